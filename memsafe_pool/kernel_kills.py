"""The kernel's kills for lack of memory: which of them hit a child, and what is known of the others.

The kernel counts its kills, but does not say whom it has killed; its log does, and can seldom be read. A
child that ends by SIGKILL claims one. What nobody has claimed some ticks later has hit another process, such
as a program that a task has started. Those of running tasks are looked at once a second, so that one that has
gone by then can be named.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from celery.utils.log import get_logger

from memsafe_pool import memory
from memsafe_pool.cgroups import field, whole_number
from memsafe_pool.settings import mib

if TYPE_CHECKING:
    from memsafe_pool.fleet import Child
    from memsafe_pool.probe import Level, Reading

__all__ = ["KernelKills"]

logger = get_logger(__name__)

#: A child may take so many ticks to end after the kernel has counted its kill.
KILL_TICKS = 3

#: Seconds between two lines about kills that nobody has claimed.
QUIET_SECONDS = 60.0

#: A program that starts and ends within this time is not looked at: short tasks cost nothing (seconds).
LOOK_AT_SECONDS = 1.0

#: Programs that are looked at for each task.
MOST_PROGRAMS = 32

#: The machine's memory is out from this part of it on.
NEAR = 0.8

#: A cgroup was at its limit if this part of it was ever used: the kernel charges in portions.
REACHED = 0.95


class KernelKills:
    """Keeps account of the kernel's kills.

    Arguments:
        reading: Memory as it is now: earlier kills are not ours.
        children: Returns the children.
        describe: Says what the limit is, and who has how much.
    """

    def __init__(
        self, reading: Reading, children: Callable[[], Iterable[Child]], describe: Callable[[], str]
    ) -> None:
        self._cgroup, self._counted = reading.cgroup, reading.oom_kills or 0
        self._children, self._describe = children, describe
        self._ticks = 0
        # Of each kill that nobody has claimed: when it was noticed, and what tasks had started then.
        self._unclaimed: deque[tuple[int, dict[int, str]]] = deque()
        self._programs: dict[int, str] = {}
        self._machine_used: deque[int] = deque(maxlen=KILL_TICKS)
        self._rose = False
        self._untold = 0
        self._suspects: dict[str, None] = {}
        self._said_at = float("-inf")
        self._hidden_said = False

    def claim(self, reading: Reading) -> bool:
        """Whether a child that has ended by SIGKILL was hit by the kernel; each kill is claimed once."""
        self._note(reading)
        if not self._unclaimed:
            return False
        self._unclaimed.popleft()
        return True

    def tick(self, reading: Reading, forkserver: int | None) -> None:
        """Say what nobody has claimed, and look at what tasks have started; called about once a second."""
        if reading.oom_kills is None:
            return
        now = time.monotonic()
        self._note(reading)
        self._machine_used.append(reading.levels[-1].used)
        self._ticks += 1
        while self._unclaimed and self._ticks - self._unclaimed[0][0] > KILL_TICKS:
            self._untold += 1
            # Not when it is noticed: the kernel counts it first, and a process may take seconds to go.
            self._suspects |= dict.fromkeys(_gone(self._unclaimed.popleft()[1]).values())
        if self._untold and now - self._said_at >= QUIET_SECONDS:
            self._said_at = now
            self._say(reading)
        if self._rose and not self._hidden_said and self._is_limit_hidden(reading):
            self._hidden_said = True
            logger.warning(
                "The kernel kills for lack of memory, but the limit known here, %s (%s), was never reached: "
                "a lower one that cannot be seen from here may hold. If so, set memsafe_memory_budget to "
                "nine tenths of it.",
                mib(reading.lowest_limit_bytes),
                reading.lowest_limit_source,
            )
        self._rose = False
        self._programs = {} if forkserver is None else {forkserver: f"the forkserver (pid {forkserver})"}
        for child in self._children():
            self._programs |= _programs(child, now)

    def close(self, reading: Reading) -> None:
        """Say what was not said yet: no child is left that could claim a kill."""
        if reading.oom_kills is None:
            return
        self._note(reading)
        self._untold += len(self._unclaimed)  # by whom is not known: all have gone by now
        if self._untold:
            self._say(reading)

    def _note(self, reading: Reading) -> None:
        """Take note of what the kernel has killed since the last time."""
        counted = reading.oom_kills or 0
        if reading.cgroup != self._cgroup:  # where it has counted from the beginning
            self._cgroup, self._counted = reading.cgroup, counted
            self._unclaimed.clear()
        if counted > self._counted:
            # If some have gone by now, it is one of those.
            gone = _gone(self._programs) or self._programs
            self._unclaimed.extend([(self._ticks, gone)] * (counted - self._counted))
            self._rose = True
        self._counted = counted

    def _say(self, reading: Reading) -> None:
        logger.warning(
            "Memory was out, and the kernel has killed %d process%s %s, no child of this pool: %s. %s",
            self._untold,
            "es" * (self._untold > 1),
            "on this machine" if reading.cgroup is None else f"in {reading.cgroup}",
            f"it may have been {' or '.join(self._suspects)}" if self._suspects else "more is not known",
            self._describe(),
        )
        self._untold, self._suspects = 0, {}

    def _is_limit_hidden(self, reading: Reading) -> bool:
        """Whether none of the limits that are known can be the reason of a kill."""
        if reading.cgroup is None or max(self._machine_used) > NEAR * reading.physical_bytes:
            return False
        return not any(_may_be_reached(level) for level in reading.levels if level.kind != "physical")


def _may_be_reached(level: Level) -> bool:
    """Whether use may ever have come up to the limit of a cgroup."""
    if level.charged_file is None:
        return True
    folder = os.path.dirname(level.charged_file)
    times = field(_read(f"{folder}/memory.events"), b"oom ")
    if times is not None:
        return times > 0
    most = whole_number(_read(f"{folder}/memory.max_usage_in_bytes"))
    return most is None or most > REACHED * level.limit


def _programs(child: Child, now: float) -> dict[int, str]:
    """Return the processes that a child's task has started, by pid, in words. 40 us if there are none."""
    job = child.job
    if job is None or job.accepted_at is None or now - job.accepted_at < LOOK_AT_SECONDS:
        return {}
    found: dict[int, str] = {}
    todo = [child.pid]
    while todo and len(found) < MOST_PROGRAMS:
        parent = todo.pop()
        # Of the main thread: what others have started is seldom worth a look at each of them.
        for pid in map(int, _read(f"/proc/{parent}/task/{parent}/children").split()):
            name = _read(f"/proc/{pid}/comm").decode(errors="replace").strip()
            with contextlib.suppress(OSError, IndexError, ValueError):  # it has just ended
                size = mib(memory.resident_bytes(pid))
                found[pid] = f"{name} (pid {pid}, {size} when looked at last) of {job.name} in {child.name}"
                todo.append(pid)
    return found


def _gone(programs: dict[int, str]) -> dict[int, str]:
    """Return those that have ended."""
    found = {}
    for pid, text in programs.items():
        state = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()[:1]
        if state in ([], [b"Z"], [b"X"]):
            found[pid] = text
    return found


def _read(path: str) -> bytes:
    """Return what is in a file; nothing where it cannot be read."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""
