"""The forkserver: the app imported, no thread but those that this starts, forks a child on request.

It begins in one of two ways: forked from the worker while no other thread runs Python code there
(``begin_as_fork``), or as a fresh interpreter that imports the app (see ``fresh``). Either
way it ends in :func:`serve`.

How a child comes to be the worker's own child, and who reaps whom::

    worker          asks: sends (request, name, slot) and the child's end of the socket pair
      forkserver    makes a midwife on its own memory (vfork), and stands still until that has
                    ended; reaps it, and tells the worker the child's pid
        midwife     forks the child, leaves its pid in the forkserver's memory, exits
          child     loses its parent, is adopted by the worker, which holds
                    PR_SET_CHILD_SUBREAPER while a start is under way

The worker reaps the forkserver and all children, the forkserver reaps midwives. The
forkserver holds a child's end from the request until the midwife is gone. If one of the two
is killed at any step, the other one ends as well, and the worker sees the end of its socket.
Running children are not concerned.

Without the C helper the midwife is a fork as well, and writes the pid to a pipe. If it is killed,
the forkserver says that the request is lost.

Everything here runs in the forkserver, but for ``begin_as_fork`` which is called in the
worker.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import gc
import os
import pickle
import posix
import re
import resource
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from celery.utils.imports import import_from_cwd

from memsafe_pool import child, native, scarcity, upstream

__all__ = [
    "FAILED",
    "FORKED",
    "FORK_FAILED",
    "LOST",
    "MAX_MESSAGE_BYTES",
    "READY",
    "REFUSED",
    "Descriptors",
    "Role",
    "begin_as_fork",
    "cut_off",
    "fork_works",
    "is_descendant",
    "native_threads",
    "open_descriptors",
    "preload",
    "python_threads",
    "send_failure",
    "serve",
    "settle",
    "thread_ids",
]

#: Kinds of messages from the forkserver: ``(kind, ...)``.
READY, REFUSED, FAILED = "ready", "refused", "failed"
FORKED, FORK_FAILED, LOST = "forked", "fork failed", "lost"

#: What a midwife leaves behind: the child's pid, or -errno.
_RESULT = struct.Struct("=q")

#: ``RLIMIT_LOCKS``, which Linux has not looked at since 2.4.25.
_MARKED_LIMIT = 10

#: The forkserver sets that limit to the sum of this and the worker's pid: a mark that all its descendants
#: inherit, by fork and exec, and keep when they have ended.
_MARK = 1 << 30

#: Where nothing lists open descriptors, so many numbers are tried: 1 ms.
_MOST_TRIED = 4096

#: Seconds that a process forked for a trial may take; it takes 3 to 20 ms.
_TRIAL_SECONDS = 5.0

#: Names of threads of libraries that no child can use once they run: those of polars do all its work.
_DEAF_TO_FORK = re.compile(r"polars-\d")

#: Largest message in bytes; texts are cut to fit.
MAX_MESSAGE_BYTES = 65536


#: Open descriptors: number, and which file that is (device, inode).
Descriptors = Mapping[int, tuple[int, int]]


@dataclass(frozen=True)
class Role:
    """What a forkserver has to know.

    Attributes:
        terms: What all its children have in common; name and index are set for each.
        preload: Modules to import before anything is forked.
    """

    terms: child.Terms
    preload: tuple[str, ...] = ()


def begin_as_fork(
    app: Any, role: Role, sock: socket.socket, descriptors: Descriptors, *, again: bool = False
) -> int:
    """Fork the forkserver from the worker; return its pid. Runs in the worker.

    The heap is collected and frozen first, so that no collection in the worker, the
    forkserver or a child writes to the pages they share.

    Arguments:
        sock: The forkserver's end of its socket pair with the worker.
        descriptors: What was open when the pool began, and may be shared.
        again: Whether it is not the first. What the worker has by then comes and goes, and what is
            frozen there is never collected.
    """
    upstream.send_before_create_process(role.terms.hostname)
    app.finalize()
    upstream.build_tracers(app, role.terms.hostname)
    gc.collect()
    if not again:
        gc.freeze()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # see fork_works
        pid = os.fork()
    if pid:
        return pid
    try:
        gc.freeze()
        cut_off(descriptors, sock.fileno())
        settle(role)
        preload(role)
        serve(app, role, sock, fresh=False)
    except BaseException:  # noqa: BLE001 - the worker logs it and decides
        send_failure(sock)
    finally:
        os._exit(1)  # must not return into the worker's code


def serve(
    app: Any,
    role: Role,
    sock: socket.socket,
    *,
    fresh: bool,
    blame: Callable[[Collection[int]], str] | None = None,
) -> NoReturn:
    """Prepare the app, then fork children until the worker closes the socket.

    Arguments:
        fresh: Whether this process is a new interpreter.
        blame: Says which imports have started threads of these kernel ids.
    """
    sock.setblocking(True)  # whatever socket.setdefaulttimeout() says
    # A handler of the app's is not for midwives: children have it again.
    on_child_end = signal.getsignal(signal.SIGCHLD)
    if on_child_end is not None:  # else it is not Python's
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        upstream.prepare_app(app, role.terms.hostname, fresh=fresh)
        if fresh:
            # Before the heap is frozen and threads are counted. A forked one has what the worker had loaded.
            upstream.send_before_create_process(role.terms.hostname)
        if fresh or role.preload:
            gc.collect()
            gc.freeze()
        with contextlib.suppress(OSError):  # not with this C library
            # So that free heap which a child takes into use is new to it, and no page to copy.
            native.release_heap()
        why = _reason_not_to_fork(blame)
    except BaseException:  # noqa: BLE001 - the worker logs it and decides
        send_failure(sock)
        os._exit(1)
    if why:
        _send(sock, REFUSED, why)
        os._exit(1)
    _send(sock, READY, os.getpid())
    _Server(app, role.terms, sock, on_child_end).run()


def preload(role: Role) -> None:
    """Import what children are to share beyond the app."""
    for module in role.preload:
        import_from_cwd(module)


def send_failure(sock: socket.socket) -> None:
    """Tell the worker that the forkserver can not begin, with the current exception."""
    _send(sock, FAILED, traceback.format_exc(), scarcity.is_shortage(sys.exc_info()[1]))


def settle(role: Role) -> None:
    """Become a process that only the worker can end."""
    for name in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    with contextlib.suppress(OSError, ValueError):  # not in gVisor, or above the hard limit
        hard = resource.getrlimit(_MARKED_LIMIT)[1]
        resource.setrlimit(_MARKED_LIMIT, (_MARK + role.terms.worker_pid, hard))
    child.tie_to_parent(role.terms.worker_pid)
    upstream.become_child("ForkServer", None, role.terms.worker_pid)
    upstream.set_title(role.terms.hostname)


def is_descendant(pid: int) -> bool:
    """Whether a process, which may have ended, descends from a forkserver of this one. Runs in the worker."""
    try:
        return resource.prlimit(pid, _MARKED_LIMIT)[0] == _MARK + os.getpid()
    except (OSError, ValueError):
        return False  # another user's, or gone


def _send(sock: socket.socket, kind: str, *rest: Any) -> None:
    if rest and isinstance(rest[0], str):
        rest = (rest[0][: MAX_MESSAGE_BYTES // 4], *rest[1:])
    sock.send(pickle.dumps((kind, *rest)))


class _Server:
    """Forks a child for each request."""

    def __init__(self, app: Any, terms: child.Terms, sock: socket.socket, on_child_end: Any) -> None:
        self.app, self.on_child_end = app, on_child_end
        self.terms = terms
        self.sock = sock

    def run(self) -> NoReturn:
        """Serve requests until the worker closes the socket."""
        while (request := _receive_request(self.sock)) is not None:
            _send(self.sock, *self._bear(request))
        os._exit(0)

    def _bear(self, request: _Request) -> tuple[str, int] | tuple[str, int, int]:
        """Fork a child, and return what to answer."""
        if not request.fds:  # there was no number free for it
            return FORK_FAILED, request.id, errno.EMFILE
        upstream.send_before_create_process(self.terms.hostname)
        try:
            pid, midwife = _fork_orphan()
        except OSError as exc:
            os.close(request.fds[0])
            if exc.errno == errno.ECHILD:
                return LOST, request.id
            return FORK_FAILED, request.id, exc.errno or errno.EAGAIN
        if pid == 0:
            self._be_child(request, midwife)
        os.close(request.fds[0])
        return FORKED, request.id, pid

    def _be_child(self, request: _Request, midwife: int) -> NoReturn:
        try:
            self.sock.close()
            if callable(self.on_child_end):
                signal.signal(signal.SIGCHLD, self.on_child_end)
            sock = socket.socket(fileno=request.fds[0])
            try:
                sock.set_inheritable(False)  # as any other descriptor: what tasks start must not have it
                upstream.become_child(request.name, request.slot, self.terms.worker_pid)
            except BaseException:
                child.send_failure(sock)
                raise
            terms = replace(self.terms, name=request.name, index=request.slot)
            child.run(self.app, sock, terms, midwife)
        finally:
            os._exit(1)


class _Request(NamedTuple):
    id: int
    name: str
    slot: int
    fds: list[int]


def _receive_request(sock: socket.socket) -> _Request | None:
    """Wait for the worker's next request; None if it has closed the socket."""
    try:
        data, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE_BYTES, 1)
    except ConnectionError:
        return None
    if not data:
        return None
    number, name, slot = pickle.loads(data)
    return _Request(number, name, slot, fds)


