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

#: What a task needs is known when so many peaks in a row differ by no more than this share and these bytes.
KNOWN_RUNS, KNOWN_SHARE, KNOWN_BYTES = 4, 0.05, 1 << 20


class Summary(TypedDict):
    """The peaks of one task: number of runs, of exact peaks among them, and bytes."""

    count: int
    exact: int
    last: int
    median: int
    p95: int
    max: int


class _Record:
    __slots__ = ("alike", "bounds", "count", "exact", "last", "level", "little", "most", "peaks")

    def __init__(self) -> None:
        self.count = self.exact = self.last = self.most = 0
        # Peaks in a row that were as small as can be, and exact ones that were like one another.
        self.little = self.alike = self.level = 0
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
        # Also by lower bounds: what a child could look at it has looked at, until it is told not to.
        record.little = 0 if peak > KNOWN_BYTES else record.little + 1
        near = abs(peak - record.level) <= KNOWN_BYTES + KNOWN_SHARE * record.level
        if exact:
            record.alike = record.alike + 1 if near else 1
            record.level = peak
        elif peak > record.level and not near:
            record.alike = 0
        record.most = max(record.most, peak)
        (record.peaks if exact else record.bounds).append(peak)

    def is_known(self, name: str) -> bool:
        """Whether it is known what tasks of this name need: so many in a row needed little, or the same."""
        record = self._records.get(name)
        return record is not None and max(record.little, record.alike) >= KNOWN_RUNS

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
