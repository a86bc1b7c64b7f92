"""The forkserver: one thread, the app imported, forks a child on request.

It begins in one of two ways: forked from the worker while that has one thread
(``begin_as_fork``), or as a fresh interpreter that imports the app (see ``fresh``). Either
way it ends in :func:`serve`.

How a child comes to be the worker's own child, and who reaps whom::

    worker          asks: sends (request, name, slot) and the child's end of the socket pair
      forkserver    forks a midwife; when that has ended, tells the worker the child's pid
                    and forks the next, to be there for the next request
        midwife     takes one request, forks the child, writes its pid to a pipe, exits
          child     loses its parent, is adopted by the worker, which holds
                    PR_SET_CHILD_SUBREAPER while a start is under way

The worker reaps the forkserver and all children, the forkserver reaps midwives. Only
the midwife holds a child's end, from the request to the fork. If the forkserver dies at
any step, so does the midwife, and the worker sees the end of their socket; if a midwife
is killed, the forkserver says that a request is lost. Running children are not concerned.

Everything here runs in the forkserver, but for ``begin_as_fork`` which is called in the
worker.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import pickle
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, NoReturn

from celery.utils.imports import import_from_cwd

from memsafe_pool import arenas, child, heap, native, upstream

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

#: What a midwife says at its end: the request, and the child's pid or -errno.
_BIRTH = struct.Struct("=Qq")

#: Exit codes of a midwife that found the socket closed, or for which there was nothing to do.
_CLOSED, _UNUSED = 42, 43

#: Seconds that a thread which was joined may take to leave.
_JOIN_SECONDS = 0.5

#: Seconds a midwife waits for the next request. It makes that faster by the time of a fork, and
#: costs 1 MB.
MIDWIFE_SECONDS = 10.0

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


def begin_as_fork(app: Any, role: Role, sock: socket.socket, descriptors: Descriptors) -> int:
    """Fork the forkserver from the worker; return its pid. Runs in the worker.

    The heap is collected and frozen first, so that no collection in the worker, the
    forkserver or a child writes to the pages they share.

    Arguments:
        sock: The forkserver's end of its socket pair with the worker.
        descriptors: What was open when the pool began, and may be shared.
    """
    app.finalize()
    upstream.build_tracers(app, role.terms.hostname)
    gc.collect()
    gc.freeze()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
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
    try:
        upstream.prepare_app(app, role.terms.hostname, fresh=fresh)
        if fresh or role.preload:
            gc.collect()
            gc.freeze()
    except BaseException:  # noqa: BLE001 - the worker logs it and decides
        send_failure(sock)
        os._exit(1)
    arenas.read()  # imports what it needs, once for all children
    with contextlib.suppress(OSError):  # not with this C library
        # So that free heap which a child takes into use is new to it, and no page to copy.
        native.release_heap()
    heap.look()  # children know from it what can be free in theirs
    threads = settled_thread_count()
    if threads > 1:
        _send(sock, REFUSED, _describe_threads(threads, blame))
        os._exit(1)
    _send(sock, READY, os.getpid())
    _Server(app, role.terms, sock).run()


def preload(role: Role) -> None:
    """Import what children are to share beyond the app."""
    for module in role.preload:
        import_from_cwd(module)


def send_failure(sock: socket.socket) -> None:
    """Tell the worker that the forkserver can not begin, with the current exception."""
    _send(sock, FAILED, traceback.format_exc())


def settle(role: Role) -> None:
    """Become a process that only the worker can end."""
    for name in ("SIGTERM", "SIGINT", "SIGQUIT", "SIGHUP", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child.tie_to_parent(role.terms.worker_pid)
    upstream.become_child("ForkServer", None, role.terms.worker_pid)


def _send(sock: socket.socket, kind: str, *rest: Any) -> None:
    if rest and isinstance(rest[0], str):
        rest = (rest[0][: MAX_MESSAGE_BYTES // 4],)
    sock.send(pickle.dumps((kind, *rest)))


class _Server:
    """Keeps a midwife waiting while children are asked for, so that the next is one fork away."""

    def __init__(self, app: Any, terms: child.Terms, sock: socket.socket) -> None:
        self.app = app
        self.terms = terms
        self.sock = sock
        self.birth_reader, self.birth_writer = os.pipe()
        os.set_blocking(self.birth_reader, False)
        self.pid = os.getpid()

    def run(self) -> NoReturn:
        """Serve requests until the worker closes the socket."""
        warm = False
        while True:
            if not warm:
                _wait_readable(self.sock)
                if _is_closed(self.sock):
                    os._exit(0)
            try:
                midwife = os.fork()
            except OSError as exc:
                self._do_without_midwife(exc)
                continue
            if midwife == 0:
                self._be_midwife()
            _, status = os.waitpid(midwife, 0)
            code = os.waitstatus_to_exitcode(status)
            if code == _CLOSED:
                os._exit(0)
            warm = code != _UNUSED
            if warm:
                self._report_birth()

    def _report_birth(self) -> None:
        # Only now, when the midwife is gone, is the child the worker's own.
        try:
            birth = os.read(self.birth_reader, _BIRTH.size)
        except BlockingIOError:
            _send(self.sock, LOST)  # it was killed, and its request with it
        else:
            self._report(*_BIRTH.unpack(birth))

    def _report(self, request: int, result: int) -> None:
        if result > 0:
            _send(self.sock, FORKED, request, result)
        else:
            _send(self.sock, FORK_FAILED, request, -result)

    def _do_without_midwife(self, error: OSError) -> None:
        """Answer one request with the error that keeps even a midwife from being forked."""
        request = _receive_request(self.sock)
        if request is None:
            os._exit(0)
        os.close(request.fd)
        self._report(request.id, -(error.errno or errno.EAGAIN))

    def _be_midwife(self) -> NoReturn:
        code = 1
        try:
            child.tie_to_parent(self.pid)
            if not _wait_readable(self.sock, MIDWIFE_SECONDS):
                os._exit(_UNUSED)
            request = _receive_request(self.sock)
            if request is None:
                code = _CLOSED
            else:
                self._bear(request)
                code = 0
        finally:
            os._exit(code)

    def _bear(self, request: _Request) -> None:
        midwife = os.getpid()
        try:
            result = os.fork()
        except OSError as exc:
            result = -(exc.errno or errno.EAGAIN)
        if result == 0:
            self._be_child(request, midwife)
        os.write(self.birth_writer, _BIRTH.pack(request.id, result))

    def _be_child(self, request: _Request, midwife: int) -> NoReturn:
        try:
            self.sock.close()
            os.close(self.birth_reader)
            os.close(self.birth_writer)
            sock = socket.socket(fileno=request.fd)
            upstream.become_child(request.name, request.slot, self.terms.worker_pid)
            terms = replace(self.terms, name=request.name, index=request.slot)
            child.run(self.app, sock, terms, midwife)
        finally:
            os._exit(1)


class _Request(NamedTuple):
    id: int
    name: str
    slot: int
    fd: int


def _wait_readable(sock: socket.socket, seconds: float | None = None) -> bool:
    """Wait until there is something to read, or the end; return whether there is."""
    poll = select.poll()  # select() takes no descriptor above 1023
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def _is_closed(sock: socket.socket) -> bool:
    """Tell whether a socket that can be read has nothing but its end."""
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except ConnectionError:
        return True


def _receive_request(sock: socket.socket) -> _Request | None:
    """Wait for the worker's next request; None if it has closed the socket."""
    try:
        data, fds, _, _ = socket.recv_fds(sock, MAX_MESSAGE_BYTES, 1)
    except ConnectionError:
        return None
    if not data:
        return None
    number, name, slot = pickle.loads(data)
    return _Request(number, name, slot, fds[0])


