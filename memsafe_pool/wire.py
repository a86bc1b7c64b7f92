"""What the worker and a child say to each other, and how it looks on the socket.

Each child has one stream socket pair with the worker. A message is a fixed head
(kind, length of the payload, job id, one number) and a pickled payload, which most
kinds leave out. The head alone answers most questions, so that accepting a task
costs no pickling on either side.

========  ==========  =======================================================
kind      sender      meaning
========  ==========  =======================================================
TASK      worker      run this: payload ``(function, args, kwargs)``
STOP      worker      leave; nothing follows
UP        child       ready for work; job: its pid
ACK       child       the job begins; number: monotonic seconds
DONE      child       the job ended; payload ``(succeeded, value)``; number:
                      private bytes of the child where they are asked for
FAILED    child       could not start; payload: text of the traceback
========  ==========  =======================================================

Imports neither Celery nor billiard, and is shared by both sides of the fork.
"""

from __future__ import annotations

import pickle
import struct

__all__ = ["ACK", "DONE", "FAILED", "HEAD", "STOP", "TASK", "UP", "Reader", "head", "loads"]

TASK, STOP, UP, ACK, DONE, FAILED = range(1, 7)

#: kind, payload length in bytes, job id, number
HEAD = struct.Struct("=BQQd")

head = HEAD.pack
loads = pickle.loads
_head_size = HEAD.size
_unpack_head = HEAD.unpack_from


class Reader:
    """Cuts a byte stream into messages."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = bytearray()

    @property
    def partial(self) -> bool:
        """Whether a message has begun and not ended."""
        return bool(self._rest)

    def feed(self, data: bytes) -> list[tuple[int, int, float, memoryview]]:
        """Take what was received; return each complete ``(kind, job, number, payload)``."""
        buffer: bytes | bytearray = data
        if self._rest:
            self._rest += data
            buffer = self._rest
        messages = []
        size, start = len(buffer), 0
        view = memoryview(buffer)
        while size - start >= _head_size:
            kind, length, job, number = _unpack_head(buffer, start)
            end = start + _head_size + length
            if end > size:
                break
            messages.append((kind, job, number, view[start + _head_size : end]))
            start = end
        if start or buffer is data:
            self._rest = bytearray(view[start:])
        return messages
