"""Keeps what is exact and dear to a share of the time.

Data and a clock only: it says when something may be done, and is told how long that took.

Imports neither Celery nor billiard.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Expense"]

#: At most this share of the process's own CPU time may be spent: the same share of the time of day would be
#: much for a child that has little to do.
SHARE = 0.005

#: The same, as long as less than ``early`` seconds were spent.
EARLY_SHARE = 0.05

#: The share of the time of day that may be spent beside it: tasks that mostly wait use no CPU time.
IDLE_SHARE = 0.0002

#: More is never taken off for one time (seconds): the CPU time of a process has in it what the machine was
#: taken from it by its host, and 0.1 s is what a process of 6 GB takes.
MOST_SECONDS = 0.1

#: Seconds between looks at how much CPU time there was: each is a system call.
EARN_SECONDS = 0.05


class Expense:
    """What may be spent on one thing.

    Arguments:
        allowance: Seconds that can be saved up, and are there at the start.
        early: Seconds for which the share is a larger one, until they are spent.
        delay: Seconds until it is allowed for the first time.
    """

    def __init__(self, allowance: float = 0.0, early: float = 0.0, delay: float = 0.0) -> None:
        self._allowance = self._left = allowance
        self._early = early
        self._cpu, self._now = time.process_time(), time.monotonic()
        self._not_before = self._now + delay

    def allowed(self) -> bool:
        """Whether it may be done now."""
        if self._left < 0:
            if time.monotonic() - self._now < EARN_SECONDS:
                return False
            self._earn()
        return self._left >= 0 and time.monotonic() >= self._not_before

    def _earn(self) -> None:
        cpu, now = time.process_time(), time.monotonic()
        share = EARLY_SHARE if self._early > 0 else SHARE
        earned = share * (cpu - self._cpu) + IDLE_SHARE * (now - self._now)
        self._left = min(self._left + earned, self._allowance)
        self._cpu, self._now = cpu, now

    @contextmanager
    def spend(self) -> Iterator[None]:
        """Do it: its CPU time is taken off."""
        self._earn()
        began = self._cpu
        try:
            yield
        finally:
            spent = min(time.process_time() - began, MOST_SECONDS)
            self._left -= spent
            self._early -= spent
