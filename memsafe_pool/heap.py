"""The C library's heap as the kernel sees it: which of its pages are there, and which were touched.

For this process. Only the heap proper is looked at, which glibc uses for the main thread; mappings of their
own and the heaps of other threads are not in it. Linux only. What the allocator knows is in ``native``.

Imports neither Celery nor billiard.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

__all__ = ["Pages", "forget_references", "look", "most_grown", "pages"]


class Pages(NamedTuple):
    """The heap, in bytes.

    Attributes:
        mapped: How large it is.
        resident: What of it is in memory.
        referenced: What of that was touched since :func:`forget_references`.
    """

    mapped: int
    resident: int
    referenced: int


_FAR_APART_BYTES = 4 << 20

#: By the last look: pages that were not there, in bytes, and where the heap ended.
_last: list[tuple[int, int]] = []


def pages() -> Pages | None:
    """Return how much of the heap is there; None where the kernel does not say.

    ``/proc/self/smaps``, up to the end of the heap, which comes before
    the libraries: the kernel walks what is asked for, at about 7 us per MB. After a fork the heap is more
    than one mapping.
    """
    sums = {b"Size": 0, b"Rss": 0, b"Referenced": 0}
    found = False
    try:
        with open("/proc/self/smaps", "rb", buffering=4096) as smaps:
            for line in smaps:
                if line.endswith(b"[heap]\n"):
                    found = True
                elif b"-" in line[:18]:  # the first line of another mapping
                    if found:
                        break
                elif found and (name := line.partition(b":")[0]) in sums:
                    sums[name] += 1024 * int(line[len(name) + 1 : -3])
    except OSError:
        return None
    return Pages(*sums.values()) if found else None


def look() -> int | None:
    """Return how many bytes of the heap are in memory, and have :func:`most_grown` count from now on.

    None where the kernel does not say. 0.2 ms for 20 MB where :func:`pages` takes 1 ms: ``mincore`` looks at
    the page tables, not at each page.
    """
    _last.clear()
    # No ctypes in this Python, no such function, no /proc, or a hole in the heap.
    with suppress(ImportError, AttributeError, OSError, ValueError, IndexError):
        start, end = _start(), _end()
        resident = _resident(start, end)
        _last.append((end - start - resident, end))
        return resident
    return None


def _resident(start: int, end: int) -> int:
    import ctypes

    flags = ctypes.create_string_buffer(-(-(end - start) // mmap.PAGESIZE))
    if _functions().mincore(start, end - start, flags) < 0:
        raise OSError("the kernel does not tell which pages are there")
    return flags.raw.count(1) * mmap.PAGESIZE


def most_grown() -> int | None:
    """Return the most bytes that can be in memory now and were not at the last :func:`look`.

    That may have been before this process was forked. None if there was none. If the heap has become smaller
    since, then since it was smallest when this was called. About 1 us: only the end of the heap is asked for
    (``sbrk(0)``).
    """
    if not _last:
        return None
    missing, end = _last[0]
    now = _end()
    if now < end:
        _last[0] = missing, now
    return missing + max(now - end, 0)


def forget_references() -> bool:
    """Clear the referenced bits of all anonymous memory; return whether that was possible."""
    try:
        with open("/proc/self/clear_refs", "wb", buffering=0) as clear_refs:
            clear_refs.write(b"2")
        _forget_translations()
    except OSError:
        return False
    return True


def _forget_translations() -> None:
    """Have the processor look up each page anew when it is used.

    As long as it remembers where a page is (in the TLB), it does not set the referenced bit of that page
    again, and the kernel does not make it forget for the sake of such bits. It does when pages are unmapped,
    and on x86 all of them when the first and the last are further apart than a few dozen pages. Recent arm64
    forgets only what lies in between, so there some pages are still missed, at most as many as it remembers.
    """
    mapping = mmap.mmap(-1, _FAR_APART_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # a kernel without huge pages
        mapping.madvise(mmap.MADV_NOHUGEPAGE)  # else 2 MiB would be cleared first
    mapping[0] = mapping[-1] = 1
    mapping.close()


def _start() -> int:
    """Return where the heap begins; proc(5): the 47th field, or 45th after the name."""
    with open("/proc/self/stat", "rb", buffering=0) as stat:
        return int(stat.read(4096).rpartition(b")")[2].split()[44])


def _end() -> int:
    return int(_functions().sbrk(0))


@cache
def _functions() -> Any:
    import ctypes

    library = ctypes.CDLL(None)
    library.sbrk.argtypes, library.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_size_t
    library.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    return library
