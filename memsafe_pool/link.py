"""The worker's end of the socket to one child: messages in, messages out, never blocking."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from memsafe_pool.wire import Reader

__all__ = ["Link"]

#: Bytes asked for in one read; the larger number once a message did not fit.
_READ_BYTES, _LARGE_READ_BYTES = 65536, 1 << 20

Message = tuple[int, int, float, memoryview]


class Link:
    """One end of a stream socket pair.

    The hub knows each descriptor for reading or for writing, not for both, so writing
    that has to wait waits on a duplicate.

    Attributes:
        received: Bytes that have come so far.
    """

    __slots__ = ("_hub", "_outgoing", "_post", "_reader", "_reading", "_sock", "_writer", "received")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._reader = Reader()
        self._reading = False
        self.received = 0
        self._outgoing: deque[memoryview] = deque()
        self._writer = -1
        self._hub: Any = None
        self._post: Any = None

    @property
    def partial(self) -> bool:
        """Whether a part of a message has come, and the rest is on its way."""
        return self._reader.partial

    @property
    def writing(self) -> bool:
        """Whether something waits until there is room for it."""
        return bool(self._outgoing)

    def attach(
        self, hub: Any, post: Callable[..., None], on_readable: Callable[..., None], *args: Any
    ) -> None:
        """Have ``hub`` call ``on_readable(*args)`` through ``post`` when there is something to read."""
        self._hub, self._post = hub, post
        if self._sock.fileno() >= 0:
            hub.add_reader(self._sock.fileno(), post, on_readable, *args)
        if self._writer >= 0:
            hub.add_writer(self._writer, post, self._on_writable)

    def send(self, data: bytes) -> bool:
        """Write ``data``, now or when there is room; return False if the child is known to be gone."""
        if self._outgoing:
            self._outgoing.append(memoryview(data))
            return True
        try:
            written = self._sock.send(data)
        except BlockingIOError:
            written = 0
        except OSError:
            return False  # its end is on its way, and says more
        if written < len(data):
            self._outgoing.append(memoryview(data)[written:])
            self._wait_for_room()
        return True

    def _wait_for_room(self) -> None:
        try:
            self._writer = os.dup(self._sock.fileno())
        except OSError:
            # No descriptor left to wait with. The child has half a message, so it has to go.
            self._sock.shutdown(socket.SHUT_RDWR)
        else:
            self._hub.add_writer(self._writer, self._post, self._on_writable)

    def read(self) -> list[Message] | None:
        """Read once without blocking; return what came, or None at the end.

        Shutting down may happen in a signal handler, which may have interrupted this very
        function: then there is nothing to be read, as what was received would be out of order.
        """
        if self._reading:
            return []
        self._reading = True
        try:
            data = self._sock.recv(_LARGE_READ_BYTES if self._reader.partial else _READ_BYTES)
            self.received += len(data)
            return self._reader.feed(data) if data else None
        except BlockingIOError:
            return []
        except OSError:
            return None
        finally:
            self._reading = False

    def read_rest(self) -> list[Message]:
        """Read all that has arrived; an end is left to :meth:`read`."""
        messages: list[Message] = []
        if self._reading:
            return messages
        self._reading = True
        try:
            with contextlib.suppress(OSError):  # nothing more for now, or closed
                while data := self._sock.recv(_LARGE_READ_BYTES):
                    self.received += len(data)
                    messages += self._reader.feed(data)
        finally:
            self._reading = False
        return messages

    def stop_reading(self) -> None:
        """Wait for nothing more: the other end is closed."""
        if self._sock.fileno() >= 0:
            self._hub.remove(self._sock.fileno())

    def close(self) -> None:
        """Release the descriptors."""
        self._stop_writing()
        self.stop_reading()
        self._sock.close()

    def _on_writable(self) -> None:
        try:
            while self._outgoing:
                written = self._sock.send(self._outgoing[0])
                if written < len(self._outgoing[0]):
                    self._outgoing[0] = self._outgoing[0][written:]
                else:
                    self._outgoing.popleft()
        except BlockingIOError:
            return
        except OSError:
            self._outgoing.clear()
        self._stop_writing()

    def _stop_writing(self) -> None:
        if self._writer >= 0:
            self._hub.remove(self._writer)
            os.close(self._writer)
            self._writer = -1
