"""Whether this process still has the memory that it had: by two system calls, and nearly no code.

A child asks that after each task, in the middle of other things, so that all code and data which it takes
come from main memory: what takes 3 us in a loop takes 25 us there, and this 10 us (Linux 6.18, 2 cores). How
much the process has is read by ``native.measure``.

Imports neither Celery nor billiard.
"""

from __future__ import annotations

import fcntl
import os
import sys
from contextlib import suppress
from os import pread
from resource import RUSAGE_SELF, getpagesize, getrusage

from memsafe_pool import native

__all__ = ["Glance"]

_STATM = "/proc/self/statm"
_STATM_BYTES = 256

_PAGE_BYTES = getpagesize()

#: Above the numbers that programs expect for themselves.
_LOWEST_DESCRIPTOR = 64


class Glance:
    """Compares with what was remembered. Not to be used by a copy that was forked.

    Arguments:
        most_bytes: What may have been touched for the first time without counting as a change.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._descriptor, self._file = -1, (0, 0)
        self._text = b""  # of statm; empty where it will not do
        self._length = self._high = self._fault_limit = 0
        self._remembered = native.Measures(0, 0, 0, 0)

    def remember(self, now: native.Measures) -> None:
        """Take ``now``, which has just been measured, for what the process has."""
        usage = getrusage(RUSAGE_SELF)
        self._high = usage.ru_maxrss
        self._fault_limit = usage.ru_minflt + self._most_bytes // _PAGE_BYTES
        self._remembered = now
        # Else it is what the program had before an exec, and a peak below that does not show.
        high_is_peak = abs(usage.ru_maxrss * 1024 - now.peak) <= self._most_bytes
        self._text = self._statm(now.resident) if sys.platform == "linux" and high_is_peak else b""
        self._length = len(self._text)

    def unchanged(self) -> bool:
        """Whether resident memory and its peak are what they were, with few page faults since.

        False also where that is not known.
        """
        try:
            if not self._text:
                now = native.measure()
                return now[:3] == self._remembered[:3] and now.faults <= self._fault_limit
            # A longer text would not have its end here.
            if pread(self._descriptor, self._length, 0) != self._text:
                return False
        except OSError:
            return False
        usage = getrusage(RUSAGE_SELF)
        return usage.ru_maxrss == self._high and usage.ru_minflt <= self._fault_limit

    def _statm(self, resident_bytes: int) -> bytes:
        """What the kernel says in statm; nothing if that is not about so many resident bytes."""
        text = self._read()
        if not text or not self._is_open():
            self._open()
            text = self._read()
        fields = text.split()
        known = len(fields) > 1 and abs(int(fields[1]) * _PAGE_BYTES - resident_bytes) <= self._most_bytes
        return text if known else b""

    def _read(self) -> bytes:
        try:
            return pread(self._descriptor, _STATM_BYTES, 0)
        except OSError:
            return b""

    def _is_open(self) -> bool:
        """Whether the descriptor is still ours: code that closes all of them may have made it another's."""
        try:
            status = os.fstat(self._descriptor)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._file

    def _open(self) -> None:
        self._descriptor = -1
        with suppress(OSError):  # none left
            low = os.open(_STATM, os.O_RDONLY | os.O_CLOEXEC)
            with suppress(OSError):  # no room up there
                status = os.fstat(low)
                self._file = status.st_dev, status.st_ino
                self._descriptor = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _LOWEST_DESCRIPTOR)
            os.close(low)
