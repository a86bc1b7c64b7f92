"""How much memory is free for what could begin now: the arithmetic of admission.

What counts as taken: what is used now, what running tasks are still going to take, children that are
starting, what other workers under the same limit have set aside, and a reserve, so that one of the
running tasks may need as much as the largest of its kind ever did.

All numbers are bytes. Data only; imports neither Celery nor billiard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from memsafe_pool.reservations import pending

if TYPE_CHECKING:
    from collections.abc import Sequence

    from memsafe_pool.reservations import Estimate

__all__ = ["Look", "Room", "Seen", "Task"]

#: No more than this share of the budget is kept as a reserve for tasks that need more than is expected.
RESERVE_SHARE = 1 / 3

_MIB = 1 << 20


class Task(Protocol):
    """What is read of a task, by identity.

    Attributes:
        name: Its name.
        estimate: What it is thought to need.
        alone: Whether it is to run with no other beside it.
        since: When it began to wait (monotonic seconds).
        paused_at: When it was paused (monotonic seconds), or None.
    """

    name: str
    estimate: Estimate
    alone: bool
    since: float
    paused_at: float | None

    @property
    def redeliverable(self) -> bool:
        """Whether it may be run again after it was ended in the middle."""

    @property
    def task_id(self) -> str | None:
        """Celery's id of it."""

    @property
    def parent_id(self) -> str | None:
        """The id of the task that has sent it."""

    def __hash__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Seen:
    """A running task at one look: what it has taken since it began, and whether some of it just now.

    ``free`` is what its child had free before it began, at most: that counts as used, and is not to be set
    aside once more. ``resting``: see ``rest``.
    """

    task: Task
    grown: int
    growing: bool = False
    paused: bool = False
    free: int = 0
    resting: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """One look at memory.

    Attributes:
        at: When (monotonic seconds).
        headroom: What is left of the budget; negative when it is exceeded.
        running: The tasks that run.
        others: What of it other workers under the same limit have set aside and not yet taken.
        coming: What children that are starting, and can be given up, are still going to take.
    """

    at: float
    headroom: int
    running: Sequence[Seen] = ()
    others: int = 0
    coming: int = 0


class Room:
    """What is free.

    Attributes:
        budget: What the pool may use.
        child_bytes: What a new child costs.
        running: What each task that was admitted and has not ended is still going to take.
        rests: Whether there are tasks that run, and all of them rest.
    """

    def __init__(self, budget: int, child_bytes: int = 12 * _MIB) -> None:
        self.budget = budget
        self.child_bytes = child_bytes
        self.running: dict[Task, int] = {}
        self.headroom = budget
        self.others = 0
        self.grown: dict[Task, int] = {}
        self.rests = False
        self._pending = 0
        self._reserve = 0
        self._alone: Task | None = None

    def begin(self, task: Task) -> None:
        """Set memory aside for a task that is admitted."""
        estimate = task.estimate
        self.running[task] = estimate.reserved
        self.rests = False
        self._pending += estimate.reserved
        self._reserve = max(self._reserve, estimate.most - estimate.reserved)
        if task.alone:
            self._alone = task

    def end(self, task: Task) -> None:
        """Take back what is still set aside for a task, which has ended or did not begin."""
        self._pending -= self.running.pop(task, 0)
        self.grown.pop(task, None)
        if task is self._alone:
            self._alone = None

    def look(self, look: Look) -> None:
        """Take note of how things are."""
        self.headroom, self.others = look.headroom, look.others
        self.rests = bool(look.running) and all(seen.resting for seen in look.running)
        reserve = 0
        for seen in look.running:
            task = seen.task
            if task in self.running:
                left = pending(task.estimate, seen.grown, seen.free, growing=seen.growing)
                self._pending += left - self.running[task]
                self.running[task] = left
                self.grown[task] = seen.grown
                reserve = max(
                    reserve, task.estimate.most - max(task.estimate.reserved, seen.grown + seen.free)
                )
        self._reserve = reserve

    @property
    def pending(self) -> int:
        """What admitted tasks are still going to take."""
        return self._pending

    @property
    def free(self) -> int:
        """What is neither used nor set aside; the reserve is not taken off."""
        return self.headroom - self._pending - self.others

    def lacks(self, task: Task, extra: int = 0) -> int:
        """Return how much is missing for a task to begin, 0 or less if it can.

        Arguments:
            extra: What is to be set aside beside it, such as for the child that it needs.
        """
        estimate = task.estimate
        reserve = max(self._reserve, estimate.most - estimate.reserved)
        return estimate.reserved + extra + min(reserve, int(self.budget * RESERVE_SHARE)) - self.free

    def excludes(self, task: Task) -> bool:
        """Whether a task has to wait because it or another one is to run alone."""
        return bool(self.running) and (task.alone or self._alone is not None)
