"""Soft and hard time limits of running jobs.

The clock starts when the child accepts the job. A soft limit raises
``SoftTimeLimitExceeded`` in the task, a hard one ends the child.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memsafe_pool.job import Job

__all__ = ["TimeLimits"]


class TimeLimits:
    """Watches the next limit of each job.

    Arguments:
        on_limit: Called with the job whose limit may have passed, and what :meth:`put_off` was given; else 0.
    """

    def __init__(self, on_limit: Callable[[Job, int], None]) -> None:
        self._on_limit = on_limit
        self._hub: Any = None

    def attach(self, hub: Any, jobs: Iterable[Job]) -> None:
        """Use the timer of ``hub``, also for these jobs, which are running.

        Also when it is the same hub: older Celery clears its timer when the connection is lost.
        """
        self._hub = hub
        for job in jobs:
            self.watch(job)

    def watch(self, job: Job) -> None:
        """Wait for the job's next limit, if it has one."""
        self.forget(job)
        limit = job.next_limit()
        if limit is not None:
            self._call_later(job, max(limit[0] - time.monotonic(), 0.0), 0)

    def put_off(self, job: Job, seconds: float, mark: int) -> None:
        """Wait for so many seconds more, as its limit has passed; ``mark`` says how far it had come."""
        self.forget(job)
        self._call_later(job, seconds, mark)

    def _call_later(self, job: Job, seconds: float, mark: int) -> None:
        job.timer = self._hub.call_later(seconds, self._on_limit, job, mark)

    def forget(self, job: Job) -> None:
        """Wait for nothing."""
        if job.timer is not None:
            job.timer.cancel()
            job.timer.args = ()  # the hub keeps it until the limit would have passed, but not the job
            job.timer = None
