"""Decides when children start and leave; does nothing itself.

The engine tells the supervisor what happened and carries out what it answers:
:meth:`Supervisor.handle` takes an event and the time, and returns actions. There is
no I/O, no clock and no Celery in here, so that every rule can be tested by itself.

What it covers: how many children to start for waiting tasks, when an idle child is
retired, when a child has done its share (``max_tasks_per_child``,
``max_memory_per_child``) and what follows when children fail to start.
Which idle child gets a task is the engine's stack: the most recently used first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = [
    "Done",
    "Event",
    "Fleet",
    "Gone",
    "Resized",
    "Retire",
    "Start",
    "StopWorker",
    "Supervisor",
    "Tick",
    "Up",
    "Waiting",
]

#: Seconds before the first new try after a failed start; doubles with each failure up to the second.
BACKOFF_SECONDS = (1.0, 30.0)

#: Failed rounds of starts, with no child coming up in between, after which the worker stops.
MAX_FAILED_ROUNDS = 5


class ChildFacts(Protocol):
    """What the supervisor reads of a child."""

    tasks: int
    idle_since: float

    @property
    def private_bytes(self) -> int:
        """What is its alone, by its last report."""


class Fleet(Protocol):
    """What the supervisor reads of all children together."""

    @property
    def size(self) -> int:
        """Number of children that exist or are starting."""

    @property
    def starting(self) -> int:
        """Number of those that are not ready yet."""

    @property
    def leaving(self) -> int:
        """Number of those that were told or made to go."""

    @property
    def idle(self) -> Sequence[ChildFacts]:
        """Idle children by last use, the longest idle first."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """Tasks wait and no idle child is there to take them."""

    tasks: int


@dataclass(frozen=True, slots=True)
class Up:
    """A child is ready for its first task."""


@dataclass(frozen=True, slots=True)
class Done:
    """A child has ended a task."""

    child: ChildFacts


@dataclass(frozen=True, slots=True)
class Gone:
    """A child has ended.

    ``failed``: before it was ready, and nobody asked for it; ``born``: when it was started.
    """

    failed: bool
    born: float
    waiting: int


@dataclass(frozen=True, slots=True)
class Resized:
    """The upper bound of the number of children is now this."""

    bound: int
    waiting: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""

    waiting: int


Event = Waiting | Up | Done | Gone | Resized | Tick


@dataclass(frozen=True, slots=True)
class Start:
    """Start so many children, all at once."""

    count: int


@dataclass(frozen=True, slots=True)
class Retire:
    """Let this child go: it is idle, or has just ended its task."""

    child: ChildFacts
    reason: str


@dataclass(frozen=True, slots=True)
class StopWorker:
    """There is no point in going on."""

    reason: str


Action = Start | Retire | StopWorker


class Supervisor:
    """The rules by which children start and leave.

    Arguments:
        fleet: The children, kept up to date by the engine.
        bound: Upper bound of the number of children.
        min_children: Number of children never retired for being idle.
        idle_timeout: Seconds after which an idle child is retired, or None for never.
        max_tasks: Tasks after which a child is replaced, or None.
        max_private_bytes: Private bytes above which a child is replaced, or None.
    """

    def __init__(
        self,
        fleet: Fleet,
        *,
        bound: int,
        min_children: int = 0,
        idle_timeout: float | None = 60.0,
        max_tasks: int | None = None,
        max_private_bytes: int | None = None,
    ) -> None:
        self.fleet = fleet
        self.bound = bound
        self.min_children = min_children
        self.idle_timeout = idle_timeout
        self.max_tasks = max_tasks
        self.max_private_bytes = max_private_bytes
        self._failed_rounds = 0
        self._last_failure = float("-inf")
        self._not_before = float("-inf")

    def handle(self, event: Event, now: float) -> list[Action]:
        """Return what to do about ``event`` at monotonic time ``now`` (seconds)."""
        match event:
            case Waiting(tasks):
                return self._start(tasks, now)
            case Done(child):
                return self._after_task(child)
            case Tick(waiting):
                return self._retire_idle(now) + self._start(waiting, now)
            case Gone(failed, born, waiting):
                return (self._count_failure(born, now) if failed else []) + self._start(waiting, now)
            case Resized(bound, waiting):
                self.bound = bound
                return self._shrink() + self._start(waiting, now)
            case Up():
                self._failed_rounds = 0
        return []

    @property
    def watches_tasks(self) -> bool:
        """Whether :class:`Done` can lead to anything, so that it need not be told for nothing."""
        return bool(self.max_tasks or self.max_private_bytes or self._surplus > 0)

    @property
    def _staying(self) -> int:
        return self.fleet.size - self.fleet.leaving

    @property
    def _surplus(self) -> int:
        return self._staying - self.bound

    def _start(self, waiting: int, now: float) -> list[Action]:
        fleet = self.fleet
        wanted = max(waiting - fleet.starting, min(self.min_children, self.bound) - self._staying)
        count = min(wanted, self.bound - fleet.size)
        if count <= 0 or now < self._not_before:
            return []
        return [Start(count)]

    def _after_task(self, child: ChildFacts) -> list[Action]:
        if self.max_tasks and child.tasks >= self.max_tasks:
            return [Retire(child, f"{child.tasks} tasks done, at most {self.max_tasks} per child")]
        if self.max_private_bytes and child.private_bytes > self.max_private_bytes:
            return [
                Retire(
                    child,
                    f"{child.private_bytes // 1024} KiB private memory, "
                    f"at most {self.max_private_bytes // 1024} KiB per child",
                )
            ]
        if self._surplus > 0:
            return [Retire(child, f"at most {self.bound} children")]
        return []

    def _retire_idle(self, now: float) -> list[Action]:
        if self.idle_timeout is None:
            return []
        spare = self._staying - self.min_children
        longest_idle = self.fleet.idle[: max(spare, 0)]
        return [
            Retire(child, f"idle for {now - child.idle_since:.0f} s")
            for child in longest_idle
            if now - child.idle_since >= self.idle_timeout
        ]

    def _shrink(self) -> list[Action]:
        surplus = max(self._surplus, 0)
        return [Retire(child, f"at most {self.bound} children") for child in self.fleet.idle[:surplus]]

    def _count_failure(self, born: float, now: float) -> list[Action]:
        # Children that were started together fail together: that is one round.
        if born < self._last_failure:
            return []
        self._last_failure = now
        self._failed_rounds += 1
        first, longest = BACKOFF_SECONDS
        self._not_before = now + min(first * 2 ** (self._failed_rounds - 1), longest)
        if self._failed_rounds >= MAX_FAILED_ROUNDS:
            return [StopWorker(f"children failed to start {self._failed_rounds} times in a row")]
        return []
