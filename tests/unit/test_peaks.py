"""What tasks needed, in numbers."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from memsafe_pool import peaks
from memsafe_pool.peaks import Peaks


def summary(*entries):
    """The summary of a task with these ``(peak, exact)``."""
    record = Peaks()
    for peak, exact in entries:
        record.add("task", peak, exact=exact)
    return record.summaries()["task"]


def test_one_task():
    """With one peak, that is last, median and the rest."""
    assert summary((5, True)) == {"count": 1, "exact": 1, "last": 5, "median": 5, "p95": 5, "max": 5}


def test_tasks_are_kept_apart():
    """Each name has its own."""
    record = Peaks()
    record.add("small", 1, exact=True)
    record.add("large", 9, exact=True)
    assert {name: row["max"] for name, row in record.summaries().items()} == {"small": 1, "large": 9}


def test_a_lower_bound_does_not_hide_what_is_known():
    """Peaks that are not exact count only as long as there is none that is."""
    bounds = [(0, False)] * 50
    assert summary(*bounds)["median"] == 0
    known = summary(*bounds, (100, True), *bounds)
    assert (known["median"], known["p95"], known["exact"], known["count"]) == (100, 100, 1, 101)
    assert summary((100, True), (300, False))["max"] == 300
    assert summary((100, True), (300, False))["last"] == 300


def test_percentiles_follow_what_is_recent():
    """A task that has changed is known by what it does now; its largest peak ever stays."""
    changed = summary(*[(1000, True)] * 50, *[(10, True)] * peaks.KEPT_PEAKS)
    assert (changed["median"], changed["p95"], changed["max"]) == (10, 10, 1000)


def test_what_a_task_needs_is_known_by_exact_peaks():
    """By three of them, until there was none for a hundred runs."""
    record = Peaks()

    def known_after(exact, count=1):
        for _ in range(count):
            record.add("task", 10, exact=exact)
        return record.is_known("task")

    assert not record.is_known("task")
    assert not known_after(False, 200)
    assert not known_after(True, peaks.KNOWN_RUNS - 1)
    assert known_after(True)
    assert known_after(False, peaks.KNOWN_FOR - 1)
    assert not known_after(False)
    assert known_after(True)


def test_there_is_an_end_to_names(monkeypatch):
    """An app that makes up names does not fill the worker: the one unused for longest is forgotten."""
    monkeypatch.setattr(peaks, "KEPT_NAMES", 3)
    record = Peaks()
    for name in ["a", "b", "c", "a", "d"]:
        record.add(name, 1, exact=True)
    assert list(record.summaries()) == ["c", "a", "d"]


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=peaks.KEPT_PEAKS))
def test_a_percentile_is_one_of_the_peaks(sizes):
    """So much of the peaks is not above it, and no smaller peak will do."""
    row = summary(*[(size, True) for size in sizes])
    for share, value in ((0.5, row["median"]), (0.95, row["p95"])):
        assert value in sizes
        assert sum(size <= value for size in sizes) >= share * len(sizes)
        assert sum(size < value for size in sizes) < math.ceil(share * len(sizes))