def _fork_orphan() -> tuple[int, int]:
    """As :func:`native.fork_orphan`, but everywhere."""
    if os.fork is posix.fork:  # else somebody has put another there, which is to be called
        try:
            return native.fork_orphan()
        except OSError as exc:
            # Whatever else it is: some sandboxes refuse vfork, each in its own words.
            if exc.errno == errno.ECHILD or scarcity.is_errno(exc.errno):
                raise
    return _fork_twice()


def _fork_twice() -> tuple[int, int]:
    """As :func:`_fork_orphan`; ECHILD if the midwife was killed: then there is an orphan, or not."""
    us = os.getpid()
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    try:
        midwife = os.fork()
        if midwife == 0:
            child.tie_to_parent(us)
            midwife = os.getpid()
            try:
                orphan = os.fork()
            except OSError as exc:
                orphan = -(exc.errno or errno.EAGAIN)
            if orphan == 0:
                return 0, midwife
            with contextlib.suppress(OSError):
                os.write(writer, _RESULT.pack(orphan))
            os._exit(0)
        os.waitpid(midwife, 0)
        try:
            (orphan,) = _RESULT.unpack(os.read(reader, _RESULT.size))
        except BlockingIOError:
            orphan = -errno.ECHILD
    finally:
        os.close(reader)
        os.close(writer)
    if orphan < 0:
        raise OSError(-orphan, os.strerror(-orphan))
    return orphan, midwife


