"""The worker's side of the forkserver: begin it, ask it for children, replace it.

See ``forkserver`` for what runs in that process and for who reaps whom. The two speak
over one SEQPACKET socket pair: a request is one message with the child's end of a
socket pair attached, an answer is one message.

What happens when the forkserver dies: requests it had not answered are taken back (the
child's socket is closed, so that one which was forked all the same ends by itself), the
supervisor asks again for what is still needed, and a new forkserver is begun: first the
new one, then the taking back, as that leads to new requests.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import pickle
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

from celery.utils.log import get_logger

from memsafe_pool import forkserver, native, scarcity, signals, start, upstream
from memsafe_pool.fleet import Child, State

__all__ = ["Forkserver"]

logger = get_logger(__name__)

#: Seconds a forkserver may take to end once its socket is closed, before it is killed.
STOP_SECONDS = 5.0

#: One that nobody waits for is not begun more often than that (seconds).
LEAST_LIFE_SECONDS = 1.0

#: So many times in a row whoever was to fork a child may die over it, as they do when somebody kills them;
#: then it is a child that has failed to start.
MOST_IN_VAIN = 10


class Forkserver:
    """Children are forked by a process that does nothing else."""

    name = "forkserver"
    process_name = "ForkServerPoolWorker"

    def __init__(self, owner: start.Owner, origin: start.Origin) -> None:
        self.owner = owner
        self.origin = origin
        self.pid, self._pidfd = 0, -1
        self.ready = False
        self._begun_at = 0.0
        self._again_at = math.inf
        self._sock: socket.socket | None = None
        self._waiting: deque[tuple[Child, socket.socket]] = deque()
        self._asked: dict[int, Child] = {}
        self._numbers = itertools.count(1)
        self._ending: dict[int, tuple[int, float]] = {}
        self._in_vain = 0
        self._by_fork = False
        self._for_one = False
        self._stillborn = False
        self._adoption = _Adoption()

    # -- begin and end

    def begin(self) -> None:
        """Begin as a fork of the worker where that is safe, else as a fresh interpreter."""
        try:
            self._adoption.open()
            self._adoption.close()
        except OSError as exc:
            if not scarcity.is_shortage(exc):
                self.owner.fall_back(
                    f"The forkserver can not be used here ({exc}): children start by spawn instead.", []
                )
                return
        try:
            self._begin()
        except OSError as exc:
            if self._sock is None:  # else it could not be told that it is safe, which it finds out itself
                self._on_no_start(exc)  # the first task that waits tries again

    def _begin(self) -> None:
        threads = forkserver.python_threads()
        # Prefork forks beside threads for each child. So here each child has a forkserver of its own then,
        # unless that would have to import modules each time.
        self._for_one = bool(threads) and not self.origin.preload
        if self.origin.app_name is not None:
            keep = upstream.start_handlers(self.origin.terms.hostname)
            if self.origin.child_env or (threads and not self._for_one and not keep):
                return self._begin_fresh()
            names = [*(name for name, _ in threads), *forkserver.native_threads().values()]
            if names and not forkserver.fork_works():
                logger.warning(
                    "The forkserver begins as a fresh interpreter: a process forked from the worker, beside "
                    "other threads (%s), was stuck.",
                    ", ".join(names),
                )
                return self._begin_fresh()
            if names:
                logger.debug("Forking beside other threads: %s", ", ".join(names))
        return self._begin_as_fork()

    def renew(self) -> None:
        """Replace the process, so that children have the code that the worker has by now."""
        self._reap(time.monotonic())  # one for each child would be many until the next tick
        asked = self._part()
        self._begin_again()
        self._withdraw(asked)

    def stop(self) -> None:
        """Let the process end, and take back what it was or would have been asked."""
        asked = self._part()
        while self._waiting:
            child, sock = self._waiting.popleft()
            sock.close()
            asked.append(child)
        self._withdraw(asked)

    def give_up(self, child: Child) -> None:
        """End a forkserver that does not answer: the next one may."""
        if self.pid:
            logger.warning("The forkserver (pid %s) does not answer, and is killed.", self.pid)
            signals.send(self.pid, self._pidfd, signal.SIGKILL)

    @property
    def stopped(self) -> bool:
        """Whether no process is left."""
        self._reap(time.monotonic())
        return not self._ending and not self.pid

    def _begin_again(self) -> None:
        """Begin as the first one did; as a fresh interpreter if the last one was never ready.

        A fork of the worker has what handlers and reloads have made there, as a late child of prefork has.
        What other threads hold at that moment may be held in it for ever, which the start timeout ends.
        """
        if self._sock is not None:
            return
        try:
            if (self._by_fork and not self._stillborn) or self.origin.app_name is None:
                self._begin_as_fork()
            else:
                self._begin_fresh()
        except OSError as exc:
            self._on_no_start(exc)

    def _on_no_start(self, exc: OSError) -> None:
        reason = f"the forkserver could not be started: {exc}"
        self._fail_waiting(reason, shortage=scarcity.is_shortage(exc))

    def _begin_as_fork(self) -> None:
        self._by_fork = True
        again = self._begun_at > 0
        self._begin_with(
            lambda sock: forkserver.begin_as_fork(
                self.origin.app, self._role, sock, self.origin.descriptors, again=again
            )
        )

    def _begin_fresh(self) -> None:
        self._for_one = False
        self.origin.tell_what_is_missing()
        self._begin_with(lambda sock: self.origin.start_interpreter(sock, self._role))

    def _begin_with(self, begin: Callable[[socket.socket], int]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                pid = begin(theirs)
            except BaseException:
                ours.close()
                raise
        ours.setblocking(False)
        self.pid, self._pidfd, self._sock, self.ready = pid, signals.open_pidfd(pid), ours, False
        self._begun_at = time.monotonic()
        self.attach()

    @property
    def _role(self) -> forkserver.Role:
        return forkserver.Role(self.origin.terms, self.origin.preload)

    def attach(self) -> None:
        """Register with the owner's event loop."""
        if self._sock is not None and self.owner.hub is not None:
            self.owner.hub.add_reader(self._sock.fileno(), self.owner.post, self._on_readable)

    def _part(self) -> list[Child]:
        """Part with the process, whether it lives or not; return what it has not answered."""
        if self._sock is not None:
            if self.owner.hub is not None:
                self.owner.hub.remove(self._sock.fileno())
            self._sock.close()
        if self.pid:
            self._ending[self.pid] = self._pidfd, time.monotonic() + STOP_SECONDS
        self._sock, self.pid, self._pidfd, self.ready = None, 0, -1, False
        self._again_at = math.inf
        self._adoption.close()
        asked, self._asked = list(self._asked.values()), {}
        return asked

    # -- children

    def start(self, child: Child, sock: socket.socket) -> None:
        """Ask for a child now, or when the forkserver is ready for it."""
        self._waiting.append((child, sock))
        if self._sock is None:
            self._begin_again()
        self._ask()

    def _withdraw(self, children: Sequence[Child]) -> None:
        for child in children:
            if not child.pid:
                self.owner.start_withdrawn(child)

    def _ask(self) -> None:
        while self._waiting and self.ready and self._sock is not None:
            if self._asked and self._for_one:
                return
            child, sock = self._waiting[0]
            if child.state is not State.STARTING:
                self._waiting.popleft()
                sock.close()
                continue
            number = next(self._numbers)
            request = pickle.dumps((number, child.name, child.index))
            try:
                self._adoption.open()
                socket.send_fds(self._sock, [request], [sock.fileno()])
            except BlockingIOError:
                return  # it is busy: its next answer, or the next tick, comes back here
            except OSError as exc:
                if scarcity.is_shortage(exc):
                    self._fail_waiting(f"the forkserver could not be asked: {exc}", shortage=True)
                return  # else it is dead: the end of its socket is on its way
            self._asked[number] = child
            self._waiting.popleft()
            sock.close()

    def _on_readable(self) -> None:
        while self._sock is not None:
            try:
                data = self._sock.recv(forkserver.MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if data:
                self._on_message(*pickle.loads(data))
            else:
                self._on_death()

    def _on_message(self, kind: str, *rest: object) -> None:
        match kind, rest:
            case forkserver.READY, (int(),):
                self.ready, self._stillborn = True, False
                logger.debug("Forkserver ready (pid %s)", self.pid)
            case forkserver.REFUSED, (str(why),):
                self._on_refusal(why)
            case forkserver.FAILED, (str(trace), bool(shortage)):
                self._on_failure(trace, shortage=shortage)
            case _:
                self._on_birth(kind, *rest)
        self._ask()

    def _on_birth(self, kind: str, request: object, result: object = None) -> None:
        """Take note of what became of a request."""
        child = self._asked.pop(cast("int", request), None)
        if child is not None:
            if kind == forkserver.FORKED:
                self._in_vain = 0
                self.owner.started(child, cast("int", result))
            elif kind == forkserver.FORK_FAILED:
                number = cast("int", result)
                self.owner.start_failed(
                    child,
                    f"the forkserver could not fork: {os.strerror(number)}",
                    shortage=scarcity.is_errno(number),
                )
            else:
                self._on_silence([child])
        if not self._asked:
            self._adoption.close()
            if self._for_one and kind == forkserver.FORKED:
                self.renew()

    def _on_death(self) -> None:
        was_ready, pid = self.ready, self.pid
        asked = self._part()
        logger.warning("The forkserver (pid %s) has died; running children are not concerned.", pid)
        if was_ready:
            self._again_at = self._begun_at + LEAST_LIFE_SECONDS
            if asked or self._waiting or time.monotonic() >= self._again_at:
                self._begin_again()
        else:
            self._stillborn = True
            self._fail_waiting(f"the forkserver (pid {pid}) died before it was ready")
        self._on_silence(asked)

    def _on_silence(self, children: Sequence[Child]) -> None:
        """Take note that whoever was asked for these children has died, and left no word of them."""
        if not children:
            return
        self._in_vain += 1
        if self._in_vain <= MOST_IN_VAIN:
            self._withdraw(children)
            return
        for child in children:
            if not child.pid:
                self.owner.start_failed(
                    child, f"whoever was to fork it has died, {self._in_vain} times in a row"
                )

    def _on_refusal(self, why: str) -> None:
        self._part()
        waiting, self._waiting = list(self._waiting), deque()
        self.owner.fall_back(
            f"The forkserver must not fork: {why}. Children start by spawn instead, which costs more memory. "
            "Start such threads, or first use the library that has them, in a worker_process_init handler or "
            "in tasks; or set memsafe_start_method='spawn'.",
            waiting,
        )

    def _on_failure(self, trace: str, *, shortage: bool) -> None:
        asked = self._part()
        self._stillborn = not shortage
        self._fail_waiting(f"the forkserver could not begin:\n{trace}", shortage=shortage)
        self._on_silence(asked)

    def _fail_waiting(self, reason: str, *, shortage: bool = False) -> None:
        waiting, self._waiting = list(self._waiting), deque()
        for child, sock in waiting:
            sock.close()
            self.owner.start_failed(child, reason, shortage=shortage)
        if not waiting and not shortage:  # whoever needs a child tries again
            logger.error("Children can not start: %s", reason)

    def catch_up(self) -> None:
        """Take note of what the process has answered until now."""
        self._on_readable()

    # -- time

    def tick(self, now: float) -> None:
        """Ask again where the forkserver had no room, begin one that has died early, and reap."""
        if now >= self._again_at:
            self._again_at = math.inf
            self._begin_again()
        self._ask()
        self._reap(now)
        self._adoption.reap([*self.owner.pids(), *self._ending, self.pid], self._asked)

    def _reap(self, now: float) -> None:
        for pid, (pidfd, deadline) in list(self._ending.items()):
            if _reaped(pid):
                del self._ending[pid]
                if pidfd >= 0:
                    os.close(pidfd)
            elif now > deadline:
                signals.send(pid, pidfd, signal.SIGKILL)


class _Adoption:
    """What the worker adopts while its forkserver makes children.

    A subreaper also becomes the parent of what other processes below it leave behind. The kernel does not
    tell those from programs that other code of the worker has started, and may wait for at any time. So what
    is reaped is only what descends from the forkserver, by the mark that it has inherited.
    """

    def __init__(self) -> None:
        self._open = False
        self._before = False
        self._ended: set[int] = set()
        self._unanswered: set[int] = set()

    def open(self) -> None:
        if not self._open:
            self._before = native.get_child_subreaper()
            native.set_child_subreaper(True)
            self._open = True

    def close(self) -> None:
        if self._open:
            native.set_child_subreaper(self._before)
            self._open = False

    def reap(self, known: Iterable[int], unanswered: Iterable[int]) -> None:
        """Reap what our children have left behind, if it had ended at the last call already.

        Arguments:
            known: Pids that are reaped elsewhere.
            unanswered: Requests to the forkserver. A child may have ended before its pid is known here: so
                nothing is reaped until those are answered that were unanswered at the last call.
        """
        unanswered = set(unanswered)
        if self._unanswered & unanswered:
            return
        ended = {
            pid
            for pid in _own_children().difference(known)
            if forkserver.is_descendant(pid) and _has_ended(pid)
        }
        for pid in self._ended & ended:
            _reaped(pid)
        self._ended, self._unanswered = ended, unanswered


def _has_ended(pid: int) -> bool:
    """Whether a child has ended; it is left as it is."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False  # somebody else has reaped it


def _reaped(pid: int) -> bool:
    """Reap a child if it has ended; return whether it is gone, whoever has reaped it."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _own_children() -> set[int]:
    """Return the pids of this process's children; without some or all where the kernel does not say."""
    pids: set[int] = set()
    # The thread has just ended, or no descriptor is left.
    with contextlib.suppress(OSError):
        for task in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):
                pids.update(map(int, (task / "children").read_text().split()))
    return pids
