"""Leaves out the report on memory for every other task, and notes what tasks cost with and without it.

Without it a child measures nothing and sends a report that is ready made, and the worker does not look at it.
What is noted, in nanoseconds of CPU time of the thread, is a child's whole round, from one task's arrival to
the next, and what the worker does when a task has ended, which mostly includes giving the child the next one.
Tasks with and without take turns in the same processes: two workers that do the same differ by some per cent.
"""

from __future__ import annotations

import functools
import json
import os
from time import thread_time_ns
from typing import Any


class Rounds:
    """What rounds took, with the report and without it, by turns."""

    def __init__(self) -> None:
        self.on = True
        self.spent: dict[bool, list[int]] = {False: [], True: []}

    def dump(self, file: str, process: str) -> None:
        """Append one line; what has no rounds leaves none."""
        if not self.spent[True]:
            return
        line = {"process": process, "without": self.spent[False], "with": self.spent[True]}
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with open(descriptor, "a") as opened:
            opened.write(json.dumps(line) + "\n")


def ignore(*_: object, **__: object) -> None:
    """Do nothing."""


def install(file: str) -> None:
    """Do so in this process and those forked from it; each appends to `file` when it ends."""
    from celery import signals

    from memsafe_pool import child, engine, ledger, wire

    rounds = Rounds()
    report, nothing = wire.Report, wire.Report()
    packed = wire.REPORT.pack(*nothing)

    class NoReport:
        @staticmethod
        def unpack(_: memoryview) -> wire.Report:
            return nothing

    class Meter(child.Meter):
        began = 0

        def begin(self) -> None:
            now = thread_time_ns()
            if self.began:
                rounds.spent[rounds.on].append(now - self.began)
            self.began = now
            rounds.on = not rounds.on
            # Set anew each time, so that what is called has nothing around it.
            begin = super().begin if rounds.on else ignore
            self.end = super().end if rounds.on else lambda _: packed
            begin()

    on_message = engine.Engine.on_message

    def timed(self: Any, sender: Any, kind: int, *rest: Any) -> None:
        if kind != wire.DONE:
            on_message(self, sender, kind, *rest)
            return
        began = thread_time_ns()
        rounds.on = on = not rounds.on
        wire.Report = report if on else NoReport
        self.ledger.ended = functools.partial(ledger.Ledger.ended, self.ledger) if on else ignore
        on_message(self, sender, kind, *rest)
        rounds.spent[on].append(thread_time_ns() - began)
        wire.Report = report

    child.Meter = Meter  # type: ignore[misc]
    engine.Engine.on_message = timed  # type: ignore[method-assign]
    signals.worker_process_shutdown.connect(lambda **_: rounds.dump(file, "child"), weak=False)
    signals.worker_shutdown.connect(lambda **_: rounds.dump(file, "worker"), weak=False)
