"""What runs in a child: wait for a task, run it, report, until told to stop.

Everything here runs in the child. The worker's side is ``engine``; what goes over the
socket between them is ``wire``.

How a child ends: the worker sends STOP or closes the socket, a signal arrives, or the
task ends the process. In the first two cases and for SIGTERM ``worker_process_shutdown``
is sent. A child never outlives its worker: on Linux the kernel kills it
(``PR_SET_PDEATHSIG``), elsewhere it sees the closed socket.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

from memsafe_pool import native, scarcity, upstream, wire
from memsafe_pool.errors import SoftMemoryLimitExceeded
from memsafe_pool.meter import Meter
from memsafe_pool.rlimit import Bound

__all__ = ["Terms", "run", "send_failure", "tie_to_parent"]

#: Bytes asked for in one read. Most tasks are smaller, and arrive in one piece.
_READ_BYTES = 65536

#: poll() takes no more than 24 days.
_LONGEST_WAIT_SECONDS = 86400.0

#: How much sooner the kernel ends a child than the worker when memory is out: as if the child had this many
#: thousandths of the memory more.
OOM_SCORE = 300

#: A block of that many bytes is taken and freed at the start of a child, untouched. From then on glibc takes
#: blocks of up to that size from its heap, and gives back what is free at the end of the heap above twice as
#: much, as in any process that has freed such a block; the limits still move (mallopt(3), M_MMAP_THRESHOLD).
#: They begin at 128 KiB, where tasks that compute with blocks of 1 to 4 MB get the same pages from the kernel
#: anew for each operation: base64 of 3 MB takes 1.4 times the CPU time. With 32 MiB, the most that glibc goes
#: along with, containers with many children fill up sooner.
FIRST_BLOCK_BYTES = 8 << 20

#: Seconds a child may take to become the worker's own child after it was forked.
_ADOPTION_SECONDS = 10.0


@dataclass(frozen=True)
class Terms:
    """What a child has to know about its place.

    Attributes:
        worker_pid: The worker, which is or will be this process's parent.
        hostname: Node name of the worker.
        index: Number of the child's slot, from 0; names its log file.
        name: Process name for logs.
        trim_idle: Seconds without work after which it gives memory back; None for never.
        trim_bytes: Growth in bytes that makes that worth it.
    """

    worker_pid: int
    hostname: str
    index: int
    name: str
    trim_idle: float | None = None
    trim_bytes: int = 0


class _Leave(SystemExit):
    """A signal asked this child to end."""


class _Signals:
    """Signal handling of a child: what a signal does depends on whether a task runs."""

    def __init__(self) -> None:
        self.in_task = False
        self.leaving = False

    def install(self) -> None:
        handlers: dict[int, Any] = {
            upstream.TERM_SIGNAL: self._on_terminate,
            signal.SIGQUIT: self._on_terminate,
            signal.SIGHUP: self._on_terminate,
            signal.SIGUSR1: self._on_soft_limit,
            signal.SIGUSR2: self._on_soft_memory_limit,
            signal.SIGINT: signal.SIG_IGN,
        }
        if upstream.TERM_SIGNAL != signal.SIGTERM:
            handlers[signal.SIGTERM] = signal.SIG_IGN
        for signum, handler in handlers.items():
            signal.signal(signum, handler)

    def _on_terminate(self, signum: int, frame: FrameType | None) -> None:
        if self.leaving:
            os._exit(os.EX_SOFTWARE)  # the first one is stuck somewhere
        self.leaving = True
        # The exit status Celery's users know: the number of the signal.
        raise _Leave(signum)

    def _on_soft_limit(self, signum: int, frame: FrameType | None) -> None:
        # One that arrives late, when its task has just ended, must not hit the next.
        if self.in_task:
            raise upstream.SoftTimeLimitExceeded

    def _on_soft_memory_limit(self, signum: int, frame: FrameType | None) -> None:
        if self.in_task:
            raise SoftMemoryLimitExceeded


def run(app: Any, sock: socket.socket, terms: Terms, midwife: int = 0) -> NoReturn:
    """Be a child until the end. The app is imported and prepared; never returns.

    Arguments:
        app: The Celery app.
        sock: This child's end of its socket pair with the worker.
        midwife: As for :func:`tie_to_parent`.
    """
    code = 1
    sock.setblocking(True)  # whatever socket.setdefaulttimeout() says: idle children wait for long
    try:
        signals, meter = _begin(app, sock, terms, midwife)
        if meter is not None:
            code = _serve(app, sock, terms, signals, meter)
    except _Leave as leave:
        code = int(leave.code or 0)
    except ConnectionError:
        code = 1  # the worker has closed the socket: it is gone, or wants us gone
    except BaseException:  # noqa: BLE001 - the process ends here; nothing may pass into the forking code
        traceback.print_exc()
    finally:
        _flush()
        os._exit(code)


def _begin(app: Any, sock: socket.socket, terms: Terms, midwife: int) -> tuple[_Signals, Meter | None]:
    """Do all that comes before the first task; no meter if that failed and the worker knows."""
    signals = _Signals()
    try:
        tie_to_parent(terms.worker_pid, midwife)
        with contextlib.suppress(OSError):  # not on this platform, or forbidden
            native.raise_oom_score_adj(OOM_SCORE)
        upstream.prepare_process(app, terms.hostname)
        signals.install()
        upstream.send_process_init(terms.hostname)
        bytes(FIRST_BLOCK_BYTES)
        meter = Meter(terms.trim_bytes, terms.trim_idle)
    except _Leave:
        raise
    except BaseException:  # noqa: BLE001 - whatever it is, the worker logs it
        send_failure(sock)
        return signals, None
    report = meter.report()
    sock.sendall(wire.head(wire.UP, len(report), os.getpid(), 0.0) + report)
    return signals, meter


def send_failure(sock: socket.socket) -> None:
    """Tell the worker that this process can not start, with the current exception."""
    text = traceback.format_exc().encode(errors="replace")
    shortage = scarcity.is_shortage(sys.exc_info()[1])
    sock.sendall(wire.head(wire.FAILED, len(text), shortage, 0.0) + text)


def tie_to_parent(pid: int, midwife: int = 0) -> None:
    """Arrange for this process to die with its parent ``pid``; end it if that is not its parent.

    The parent-death signal refers to the parent at the time of the call, so it is set
    after an adoption, and the parent is looked at again after it.

    Arguments:
        midwife: The process that forked this one and is about to end, so that ``pid``
            becomes the parent; 0 if ``pid`` is the parent already.
    """
    deadline = time.monotonic() + _ADOPTION_SECONDS
    while midwife and os.getppid() == midwife and time.monotonic() < deadline:
        time.sleep(0.0002)
    with contextlib.suppress(OSError):  # not on this platform: there the closed socket ends us
        native.set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != pid:
        os._exit(1)


def _serve(app: Any, sock: socket.socket, terms: Terms, signals: _Signals, meter: Meter) -> int:
    """Run tasks until there are no more; return the exit code."""
    code = 0
    try:
        _run_tasks(app, sock, terms.hostname, signals, meter)
    except SystemExit as leave:
        code = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
    finally:
        upstream.send_process_shutdown(terms.hostname, code)
    return code


def _run_tasks(app: Any, sock: socket.socket, hostname: str, signals: _Signals, meter: Meter) -> None:
    send, loads, head = sock.sendall, pickle.loads, wire.head
    monotonic = time.monotonic
    pid = os.getpid()
    inbox, bound = _Inbox(sock), Bound()
    while True:
        if inbox.empty and (patience := meter.patience) is not None:
            _trim_if_idle(sock, patience, meter)
        if not inbox.wait():
            return
        if meter.worth_trimming and (inbox.hint == wire.TRIM or (inbox.hint and meter.affords_trim)):
            _trim(sock, meter, collect=False)  # a collection may take longer than the task
        meter.begin()
        job, payload = inbox.take()
        function, args, kwargs = loads(payload)
        del payload  # a large call must not stay in memory twice while it runs
        if inbox.limit_bytes:
            bound.size, inbox.limit_bytes = inbox.limit_bytes, 0
            upstream.wrap_run(app, args[0], hostname, bound)
        send(head(wire.ACK, 0, job, monotonic()))
        signals.in_task = True
        try:
            outcome = True, upstream.shield_worker(function(*args, **kwargs))
        except (SystemExit, KeyboardInterrupt):
            raise  # the process ends, and the worker reports the task as lost with it
        except BaseException as exc:  # the worker gets it
            if signals.leaving:
                raise _Leave(signal.SIGTERM) from exc
            outcome = _failure(exc)
        finally:
            signals.in_task = False
            bound.size = 0
            bound.lift()  # a signal may have kept the task from doing so
            if os.getpid() != pid:
                os._exit(0)  # the task has forked, and its copy has come back too: one is enough
        del function, args, kwargs
        _send_outcome(send, job, outcome, meter)
        del outcome


class _Inbox:
    """What the worker sends, one message after the other.

    Attributes:
        limit_bytes: What the next task may take; 0 for no limit.
    """

    __slots__ = ("_data", "_sock", "limit_bytes")

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = b""
        self.limit_bytes = 0

    @property
    def empty(self) -> bool:
        """Whether nothing has been received that was not taken."""
        return not self._data

    def wait(self) -> bool:
        """Wait for a task; return False when there is none to come: the worker says so, or is gone."""
        size = wire.HEAD.size
        while True:
            while len(self._data) < size:
                data = self._sock.recv(_READ_BYTES)
                if not data:
                    if self._data:
                        raise SystemExit(1)
                    return False
                self._data += data
            if self._data[0] != wire.LIMIT:
                return self._data[0] != wire.STOP
            self.limit_bytes = int(wire.HEAD.unpack_from(self._data)[3])
            self._data = self._data[size:]

    @property
    def hint(self) -> int:
        """What is said of the task that has arrived: 0, TRIM or EXACT."""
        return int(wire.HEAD.unpack_from(self._data)[3])

    def take(self) -> tuple[int, memoryview]:
        """Return a task that has arrived, its number and the payload; wait for the rest of it."""
        data = self._data
        _, length, job, _ = wire.HEAD.unpack_from(data)
        end = wire.HEAD.size + length
        payload: memoryview = memoryview(data)[wire.HEAD.size : end]
        self._data = data[end:]
        if len(data) < end:
            payload = self._take_rest(payload, length)
        return job, payload

    def _take_rest(self, begun: memoryview, length: int) -> memoryview:
        whole = memoryview(bytearray(length))
        filled = len(begun)
        whole[:filled] = begun
        while filled < length:
            received = self._sock.recv_into(whole[filled:])
            if not received:
                raise SystemExit(1)
            filled += received
        return whole


def _trim_if_idle(sock: socket.socket, patience: float, meter: Meter) -> None:
    """Wait for work; give memory back when there is none for so many seconds."""
    work = select.poll()  # select() takes no descriptor above 1023
    work.register(sock, select.POLLIN)
    if not work.poll(min(patience, _LONGEST_WAIT_SECONDS) * 1000):
        _trim(sock, meter, collect=True)


def _trim(sock: socket.socket, meter: Meter, *, collect: bool) -> None:
    won, report = meter.trim(collect=collect)
    sock.sendall(wire.head(wire.TRIMMED, len(report), 0, won) + report)


def _failure(exc: BaseException) -> tuple[bool, Any]:
    """Return the outcome of a call that raised ``exc``, which is being handled."""
    if isinstance(exc, MemoryError):
        return False, upstream.failed(upstream.TaskMemoryError(repr(exc)))
    return False, upstream.ExceptionInfo()


def _send_outcome(send: Any, job: int, outcome: tuple[bool, Any], meter: Meter) -> None:
    try:
        body = pickle.dumps(outcome, pickle.HIGHEST_PROTOCOL)
    except Exception as exc:  # noqa: BLE001 - pickling runs foreign code
        error = upstream.failed(upstream.MaybeEncodingError(exc, outcome[1]))
        body = pickle.dumps((False, error), pickle.HIGHEST_PROTOCOL)
    report = meter.end(len(body))
    if meter.repeated:
        message = wire.head(wire.DONE, len(body), job, 1.0)
    else:
        message = wire.head(wire.DONE, len(report) + len(body), job, 0.0) + report
    if len(body) < _READ_BYTES:
        send(message + body)
    else:
        send(message)
        send(body)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            continue  # closed or not there: nothing to lose
