"""How much memory may still be taken, asked often.

A full reading (``probe``) takes 0.2 ms, as it looks for limits and opens files. Between two of them only the
numbers that change are read, from descriptors that are kept open: 3 us for a cgroup, 20 us more where
``memory.stat`` is read as well, 6 us for the machine's memory (measured: Linux 6.18, cgroups of version 1).
Another number in the file of a limit makes it a full reading; a limit where there was none, a
``memory.high`` that becomes lower than ``memory.max``, or the like are found by the next one.

What is used is what the kernel charges less what it can take back, and the latter is in ``memory.stat``. The
kernel gathers that from all cores, which takes 20 us on a small machine and more than 1 ms on some large
ones. The last number does for a while: until what is charged has changed by a part of the limit, as files may
have been read since, or their pages taken back. From where less than a quarter of the limit is not charged,
which is always so where the rest is full of files, it is read each time; but only for a part of the time, as
measured. In between all that was charged, or taken by tasks, since it was read counts as used, also files.

Imports neither Celery nor billiard.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from memsafe_pool import reclaim
from memsafe_pool.cgroups import field

if TYPE_CHECKING:
    from memsafe_pool.probe import Level, Probe, Reading

__all__ = ["Gauge"]

#: What can be taken back is read each time when less than this part of the limit is not charged; else when
#: what is charged has changed by the second part of it.
NEAR, CHANGED = 4, 32

#: That is not done again before so many times the time has passed that it took: 1 % of the time; 5 % where
#: less than the part of the limit that is ``NEAR`` is left, and somebody may be paused for it.
SELDOM, OFTEN = 100, 20

#: The file in which a limit is one number of many.
_AMONG_OTHERS = "/memory.stat"

#: More than ``memory.stat`` has; of ``/proc/meminfo`` the first lines do.
_STAT_BYTES, _NUMBER_BYTES, _MEMINFO_BYTES = 16384, 64, 512


class _Dial:
    """The open files of one limit.

    Attributes:
        files: What they were opened for.
        uncertain: As of the level, as last known.

    Raises:
        OSError: They cannot be opened.
    """

    __slots__ = (
        *("_again", "_bound", "_changed", "_charged", "_kernel", "_left", "_limit", "_near"),
        *("_reclaimable", "_stat", "_taken", "_timer", "_version", "files", "uncertain"),
    )

    def __init__(self, level: Level, timer: Callable[[], float]) -> None:
        self.files = _files(level)
        if level.charged_file is None:
            raise FileNotFoundError("what is used is in no file")
        self._bound = self._charged = self._stat = self._kernel = -1
        self._timer, self._version = timer, level.version
        self._again = float("-inf")
        try:
            self._charged = _open(level.charged_file)
            if not level.source.endswith(_AMONG_OTHERS):
                self._bound = _open(level.source)
            if level.stat_file is not None:
                self._stat = _open(level.stat_file)
            if level.kernel_file is not None:
                self._kernel = _open(level.kernel_file)
        except OSError:
            self.close()
            raise
        self.set(level, 0)

    def set(self, level: Level, taken: int) -> None:
        self._limit = level.limit
        self._near, self._changed = level.limit // NEAR, level.limit // CHANGED
        self._know(level.limit - level.charged, level.charged - level.used, level.uncertain, taken)

    def _know(self, left: int, reclaimable: int, uncertain: int, taken: int) -> None:
        self._left, self._reclaimable, self.uncertain, self._taken = left, reclaimable, uncertain, taken

    def room(self, least: float, taken: int, *, exact: bool) -> int:
        """Return the bytes that are left; not exactly where they are more than ``least``.

        Arguments:
            least: Bytes that are left elsewhere.
            taken: Bytes that tasks have taken so far.
            exact: Whether the numbers have to be those of this moment.

        Raises:
            OSError: The cgroup is gone.
            ValueError: The file is another one, or has no number in it; or the limit is another one.
        """
        if self._bound >= 0 and int(os.pread(self._bound, _NUMBER_BYTES, 0)) != self._limit:
            raise ValueError
        charged = int(os.pread(self._charged, _NUMBER_BYTES, 0))
        left = self._limit - charged
        is_near = left < self._near
        room = left + self._reclaimable
        if self._stat >= 0 and left < least:
            if is_near:
                # What tasks take may take the place of files: then what is charged stays as it is.
                room = self._left + self._reclaimable - max(self._left - left, taken - self._taken, 0)
            if is_near or exact or abs(left - self._left) > self._changed:
                began = self._timer()
                if exact or began >= self._again:
                    self._read(charged, taken)
                    room = left + self._reclaimable
                    took = self._timer() - began
                    self._again = began + took * (OFTEN if room < self._near else SELDOM)
        return min(room, self._limit)

    def _read(self, charged: int, taken: int) -> None:
        stat = os.pread(self._stat, _STAT_BYTES, 0)
        kernel = int(os.pread(self._kernel, _NUMBER_BYTES, 0)) if self._kernel >= 0 else 0
        use = reclaim.find(self._version, self._limit, charged, stat, kernel)
        if use is None:
            raise ValueError
        self._know(self._limit - charged, charged - use.used, use.uncertain, taken)

    def close(self) -> None:
        for descriptor in (self._bound, self._charged, self._stat, self._kernel):
            _close(descriptor)
        self._bound = self._charged = self._stat = self._kernel = -1


class _MachineDial:
    """As ``_Dial``, for the machine's memory."""

    __slots__ = ("_limit", "_meminfo", "files", "uncertain")

    def __init__(self, level: Level) -> None:
        self.files = _files(level)
        assert level.charged_file is not None
        self._meminfo = _open(level.charged_file)
        self.uncertain = 0
        self.set(level, 0)

    def set(self, level: Level, taken: int) -> None:
        self._limit = level.limit

    def room(self, least: float, taken: int, *, exact: bool) -> int:
        available = field(os.pread(self._meminfo, _MEMINFO_BYTES, 0), b"MemAvailable:")
        if available is None:
            raise ValueError
        return min(available * 1024, self._limit)

    def close(self) -> None:
        _close(self._meminfo)
        self._meminfo = -1


