"""Python's own arenas: where objects of up to 512 bytes live, and how much room is free in there.

CPython tells it only as text, in the function behind ``sys._debugmallocstats()``, which is called here by
ctypes with a stream in memory. It is no documented interface: where it is missing or says something
else, :func:`read` returns None, and nobody knows.

Imports neither Celery nor billiard.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ARENA_BYTES", "Arenas", "known", "read"]

#: Size of an arena, from Python 3.10 on; smaller before, and where a pointer has 32 bits.
ARENA_BYTES = 1 << 20


class Arenas(NamedTuple):
    """Python's arenas.

    Attributes:
        made: Number of arenas that were ever made. A new one is made only when no pool is unused.
        unused: Bytes of pools that nothing is in; each can be used for objects of any size.
        available: Free bytes in pools that are in use; each for objects of one size.
    """

    made: int
    unused: int
    available: int


_MADE = re.compile(rb"# arenas allocated total +=\s+([\d,]+)")
_AVAILABLE = re.compile(rb"# bytes in available blocks +=\s+([\d,]+)")
_UNUSED = re.compile(rb"unused pools \* \d+ bytes +=\s+([\d,]+)")


_last: list[Arenas | None] = []


def known() -> Arenas | None:
    """Return what :func:`read` said last, here or before this process was forked; else what it says now."""
    return _last[-1] if _last else read()


def read() -> Arenas | None:
    """Return what is free in the arenas, or None where that is not known.

    All pools are visited: about 15 us per MB of arenas, 40 us in a process that has just been forked.
    """
    found = _read()
    _last[:] = [found]
    return found


def _read() -> Arenas | None:
    stats = _reader()
    if stats is None:
        return None
    text = stats()
    found = [pattern.search(text) for pattern in (_MADE, _UNUSED, _AVAILABLE)]
    if not all(found):
        return None  # another allocator (PYTHONMALLOC), or other words
    return Arenas(*(int(match[1].replace(b",", b"")) for match in found if match))


@cache
def _reader() -> Callable[[], bytes] | None:
    """A function that returns the text; None where there is none."""
    if sys.implementation.name != "cpython":
        return None
    try:
        import ctypes

        # PyDLL: the interpreter's lock is held during the call.
        write: Any = ctypes.pythonapi._PyObject_DebugMallocStats  # noqa: SLF001 - there is no other way
        library = ctypes.CDLL(None)
        open_memory, close, free = library.open_memstream, library.fclose, library.free
    except (ImportError, AttributeError, OSError):
        return None
    write.argtypes = close.argtypes = free.argtypes = [ctypes.c_void_p]
    open_memory.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.POINTER(ctypes.c_size_t)]
    open_memory.restype = ctypes.c_void_p

    def stats() -> bytes:
        buffer, size = ctypes.c_void_p(), ctypes.c_size_t()
        stream = open_memory(ctypes.byref(buffer), ctypes.byref(size))
        if not stream:
            return b""
        write(stream)
        close(stream)
        text = ctypes.string_at(buffer, size.value)
        free(buffer)
        return text

    return stats
