"""Memory numbers of a process.

Covers private memory of one process; see the module docstring of ``wire`` for how a
child reports it. Imports neither Celery nor billiard.
"""

from __future__ import annotations

import os
import sys

__all__ = ["private_bytes", "resident_bytes"]

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def resident_bytes(pid: int | str = "self") -> int:
    """Return the resident memory of a process in bytes, shared pages included.

    About 20 us on Linux (``/proc/<pid>/statm``).

    Raises:
        OSError: There is no such process.
    """
    if sys.platform == "linux":
        with open(f"/proc/{pid}/statm", "rb", buffering=0) as file:
            return int(file.read(256).split()[1]) * _PAGE_BYTES
    import psutil

    return int(psutil.Process(None if pid == "self" else int(pid)).memory_info().rss)


def private_bytes(pid: int | str = "self") -> int:
    """Return the memory in bytes that would be free if the process ended now.

    It is the sum of the ``Private_`` lines of ``smaps_rollup`` on Linux (0.65 ms for
    50 MB, 5 ms for 400 MB), psutil's USS elsewhere.

    Raises:
        OSError: There is no such process, or it may not be read.
    """
    if sys.platform == "linux":
        with open(f"/proc/{pid}/smaps_rollup", "rb", buffering=0) as file:
            return 1024 * sum(
                int(line.split()[1]) for line in file.read().splitlines() if line.startswith(b"Private_")
            )
    import psutil

    return int(psutil.Process(None if pid == "self" else int(pid)).memory_full_info().uss)
