"""What happens, as the supervisor is told it, and what is to be done, as it answers.

Data only; imports neither Celery nor billiard.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memsafe_pool.recycle import Child
    from memsafe_pool.room import Look, Task

__all__ = [
    "Action",
    "Done",
    "Event",
    "Give",
    "Gone",
    "Kill",
    "Looked",
    "Measure",
    "Outdated",
    "Resized",
    "Retire",
    "Say",
    "Start",
    "StopWorker",
    "Stuck",
    "Tick",
    "Up",
    "Waiting",
]


# What happens


@dataclass(frozen=True, slots=True)
class Waiting:
    """Tasks wait that did not before."""


@dataclass(frozen=True, slots=True)
class Up:
    """A child is ready for its first task, and idle."""


@dataclass(frozen=True, slots=True)
class Done:
    """A child has ended a task, and is not idle yet."""

    child: Child


@dataclass(frozen=True, slots=True)
class Gone:
    """A child has ended.

    ``failed``: before it was ready, and nobody asked for it; ``born``: when it was started; ``no_memory``: it
    failed because the kernel has ended it, as memory was out; ``shortage``: it failed because the system had
    no room for it, and in whose words.
    """

    failed: bool
    born: float
    child: Child | None = None
    no_memory: bool = False
    shortage: str | None = None


@dataclass(frozen=True, slots=True)
class Resized:
    """The upper bound of the number of children is now this."""

    bound: int


@dataclass(frozen=True, slots=True)
class Outdated:
    """All children there are were started before the pool was restarted, and are to be replaced."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Looked:
    """Memory was looked at."""

    look: Look


@dataclass(frozen=True, slots=True)
class Stuck:
    """All running tasks are paused, and there is no room for any of them to go on.

    In ``look`` they stand from the oldest to the newest.
    """

    look: Look


Event = Waiting | Up | Done | Gone | Resized | Outdated | Tick | Looked | Stuck


# What is to be done


@dataclass(frozen=True, slots=True)
class Start:
    """Start so many children, all at once."""

    count: int


@dataclass(frozen=True, slots=True)
class Give:
    """Give this waiting task to an idle child. Memory is set aside for it."""

    task: Task


@dataclass(frozen=True, slots=True)
class Measure:
    """Look at memory and tell, with :class:`Looked`."""


@dataclass(frozen=True, slots=True)
class Retire:
    """Let this child go: it is idle, or has just ended its task."""

    child: Child
    reason: str


@dataclass(frozen=True, slots=True)
class Kill:
    """End the child that runs this task, as nothing else makes room."""

    task: Task
    reason: str


@dataclass(frozen=True, slots=True)
class Say:
    """Say that the system has no room for more children, and why; without a reason, that it has again."""

    shortage: str | None


@dataclass(frozen=True, slots=True)
class StopWorker:
    """There is no point in going on."""

    reason: str


Action = Start | Give | Measure | Retire | Kill | Say | StopWorker
