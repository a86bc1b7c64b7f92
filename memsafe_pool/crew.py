"""The children as processes: starts them, notices their end, reaps them.

Descriptors, as the worker sees them::

    child.link      one end of a stream socket pair per child; the other end is only in
                    that child, so its end of file means that the child is gone
    child.sentinel  pidfd: readable when the process has ended, whatever it left open
    start method    e.g. the forkserver's socket

Who gets which task is the engine's business; it is told what a child says and when it
has gone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from celery.utils.log import get_logger

from memsafe_pool import signals, upstream, wire
from memsafe_pool.fleet import Child, Fleet, State
from memsafe_pool.start import Origin, Owner, Spawn, StartMethod

if TYPE_CHECKING:
    from memsafe_pool.loop import Mailbox
    from memsafe_pool.watch import Watch

__all__ = ["Crew", "Listener"]

logger = get_logger(__name__)

#: Seconds a child may take to leave once it was told to, before it is killed: its
#: ``worker_process_shutdown`` handlers run in that time.
LEAVE_SECONDS = 30.0

#: Descriptors that children leave to the rest of the worker: connections, files of /proc.
LEFT_DESCRIPTORS = 16

#: Seconds that children have to end when the pool is terminated.
TERMINATE_SECONDS = 10.0

#: The same for a child that has lost its socket and can not be of use any more.
CUT_OFF_SECONDS = 1.0


class Listener(Protocol):
    """Who is told about children."""

    def on_message(self, child: Child, kind: int, number: int, value: float, payload: memoryview) -> None:
        """Act on a message of a child, see ``wire``."""

    def on_gone(self, child: Child, exitcode: int | None, *, failed: bool, by_kernel: bool) -> None:
        """Act on a child's end.

        ``failed``: it never was ready, and nobody wanted it to end; ``by_kernel``: the kernel has killed it,
        as memory was out.
        """

    def stop_worker(self, reason: str) -> None:
        """Act on it that no child can be started, now or later."""

    def on_fall_back(self) -> None:
        """Act on it that children are fresh interpreters from now on."""


class Crew:
    """All children.

    Arguments:
        origin: What children come from.
        make_start_method: Makes the way they are started, given this crew.
        listener: Who is told about them.
        mailbox: For what the loop and its timers call; those may fire in another thread.
        fleet: The record of them.
        watch: Stops children for a while, and must not do that to those that are to end.
        killed_by_kernel: Tells whether the kernel has killed somebody, as memory was out; each time once.
        start_timeout: Seconds a child may take until it is ready.
    """

    def __init__(
        self,
        origin: Origin,
        make_start_method: Callable[[Owner, Origin], StartMethod],
        listener: Listener,
        mailbox: Mailbox,
        *,
        fleet: Fleet,
        watch: Watch,
        killed_by_kernel: Callable[[], bool],
        start_timeout: float,
    ) -> None:
        self.fleet = fleet
        self.hub: Any = None
        self.starts = 0
        self.generation = 0
        self._origin = origin
        self._listener = listener
        self.post = mailbox.post
        self._watch = watch
        self._killed_by_kernel = killed_by_kernel
        self._start_timeout = start_timeout
        self.start_method = make_start_method(self, origin)
        # What was fallen back from: its process has to end, and to be reaped.
        self._former: list[StartMethod] = []

    def attach(self, hub: Any) -> None:
        """Use this loop from now on."""
        self.hub = hub
        self.start_method.attach()
        for child in self.fleet.children:
            self._attach(child)
            if child.kill_at is not None:
                self._kill_after(child.kill_at - time.monotonic(), child)

    def _attach(self, child: Child) -> None:
        child.link.attach(self.hub, self.post, self._on_readable, child)
        if child.sentinel >= 0:
            self.hub.add_reader(child.sentinel, self.post, self._reap, child)

    def pids(self) -> list[int]:
        """Return the pids of all children."""
        return list(self.fleet.by_pid)

    # -- start

    def start(self) -> None:
        """Start a child.

        Raises:
            OSError: Not even its socket could be made.
        """
        ours, theirs = _socket_pair()
        self.starts += 1
        child = Child(
            f"{self.start_method.process_name}-{self.starts}",
            self.fleet.free_index(),
            ours,
            born=time.monotonic(),
            generation=self.generation,
            start_method=self.start_method.name,
        )
        self.fleet.add(child)
        self._attach(child)
        self.start_method.start(child, theirs)

    def started(self, child: Child, pid: int) -> None:
        """Say that a child has this pid."""
        if child.pid or child.state is State.GONE:
            return
        child.pid = pid
        self.fleet.by_pid[pid] = child
        child.sentinel = signals.open_pidfd(pid)
        if child.sentinel >= 0:  # else the end of the socket and the tick have to do
            self.hub.add_reader(child.sentinel, self.post, self._reap, child)
        if child.state is State.LEAVING:
            child.signal(signal.SIGKILL)  # nobody knew whom to signal until now

    def start_failed(self, child: Child, reason: str, *, shortage: bool = False) -> None:
        """Say that no process came to be, and why."""
        child.failure, child.shortage = reason, shortage
        self._gone(child, None)

    def start_withdrawn(self, child: Child) -> None:
        """Forget a child that was asked for, as nobody knows whether it came to be."""
        child.expected = True
        self._gone(child, None)

    def fall_back(self, why: str, waiting: Sequence[tuple[Child, socket.socket]]) -> None:
        """Start children by spawn from now on, these first."""
        if self._origin.app_name is None:
            self._listener.stop_worker(f"{why} But a fresh interpreter can not import the app")
            for child, sock in waiting:
                sock.close()
                self.start_failed(child, why)
            return
        logger.warning("%s", why)
        self._former.append(self.start_method)
        self.start_method = Spawn(self, self._origin)
        self._listener.on_fall_back()
        for child, sock in waiting:
            if child.state is not State.STARTING:
                sock.close()
                continue
            child.start_method = self.start_method.name
            self.start_method.start(child, sock)

    def renew(self) -> None:
        """Replace what children are forked from; those there are count as outdated from now on."""
        self.generation += 1
        for child in self.fleet.children:
            child.outdated = True
        self.start_method.renew()

    # -- end

    def let_go(self, child: Child) -> None:
        """Tell a child without a task to leave."""
        self.fleet.move(child, State.LEAVING)
        child.expected = True
        child.link.send(wire.head(wire.STOP, 0, 0, 0.0))
        self._kill_after(LEAVE_SECONDS, child)

    def kill(self, child: Child, signum: int, after: float = TERMINATE_SECONDS) -> None:
        """Make a child end: ``signum`` now, SIGKILL ``after`` seconds."""
        self.fleet.move(child, State.LEAVING)
        child.expected = True
        child.signal_group(signum)
        self._watch.end(child)  # a paused process does not act on signals
        if signum != signal.SIGKILL:
            self._kill_after(after, child)

    def _kill_after(self, seconds: float, child: Child) -> None:
        child.kill_at = time.monotonic() + seconds
        self.hub.call_later(seconds, self.post, self._kill_late, child)

    def _kill_late(self, child: Child) -> None:
        if not child.pid:
            self._gone(child, None)  # nobody is going to say any more that it came to be
        elif child.state is not State.GONE:
            child.signal_group(signal.SIGKILL)

    def stop(self, *, terminate: bool) -> None:
        """Let all children go, those with a task only if ``terminate``; start no more."""
        self.start_method.stop()
        for child in list(self.fleet.children):
            if child.state is State.STARTING:
                self.kill(child, signal.SIGKILL)
            elif child.state is State.BUSY and terminate:
                self.kill(child, upstream.TERM_SIGNAL)
            else:
                if child.state is State.IDLE:
                    self.let_go(child)
                if terminate:
                    self._kill_after(TERMINATE_SECONDS, child)

    @property
    def stopped(self) -> bool:
        """Whether no process is left."""
        methods = (*self._former, self.start_method)
        return not self.fleet.size and all(method.stopped for method in methods)

    def catch_up(self, child: Child) -> None:
        """Pass on all that a child has said until now, and its end."""
        if not self._reap(child):
            self._hear(child)

    def _hear(self, child: Child) -> None:
        for message in child.link.read_rest():
            self._listener.on_message(child, *message)

    def _on_readable(self, child: Child) -> None:
        if not self._read(child) and child.state is not State.GONE:
            child.link.stop_reading()
            self._on_link_ended(child)

    def _read(self, child: Child) -> bool:
        """Read once and pass it on; return False at the end of the file."""
        messages = child.link.read()
        for message in messages or ():
            self._listener.on_message(child, *message)
        return messages is not None

    def _on_link_ended(self, child: Child) -> None:
        """Reap a child whose socket has ended: the process may need a moment to be gone."""
        if not self._reap(child):
            self.hub.call_later(0.05, self.post, self.cut_off, child)

    def cut_off(self, child: Child) -> None:
        """End a child whose socket cannot be used any more; it may not know, or have ended."""
        if not self._reap(child) and child.state not in {State.LEAVING, State.GONE}:
            self.fleet.move(child, State.LEAVING)
            child.signal_group(signal.SIGTERM)
            self._watch.end(child)
            self._kill_after(CUT_OFF_SECONDS, child)

    def _reap(self, child: Child) -> bool:
        """Take leave of a child if it has ended; return whether it has."""
        if child.state is State.GONE or not child.pid:
            return False
        try:
            pid, status = self._watch.reap(child)
        except ChildProcessError:
            pid, status = child.pid, None  # somebody else has reaped it
        if not pid:
            return False
        child.reaped = True
        self.fleet.move(child, State.LEAVING)  # so that it gets nothing more, whatever it has left behind
        self._hear(child)
        self._gone(child, None if status is None else os.waitstatus_to_exitcode(status))
        return True

    def _gone(self, child: Child, exitcode: int | None) -> None:
        if child.state is State.GONE:
            return
        failed = not child.was_ready and not child.expected
        by_kernel = (
            exitcode == -signal.SIGKILL
            and not child.expected
            and child.failure is None
            and self._killed_by_kernel()
        )
        child.link.close()
        self.fleet.move(child, State.GONE)
        self._watch.gone(child)  # from here on it does not use the pidfd
        if child.sentinel >= 0:
            self.hub.remove(child.sentinel)
            os.close(child.sentinel)
            child.sentinel = -1
        _log_end(child, exitcode, failed=failed, by_kernel=by_kernel)
        self._listener.on_gone(child, exitcode, failed=failed, by_kernel=by_kernel)

    def tick(self, now: float) -> None:
        """Look at the clock for children that are late, when all has been heard that was said."""
        self.start_method.catch_up()
        for child in list(self.fleet.starting_children):
            self.catch_up(child)
        for child in list(self.fleet.starting_children):
            if now - child.born > self._start_timeout:
                child.failure = f"not ready after {self._start_timeout:g} s (memsafe_start_timeout)"
                if not child.signal(signal.SIGKILL):
                    self.start_method.give_up(child)
                    self._gone(child, None)
        for child in [child for child in self.fleet.children if child.sentinel < 0]:
            self._reap(child)
        for method in (*self._former, self.start_method):
            method.tick(now)


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    """Make the socket pair of a child.

    Raises:
        OSError: EMFILE also if hardly any descriptor would be left for others.
    """
    ours, theirs = socket.socketpair()
    limit = resource.RLIM_INFINITY
    with contextlib.suppress(OSError):  # forbidden
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    # The lowest free numbers are taken: so that is about how many there are.
    if limit != resource.RLIM_INFINITY and theirs.fileno() >= limit - LEFT_DESCRIPTORS:
        ours.close()
        theirs.close()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return ours, theirs


def _log_end(child: Child, exitcode: int | None, *, failed: bool, by_kernel: bool) -> None:
    why = ": the kernel has killed it, as memory was out" if by_kernel else ""
    if child.expected:
        logger.debug("%s ended: %s", child, exitcode)
    elif failed and child.shortage:
        logger.debug("%s (pid %s) failed to start: %s", child.name, child.pid or "none", child.failure)
    elif failed:
        how = child.failure or f"it ended before it was ready: {upstream.human_status(exitcode)}{why}"
        logger.error("%s (pid %s) failed to start: %s", child.name, child.pid or "none", how)
    elif exitcode:
        # Stock's words: people have alerts on them.
        logger.error(
            "Process %r pid:%r exited with %r%s", child.name, child.pid, upstream.human_status(exitcode), why
        )
