"""The C helper, as Python functions: the allocator, the memory of this process, prctl.

Covers the calls that Python itself cannot make, or not cheaply. They go through the extension
``memsafe_pool._native`` (``csrc/``), or, where that was not built, through ``native_ctypes``. All but the
fork release the GIL while they run, and a failure is an :class:`OSError` with ``errno``: ``ENOSYS`` where the
platform has no such call. All numbers are about the process that calls, also after a fork; any thread may
call.

Does not decide when to trim, what is too much, nor who adopts whom; :mod:`memsafe_pool.memory` reads the
memory of other processes. Imports neither Celery nor billiard, and ctypes only for a fork, or at the first
call without the extension.

Costs are per call from Python on one core of a 2-core virtual machine (Linux 6.18, glibc 2.36), with the
extension. Without it, what reads /proc opens the file each time and takes 3 to 10 us.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from memsafe_pool.native_ctypes import ALLOCATORS, CtypesLibrary, high_water_kilobytes

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "EXTENSION_ERROR",
    "HAVE_EXTENSION",
    "Measures",
    "OwnMemory",
    "allocator",
    "fork_orphan",
    "get_child_subreaper",
    "measure",
    "missing",
    "own_memory",
    "peak",
    "raise_oom_score_adj",
    "release_heap",
    "reset_peak",
    "set_child_subreaper",
    "set_parent_death_signal",
]


class OwnMemory(NamedTuple):
    """Memory of this process, in bytes; see :func:`own_memory`."""

    resident: int
    anonymous: int


class Measures(NamedTuple):
    """Memory of this process in bytes, and page faults; see :func:`measure`."""

    resident: int
    anonymous: int
    peak: int
    faults: int


class _Library(Protocol):
    """What ``csrc/memsafe_native.h`` declares: each returns 0 or a positive value, or -errno.

    Arguments that are called ``*_bytes`` and are not numbers are cells, whose item 0 is written.
    """

    def ms_allocator(self) -> int: ...
    def ms_release_heap_bytes(self) -> int: ...
    def ms_own_memory_bytes(self, resident_bytes: Any, anonymous_bytes: Any, /) -> int: ...
    def ms_peak_resident_bytes(self) -> int: ...
    def ms_measure(self, numbers: Any, /) -> int: ...
    def ms_reset_peak(self) -> int: ...
    def ms_raise_oom_score_adj(self, by: int, /) -> int: ...
    def ms_set_parent_death_signal(self, signum: int, /) -> int: ...
    def ms_set_child_subreaper(self, on: int, /) -> int: ...
    def ms_get_child_subreaper(self) -> int: ...
    def ms_fork_orphan(self, before: Any, in_parent: Any, in_orphan: Any, midwife: Any, /) -> int: ...


#: Those whose free pages release_heap can give back.
_RELEASING = frozenset({"glibc", "jemalloc", "mimalloc", "tcmalloc", "macos"})


#: Why the extension cannot be used, in the import's own words; None when it can.
EXTENSION_ERROR: str | None = None

_library: _Library
_new_cell: Callable[[], Any]
_new_numbers: Callable[[], Any]
try:
    from memsafe_pool._native import ffi as _ffi
    from memsafe_pool._native import lib as _library
except ImportError as error:
    EXTENSION_ERROR = str(error)
    _library = CtypesLibrary()

    def _new_cell() -> Any:
        return [0]

    def _new_numbers() -> Any:
        return [0] * 4
else:
    _CELL, _NUMBERS = _ffi.typeof("int64_t *"), _ffi.typeof("int64_t[4]")

    def _new_cell() -> Any:
        return _ffi.new(_CELL)

    def _new_numbers() -> Any:
        return _ffi.new(_NUMBERS)


#: True when the calls go through the C extension, False when they go through ctypes.
HAVE_EXTENSION: bool = EXTENSION_ERROR is None


def missing() -> list[str]:
    """What this process has to do without, as short phrases for a log line; empty where all is there.

    About 40 us. Nothing is changed by asking, and no failure is raised.
    """
    phrases = []
    name = allocator()
    if not HAVE_EXTENSION:
        phrases.append("the C extension is not built, so calls through ctypes and /proc are slower")
    if name not in _RELEASING:
        phrases.append(f"free heap cannot be given back ({name} allocator)")
    for phrase, probe in (
        ("own memory cannot be read", own_memory),
        ("private memory cannot be read", _probe_private),
        ("the highest resident memory is that of the program's whole life", _probe_high_water),
        ("the peak of one task cannot be told from earlier ones", _probe_reset),
        ("no prctl, so children cannot be tied to their parent", get_child_subreaper),
    ):
        try:
            probe()
        except OSError as error:
            phrases.append(f"{phrase} ({error.strerror})")
    return phrases


def allocator() -> str:
    """Whose malloc this process uses.

    "glibc", "musl", "jemalloc", "mimalloc", "tcmalloc", "macos" or "unknown". A library that is loaded
    but does not serve malloc does not count. Without the extension all but glibc's are "unknown". 0.2 us, the
    first call 65 us.
    """
    return ALLOCATORS[_library.ms_allocator()]


def release_heap() -> int:
    """Give the free pages of the heap back to the kernel; return how many bytes that was.

    The call is the allocator's own: ``malloc_trim`` with glibc, ``arena.<all>.purge`` with jemalloc,
    ``mi_collect`` with mimalloc, ``MallocExtension_ReleaseFreeMemory`` with tcmalloc,
    ``malloc_zone_pressure_relief`` on macOS. What threads keep in caches of their own stays; with jemalloc
    and tcmalloc the calling thread's goes. mimalloc 2.0 gives back only segments of 32 MB in which no block
    survives.

    The number is the resident anonymous memory of this process before and after: 0 when there was
    nothing to win, approximate when other threads allocate meanwhile. It takes about 0.1 ms per MB
    given back. Objects that are garbage but not collected yet stay: ``gc.collect()`` first.

    Raises OSError with ENOSYS when the allocator has no such call (musl) or is not known; without the
    extension it is only known with glibc.
    """
    return _checked(_library.ms_release_heap_bytes)


def own_memory() -> OwnMemory:
    """Read the memory of this process, in bytes.

    `resident`: what is in memory, shared pages included. `anonymous`: of that, what is neither file-backed
    nor shared memory, so heap, stacks and private mappings; pages that a fork shares copy-on-write are in it.

    ``/proc/self/statm``, which the extension keeps open: 3 us. psutil's RSS and USS on macOS.

    Raises OSError when it cannot be read.
    """
    if sys.platform != "linux":
        import psutil

        memory = psutil.Process().memory_full_info()
        return OwnMemory(int(memory.rss), int(memory.uss))
    resident_bytes, anonymous_bytes = _new_cell(), _new_cell()
    _checked(_library.ms_own_memory_bytes, resident_bytes, anonymous_bytes)
    return OwnMemory(int(resident_bytes[0]), int(anonymous_bytes[0]))


def measure() -> Measures:
    """Read what :func:`own_memory` and :func:`peak` do, and the number of minor page faults, all at once.

    3 us; on macOS by the other two.

    Raises OSError when one of them cannot be read.
    """
    if sys.platform != "linux":
        import resource

        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        return Measures(*own_memory(), peak(), faults)
    numbers = _new_numbers()
    if (result := _library.ms_measure(numbers)) < 0:
        raise OSError(-result, os.strerror(-result))
    return Measures(*numbers)


def peak() -> int:
    """Read the highest resident memory of this process since :func:`reset_peak`, in bytes.

    Without a reset: since the process was forked, or its program started. It is ``VmHWM`` of
    ``/proc/self/status`` (4 us), or ``ru_maxrss`` (0.6 us) where that cannot be what is left of the
    program before an exec. What the kernel has not added up yet, up to 0.4 MB for each CPU that the
    process ran on (more if there are over 16), is not in it.

    Raises OSError when it cannot be read.
    """
    return _checked(_library.ms_peak_resident_bytes)


def reset_peak() -> None:
    """Let :func:`peak` begin anew from the present resident memory.

    "5" to ``/proc/self/clear_refs``: 1 us. It also resets VmHWM for everybody else who looks at it, but
    not ``ru_maxrss`` as the parent's ``wait4`` sees it, if that is higher since before an exec.

    Raises OSError: ENOSYS where there is no such thing (macOS), EACCES when the process may not be dumped
    (a change of user without exec), what opening the file raises (EMFILE, ENOENT).
    """
    _checked(_library.ms_reset_peak)


def raise_oom_score_adj(by: int) -> int:
    """Add to this process's ``oom_score_adj``, up to 1000; return by how much it was raised.

    It makes the kernel's out-of-memory killer prefer this process, and those that it makes from now on:
    they inherit the sum, so add once per process, not per generation. Needs no privileges. 3 us.

    Raises OSError: EINVAL when `by` is negative, ENOSYS on macOS.
    """
    return _checked(_library.ms_raise_oom_score_adj, by)


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


def fork_orphan() -> tuple[int, int]:
    """Fork a process that belongs to whoever adopts orphans; return its pid, or 0 in that process.

    The second number is the pid of the process that forked it. That has ended when the call returns here;
    in the new process it may be the parent for a moment longer.

    As :func:`os.fork` with all its hooks, and about as dear: two forks in a row would cost twice that.
    Only for a process with one thread. If the process between the two is killed, this one exits with 1, as
    they share their memory.

    Raises OSError: what fork raises; ENOSYS where this is not Linux, and without the extension.
    """
    if not HAVE_EXTENSION:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    # Through ctypes, which keeps the GIL: between the hooks nothing of Python may run.
    import ctypes

    address = int(_ffi.cast("intptr_t", _ffi.addressof(_library, "ms_fork_orphan")))
    function = ctypes.PYFUNCTYPE(ctypes.c_int64, *[ctypes.c_void_p] * 4)(address)
    hooks = ("PyOS_BeforeFork", "PyOS_AfterFork_Parent", "PyOS_AfterFork_Child")
    midwife = ctypes.c_int64()
    pid = _checked(
        function,
        *(ctypes.cast(getattr(ctypes.pythonapi, hook), ctypes.c_void_p) for hook in hooks),
        ctypes.byref(midwife),
    )
    return pid, midwife.value


def _checked(function: Callable[..., int], *arguments: Any) -> int:
    """The result of a call that returns 0 or a positive value, or -errno, which is raised."""
    result = function(*arguments)
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def _probe_private() -> None:
    """Raise what the file raises from which :mod:`memsafe_pool.memory` has private memory on Linux."""
    if sys.platform == "linux":
        os.close(os.open("/proc/self/smaps_rollup", os.O_RDONLY | os.O_CLOEXEC))


def _probe_high_water() -> None:
    """Raise ENODATA where Linux does not say VmHWM, so that :func:`peak` has to do with ``ru_maxrss``."""
    if sys.platform == "linux" and high_water_kilobytes() is None:
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))


def _probe_reset() -> None:
    """Raise what :func:`reset_peak` would, without resetting."""
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    os.close(os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC))
