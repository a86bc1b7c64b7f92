"""What each call will need: finds what is said about it, and remembers what calls like it needed.

The first that is known of: the call's header ``memsafe_memory``, the task's attribute of that name, what
was learned (``reservations``). What was learned is kept for the task's name and a label: the queue and the
size of the arguments in powers of two, or what the task's ``memsafe_key`` returns for its arguments.

Headers and attributes also say what a call may take: ``memsafe_soft_limit``, above which it is told, and
``memsafe_hard_limit``, above which it gets no more.
"""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from celery.utils.log import get_logger

from memsafe_pool import state, upstream
from memsafe_pool.reservations import Estimate, Reservations
from memsafe_pool.settings import mib, parse_computed_size

if TYPE_CHECKING:
    from memsafe_pool.job import Job

__all__ = ["Sizes"]

logger = get_logger(__name__)

#: What headers and the task's attributes are called: what it needs, and what it may take.
MEMORY, SOFT_LIMIT, HARD_LIMIT = NAMES = ("memsafe_memory", "memsafe_soft_limit", "memsafe_hard_limit")

#: What the task's function is called that names the kind of a call.
KEY = "memsafe_key"

#: More is no size: it would not fit into the numbers of the kernel.
MOST_BYTES = 1 << 60

#: The least that is said: nothing may be set aside for a task, but a limit of nothing would end each.
LEAST_BYTES = {MEMORY: 0, SOFT_LIMIT: 1, HARD_LIMIT: 1}

#: Characters of a label. What is longer is cut, and marked with a part of its digest.
MOST_LABEL, DIGEST_DIGITS = 200, 16

#: Warnings about what was said wrongly; more would say no more.
MOST_COMPLAINTS = 100

#: Characters of a value in a warning.
MOST_SHOWN = 200

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = 120


@dataclass(frozen=True, slots=True)
class _Declaration:
    """What a task's attributes say, in bytes."""

    estimate: Estimate | None
    shown: str
    soft_limit: int | None
    hard_limit: int | None
    key: Callable[..., Any] | None