def open_descriptors() -> Descriptors:
    """Return the descriptors of this process that are open now."""
    try:
        numbers = list(map(int, os.listdir("/dev/fd")))
    except OSError:  # no /proc
        numbers = list(range(min(os.sysconf("SC_OPEN_MAX"), _MOST_TRIED)))
    files = {}
    for number in numbers:
        with contextlib.suppress(OSError):  # it is not open, or was the one that listed the others
            status = os.fstat(number)
            files[number] = status.st_dev, status.st_ino
    return files


def cut_off(descriptors: Descriptors, keep: int) -> None:
    """Part a forked process from what the worker has opened since ``descriptors`` were all.

    Those are its connections to the broker, its event loop, its ends of children's sockets. The
    numbers stay taken, by the null device: objects that believe to own them are still
    around, and must not close what gets the number next. Files that are appended to stay: such is
    a log that was opened anew when it had been rotated.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for fd, file in open_descriptors().items():
        if descriptors.get(fd) != file and fd not in {keep, null} and not _is_log(fd):
            os.dup2(null, fd, inheritable=False)


def _is_log(fd: int) -> bool:
    return stat.S_ISREG(os.fstat(fd).st_mode) and bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND)


def python_threads() -> list[tuple[str, int]]:
    """Return name and kernel id (0: unknown) of each other thread that runs Python code."""
    others = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    # Those that `threading` did not start, too. By frame: gevent has get_ident() tell greenlets.
    frames, ours = sys._current_frames(), sys._getframe()  # noqa: SLF001 - there is no other way
    known = {thread.ident for thread in others}
    unknown = [ident for ident, frame in frames.items() if frame is not ours and ident not in known]
    return [
        *((thread.name, thread.native_id or 0) for thread in others),
        *((f"thread {ident:#x}", 0) for ident in unknown),
    ]


def thread_ids() -> set[int]:
    """Return kernel ids of all threads of this process; none where there is no /proc."""
    with contextlib.suppress(FileNotFoundError):
        return set(map(int, os.listdir("/proc/self/task")))
    return set()


def native_threads() -> dict[int, str]:
    """Return kernel ids and names of this process's threads that Python does not know."""
    known = {thread.native_id for thread in threading.enumerate()} | {threading.get_native_id()}
    found = {}
    for tid in thread_ids():
        if tid not in known:
            with contextlib.suppress(OSError):  # it has just ended
                found[tid] = (
                    Path(f"/proc/self/task/{tid}/comm").read_text(encoding="utf-8", errors="replace").strip()
                )
    return found


