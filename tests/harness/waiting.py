"""Wait for a condition with a deadline; the only place in the tests that polls."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

#: How many times longer everything may take than on a usual machine; see ``tests/version2``.
SLOWNESS = float(os.environ.get("TEST_SLOWNESS", "1"))

#: Seconds any single step may take.  Generous: tests share few cores with each other.
DEADLINE = 60.0 * SLOWNESS


class DeadlineMissed(AssertionError):
    """A condition did not become true in time."""


def until(condition: Callable[[], T], what: str, timeout: float = DEADLINE, every: float = 0.03) -> T:
    """Return the first true value of ``condition()``; after ``timeout`` seconds raise, naming ``what``."""
    tick = threading.Event()
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise DeadlineMissed(f"not within {timeout:g} s: {what} (last value: {value!r})")
        tick.wait(every)
