"""What tasks of each name needed at their peaks: the recent ones, in numbers.

Data only. A peak is what a task needed beyond what its child had before it. One that is not
exact is a lower bound (see ``meter``): it counts in ``last`` and ``max``, and in the others
only as long as there is no exact one.

Imports neither Celery nor billiard.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from typing import TypedDict

__all__ = ["Peaks", "Summary"]

#: Peaks kept of each task: enough for a 95th percentile.
KEPT_PEAKS = 200

#: Task names kept; the one that ran least recently goes first.
KEPT_NAMES = 1000

#: What a task needs is known by so many exact peaks, for so many runs after the last of them.
KNOWN_RUNS, KNOWN_FOR = 3, 100


class Summary(TypedDict):
    """The peaks of one task: number of runs, of exact peaks among them, and bytes."""

    count: int
    exact: int
    last: int
    median: int
    p95: int
    max: int


class _Record:
    __slots__ = ("bounds", "count", "exact", "exact_at", "last", "most", "peaks")

    def __init__(self) -> None:
        self.count = self.exact = self.exact_at = self.last = self.most = 0
        self.peaks: deque[int] = deque(maxlen=KEPT_PEAKS)
        self.bounds: deque[int] = deque(maxlen=KEPT_PEAKS)


class Peaks:
    """The peaks of all tasks, by name."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()

    def add(self, name: str, peak: int, *, exact: bool) -> None:
        """Enter what a task of this name needed, in bytes."""
        record = self._records.get(name)
        if record is None:
            record = self._records[name] = _Record()
            if len(self._records) > KEPT_NAMES:
                self._records.popitem(last=False)
        else:
            self._records.move_to_end(name)
        record.count += 1
        record.exact += exact
        record.last = peak
        if exact:
            record.exact_at = record.count
        record.most = max(record.most, peak)
        (record.peaks if exact else record.bounds).append(peak)

    def is_known(self, name: str) -> bool:
        """Whether it is known what tasks of this name need."""
        record = self._records.get(name)
        return (
            record is not None and record.exact >= KNOWN_RUNS and record.count - record.exact_at < KNOWN_FOR
        )

    def summaries(self) -> dict[str, Summary]:
        """Return each task's peaks in numbers. Percentiles are by the nearest-rank method."""
        return {name: _summary(record) for name, record in list(self._records.items())}


def _summary(record: _Record) -> Summary:
    peaks = sorted(record.peaks or record.bounds)
    return Summary(
        count=record.count,
        exact=record.exact,
        last=record.last,
        median=_percentile(peaks, 0.5),
        p95=_percentile(peaks, 0.95),
        max=record.most,
    )


def _percentile(ordered: list[int], share: float) -> int:
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]
