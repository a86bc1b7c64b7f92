"""A bound on the memory that one task may take, kept by the kernel.

``RLIMIT_DATA`` bounds what a process has mapped to write to and shares with nobody: an allocation
that would exceed it fails, and Python raises MemoryError there. It counts what is mapped, also where
nothing was written yet, so it is reached at the latest when so much is used.

Programs inherit such a limit, but it is computed from what the child has mapped and says nothing of them.
So it is lifted while Python starts one. What that does not cover: a program that a library in C starts by
itself, with ``posix_spawn`` or ``system`` of the C library.

Linux 4.7 and later; elsewhere nothing is bounded. Imports neither Celery nor billiard.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

__all__ = ["Bound"]

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

#: Where /proc/self/statm has data and stack, in pages: proc(5).
_DATA_FIELD = 5


class Bound:
    """As a context, the process may map so many bytes beside what it has when that begins.

    One for a process: what starts programs is replaced when it is first used, for good.

    Attributes:
        size: Bytes, or 0: then nothing is bounded.
    """

    def __init__(self) -> None:
        self.size = 0
        self._depth = 0
        self._before: tuple[int, int] | None = None
        self._within = (0, 0)
        self._starting = 0
        self._lock = threading.Lock()
        self._installed = False

    def __enter__(self) -> None:
        """Bound it; not again where a task calls another one."""
        self._depth += 1
        mapped = _mapped_bytes() if self.size and self._depth == 1 else None
        if mapped is None:
            return
        if not self._installed:
            self._installed = True
            self._exempt_programs()
        soft, hard = before = resource.getrlimit(resource.RLIMIT_DATA)
        most = min(limit for limit in (mapped + self.size, soft, hard) if limit != resource.RLIM_INFINITY)
        with self._lock:
            self._before, self._within = before, (most, hard)
            resource.setrlimit(resource.RLIMIT_DATA, self._within)

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth <= 0:
            self.lift()

    def lift(self) -> None:
        """Bound it no more: what handles a MemoryError needs memory, and the task still has its own."""
        self._depth = 0
        with self._lock:
            if self._before is not None:
                resource.setrlimit(resource.RLIMIT_DATA, self._before)
                self._before = None

    # -- programs

    def _exempt_programs(self) -> None:
        """Lift the bound in each place where Python starts a process, for as long as that takes."""
        import _posixsubprocess  # what subprocess and multiprocessing call

        os.register_at_fork(
            before=self._suspend, after_in_parent=self._renew, after_in_child=self._begin_forked
        )
        places: list[tuple[Any, str]] = [
            (_posixsubprocess, "fork_exec"),
            (subprocess, "_fork_exec"),  # from Python 3.11 a name of its own
            (os, "posix_spawn"),
            (os, "posix_spawnp"),
            (os, "system"),
        ]
        for module, name in places:
            start = getattr(module, name, None)
            if start is not None:
                setattr(module, name, self._unbound(start))

    def _unbound(self, start: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(start)
        def unbound(*args: Any, **kwargs: Any) -> Any:
            self._suspend()
            try:
                return start(*args, **kwargs)
            finally:
                self._renew()

        return unbound

    def _suspend(self) -> None:
        with self._lock:
            self._starting += 1
            if self._before is not None:
                resource.setrlimit(resource.RLIMIT_DATA, self._before)

    def _renew(self) -> None:
        with self._lock:
            self._starting -= 1
            if not self._starting and self._before is not None:
                resource.setrlimit(resource.RLIMIT_DATA, self._within)

    def _begin_forked(self) -> None:
        """In a process that a task has forked: it is not the task."""
        self._lock = threading.Lock()  # somebody may have held it
        self.size, self._starting, self._before = 0, 0, None


def _mapped_bytes() -> int | None:
    """Private memory that can be written to; None where that is not bounded by the limit."""
    if sys.platform != "linux":
        return None
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read(256).split()[_DATA_FIELD]) * _PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return None
