"""Whether a failed start says that the system has no room for one more process, or that something is wrong.

For the worker, the forkserver and children. Imports neither Celery nor billiard.
"""

from __future__ import annotations

import errno

__all__ = ["is_errno", "is_shortage"]

#: Processes or memory (EAGAIN, ENOMEM), descriptors of the process and of the machine, those that are on
#: their way over sockets, and buffers.
_ERRNOS = frozenset(
    {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETOOMANYREFS, errno.ENOBUFS}
)

#: What Python says when the C library can start no thread; it keeps the number to itself.
_NO_THREAD = "can't start new thread"


def is_errno(number: int | None) -> bool:
    """Whether this error number says that something has run out."""
    return number in _ERRNOS


def is_shortage(exc: BaseException | None) -> bool:
    """Whether an exception, or what it came from, says that something has run out."""
    seen = set()
    while exc is not None and id(exc) not in seen:
        seen.add(id(exc))
        if isinstance(exc, MemoryError) or (isinstance(exc, RuntimeError) and _NO_THREAD in str(exc)):
            return True
        if isinstance(exc, OSError) and is_errno(exc.errno):
            return True
        exc = exc.__cause__ or exc.__context__
    return False
