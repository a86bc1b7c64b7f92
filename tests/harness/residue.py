"""The check after every test: no process, zombie, or descriptor of it is left."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import psutil

from .waiting import DeadlineMissed, until

_FDS = Path("/proc/self/fd")


def descriptors() -> dict[int, str]:
    """Open descriptors of this process and what they lead to; empty where the platform does not say."""
    found = {}
    if not _FDS.exists():
        return found
    for entry in os.listdir(_FDS):
        try:
            found[int(entry)] = os.readlink(_FDS / entry)
        except FileNotFoundError:
            continue  # the descriptor that listed the folder
    return found


def below() -> dict[int, str]:
    """Processes under this one, zombies too."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            found[process.pid] = f"{process.pid} ({process.status()}) {' '.join(process.cmdline())[:200]}"
        except psutil.NoSuchProcess:
            continue
    return found


class Residue:
    """What was there before a test; ``check`` fails when more is there after it."""

    def __init__(self) -> None:
        self.descriptors = descriptors()
        self.processes = set(below())

    def check(self, allowed: Callable[[], set[int]], *, with_descriptors: bool = True) -> None:
        """Fail unless everything new is gone soon.

        ``allowed()`` are the pids of workers and servers that live on.  Without descriptors after a
        failed test: its traceback keeps what the test had open.
        """

        def left() -> list[str]:
            gc.collect()  # kombu leaves its epoll descriptors to the collector
            processes = [text for pid, text in below().items() if pid not in self.processes]
            if processes:
                legal = allowed()
                processes = [text for pid, text in below().items() if pid not in self.processes | legal]
            files = [
                f"descriptor {fd}: {target}"
                for fd, target in descriptors().items()
                if with_descriptors and self.descriptors.get(fd) != target
            ]
            return processes + files

        try:
            until(lambda: not left(), "everything the test started or opened to be gone")
        except DeadlineMissed:
            raise AssertionError("the test left behind: " + "; ".join(left())) from None
