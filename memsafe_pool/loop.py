"""The event loop the engine runs on, for brokers that do not bring one.

Where Celery has an event loop the engine rides on it. Elsewhere, and while the pool is
being joined, it runs on a kombu ``Hub`` of its own: :class:`LoopThread` in a thread,
:func:`run_until` in the calling one.

:class:`Mailbox` lets other threads have something done by the thread that runs the loop.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from celery.utils.log import get_logger
from kombu.asynchronous import Hub

__all__ = ["LoopThread", "Mailbox", "run_until"]

logger = get_logger(__name__)


class Mailbox:
    """Calls for the thread that runs the engine.

    ``post`` may be called by any thread. The calls are made in order, in the thread
    that called ``own`` last; a post by that thread itself is made at once. The engine's
    callbacks go through it as well, so that it knows whether one of them is under way.

    Attributes:
        failed: Whether one of the calls has raised an exception; the engine takes that back.
    """

    def __init__(self) -> None:
        self.failed = False
        self._calls: deque[tuple[Callable[..., Any], tuple[Any, ...]]] = deque()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._owner = threading.get_ident()
        self._calling = 0

    @property
    def interrupted(self) -> bool:
        """Whether a signal handler asks, which has interrupted one of the calls."""
        return self._calling > 0 and threading.get_ident() == self._owner

    def own(self) -> None:
        """Make the calling thread the one that makes the calls."""
        self._owner = threading.get_ident()

    def attach(self, hub: Any) -> None:
        """Have ``hub`` make the calls."""
        hub.add_reader(self._reader.fileno(), self._on_readable)

    def post(self, function: Callable[..., Any], *args: Any) -> None:
        """Call ``function(*args)``, now if this is the owner."""
        if threading.get_ident() == self._owner:
            self._calling += 1
            try:
                function(*args)
            except Exception:
                self.failed = True
                raise
            finally:
                self._calling -= 1
            return
        self._calls.append((function, args))
        self._wake()

    def deliver(self) -> None:
        """Make all calls that wait; by the owner."""
        try:
            while self._calls:
                function, args = self._calls.popleft()
                self.post(function, *args)
        finally:
            if self._calls:  # one has raised an exception: the others are not to wait for the next post
                self._wake()

    def close(self) -> None:
        """Release the sockets."""
        self._reader.close()
        self._writer.close()

    def _on_readable(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)
        self.deliver()

    def _wake(self) -> None:
        # A full buffer means that the reader is going to wake up anyway; a closed socket, that
        # there is nothing left to do.
        with contextlib.suppress(OSError):
            self._writer.send(b"\0")


class LoopThread:
    """A kombu Hub that runs in a thread until it is told to stop.

    Arguments:
        on_crash: Called in the thread with an exception that nothing has handled.
    """

    def __init__(self, on_crash: Callable[[BaseException], None]) -> None:
        self.hub = Hub()
        self._on_crash = on_crash
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="memsafe-pool", daemon=True)

    def start(self, prepare: Callable[[], None]) -> None:
        """Start the thread; ``prepare`` is called in it first. Returns when it has been."""
        prepared = threading.Event()

        def both() -> None:
            prepare()
            prepared.set()

        self.hub.call_soon(both)
        self._thread.start()
        if not prepared.wait(timeout=30):
            raise RuntimeError("the pool's event loop did not start within 30 s")

    def stop(self) -> None:
        """Ask the loop to end after its present round; called in the loop."""
        self._stopping = True

    def join(self, timeout: float) -> bool:
        """Wait until the thread has ended; return whether it has within ``timeout`` seconds."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self.hub.run_once()
        except BaseException as exc:  # a SystemExit, too, would end the thread without a word
            logger.critical("The pool's event loop has failed: %r", exc, exc_info=True)
            self._on_crash(exc)
        finally:
            self.hub.close()


def run_until(hub: Any, condition: Callable[[], bool]) -> None:
    """Run ``hub`` in this thread until ``condition`` holds; what makes it hold has its own deadlines."""
    while not condition():
        hub.run_once()
