"""When a child has had its time: the rules, without their timing.

A *hard* reason holds at once: what the user has set, per child, and the number of children. A *soft* one
can wait for the replacement to be ready. Growth counts what a child cannot give back: what it has got since
its last trim, of which nobody knows whether another would win it, is not in it. Nor is what a task loads
when it first runs in a child, such as modules and models: another child would have to load it, too.

Data only; imports neither Celery nor billiard.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Child", "FirstRuns", "Rules", "default_growth_bytes"]

_MIB = 1 << 20

#: A child may always grow by this much: starting another one costs about as much.
LEAST_GROWTH_BYTES = 32 * _MIB

#: Under pressure the limit is that part of it, but no lower than the second number: not much lower, as each
#: child that goes early is one more to start.
PRESSED_SHARE, LEAST_PRESSED_BYTES = 0.8, 8 * _MIB

#: A task that leaves this share of what its first run has left in its second, too, does not load but leak.
LEAK_SHARE = 0.5

#: What first runs of a task have left is remembered of so many children, and of so many tasks.
KEPT_RUNS, KEPT_NAMES = 8, 2000

#: Limits differ by up to this share from child to child, so that they do not all go at once.
JITTER = 0.2


class Child(Protocol):
    """What is read of a child.

    Attributes:
        index: Number of its slot, from 0.
        born: When it was started (monotonic seconds).
        tasks: Tasks it has ended.
    """

    index: int
    born: float
    tasks: int

    @property
    def private_bytes(self) -> int:
        """What is its alone, by its last report."""

    @property
    def growth_bytes(self) -> int:
        """What it has grown by since it was ready, and cannot give back; not what it had to load."""

    @property
    def outdated(self) -> bool:
        """Whether the pool was restarted since it was started."""


class Loader(Protocol):
    """What is written of a child.

    Attributes:
        loaded_bytes: What it has kept of the first runs of tasks, as every child does.
        ran: What of that is of each task that has run in it; 0 when it has run again.
        loads: Whether some task has run in it for the first time since its last trim, and did not leak.
    """

    loaded_bytes: int
    ran: dict[str, int]
    loads: bool


class FirstRuns:
    """What each task leaves behind in a child when it runs there for the first time."""

    def __init__(self) -> None:
        self._left: OrderedDict[str, deque[int]] = OrderedDict()

    def note(self, child: Loader, name: str, left: int) -> None:
        """Take note of a run of a task in a child: the first and the second one tell.

        Arguments:
            name: Name of the task.
            left: Bytes by which the child has grown.
        """
        loaded = child.ran.get(name)
        if loaded is None:
            loaded = child.ran[name] = self._loaded(name, left)
            child.loaded_bytes += loaded
            child.loads = True
            return
        if not loaded:
            return
        child.ran[name] = 0
        if left > loaded * LEAK_SHARE:
            child.loaded_bytes -= loaded  # it is no loading but a leak
            child.loads = False

    def settle(self, child: Loader, kept: int) -> None:
        """Take note of what a trim could not win: only now it is known what was loaded, and what was free.

        What a task loads may have found its place in memory that another one had left free.

        Arguments:
            kept: Bytes by which the child has grown since it was ready.
        """
        child.loaded_bytes = max(kept if child.loads else min(kept, child.loaded_bytes), 0)
        child.loads = False

    def _loaded(self, name: str, left: int) -> int:
        """Return what of it every child has to load.

        The least that was left lately: what only some children have kept is theirs.
        """
        recent = self._left.get(name)
        if recent is None:
            recent = self._left[name] = deque(maxlen=KEPT_RUNS)
            if len(self._left) > KEPT_NAMES:
                self._left.popitem(last=False)
        recent.append(max(left, 0))
        return min(recent)


@dataclass(slots=True)
class Rules:
    """The limits of one child; None for none.

    Attributes:
        max_tasks: Tasks after which it is replaced, Celery's ``max_tasks_per_child``.
        max_private_bytes: Private memory above which it is, Celery's ``max_memory_per_child``.
        max_growth_bytes: Growth above which it is.
        max_age: Seconds after which it is.
    """

    max_tasks: int | None = None
    max_private_bytes: int | None = None
    max_growth_bytes: int | None = None
    max_age: float | None = None

    @property
    def hard(self) -> bool:
        """Whether there are any hard rules."""
        return bool(self.max_tasks or self.max_private_bytes)

    def must_go(self, child: Child) -> str | None:
        """Return why a child has to go now, or None."""
        if self.max_tasks and child.tasks >= self.max_tasks:
            return f"{child.tasks} tasks done, at most {self.max_tasks} per child"
        if self.max_private_bytes and child.private_bytes > self.max_private_bytes:
            return (
                f"{child.private_bytes // 1024} KiB private memory, "
                f"at most {self.max_private_bytes // 1024} KiB per child"
            )
        return None

    def should_go(self, child: Child, now: float, *, pressed: bool) -> str | None:
        """Return why a child is to be replaced, or None.

        Arguments:
            pressed: Whether memory is short.
        """
        if child.outdated:
            return "the pool was restarted"
        scale = 1 - JITTER * (child.index % 8) / 8
        if self.max_age is not None and now - child.born >= self.max_age * scale:
            return f"{now - child.born:.0f} s old, at most {self.max_age:g} s"
        if self.max_growth_bytes is not None:
            limit = self.max_growth_bytes * scale
            if pressed:
                limit = min(limit, max(limit * PRESSED_SHARE, LEAST_PRESSED_BYTES))
            if child.growth_bytes > limit:
                return (
                    f"grown by {child.growth_bytes // _MIB} MiB, "
                    f"at most {limit / _MIB:.0f} MiB per child{' while memory is short' * pressed}"
                )
        return None


def default_growth_bytes(budget: int, bound: int) -> int:
    """Return how much a child may grow if nobody says: its share of the budget."""
    return max(budget // max(bound, 1), LEAST_GROWTH_BYTES)
