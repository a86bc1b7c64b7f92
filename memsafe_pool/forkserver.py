"""The forkserver: one thread, the app imported, forks a child on request.

It begins in one of two ways: forked from the worker while that has one thread
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
import errno
import fcntl
import gc
import os
import pickle
import posix
import resource
import signal
import socket
import stat
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
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
    "is_descendant",
    "open_descriptors",
    "preload",
    "send_failure",
    "serve",
    "settle",
    "settled_thread_count",
    "thread_count",
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

#: Seconds that a thread which was joined may take to leave.
_JOIN_SECONDS = 0.5

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
    app: Any, role: Role, sock: socket.socket, *, fresh: bool, blame: Callable[[], str] | None = None
) -> NoReturn:
    """Prepare the app, then fork children until the worker closes the socket.

    Arguments:
        fresh: Whether this process is a new interpreter.
        blame: Says which imports have started threads.
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
        threads = settled_thread_count()
    except BaseException:  # noqa: BLE001 - the worker logs it and decides
        send_failure(sock)
        os._exit(1)
    if threads > 1:
        _send(sock, REFUSED, _describe_threads(threads, blame))
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


def settled_thread_count() -> int:
    """Return how many threads this process has that a fork would lose.

    Libraries that are made for fork, such as OpenBLAS, end their threads before one and
    start them again when needed; so a process is forked that exits at once, and the threads are
    counted after that. Linux only; elsewhere Python's own threads are counted.
    """
    if thread_count() == 1 or sys.platform != "linux":
        return thread_count()
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    # A joined thread leaves /proc a moment after the join has returned.
    deadline = time.monotonic() + _JOIN_SECONDS
    while (count := thread_count()) > 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    return count


def thread_count() -> int:
    """Return how many threads the kernel sees in this process; Python's own where it can not say."""
    try:
        return len(os.listdir("/proc/self/task"))
    except FileNotFoundError:  # not Linux, or no /proc
        return threading.active_count()


def _describe_threads(count: int, blame: Callable[[], str] | None) -> str:
    names = [repr(thread.name) for thread in threading.enumerate() if thread is not threading.main_thread()]
    text = f"{count - 1} thread(s) run besides the main one"
    if names:
        text += f" ({', '.join(names)})"
    if blame is not None and (culprits := blame()):
        text += f", started by the import of {culprits}"
    return text
