"""What the worker and a child say to each other, and how it looks on the socket.

Each child has one stream socket pair with the worker. A message is a fixed head
(kind, length of the payload, job id, one number) and a pickled payload, which most
kinds leave out. The head alone answers most questions, so that accepting a task
costs no pickling on either side.

========  ==========  =======================================================
kind      sender      meaning
========  ==========  =======================================================
TASK      worker      run this: payload ``(function, args, kwargs)``; number: TRIM when
                      free heap is to be given back first, EXACT when it is only if
                      that costs little, so that it is seen what the task needs
LIMIT     worker      the next task may take so many bytes: number
STOP      worker      leave; nothing follows
UP        child       ready for work; job: its pid; payload: report
ACK       child       the job begins; number: monotonic seconds
DONE      child       the job ended; payload: report, ``(succeeded, value)``; number: 1 when
                      the report is left out, as it is that of the job before
TRIMMED   child       gave memory back; number: bytes won; payload: report
FAILED    child       could not start; job: 1 if the system had no room for it; payload: text of the
                      traceback
========  ==========  =======================================================

A report is a packed :class:`Report`. It comes with the end of the task, so the worker
knows it before it can hand out more work.

Imports neither Celery nor billiard, and is shared by both sides of the fork.
"""

from __future__ import annotations

import pickle
import struct
from functools import lru_cache
from typing import NamedTuple

__all__ = [
    "ACK",
    "DONE",
    "EXACT",
    "FAILED",
    "HEAD",
    "LIMIT",
    "REPORT",
    "STOP",
    "TASK",
    "TRIM",
    "TRIMMED",
    "UP",
    "Reader",
    "Report",
    "head",
    "loads",
]

TASK, STOP, UP, ACK, DONE, FAILED, TRIMMED, LIMIT = range(1, 9)

#: What the number of a TASK says; else it is 0.
TRIM, EXACT = 1, 2

#: kind, payload length in bytes, job id, number
HEAD = struct.Struct("=BQQd")

#: The fields of a :class:`Report`.
REPORT = struct.Struct("=7Q")


class Report(NamedTuple):
    """A child's memory, by itself. Numbers are bytes.

    Attributes:
        resident: What it has, shared pages included.
        anonymous: Resident memory that is not of a file, shared with other processes or not.
        private: What would be free if it ended.
        high: The most that was resident since its last task began.
        peak: What that task needed at its peak, beyond what was there before it.
        trimmable: What it has beyond what it had when it was fresh, or after its last trim: the most that a
            trim could win. 0 when little.
        hidden: What the task may have needed besides, unseen, as it was free in the child; 0 if ``peak`` is
            all.
    """

    resident: int = 0
    anonymous: int = 0
    private: int = 0
    high: int = 0
    peak: int = 0
    trimmable: int = 0
    hidden: int = 0

    @property
    def kept(self) -> int:
        """What would be free if it ended, but for what a trim could win."""
        return self.private - self.trimmable

    @property
    def exact(self) -> bool:
        """Whether ``peak`` is what the task needed; else it is a lower bound."""
        return not self.hidden

    @classmethod
    def unpack(cls, payload: memoryview) -> Report:
        """Return the report at the start of a payload."""
        return _report(bytes(payload[: REPORT.size]))


@lru_cache(maxsize=256)
def _report(packed: bytes) -> Report:
    """Most reports of a child are like the one before."""
    return Report(*REPORT.unpack(packed))


head = HEAD.pack
loads = pickle.loads
_head_size = HEAD.size
_unpack_head = HEAD.unpack_from


class Reader:
    """Cuts a byte stream into messages."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = bytearray()

    @property
    def partial(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[tuple[int, int, float, memoryview]]:
        """Take what was received; return each complete ``(kind, job, number, payload)``."""
        buffer: bytes | bytearray = data
        if self._rest:
            self._rest += data
            buffer = self._rest
        messages = []
        size, start = len(buffer), 0
        view = memoryview(buffer)
        while size - start >= _head_size:
            kind, length, job, number = _unpack_head(buffer, start)
            end = start + _head_size + length
            if end > size:
                break
            messages.append((kind, job, number, view[start + _head_size : end]))
            start = end
        if start or buffer is data:
            self._rest = bytearray(view[start:])
        return messages
