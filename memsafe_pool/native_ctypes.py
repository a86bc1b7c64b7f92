"""The C helper without the extension: its functions through ctypes and ``/proc``.

For ``native``, which has the documented functions, and says what each costs. ``csrc`` is the other way to
have them, and has the reasons in its comments. Of allocators this knows glibc's alone: with another one free
heap is not given back, and the worker says so. Imports neither Celery nor billiard, and ctypes only at the
first call that needs it.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

__all__ = ["ALLOCATORS", "CtypesLibrary", "high_water_kilobytes"]

#: In the order of MS_ALLOCATOR_* in csrc/memsafe_native.h.
ALLOCATORS = ("unknown", "glibc", "musl", "jemalloc", "mimalloc", "tcmalloc", "macos")


class CtypesLibrary:
    """The same functions without the extension: on the C library that this process already has, and /proc.

    The comments in ``csrc`` give the reasons. Files of /proc are opened at each call, so there is nothing
    that a fork or a closed descriptor could spoil.
    """

    # <linux/prctl.h>
    PR_SET_PDEATHSIG = 1
    PR_SET_CHILD_SUBREAPER = 36
    PR_GET_CHILD_SUBREAPER = 37

    def __init__(self, c_library: Any = None) -> None:
        """`c_library` has the C functions as attributes; by default it is opened at the first call."""
        self._c_library = c_library
        self._allocator: int | None = None

    def ms_allocator(self) -> int:
        if self._allocator is None:
            provider = self._provider("malloc_usable_size")
            is_glibc = provider is not None and provider == self._provider("gnu_get_libc_version")
            self._allocator = ALLOCATORS.index("glibc" if is_glibc else "unknown")
        return self._allocator

    def ms_release_heap_bytes(self) -> int:
        import ctypes

        if ALLOCATORS[self.ms_allocator()] != "glibc":
            return -errno.ENOSYS
        trim = self._function("malloc_trim")
        trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
        before_bytes = self._anonymous_memory()
        trim(0)
        after_bytes = self._anonymous_memory()
        return 0 if before_bytes < 0 or after_bytes < 0 else max(0, before_bytes - after_bytes)

    def ms_own_memory_bytes(self, resident_bytes: Any, anonymous_bytes: Any, /) -> int:
        try:
            fields = _read("/proc/self/statm").split()
        except OSError as error:
            return -_proc_errno(error)
        page_bytes = os.sysconf("SC_PAGE_SIZE")
        resident_bytes[0] = int(fields[1]) * page_bytes
        anonymous_bytes[0] = (int(fields[1]) - int(fields[2])) * page_bytes
        return 0

    def ms_peak_resident_bytes(self) -> int:
        try:
            kilobytes = None if sys.platform == "darwin" else high_water_kilobytes()
        except OSError as error:
            return -_proc_errno(error)
        if kilobytes is not None:
            return 1024 * kilobytes
        import resource

        highest: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return highest if sys.platform == "darwin" else 1024 * highest

    def ms_measure(self, numbers: Any, /) -> int:
        import resource

        resident_bytes, anonymous_bytes = [0], [0]
        if (result := self.ms_own_memory_bytes(resident_bytes, anonymous_bytes)) < 0:
            return result
        if (peak_bytes := self.ms_peak_resident_bytes()) < 0:
            return peak_bytes
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        numbers[:] = [resident_bytes[0], anonymous_bytes[0], peak_bytes, faults]
        return 0

    def ms_reset_peak(self) -> int:
        try:
            _write("/proc/self/clear_refs", b"5")
        except OSError as error:
            return -_proc_errno(error)
        return 0

    def ms_raise_oom_score_adj(self, by: int, /) -> int:
        if by < 0:
            return -errno.EINVAL
        try:
            before = int(_read("/proc/self/oom_score_adj"))
            raised = min(by, 1000 - before)
            if raised > 0:
                _write("/proc/self/oom_score_adj", b"%d" % (before + raised))
        except OSError as error:
            return -_proc_errno(error)
        return raised

    def ms_set_parent_death_signal(self, signum: int, /) -> int:
        return self._prctl(self.PR_SET_PDEATHSIG, signum)

    def ms_set_child_subreaper(self, on: int, /) -> int:
        return self._prctl(self.PR_SET_CHILD_SUBREAPER, on)

    def ms_get_child_subreaper(self) -> int:
        import ctypes

        on = ctypes.c_int(0)
        return self._prctl(self.PR_GET_CHILD_SUBREAPER, ctypes.addressof(on)) or on.value

    def ms_fork_orphan(self, before: Any, in_parent: Any, in_orphan: Any, midwife: Any, /) -> int:
        return -errno.ENOSYS  # vfork returns twice, the first time on a stack that is lent: not for Python

    def _function(self, name: str) -> Any:
        """The C function of that name, or None."""
        import ctypes

        if self._c_library is None:
            self._c_library = ctypes.CDLL(None, use_errno=True)
        return getattr(self._c_library, name, None)

    def _provider(self, name: str) -> int | None:
        """The address at which the object with that function begins, or None."""
        import ctypes

        class DlInfo(ctypes.Structure):
            _fields_ = [
                ("dli_fname", ctypes.c_char_p),
                ("dli_fbase", ctypes.c_void_p),
                ("dli_sname", ctypes.c_char_p),
                ("dli_saddr", ctypes.c_void_p),
            ]

        function, dladdr = self._function(name), self._function("dladdr")
        if function is None or dladdr is None:
            return None
        found = DlInfo()
        dladdr.argtypes, dladdr.restype = [ctypes.c_void_p, ctypes.POINTER(DlInfo)], ctypes.c_int
        if not dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(found)):
            return None
        base: int | None = found.dli_fbase
        return base

    def _prctl(self, option: int, argument: int) -> int:
        import ctypes

        if (prctl := self._function("prctl")) is None:
            return -errno.ENOSYS
        prctl.argtypes, prctl.restype = [ctypes.c_int] + [ctypes.c_ulong] * 4, ctypes.c_int
        return -ctypes.get_errno() if prctl(option, argument, 0, 0, 0) < 0 else 0

    def _anonymous_memory(self) -> int:
        """In bytes, or -errno."""
        resident_bytes, anonymous_bytes = [0], [0]
        return self.ms_own_memory_bytes(resident_bytes, anonymous_bytes) or anonymous_bytes[0]


def _read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, 65536, 0)
    finally:
        os.close(descriptor)


def high_water_kilobytes() -> int | None:
    """VmHWM of this process; None where the kernel has no such line, as in gVisor."""
    _, found, rest = _read("/proc/self/status").partition(b"\nVmHWM:")
    return int(rest.split(None, 1)[0]) if found else None


def _write(path: str, text: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text)
    finally:
        os.close(descriptor)


def _proc_errno(error: OSError) -> int:
    """ENOSYS on a platform that has no /proc, as the extension has it; else the error's own number."""
    return error.errno or errno.EIO if sys.platform == "linux" else errno.ENOSYS
