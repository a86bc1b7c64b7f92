"""A bound on the memory that one task may take, kept by the kernel.

``RLIMIT_DATA`` bounds what a process has mapped to write to and shares with nobody: an allocation
that would exceed it fails, and Python raises MemoryError there. It counts what is mapped, also where
nothing was written yet, so it is reached at the latest when so much is used.

Linux 4.7 and later; elsewhere nothing is bounded. Imports neither Celery nor billiard.
"""

from __future__ import annotations

import os
import resource
import sys

__all__ = ["Bound"]

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

#: Where /proc/self/statm has data and stack, in pages: proc(5).
_DATA_FIELD = 5


class Bound:
    """As a context, the process may map so many bytes beside what it has when that begins.

    Attributes:
        size: Bytes, or 0: then nothing is bounded.
    """

    def __init__(self) -> None:
        self.size = 0
        self._depth = 0
        self._before: tuple[int, int] | None = None

    def __enter__(self) -> None:
        """Bound it; not again where a task calls another one."""
        self._depth += 1
        mapped = _mapped_bytes() if self.size and self._depth == 1 else None
        if mapped is None:
            return
        soft, hard = self._before = resource.getrlimit(resource.RLIMIT_DATA)
        most = min(limit for limit in (mapped + self.size, soft, hard) if limit != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self.lift()

    def lift(self) -> None:
        """Bound it no more: what handles a MemoryError needs memory, and the task still has its own."""
        self._depth = 0
        if self._before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, self._before)
            self._before = None


def _mapped_bytes() -> int | None:
    """Private memory that can be written to; None where that is not bounded by the limit."""
    if sys.platform != "linux":
        return None
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(256).split()[_DATA_FIELD]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return None