class Gauge:
    """Tells headroom; nothing that happens to the files is an error.

    A cgroup that is removed, a limit that was changed, a process that was moved, a descriptor that cannot be
    opened or leads elsewhere (after a fork): at the next full reading at the latest, ``refresh`` seconds
    after the last one, it is what ``probe`` says. Where no file has the number, as on macOS, each reading is
    a full one.

    For one thread at a time. After a fork both processes may go on with it.

    Arguments:
        probe: Reads in full, and warns about what it cannot read.
        refresh: Seconds from one full reading to the next.
        clock: Tells the time in seconds.
        timer: Tells it exactly: what reading takes is measured with it.

    Attributes:
        uncertain: As ``uncertain_bytes`` of a reading, when ``headroom`` was last asked.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        refresh: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._probe, self._every, self._clock, self._timer = probe, refresh, clock, timer
        self._dials: list[_Dial | _MachineDial] = []
        self._taken = 0
        self._until = float("-inf")
        self._reading = self.refresh()

    @property
    def reading(self) -> Reading:
        """The last full reading."""
        return self._reading

    def headroom(self, taken: int = 0, *, exact: bool = False) -> int:
        """Return the bytes that are left under the limit with the least room; negative above ``memory.high``.

        3 to 40 us for each limit, and 0.2 ms when it is time for a full reading.

        Arguments:
            taken: What running tasks have taken, in bytes, as the caller knows.
            exact: Whether no number may be older than this call, however long that takes.
        """
        self._taken = taken
        if self._dials and self._clock() < self._until:
            try:
                least = most = math.inf
                for dial in self._dials:
                    room = dial.room(least, taken, exact=exact)
                    least, most = min(least, room), min(most, room + dial.uncertain)
                self.uncertain = int(most - least) + self._reading.swap_bytes
                return int(least)
            except (OSError, ValueError):
                # Gone, or not what it was: the full reading finds out, and says what is wrong with a file.
                self.close()
        return self.refresh().headroom_bytes

    def refresh(self) -> Reading:
        """Read in full, and return that. About 0.2 ms."""
        reading = self._reading = self._probe.read()
        self.uncertain = reading.uncertain_bytes
        self._until = self._clock() + self._every
        if [dial.files for dial in self._dials] == list(map(_files, reading.levels)):
            for dial, level in zip(self._dials, reading.levels, strict=True):
                dial.set(level, self._taken)
        else:
            self._open(reading.levels)
        return reading

    def close(self) -> None:
        """Close the descriptors; the next reading opens them again."""
        for dial in self._dials:
            dial.close()
        self._dials = []

    def _open(self, levels: Sequence[Level]) -> None:
        self.close()
        if sys.platform != "linux":
            return
        try:
            for level in levels:
                is_machine = level.kind == "physical"
                self._dials.append(_MachineDial(level) if is_machine else _Dial(level, self._timer))
        except OSError:
            # Too many files are open, or there is none: each reading is a full one, which warns.
            self.close()


def _files(level: Level) -> tuple[object, ...]:
    return level.source, level.charged_file, level.stat_file, level.kernel_file


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        try:
            os.close(descriptor)
        except OSError:
            pass  # closed by somebody who closes all
