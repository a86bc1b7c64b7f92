"""What a task fails with for want of memory."""

from __future__ import annotations

from memsafe_pool.upstream import WorkerLostError

__all__ = ["MemoryLimitExceeded", "SoftMemoryLimitExceeded"]


class MemoryLimitExceeded(WorkerLostError):  # type: ignore[misc]
    """The task's child was ended because memory was out, or because the task exceeded its own limit.

    The message says what the task had taken, what the limit is, and what else ran.
    """


class SoftMemoryLimitExceeded(Exception):
    """The task has taken more than its ``memsafe_soft_limit``; raised in the task, which may clean up."""