def fork_works() -> bool:
    """Whether a process forked now can allocate memory, use OpenMP, and end.

    It cannot if another thread holds a lock that the C library, an allocator, or a handler which runs at
    each fork needs, nor if GNU OpenMP or polars has been used here. What is stuck is killed after 5 s.
    """
    if any(map(_DEAF_TO_FORK.match, native_threads().values())):
        return False
    with warnings.catch_warnings():
        # Python 3.12 and later warn of each fork beside other threads: that is what is tried here.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            pid = os.fork()
        except OSError:
            return True  # nothing was tried; what the system refuses is said when it matters
    if pid == 0:
        try:
            for power in range(4, 26):  # from the allocator's smallest blocks to mapped ones
                bytearray(1 << power)
            _use_openmp()
            os._exit(0)
        finally:
            os._exit(1)
    deadline = time.monotonic() + _TRIAL_SECONDS
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status == 0
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return False


def _use_openmp() -> None:
    """Run nothing in parallel: GNU OpenMP waits for ever if its threads have not come along."""
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as maps:
        # Each wheel (scikit-learn, xgboost, torch) brings its own.
        paths = {line.split(maxsplit=5)[5].strip() for line in maps if "/libgomp" in line}
    for path in paths:
        nothing = ctypes.cast(ctypes.CDLL(None).getpid, ctypes.c_void_p)
        ctypes.CDLL(path).GOMP_parallel(nothing, None, 2, 0)


def _reason_not_to_fork(blame: Callable[[Collection[int]], str] | None) -> str:
    """Return why this process must not fork children; nothing if it may."""
    threads = [*python_threads(), *((name, tid) for tid, name in native_threads().items())]
    if not threads or fork_works():
        return ""
    text = f"a process forked beside other threads ({', '.join(name for name, _ in threads)}) was stuck"
    if blame is not None and (culprits := blame({tid for _, tid in threads if tid})):
        text += f", started by the import of {culprits}"
    return text
