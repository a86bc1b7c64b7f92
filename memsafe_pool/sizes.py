"""What each call will need: finds what is said about it, and remembers what calls like it needed.

The first that is known of: the call's header ``memsafe_memory``, the task's attribute of that name, what
was learned (``reservations``). What was learned is kept for the task's name and a label: the queue and the
size of the arguments in powers of two, or what the task's ``memsafe_key`` returns for its arguments.

Headers and attributes also say what a call may take: ``memsafe_soft_limit``, above which it is told, and
``memsafe_hard_limit``, above which it gets no more.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from celery.utils.log import get_logger

from memsafe_pool import upstream
from memsafe_pool.reservations import Estimate, Reservations
from memsafe_pool.settings import parse_computed_size

if TYPE_CHECKING:
    from memsafe_pool.job import Job

__all__ = ["Sizes"]

logger = get_logger(__name__)

#: What headers and the task's attributes are called: what it needs, and what it may take.
MEMORY, SOFT_LIMIT, HARD_LIMIT = NAMES = ("memsafe_memory", "memsafe_soft_limit", "memsafe_hard_limit")

#: More is no size: it would not fit into the numbers of the kernel.
MOST_BYTES = 1 << 60

#: Warnings about what was said wrongly; more would say no more.
MOST_COMPLAINTS = 100


@dataclass(frozen=True, slots=True)
class _Declaration:
    """What a task's attributes say, in bytes."""

    estimate: Estimate | None
    soft_limit: int | None
    hard_limit: int | None
    key: Callable[..., Any] | None


class Sizes:
    """Sizes of calls.

    Arguments:
        app: The Celery app, for what tasks declare.
        state: Path of the file that keeps what was learned across restarts, or None.
    """

    def __init__(self, app: Any, state: str | None = None) -> None:
        self.learned = Reservations()
        self._app = app
        self._state = state
        self._declarations: dict[str, _Declaration] = {}
        self._complained: set[str] = set()
        if state is not None:
            self._read(state)

    def size_up(self, job: Job) -> None:
        """Find out what a job will need and may take; sets its label, estimate and memory limits."""
        name = job.name
        headers = upstream.headers_of(job.function, job.args)
        if headers is None:
            job.estimate = self.learned.estimate(name, None)
            return
        declared = self._declarations.get(name) or self._declare(name)
        job.label = self._label(declared.key, headers, job)
        job.soft_limit, job.hard_limit = declared.soft_limit, declared.hard_limit
        estimate = declared.estimate
        if MEMORY in headers or SOFT_LIMIT in headers or HARD_LIMIT in headers:
            where = f"the header of {name}"
            estimate = _certain(self._size(headers.get(MEMORY), MEMORY, where)) or estimate
            job.soft_limit = self._size(headers.get(SOFT_LIMIT), SOFT_LIMIT, where) or job.soft_limit
            job.hard_limit = self._size(headers.get(HARD_LIMIT), HARD_LIMIT, where) or job.hard_limit
        job.estimate = estimate or self.learned.estimate(name, job.label)

    def learn(self, job: Job, peak: int, hidden: int = 0) -> None:
        """Remember what a job needed (bytes); ``hidden`` as for :meth:`Reservations.learn`."""
        self.learned.learn(job.name, job.label, peak, hidden)

    def rise(self, job: Job, grown: int) -> None:
        """Take note of what a job has taken that still runs, and was expected to need less (bytes).

        It may then need as much as any of its kind did, those that run included.
        """
        self.learned.rise(job.name, job.label, grown)
        most = self.learned.estimate(job.name, job.label).most
        if job.estimate.known and most > job.estimate.most:
            job.estimate = replace(job.estimate, most=most)

    def _label(self, key: Callable[..., Any] | None, headers: dict[str, Any], job: Job) -> str:
        if key is not None:
            try:
                return str(key(*(headers.get("args") or ()), **(headers.get("kwargs") or {})))
            except Exception as exc:  # noqa: BLE001 - the user's own function
                self._complain(f"memsafe_key of {job.name} failed, and the arguments' size is taken: {exc!r}")
        queue = (headers.get("delivery_info") or {}).get("routing_key")
        return f"{queue}/{upstream.body_size(job.args).bit_length()}"

    def _declare(self, name: str) -> _Declaration:
        task = self._app.tasks.get(name)
        where = f"the task {name}"
        memory, soft, hard = (self._size(getattr(task, each, None), each, where) for each in NAMES)
        key = getattr(task, "memsafe_key", None)
        key = getattr(key, "__func__", key)  # an option of a task becomes a method of its class
        found = _Declaration(_certain(memory), soft, hard, key if callable(key) else None)
        self._declarations[name] = found
        return found

    def _size(self, value: Any, name: str, where: str) -> int | None:
        if value is None:
            return None
        try:
            return min(parse_computed_size(value), MOST_BYTES)
        except (ValueError, TypeError, OverflowError):
            self._complain(
                f"{name}={value!r} of {where} is not valid, and is left out: it must be a number of bytes, "
                "or a size such as '1.5GiB'."
            )
            return None

    def _complain(self, text: str) -> None:
        if text not in self._complained and len(self._complained) < MOST_COMPLAINTS:
            self._complained.add(text)
            logger.warning("%s", text)

    # -- across restarts

    def _read(self, path: str) -> None:
        try:
            with open(path, encoding="utf-8") as file:
                self.learned.load(json.load(file))
        except FileNotFoundError:
            pass  # the first time
        except (OSError, ValueError, RecursionError) as exc:
            logger.warning("What tasks needed is not known from %s (memsafe_state): %s", path, exc)

    def save(self) -> None:
        """Write what was learned to the file, if there is one; as a whole, or not at all."""
        path = self._state
        if path is None:
            return
        new = f"{path}.{os.getpid()}"
        try:
            with open(new, "w", encoding="utf-8") as file:
                json.dump(self.learned.dump(), file)
            os.replace(new, path)
        except OSError as exc:
            logger.warning("What tasks needed could not be written to %s (memsafe_state): %s", path, exc)
            with contextlib.suppress(OSError):
                os.unlink(new)


def _certain(size: int | None) -> Estimate | None:
    return None if size is None else Estimate(size, size, known=True)