def open_descriptors() -> Descriptors:
    """Return the descriptors of this process that are open now."""
    files = {}
    for name in os.listdir("/dev/fd"):
        with contextlib.suppress(OSError):  # the one that listed the others
            status = os.fstat(int(name))
            files[int(name)] = status.st_dev, status.st_ino
    return files


def cut_off(descriptors: Descriptors, keep: int) -> None:
    """Part a forked process from what the worker has opened since ``descriptors`` were all.

    Those are its connections to the broker, its event loop, its ends of children's sockets. The
    numbers stay taken, by the null device: objects that believe to own them are still
    around, and must not close what gets the number next.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for fd, file in open_descriptors().items():
        if descriptors.get(fd) != file and fd not in {keep, null}:
            os.dup2(null, fd, inheritable=False)


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
    if sys.platform != "linux":
        return threading.active_count()
    return len(os.listdir("/proc/self/task"))


def _describe_threads(count: int, blame: Callable[[], str] | None) -> str:
    names = [repr(thread.name) for thread in threading.enumerate() if thread is not threading.main_thread()]
    text = f"{count - 1} thread(s) run besides the main one"
    if names:
        text += f" ({', '.join(names)})"
    if blame is not None and (culprits := blame()):
        text += f", started by the import of {culprits}"
    return text
