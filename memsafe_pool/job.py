"""A call on its way through the pool: what to run and whom to tell.

Takes the place of billiard's ``ApplyResult``: Celery keeps a weak reference to it and
calls :meth:`Job.terminate`.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery.utils.log import get_logger

from memsafe_pool import upstream
from memsafe_pool.reservations import UNKNOWN

if TYPE_CHECKING:
    from memsafe_pool.fleet import Child

__all__ = ["Job", "lost"]

logger = get_logger(__name__)

_numbers = itertools.count(1)

Callback = Callable[..., Any] | None


class Job:
    """One call.

    Attributes:
        id: Number of the job, in the messages to and from the child.
        child: The child that has it, or None.
        accepted_at: Monotonic seconds at which the child began, or None.
        done: Whether its outcome is known, or nobody wants it any more.
        limits: Soft and hard time limit in seconds after ``accepted_at``; None for none.
        timer: The entry of the event loop's timer that watches the next limit.
        tries: How often it was given to a child that ended before it began.
        name: Name of the task.
        label: What it is like, among tasks of that name; see ``sizes``.
        estimate: What it is thought to need.
        since: When it began to wait (monotonic seconds).
        memory_tries: How often its child was ended for want of memory.
        alone: Whether it is to run with no other beside it.
        delivered_again: Whether the broker delivers it again by itself: the connection it came on is gone.
        paused_at: When it was paused (monotonic seconds), or None.
        resumed_at: When it went on last, or 0.
        grown: Bytes it has taken since it began, when it was looked at last.
        soft_limit, hard_limit: Bytes it may take before it is told, and at all; None for no limit.
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_paused_seconds",
        "_pauses",
        "_propagate",
        "accepted_at",
        "alone",
        "args",
        "child",
        "correlation_id",
        "delivered_again",
        "done",
        "estimate",
        "function",
        "grown",
        "hard_limit",
        "id",
        "kwargs",
        "label",
        "limits",
        "memory_tries",
        "name",
        "paused_at",
        "resumed_at",
        "since",
        "soft_limit",
        "soft_limit_passed",
        "terminated",
        "timer",
        "tries",
    )

    def __init__(
        self,
        function: Callable[..., Any],
        args: Any,
        kwargs: Any,
        *,
        on_success: Callback = None,
        on_error: Callback = None,
        on_accept: Callback = None,
        on_timeout: Callback = None,
        limits: tuple[float | None, float | None] = (None, None),
        propagate: tuple[type[BaseException], ...] = (),
        correlation_id: str | None = None,
    ) -> None:
        self.id = next(_numbers)
        self.function, self.args, self.kwargs = function, args, kwargs
        self.name = upstream.task_name(function, args)
        self.label: str | None = None
        self.estimate = UNKNOWN
        self.since = 0.0
        self.grown = 0
        self.soft_limit: int | None = None
        self.hard_limit: int | None = None
        self.memory_tries = 0
        self.alone = self.delivered_again = False
        self.paused_at: float | None = None
        self.resumed_at = 0.0
        self._paused_seconds = 0.0
        self._pauses: list[tuple[float, float]] = []  # that are not in that number yet
        self._callbacks = on_success, on_error, on_accept, on_timeout
        self._propagate = propagate
        self.limits = limits
        self.correlation_id = correlation_id
        self.child: Child | None = None
        self.accepted_at: float | None = None
        self.done = False
        self.soft_limit_passed = False
        self.terminated: int | None = None
        self.timer: Any = None
        self.tries = 0

    def __repr__(self) -> str:
        return f"<Job {self.id} {self.correlation_id or self.function!r}>"

    @property
    def request(self) -> Any:
        """The request of Celery's that it runs, or None."""
        return upstream.request_of(self._callbacks[1])

    @property
    def task_id(self) -> str | None:
        """Celery's id of the task."""
        return None if self.request is None else str(self.request.id)

    @property
    def parent_id(self) -> str | None:
        """The id of the task that has sent it, or None."""
        return None if self.request is None else self.request.parent_id

    @property
    def redeliverable(self) -> bool:
        """Whether the task may be run again after it was ended in the middle: it is acknowledged late."""
        return bool(self.request is not None and self.request.task.acks_late)

    def ready(self) -> bool:
        """Whether the job has ended."""
        return self.done

    def discard_revoked(self) -> bool:
        """Whether it is not to be run: it was revoked, by id or by stamp, or has expired.

        Then Celery has said so, and has acknowledged it. Celery looks when it hands a task to the pool, which
        may have waited here since.
        """
        request = self.request
        if request is None:
            return False
        try:
            return bool(request.revoked())
        except self._propagate:
            raise
        except Exception:
            # Such as that the result backend is gone. It is not acknowledged then, and comes again.
            logger.exception("A callback of %r failed", self)
            return True

    def terminate(self, signum: int) -> None:
        """Remember that the task was terminated, for the case that it has not begun."""
        self.terminated = signum

    def accept(self, pid: int, at: float) -> None:
        """Say that a child has begun it, ``at`` monotonic seconds."""
        self.accepted_at = at
        self._count_pauses()
        self._call(self._callbacks[2], pid, at)

    def finish(self, succeeded: bool, value: Any, *, final: bool = False) -> None:
        """Say how it ended; ``final``: it is not to be run again, whatever is done with lost tasks."""
        on_success, on_error, _, _ = self._callbacks
        with upstream.no_requeue(self.request) if final else contextlib.nullcontext():
            self._call(on_success if succeeded else on_error, value)

    def pause(self, at: float) -> None:
        """Stop the clock of its time limits, ``at`` monotonic seconds."""
        self.paused_at = at

    def resume(self, at: float) -> None:
        """Let the clock of its time limits go on."""
        self.resumed_at = max(self.resumed_at, at)
        if self.paused_at is not None:
            self._pauses.append((self.paused_at, at))
            self.paused_at = None
            self._count_pauses()

    def _count_pauses(self) -> None:
        """Count what of the pauses was after the beginning, once that is known."""
        if self.accepted_at is not None:
            began = self.accepted_at
            self._paused_seconds += sum(max(end - max(begin, began), 0.0) for begin, end in self._pauses)
            self._pauses.clear()

    def leave(self) -> None:
        """Forget the child that had it, and what became of it there."""
        self.child = self.accepted_at = self.paused_at = None
        self._paused_seconds = 0.0
        self._pauses.clear()
        self.grown = 0
        self.soft_limit_passed = False

    def withdraw(self) -> None:
        """Make it a job that has not begun, to be run again."""
        upstream.withdraw(self.request)
        self.leave()

    def time_out(self, *, soft: bool) -> None:
        """Say that a time limit has passed."""
        soft_limit, hard_limit = self.limits
        self._call(self._callbacks[3], soft=soft, timeout=soft_limit if soft else hard_limit)

    def next_limit(self) -> tuple[float, bool] | None:
        """Return when the next limit passes (monotonic seconds) and whether it is the soft one.

        None while it is paused: that time does not count.
        """
        if self.accepted_at is None or self.paused_at is not None:
            return None
        began = self.accepted_at + self._paused_seconds
        soft, hard = self.limits
        if soft and not self.soft_limit_passed and not (hard and hard < soft):
            return began + soft, True
        return (began + hard, False) if hard else None

    def _call(self, callback: Callback, *args: Any, **kwargs: Any) -> None:
        if callback is None:
            return
        try:
            callback(*args, **kwargs)
        except self._propagate:
            raise
        except Exception:
            # Also a MemoryError: one task's trouble must not end the worker.
            logger.exception("A callback of %r failed", self)


def lost(job: Job, exitcode: int | None) -> Any:
    """Return the error value of a job whose child ended with ``exitcode``."""
    how = "unknown exit status" if exitcode is None else upstream.human_status(exitcode)
    return upstream.failed(upstream.WorkerLostError(f"Worker exited prematurely: {how} Job: {job.id}."))
