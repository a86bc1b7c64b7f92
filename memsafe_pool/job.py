"""A call on its way through the pool: what to run and whom to tell.

Takes the place of billiard's ``ApplyResult``: Celery keeps a weak reference to it and
calls :meth:`Job.terminate`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from celery.utils.log import get_logger

from memsafe_pool import upstream

if TYPE_CHECKING:
    from memsafe_pool.fleet import Child

__all__ = ["Job"]

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
    """

    __slots__ = (
        "__weakref__",
        "_callbacks",
        "_propagate",
        "accepted_at",
        "args",
        "child",
        "correlation_id",
        "done",
        "function",
        "id",
        "kwargs",
        "limits",
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
    def name(self) -> str:
        """Name of the task."""
        return upstream.task_name(self.function, self.args)

    def ready(self) -> bool:
        """Whether the job has ended."""
        return self.done

    def terminate(self, signum: int) -> None:
        """Remember that the task was terminated, for the case that it has not begun."""
        self.terminated = signum

    def accept(self, pid: int, at: float) -> None:
        """Say that a child has begun it, ``at`` monotonic seconds."""
        self.accepted_at = at
        self._call(self._callbacks[2], pid, at)

    def finish(self, succeeded: bool, value: Any) -> None:
        """Say how it ended."""
        on_success, on_error, _, _ = self._callbacks
        self._call(on_success if succeeded else on_error, value)

    def time_out(self, *, soft: bool) -> None:
        """Say that a time limit has passed."""
        soft_limit, hard_limit = self.limits
        self._call(self._callbacks[3], soft=soft, timeout=soft_limit if soft else hard_limit)

    def next_limit(self) -> tuple[float, bool] | None:
        """Return when the next limit passes (monotonic seconds) and whether it is the soft one."""
        if self.accepted_at is None:
            return None
        soft, hard = self.limits
        if soft and not self.soft_limit_passed and not (hard and hard < soft):
            return self.accepted_at + soft, True
        return (self.accepted_at + hard, False) if hard else None

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
