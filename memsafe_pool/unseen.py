"""Memory that is taken and that nobody is known to have: files in ``/dev/shm``, what programs have.

It is in no task's own memory, so no task seems to grow while the container fills. But that some of it is
taken just now is seen: what is used grows by more than what children and tasks have. Then it may be any of
those that run.

What is used changes for other reasons, too: children come and go, tasks keep what they had, others live in
the same container. So it is compared with what it was over the last seconds.

Pure: no I/O and no clock. Imports neither Celery nor billiard.
"""

from __future__ import annotations

__all__ = ["Unseen"]

_MIB = 1 << 20

#: Half of a difference becomes usual in so many seconds: of more than is usual, and of less. The latter is
#: longer than a child takes to start or to end, in which it is known to have what it does not have yet, or
#: has given back.
MORE_SECONDS, LESS_SECONDS = 5.0, 0.1

#: It matters from this part of what there is on, and this many bytes: less is what the kernel has for
#: processes, and what was taken between reading one number and the next.
PART, LEAST_BYTES = 32, 8 * _MIB

#: How fast it grew is forgotten by half in so many seconds.
RATE_SECONDS = 0.2


class Unseen:
    """What is remembered of it.

    Attributes:
        bytes: What was taken lately that nobody is known to have.
        matters: Whether that is much.
        rate: By how many bytes per second it grew just now.
    """

    __slots__ = ("_at", "_usual", "bytes", "matters", "rate")

    def __init__(self) -> None:
        self.bytes, self.matters, self.rate = 0.0, False, 0.0
        self._at: float | None = None
        self._usual = 0.0

    def look(self, now: float, unknown: float | None, limit: float) -> None:
        """Take note of how it is.

        Arguments:
            now: Monotonic seconds.
            unknown: Bytes in use that nobody is known to have, up to a constant; or None.
            limit: Bytes there are in all.
        """
        if unknown is None or self._at is None:
            self._at, self._usual = (None, 0.0) if unknown is None else (now, unknown)
            self.bytes, self.matters, self.rate = 0.0, False, 0.0
            return
        passed, self._at = max(now - self._at, 1e-4), now
        half = MORE_SECONDS if unknown > self._usual else LESS_SECONDS
        self._usual += (unknown - self._usual) * (1 - 0.5 ** (passed / half))
        before, self.bytes = self.bytes, max(unknown - self._usual, 0.0)
        self.matters = self.bytes >= max(limit / PART, LEAST_BYTES)
        self.rate = max((self.bytes - before) / passed, self.rate * 0.5 ** (passed / RATE_SECONDS))
