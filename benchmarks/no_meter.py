"""Takes the report out of our pool: what a no-op task costs without it is what it is held against.

Children measure nothing and send a report that is ready made; the worker does not look at it.
"""

from __future__ import annotations

from memsafe_pool import child, ledger, peaks, wire

REPORT = wire.REPORT.pack(*wire.Report())


class NoMeter:
    """Has what `child` uses of `meter.Meter`."""

    doubtful = False
    patience = None

    def __init__(self, *_: object) -> None:
        pass

    def begin(self) -> None:
        pass

    def end(self, size: int = 0) -> bytes:
        return REPORT

    report = end


def install() -> None:
    """Replace the meter in this process and those forked from it."""
    child.Meter = NoMeter  # type: ignore[assignment,misc]
    ledger.Ledger.ended = lambda *_: None  # type: ignore[method-assign]
    peaks.Peaks.is_little = lambda *_: False  # type: ignore[method-assign]