class Sizes:
    """Sizes of calls.

    Arguments:
        app: The Celery app, for what tasks declare.
        path: Path of the file that keeps what was learned across restarts, or None.

    Attributes:
        budget: Bytes that all tasks together may have: nothing can need more, whatever is said of it.
    """

    def __init__(self, app: Any, path: str | None = None) -> None:
        self.learned = Reservations()
        self.budget = MOST_BYTES
        self._app = app
        self._state = path
        self._unwritable = False
        self._declarations: dict[str, _Declaration] = {}
        self._complained: set[str] = set()
        if path is not None:
            self._read(path)

    def size_up(self, job: Job) -> None:
        """Find out what a job will need and may take; sets its label, estimate and memory limits."""
        name = job.name
        headers = upstream.headers_of(job.function, job.args)
        if headers is None:
            job.estimate = self._within_budget(self.learned.estimate(name, None))
            return
        declared = self._declarations.get(name) or self._declare(name)
        job.label = self._label(declared.key, headers, job)
        job.soft_limit, job.hard_limit = declared.soft_limit, declared.hard_limit
        estimate, shown, where = declared.estimate, declared.shown, f"the task {name}"
        if MEMORY in headers or SOFT_LIMIT in headers or HARD_LIMIT in headers:
            where = f"the header of {name}"
            memory, soft, hard = (self._size(headers.get(each), each, where) for each in NAMES)
            if memory is not None:
                estimate, shown = _certain(memory), _shown(headers[MEMORY])
            job.soft_limit = job.soft_limit if soft is None else soft
            job.hard_limit = job.hard_limit if hard is None else hard
        if estimate is None:
            estimate = self.learned.estimate(name, job.label)
        elif estimate.reserved > self.budget:
            self._complain(
                f"{MEMORY}={shown} of {where} is more than the budget, and is taken as {mib(self.budget)}."
            )
        job.estimate = self._within_budget(estimate)

    def _within_budget(self, estimate: Estimate) -> Estimate:
        most = self.budget
        if estimate.reserved <= most:
            return estimate
        return replace(estimate, reserved=most, most=most, ended=min(estimate.ended, most))

    def learn(self, job: Job, peak: int, hidden: int = 0) -> None:
        """Remember what a job needed (bytes); ``hidden`` as for :meth:`Reservations.learn`."""
        self.learned.learn(job.name, job.label, peak, hidden)

    def rise(self, job: Job, grown: int) -> None:
        """Take note of what a job has taken that still runs, and was expected to need less (bytes)."""
        job.estimate = self.learned.rise(job.name, job.label, job.estimate, grown)

    def _label(self, key: Callable[..., Any] | None, headers: dict[str, Any], job: Job) -> str:
        if key is not None:
            try:
                return _bounded(str(key(*(headers.get("args") or ()), **(headers.get("kwargs") or {}))))
            except Exception as exc:  # noqa: BLE001 - the user's own function
                self._complain(f"{KEY} of {job.name} failed, and the arguments' size is taken: {_shown(exc)}")
        queue = (headers.get("delivery_info") or {}).get("routing_key")
        return _bounded(f"{queue}/{upstream.body_size(job.args).bit_length()}")

    def _declare(self, name: str) -> _Declaration:
        task = self._app.tasks.get(name)
        where = f"the task {name}"
        said = [self._read_of(task, each, where) for each in NAMES]
        memory, soft, hard = (self._size(*pair, where) for pair in zip(said, NAMES, strict=True))
        key = self._read_of(task, KEY, where)
        if key is not None and not callable(key):
            self._complain(
                f"{KEY}={_shown(key)} of {where} is not valid, and is left out: it must be a function that "
                "takes the arguments of a call."
            )
            key = None
        found = _Declaration(None if memory is None else _certain(memory), _shown(said[0]), soft, hard, key)
        self._declarations[name] = found
        return found

    def _read_of(self, task: Any, name: str, where: str) -> Any:
        try:
            return _attribute(task, name)
        except Exception as exc:  # noqa: BLE001 - the user's own property
            self._complain(f"{name} of {where} can not be read, and is left out: {_shown(exc)}")
            return None

    def _size(self, value: Any, name: str, where: str) -> int | None:
        if value is None:
            return None
        try:
            size = parse_computed_size(value)
        except (ValueError, TypeError, OverflowError):
            size = -1
        if size >= LEAST_BYTES[name]:
            return min(size, MOST_BYTES)
        self._complain(
            f"{name}={_shown(value)} of {where} is not valid, and is left out: it must be a number of bytes"
            f"{' above 0' if LEAST_BYTES[name] else ''}, or a size such as '1.5GiB'."
        )
        return None

    def _complain(self, text: str) -> None:
        if text not in self._complained and len(self._complained) < MOST_COMPLAINTS:
            self._complained.add(text)
            logger.warning("%s", text)

    # -- across restarts

    def _read(self, path: str) -> None:
        try:
            self.learned.load(state.read(path))
        except FileNotFoundError:
            pass  # the first time
        except (OSError, ValueError) as exc:
            logger.warning("What tasks needed is not known from %s (memsafe_state): %s", path, exc)

    def save(self) -> None:
        """Write what was learned since the last time to the file, if there is one; all of it, or nothing."""
        if self._state is None:
            return
        rows = self.learned.dump(changed=True)
        if not rows:
            return
        try:
            state.update(self._state, rows)
        except OSError as exc:
            if not self._unwritable:
                logger.warning(
                    "What tasks needed could not be written to %s (memsafe_state): %s", self._state, exc
                )
            self._unwritable = True
        else:
            self._unwritable = False
            self.learned.changed.clear()


def _certain(size: int) -> Estimate:
    return Estimate(size, size, known=True)


def _attribute(task: Any, name: str) -> Any:
    """Return what a task's decorator was given under that name, or what its class has; else None.

    The decorator makes a class, which it marks with ``__wrapped__``, with the options as its attributes. A
    function among them is to be called as it is, but a method that somebody has written with its ``self``.
    """
    task = upstream.unproxied(task)
    for attributes in (getattr(task, "__dict__", {}), *map(vars, type(task).__mro__)):
        if name in attributes:
            if "__wrapped__" in attributes and callable(attributes[name]):
                return attributes[name]
            break
    return getattr(task, name, None)


def _bounded(label: str) -> str:
    """Return a label that is not too long, and another one for each that is."""
    if len(label) <= MOST_LABEL:
        return label
    digest = hashlib.sha256(label.encode("utf-8", "surrogatepass")).hexdigest()[:DIGEST_DIGITS]
    return f"{label[: MOST_LABEL - DIGEST_DIGITS - 1]}~{digest}"


def _shown(value: object) -> str:
    """Return a value as a warning shows it: in one line, and not all of it if that is long."""
    try:
        text = " ".join(_brief.repr(value).splitlines())
    except Exception:  # noqa: BLE001 - anybody's value; a number of 5000 digits has no repr
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."
