"""The worker's record of its children.

Data only: who is starting, idle, busy or leaving. The engine keeps it up to date, the
supervisor reads it. What runs in a child is in ``child``.
"""

from __future__ import annotations

import socket
from enum import Enum
from typing import TYPE_CHECKING

from memsafe_pool import signals
from memsafe_pool.link import Link
from memsafe_pool.wire import Report

if TYPE_CHECKING:
    from memsafe_pool.job import Job

__all__ = ["Child", "Fleet", "State"]


class State(Enum):
    """Where a child is in its life. A child leaves once, and does nothing after that."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    LEAVING = "leaving"
    GONE = "gone"


class Child:
    """One child, as the worker sees it.

    Attributes:
        index: Slot number from 0; the lowest free one is taken.
        pid: 0 until it is known.
        sentinel: Its pidfd, which is readable when the process has ended, or -1.
        born: When it was started, ``idle_since``: when it last became idle (monotonic seconds).
        tasks: Tasks it has ended.
        report: What it last said of its memory; all 0 before it was ready.
        first_private_bytes: Its private memory when it was ready.
        ending_bytes: What its task had taken when it was told or made to go.
        loaded_bytes, ran, loads: See ``recycle.FirstRuns``.
        most_bytes: The most that was ever resident in it while it ran a task.
        trims: How often it has given memory back; ``trimmed_bytes``: how much that was.
        generation: Children of an older generation than the engine's are to be replaced.
        start_method: How it was started.
        was_ready: Whether it ever was ready for a task.
        expected: Whether its end is no news: it was told or made to end.
        outdated: Whether the pool was restarted since it was started.
        memory_error: Why it was ended, if that was for want of memory.
        failure: Why it could not start, where that is known.
        shortage: Whether that is because the system had no room for it.
        reaped: Whether its pid may be another process's by now.
        kill_at: When it is killed if it has not ended (monotonic seconds), or None.
    """

    __slots__ = (
        "born",
        "ending_bytes",
        "expected",
        "failure",
        "first_private_bytes",
        "generation",
        "idle_since",
        "index",
        "job",
        "job_terminated",
        "kill_at",
        "link",
        "loaded_bytes",
        "loads",
        "memory_error",
        "most_bytes",
        "name",
        "outdated",
        "pid",
        "ran",
        "reaped",
        "report",
        "sentinel",
        "shortage",
        "start_method",
        "state",
        "tasks",
        "trimmed_bytes",
        "trims",
        "was_ready",
    )

    def __init__(
        self,
        name: str,
        index: int,
        sock: socket.socket,
        *,
        born: float,
        generation: int,
        start_method: str,
    ) -> None:
        self.name, self.index, self.link = name, index, Link(sock)
        self.born, self.generation, self.start_method = born, generation, start_method
        self.state = State.STARTING
        self.pid = 0
        self.sentinel = -1
        self.report = Report()
        self.tasks = self.first_private_bytes = self.most_bytes = self.trims = self.trimmed_bytes = 0
        self.loaded_bytes = self.ending_bytes = 0
        self.ran: dict[str, int] = {}
        self.loads = False
        self.idle_since = 0.0
        self.job: Job | None = None
        self.job_terminated = self.expected = self.was_ready = False
        self.outdated = self.reaped = self.shortage = False
        self.failure: str | None = None
        self.memory_error: str | None = None
        self.kill_at: float | None = None

    @property
    def private_bytes(self) -> int:
        """Its private memory, by its last report; of one that leaves, with what its task had taken."""
        return self.report.private + self.ending_bytes

    @property
    def growth_bytes(self) -> int:
        """What it has grown by since it was ready and can not give back, by its last report.

        Without what every child has to load.
        """
        grown = self.report.private - self.first_private_bytes
        return self.report.kept - self.first_private_bytes - min(self.loaded_bytes, max(grown, 0))

    @property
    def leaving(self) -> bool:
        """Whether it was told or made to go."""
        return self.state is State.LEAVING

    def signal(self, signum: int) -> bool:
        """Send a signal; return whether there was somebody to get it."""
        return bool(self.pid) and not self.reaped and signals.send(self.pid, self.sentinel, signum)

    def signal_group(self, signum: int) -> None:
        """Send a signal to it, and to what it has started if it made itself a group leader.

        Billiard does the same at a hard time limit.
        """
        if self.pid and not self.reaped:
            signals.send_to_group(self.pid, self.sentinel, signum)

    def __repr__(self) -> str:
        return f"{self.name} (pid {self.pid or '?'}, {self.state.value}, {self.tasks} tasks)"


class Fleet:
    """All children, by state.

    ``idle`` is ordered by last use: work goes to the end of it, time takes from the front.
    """

    def __init__(self) -> None:
        self.children: set[Child] = set()
        self.by_pid: dict[int, Child] = {}
        self.idle: list[Child] = []
        self.starting_children: set[Child] = set()
        self.leaving_children: set[Child] = set()

    @property
    def size(self) -> int:
        """Number of children that exist or are starting."""
        return len(self.children)

    @property
    def starting(self) -> int:
        """Number of children that are not ready yet."""
        return len(self.starting_children)

    @property
    def leaving(self) -> int:
        """Number of children that were told or made to go."""
        return len(self.leaving_children)

    @property
    def busy(self) -> int:
        """Number of children that run a task."""
        return self.size - self.starting - self.leaving - len(self.idle)

    def free_index(self) -> int:
        """Return the lowest slot number that no child has."""
        taken = {child.index for child in self.children}
        return next(index for index in range(len(taken) + 1) if index not in taken)

    def add(self, child: Child) -> None:
        """Enter a child that is starting."""
        self.children.add(child)
        self.starting_children.add(child)

    def take(self) -> Child:
        """Return the idle child that was used last, which is busy from now on."""
        child = self.idle.pop()
        child.state = State.BUSY
        return child

    def rest(self, child: Child, now: float) -> None:
        """Enter a child as idle, at monotonic seconds ``now``."""
        child.state, child.idle_since = State.IDLE, now
        self.idle.append(child)

    def move(self, child: Child, state: State) -> None:
        """Change a child's state, except between idle and busy."""
        if child.state is State.IDLE:
            self.idle.remove(child)
        self.starting_children.discard(child)
        self.leaving_children.discard(child)
        child.state = state
        if state is State.LEAVING:
            child.ending_bytes = child.job.grown if child.job is not None else 0
            self.leaving_children.add(child)
        elif state is State.IDLE:
            self.idle.append(child)
        elif state is State.GONE:
            self.children.discard(child)
            if self.by_pid.get(child.pid) is child:
                del self.by_pid[child.pid]
