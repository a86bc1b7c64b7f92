"""The worker's record of its children.

Data only: who is starting, idle, busy or leaving. The engine keeps it up to date, the
supervisor reads it. What runs in a child is in ``child``.
"""

from __future__ import annotations

import contextlib
import os
import socket
from enum import Enum
from typing import TYPE_CHECKING

from memsafe_pool.link import Link

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
        sentinel: A descriptor that is readable when the process has ended, or -1.
        born: When it was started, ``idle_since``: when it last became idle (monotonic seconds).
        tasks: Tasks it has ended.
        private_bytes: Its private memory after the last task where that was asked for, else 0.
        generation: Children of an older generation than the engine's are to be replaced.
        expected: Whether its end is no news: it was told or made to end.
        failure: Why it could not start, where that is known.
    """

    __slots__ = (
        "born",
        "expected",
        "failure",
        "generation",
        "idle_since",
        "index",
        "job",
        "job_terminated",
        "link",
        "name",
        "pid",
        "private_bytes",
        "sentinel",
        "state",
        "tasks",
    )

    def __init__(self, name: str, index: int, sock: socket.socket, *, born: float, generation: int) -> None:
        self.name, self.index, self.link = name, index, Link(sock)
        self.born, self.generation = born, generation
        self.state = State.STARTING
        self.pid = 0
        self.sentinel = -1
        self.tasks = self.private_bytes = 0
        self.idle_since = 0.0
        self.job: Job | None = None
        self.job_terminated = self.expected = False
        self.failure: str | None = None

    def signal(self, signum: int) -> bool:
        """Send a signal; return whether there was somebody to get it."""
        with contextlib.suppress(ProcessLookupError):
            if self.pid:
                os.kill(self.pid, signum)
                return True
        return False

    def signal_group(self, signum: int) -> None:
        """Send a signal to it, and to what it has started if it made itself a group leader.

        Billiard does the same at a hard time limit.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.pid and os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, signum)
            elif self.pid:
                os.kill(self.pid, signum)

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

    def move(self, child: Child, state: State) -> None:
        """Change a child's state, except between idle and busy, which the engine does itself."""
        if child.state is State.IDLE:
            self.idle.remove(child)
        self.starting_children.discard(child)
        self.leaving_children.discard(child)
        child.state = state
        if state is State.LEAVING:
            self.leaving_children.add(child)
        elif state is State.IDLE:
            self.idle.append(child)
        elif state is State.GONE:
            self.children.discard(child)
            if self.by_pid.get(child.pid) is child:
                del self.by_pid[child.pid]
