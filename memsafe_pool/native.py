"""The C helper, as Python functions: release free heap, parent death signal, child subreaper.

Covers the calls that Python itself cannot make. They go through the extension ``memsafe_pool._native``
(``csrc/``), or, where that was not built, through ctypes. Both release the GIL while they run, and a
failure is an :class:`OSError` with ``errno``: ``ENOSYS`` where the platform has no such call.

Does not decide when to trim, nor who adopts whom. Imports neither Celery nor billiard, and ctypes only
at the first call without the extension.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "EXTENSION_ERROR",
    "HAVE_EXTENSION",
    "get_child_subreaper",
    "release_heap",
    "set_child_subreaper",
    "set_parent_death_signal",
]


class _Library(Protocol):
    """What ``csrc/memsafe_native.h`` declares: each returns 0 or a positive value, or -errno."""

    def ms_release_heap_bytes(self) -> int: ...
    def ms_set_parent_death_signal(self, signum: int, /) -> int: ...
    def ms_set_child_subreaper(self, on: int, /) -> int: ...
    def ms_get_child_subreaper(self) -> int: ...


class _CtypesLibrary:
    """The same functions without the extension, on the C library that this process already has."""

    # <linux/prctl.h>
    PR_SET_PDEATHSIG = 1
    PR_SET_CHILD_SUBREAPER = 36
    PR_GET_CHILD_SUBREAPER = 37

    def __init__(self, c_library: Any = None) -> None:
        """`c_library` has the C functions as attributes; by default it is opened at the first call."""
        self._c_library = c_library

    def ms_release_heap_bytes(self) -> int:
        import ctypes

        if (trim := self._function("malloc_trim")) is not None:
            trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
            before_bytes = _resident_anonymous_bytes()
            trim(0)
            after_bytes = _resident_anonymous_bytes()
            return 0 if before_bytes is None or after_bytes is None else max(0, before_bytes - after_bytes)
        if (relieve := self._function("malloc_zone_pressure_relief")) is not None:
            relieve.argtypes, relieve.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_size_t
            return int(relieve(None, 0))
        return -errno.ENOSYS

    def ms_set_parent_death_signal(self, signum: int, /) -> int:
        return self._prctl(self.PR_SET_PDEATHSIG, signum)

    def ms_set_child_subreaper(self, on: int, /) -> int:
        return self._prctl(self.PR_SET_CHILD_SUBREAPER, on)

    def ms_get_child_subreaper(self) -> int:
        import ctypes

        on = ctypes.c_int(0)
        return self._prctl(self.PR_GET_CHILD_SUBREAPER, ctypes.addressof(on)) or on.value

    def _function(self, name: str) -> Any:
        """The C function of that name, or None."""
        import ctypes

        if self._c_library is None:
            self._c_library = ctypes.CDLL(None, use_errno=True)
        return getattr(self._c_library, name, None)

    def _prctl(self, option: int, argument: int) -> int:
        import ctypes

        if (prctl := self._function("prctl")) is None:
            return -errno.ENOSYS
        prctl.argtypes, prctl.restype = [ctypes.c_int] + [ctypes.c_ulong] * 4, ctypes.c_int
        return -ctypes.get_errno() if prctl(option, argument, 0, 0, 0) < 0 else 0


def _resident_anonymous_bytes() -> int | None:
    """Resident minus file-backed and shared memory, as the extension counts it; None without /proc."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as statm:
            fields = statm.read().split()
    except OSError:
        return None
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGESIZE")


#: Why the extension cannot be used, in the import's own words; None when it can.
EXTENSION_ERROR: str | None = None

_library: _Library
try:
    from memsafe_pool._native import lib as _library
except ImportError as error:
    EXTENSION_ERROR = str(error)
    _library = _CtypesLibrary()

#: True when the calls go through the C extension, False when they go through ctypes.
HAVE_EXTENSION: bool = EXTENSION_ERROR is None


def release_heap() -> int:
    """Give the free pages of the C heap back to the kernel; return how many bytes that was.

    The number is the resident anonymous memory of this process before and after: 0 when there was
    nothing to win, approximate when other threads allocate meanwhile. It takes about 0.1 ms per MB
    given back. Objects that are garbage but not collected yet stay: ``gc.collect()`` first.

    Raises OSError with ENOSYS when the C library has no such call (musl).
    """
    return _checked(_library.ms_release_heap_bytes)


def set_parent_death_signal(signum: int) -> None:
    """Have the kernel send `signum` to this process when its parent ends; 0 turns it off.

    The parent is the *thread* that forked this process, or the one that adopted it: set it after the
    adoption. fork clears it. A parent that ended before the call is not noticed, so compare
    ``os.getppid()`` with the expected pid afterwards.

    Raises OSError: EINVAL for a number that is not a signal, ENOSYS where there is no prctl.
    """
    _checked(_library.ms_set_parent_death_signal, signum)


def set_child_subreaper(on: bool) -> None:
    """Make orphaned descendants children of this process, or stop doing so.

    It holds for the whole process and is not inherited by fork. While on, it adopts every orphan
    below this process, also those that belong to the user's own programs.

    Raises OSError with ENOSYS where there is no prctl.
    """
    _checked(_library.ms_set_child_subreaper, int(on))


def get_child_subreaper() -> bool:
    """Whether orphaned descendants become children of this process.

    Raises OSError with ENOSYS where there is no prctl.
    """
    return bool(_checked(_library.ms_get_child_subreaper))


def _checked(function: Callable[..., int], *arguments: int) -> int:
    """The result of a call that returns 0 or a positive value, or -errno, which is raised."""
    result = function(*arguments)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
