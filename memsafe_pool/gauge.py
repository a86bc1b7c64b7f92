"""How much memory may still be taken, asked often.

A full reading (``probe``) takes 0.2 ms, as it looks for limits and opens files. Between two of them only the
numbers that change are read, from descriptors that are kept open: 3 us for a cgroup, 10 us where inactive
file pages are read as well, 6 us for the machine's memory (measured: Linux 6.18, cgroups of version 1).
Another number in the file of a limit makes it a full reading; a limit where there was none, a
``memory.high`` that becomes lower than ``memory.max``, or the like are found by the next one.

What is used is what the kernel charges less inactive file pages, and the latter are in a file that is dearer
to read. The number of the last reading does for a while: until what is charged has changed by a part of the
limit, as files may have been read since, or their pages taken back. From where less than a quarter of the
limit is not charged, the number is read each time, and headroom is exact.

Imports neither Celery nor billiard.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from memsafe_pool.cgroups import field

if TYPE_CHECKING:
    from memsafe_pool.probe import Level, Probe, Reading

__all__ = ["Gauge"]

#: Inactive pages are read each time when less than this part of the limit is not charged; else when what is
#: charged has changed by the second part of it.
NEAR, CHANGED = 4, 32

#: The file in which a limit is one number of many.
_AMONG_OTHERS = "/memory.stat"

#: More than ``memory.stat`` has; of ``/proc/meminfo`` the first lines do.
_STAT_BYTES, _NUMBER_BYTES, _MEMINFO_BYTES = 16384, 64, 512


class _Dial:
    """The open files of one limit.

    Raises:
        OSError: They cannot be opened.
    """

    __slots__ = (
        *("_bound", "_changed", "_charged", "_inactive", "_left", "_limit", "_near", "_stat", "_stat_name"),
        "files",
    )

    def __init__(self, level: Level) -> None:
        self.files = _files(level)
        if level.charged_file is None:
            raise FileNotFoundError("what is used is in no file")
        self._bound = self._charged = self._stat = -1
        self._stat_name = b""
        try:
            self._charged = _open(level.charged_file)
            if not level.source.endswith(_AMONG_OTHERS):
                self._bound = _open(level.source)
            if level.stat_file is not None:
                path, self._stat_name = level.stat_file
                self._stat = _open(path)
        except OSError:
            self.close()
            raise
        self.set(level)

    def set(self, level: Level) -> None:
        self._limit, self._inactive = level.limit, level.inactive
        self._left = level.room - level.inactive
        self._near, self._changed = level.limit // NEAR, level.limit // CHANGED

    def room(self, least: float) -> int:
        """Return the bytes that are left; not exactly where they are more than ``least``.

        Raises:
            OSError: The cgroup is gone.
            ValueError: The file is another one, or has no number in it; or the limit is another one.
        """
        if self._bound >= 0 and int(os.pread(self._bound, _NUMBER_BYTES, 0)) != self._limit:
            raise ValueError
        left = self._limit - int(os.pread(self._charged, _NUMBER_BYTES, 0))
        doubtful = left < self._near or abs(left - self._left) > self._changed
        if self._stat >= 0 and doubtful and left < least:
            self._left = left
            inactive = field(os.pread(self._stat, _STAT_BYTES, 0), self._stat_name)
            if inactive is None:
                raise ValueError
            self._inactive = inactive
        return min(left + self._inactive, self._limit)

    def close(self) -> None:
        for descriptor in (self._bound, self._charged, self._stat):
            _close(descriptor)
        self._bound = self._charged = self._stat = -1


class _MachineDial:
    """As ``_Dial``, for the machine's memory."""

    __slots__ = ("_limit", "_meminfo", "files")

    def __init__(self, level: Level) -> None:
        self.files = _files(level)
        assert level.charged_file is not None
        self._meminfo = _open(level.charged_file)
        self.set(level)

    def set(self, level: Level) -> None:
        self._limit = level.limit

    def room(self, least: float) -> int:
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
    """

    def __init__(
        self, probe: Probe, *, refresh: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._probe, self._every, self._clock = probe, refresh, clock
        self._dials: list[_Dial | _MachineDial] = []
        self._until = float("-inf")
        self._reading = self.refresh()

    @property
    def reading(self) -> Reading:
        """The last full reading."""
        return self._reading

    def headroom(self) -> int:
        """Return the bytes that are left under the limit with the least room; negative above ``memory.high``.

        3 to 10 us for each limit, and 0.2 ms when it is time for a full reading.
        """
        if self._dials and self._clock() < self._until:
            try:
                least: float = math.inf
                for dial in self._dials:
                    least = min(least, dial.room(least))
                return int(least)
            except (OSError, ValueError):
                # Gone, or not what it was: the full reading finds out, and says what is wrong with a file.
                self.close()
        return self.refresh().headroom_bytes

    def refresh(self) -> Reading:
        """Read in full, and return that. About 0.2 ms."""
        reading = self._reading = self._probe.read()
        self._until = self._clock() + self._every
        if [dial.files for dial in self._dials] == list(map(_files, reading.levels)):
            for dial, level in zip(self._dials, reading.levels, strict=True):
                dial.set(level)
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
                self._dials.append((_MachineDial if level.kind == "physical" else _Dial)(level))
        except OSError:
            # Too many files are open, or there is none: each reading is a full one, which warns.
            self.close()


def _files(level: Level) -> tuple[object, ...]:
    return level.source, level.charged_file, level.stat_file


def _open(path: str) -> int:
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _close(descriptor: int) -> None:
    if descriptor >= 0:
        try:
            os.close(descriptor)
        except OSError:
            pass  # closed by somebody who closes all
