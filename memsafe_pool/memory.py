"""Memory: what the limit is, what is used, what a process has, and how to give it back.

For library authors, too: nothing here needs Celery, or a pool. All sizes are bytes::

    from memsafe_pool import memory

    memory.limit()              # of the container, or of the machine
    memory.headroom()           # what may still be taken
    memory.usage()              # what is taken
    memory.process().private    # what would be free if this process ended
    memory.trim()               # collect garbage, give free heap back

:class:`Probe` reads limit and use again and again, and says where each number comes from.
What the C library can do is in ``native``; how a pool's child is measured in ``meter``.
Imports neither Celery nor billiard.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from memsafe_pool import native
from memsafe_pool.probe import Pressure, Probe, Reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    import psutil

__all__ = [
    "Pressure",
    "Probe",
    "ProcessMemory",
    "Reading",
    "anonymous_bytes",
    "headroom",
    "limit",
    "private_bytes",
    "process",
    "resident_bytes",
    "shared_memory_bytes",
    "trim",
    "usage",
]

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

#: What would be free if a process ended. Clean private pages are those of files.
_PRIVATE = b"Private_Dirty:", b"Private_Hugetlb:"

#: More than ``/proc/<pid>/statm`` has.
STATM_BYTES = 256

Pid = int | str


@cache
def _probe() -> Probe:
    """One for all, so that what is odd is said once."""
    return Probe()


def limit() -> int:
    """Return the memory in bytes that this process and all that share its container may use.

    The lowest limit of its cgroup and all ancestors (``memory.max``, ``memory.high``, in version 1
    ``memory.limit_in_bytes``), or the machine's memory. It can change while the process runs.
    About 0.2 ms. What can not be read is a warning in the log and left out; never an error.
    """
    return _probe().read().lowest_limit_bytes


def headroom() -> int:
    """Return the bytes that may still be taken until the first limit is reached.

    There can be several limits: of the container, of what it is in, and the machine's memory. This
    is the least room under any of them, which need not be under the lowest, as others use the same
    memory. Negative above ``memory.high``. About 0.2 ms.
    """
    return _probe().read().headroom_bytes


def usage() -> int:
    """Return the memory in bytes that is used under the limit with the least room.

    In a container what the kernel charges to it, less what it can take back: pages of files and
    its own caches. That decides about out-of-memory kills. About 0.2 ms. Where
    the machine's memory is the limit, what this process and all its descendants have (PSS: shared
    pages in equal parts). That takes 1 ms per process and more, about 10 ms per GB.
    """
    reading = _probe().read()
    return _probe().tree_bytes() if reading.limit_kind == "physical" else reading.used_bytes


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """What one process has, in bytes.

    Attributes:
        resident: What is in memory, shared pages included.
        anonymous: Of that, what is neither of files nor shared memory; what a fork shares is in it.
        private: What would be free if the process ended now.
        peak: The most that was ever resident, or since the counter was reset.
    """

    resident: int
    anonymous: int
    private: int
    peak: int


def process(pid: Pid = "self") -> ProcessMemory:
    """Return what a process has. On Linux about 1 ms, and 10 ms per GB more, for ``private``.

    Raises:
        OSError: There is no such process, or it may not be read.
    """
    return ProcessMemory(resident_bytes(pid), anonymous_bytes(pid), private_bytes(pid), _peak_bytes(pid))


def trim(*, collect: bool = True) -> int:
    """Collect garbage and give free heap back to the kernel; return the bytes that were won.

    It takes as long as a full collection and about 0.1 ms per MB given back. With a C library that
    can not release memory (musl) the collection is all there is.

    Arguments:
        collect: Whether to collect garbage first.

    Raises:
        OSError: The memory of this process can not be read.
    """
    before = native.own_memory().anonymous
    if collect:
        gc.collect()
    try:
        native.release_heap()
    except OSError:
        pass  # not with this C library; the collection may have helped
    return max(before - native.own_memory().anonymous, 0)


def resident_bytes(pid: Pid = "self") -> int:
    """Return the resident memory of a process in bytes, shared pages included.

    About 20 us on Linux (``/proc/<pid>/statm``).

    Raises:
        OSError: There is no such process.
    """
    if sys.platform == "linux":
        return _statm(pid)[0]
    with _psutil_process(pid) as found:
        return int(found.memory_info().rss)


def anonymous_bytes(pid: Pid = "self") -> int:
    """Return the resident memory of a process in bytes that is neither of files nor shared memory.

    About 20 us on Linux (``/proc/<pid>/statm``); elsewhere the private memory.

    Raises:
        OSError: There is no such process.
    """
    if sys.platform != "linux":
        return private_bytes(pid)
    resident, shared = _statm(pid)
    return resident - shared


def private_bytes(pid: Pid = "self") -> int:
    """Return the memory in bytes that would be free if the process ended now.

    On Linux it is ``Private_Dirty`` and ``Private_Hugetlb`` of ``smaps_rollup`` (0.65 ms for
    50 MB, 5 ms for 400 MB): pages of a file that nobody else has mapped, ``Private_Clean``, stay
    in the cache when it ends, and are room before that. Elsewhere psutil's USS.

    Raises:
        OSError: There is no such process, or it may not be read.
    """
    if sys.platform == "linux":
        with open(f"/proc/{pid}/smaps_rollup", "rb", buffering=0) as file:
            lines = file.read().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(_PRIVATE))
    with _psutil_process(pid) as found:
        return int(found.memory_full_info().uss)


def shared_memory_bytes(pid: Pid = "self") -> int:
    """Return the resident memory of a process that is shared memory and no file; 0 where unknown.

    ``RssShmem`` of ``/proc/<pid>/status``, about 20 us.
    """
    return _status_bytes(pid, b"RssShmem") or 0


def _peak_bytes(pid: Pid) -> int:
    peak = _status_bytes(pid, b"VmHWM")
    if peak is None:
        return native.peak() if pid == "self" else resident_bytes(pid)
    return peak


def _statm(pid: Pid) -> tuple[int, int]:
    with open(f"/proc/{pid}/statm", "rb", buffering=0) as file:
        return parse_statm(file.read(STATM_BYTES))


def parse_statm(text: bytes) -> tuple[int, int]:
    """Return resident bytes by a process's ``statm``, and those of files and shared memory in it.

    Raises:
        IndexError, ValueError: It is something else, or empty, as for a process that has just ended.
    """
    fields = text.split()
    return int(fields[1]) * _PAGE_BYTES, int(fields[2]) * _PAGE_BYTES


def _status_bytes(pid: Pid, name: bytes) -> int | None:
    """A line of ``/proc/<pid>/status``; None where there is none."""
    try:
        with open(f"/proc/{pid}/status", "rb", buffering=0) as file:
            status = file.read()
    except OSError:
        return None
    start = status.find(b"\n" + name + b":")
    if start < 0:
        return None
    return 1024 * int(status[start + len(name) + 2 : status.index(b"kB", start)])


@contextmanager
def _psutil_process(pid: Pid) -> Iterator[psutil.Process]:
    """A process by psutil, whose errors become OSErrors."""
    import psutil

    try:
        yield psutil.Process(None if pid == "self" else int(pid))
    except psutil.NoSuchProcess as exc:
        raise ProcessLookupError(str(exc)) from None
    except psutil.AccessDenied as exc:
        raise PermissionError(str(exc)) from None
