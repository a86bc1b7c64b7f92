"""What is learned of tasks, and what a running one is still expected to take."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsafe_pool.reservations import (
    ENOUGH,
    KEPT_KEYS,
    LITTLE_BYTES,
    MARGIN,
    RECENT,
    STEADY,
    UNKNOWN,
    Estimate,
    Reservations,
    pending,
)

MIB = 1 << 20


def learned(*peaks, name="add", label=None):
    found = Reservations()
    for peak in peaks:
        found.learn(name, label, peak * MIB)
    return found


def mib(size, margin=MARGIN):
    return pytest.approx(size * MIB * margin, abs=2)


def test_nothing_is_known_of_a_task_that_never_ran():
    """Then nothing is set aside, and it says so."""
    assert Reservations().estimate("add", "queue/7") is UNKNOWN
    assert not UNKNOWN.known


def test_the_largest_of_the_last_few_is_expected():
    """With a margin; larger ones of before are thought possible."""
    estimate = learned(100, *[5] * RECENT, 10).estimate("add", None)
    assert estimate.reserved == mib(10)
    assert estimate.most == mib(100)
    assert learned(10, 20, 15).estimate("add", None).reserved == mib(20)


def test_where_all_are_alike_less_is_added():
    """Only as much as they differ by."""
    assert learned(*[100] * RECENT).estimate("add", None).reserved == mib(100, STEADY)
    assert learned(*[100] * (RECENT - 1)).estimate("add", None).reserved == mib(100)
    assert learned(*[100] * RECENT, 104).estimate("add", None).reserved == mib(104)


def test_what_was_hidden_is_thought_to_be_as_ever():
    """A task that may have used free heap needed what the one before did, as far as that can be."""
    found = learned(*[100] * RECENT)
    found.learn("add", None, 0, hidden=300 * MIB)
    assert found.estimate("add", None).reserved == mib(100, STEADY)
    found.learn("add", None, 20 * MIB, hidden=50 * MIB)
    for _ in range(RECENT - 1):
        found.learn("add", None, 0, hidden=300 * MIB)
    assert found.estimate("add", None).reserved == mib(70, STEADY)
    found.learn("add", None, 150 * MIB, hidden=300 * MIB)
    assert found.estimate("add", None).reserved == mib(150)


def test_a_bound_will_do_until_there_is_an_exact_peak():
    """What may have been used unseen counts; the lowest upper bound holds, then what is exact."""
    found = Reservations()
    found.learn("add", None, 10 * MIB, hidden=200 * MIB)
    assert found.estimate("add", None).reserved == mib(210)
    found.learn("add", None, 10 * MIB, hidden=90 * MIB)
    assert found.estimate("add", None).reserved == found.estimate("add", None).most == mib(100)
    found.learn("add", None, 10 * MIB, hidden=500 * MIB)
    assert found.estimate("add", None).reserved == mib(100)
    assert not found.dump()
    found.learn("add", None, 30 * MIB)
    assert found.estimate("add", None).reserved == found.estimate("add", None).most == mib(30)
    found.learn("add", None, 10 * MIB, hidden=500 * MIB)
    assert found.estimate("add", None).most == mib(30)


def test_what_a_task_without_needs_leaves_unseen_is_little():
    """One that is known to need little does so also where a child has much that it could have used."""
    found = Reservations()
    found.learn("add", None, 0)
    found.learn("add", None, 0, hidden=500 * MIB)
    assert found.estimate("add", None).reserved == LITTLE_BYTES


def test_one_that_never_needed_much_needs_little():
    """All the same, as small peaks are mostly noise."""
    found = Reservations()
    found.learn("add", None, 1000)
    assert found.estimate("add", None) == Estimate(LITTLE_BYTES, LITTLE_BYTES, known=True)
    version = found.version
    found.learn("add", None, 2000)
    assert found.version == version


def test_a_label_counts_by_itself_once_it_was_seen_a_few_times():
    """Until then the name alone does; one label's sizes do not change another's."""
    found = learned(*[100] * ENOUGH, label="big")
    for _ in range(ENOUGH - 1):
        found.learn("add", "small", 5 * MIB)
    assert found.estimate("add", "small").reserved > 99 * MIB
    found.learn("add", "small", 5 * MIB)
    assert found.estimate("add", "small").reserved == mib(5, STEADY)
    assert found.estimate("add", "big").reserved == mib(100, STEADY)
    assert found.estimate("add", "never seen").known


def test_one_that_still_runs_raises_what_is_expected():
    """What has begun to need more may need it again; the next end corrects it."""
    found = learned(*[10] * RECENT)
    version = found.version
    found.rise("add", None, UNKNOWN, 50 * MIB)
    assert found.estimate("add", None).reserved == mib(50)
    assert found.version > version
    found.rise("add", None, UNKNOWN, 20 * MIB)
    assert found.estimate("add", None).reserved == mib(50)
    found.learn("add", None, 10 * MIB)
    assert found.estimate("add", None).reserved == mib(10, STEADY)


def test_nothing_rises_of_which_nothing_is_known():
    """An end is needed first."""
    found = Reservations()
    found.rise("add", None, UNKNOWN, 50 * MIB)
    assert found.estimate("add", None) is UNKNOWN


def test_the_version_changes_only_when_much_has_changed():
    """Waiting tasks need not be sized again for nothing."""
    found = learned(100)
    version = found.version
    found.learn("add", None, 102 * MIB)
    assert found.version == version
    found.learn("add", None, 200 * MIB)
    assert found.version > version


def test_the_one_learned_longest_ago_is_forgotten():
    """The number of names and labels is bounded, as a user's key may be anything."""
    found = learned(100, name="first")
    for number in range(KEPT_KEYS):
        found.learn("first", None, 100 * MIB)
        found.learn(f"task{number}", None, MIB)
    assert found.estimate("first", None).known
    assert not found.estimate("task0", None).known
    assert len(found.dump()) == KEPT_KEYS


def test_a_restart_changes_nothing():
    """What is written as JSON and read again gives the same estimates."""
    found = learned(100, 20, 30, label="a")
    found.learn("little", None, 10)
    again = Reservations()
    again.load(json.loads(json.dumps(found.dump())))
    for key in ("add", None), ("add", "a"), ("little", None):
        assert again.estimate(*key) == found.estimate(*key)


@pytest.mark.parametrize(
    "rows",
    [
        None,
        7,
        [1],
        [{}],
        [{"name": 1, "label": None, "count": 1, "peaks": []}],
        [{"name": "a", "label": 1, "count": 1, "peaks": []}],
        [{"name": "a", "label": None, "count": 0, "peaks": []}],
        [{"name": "a", "label": None, "count": 1, "peaks": ["many"]}],
        [{"name": "a", "label": None, "count": 1, "peaks": 5}],
    ],
)
def test_a_file_of_somebody_else_is_refused(rows):
    """With one kind of error, whatever is wrong with it."""
    with pytest.raises(ValueError, match=r"not what was written|invalid literal|^$"):
        Reservations().load(rows)


@pytest.mark.parametrize(
    ("grown", "growing", "left"),
    [
        (0, False, 100),
        (40, True, 60),
        (100, True, 0),
        (150, False, 0),  # it has more than was expected, and stays there
        (150, True, 150),  # up to the largest that was seen, or twice
        (250, True, 250),
        (90, False, 10),
    ],
)
def test_what_is_still_to_come(grown, growing, left):
    """What is left of the reservation, and more for one that has passed it and grows."""
    assert pending(Estimate(100, 200, known=True), grown, growing=growing) == left


@pytest.mark.parametrize(("grown", "left"), [(0, 80), (60, 20), (80, 0), (95, 0), (101, 101)])
def test_what_its_child_had_free_does_not_make_it_larger_than_others(grown, left):
    """It need not be taken; but a task that ends where its like did is not expected to double for it."""
    assert pending(Estimate(100, 100, known=True, ended=100), grown, 20, growing=True) == left


@pytest.mark.parametrize(("grown", "left"), [(150, 150), (250, 50), (299, 1), (300, 300), (350, 350)])
def test_one_that_stays_below_others_is_expected_to_end_there(grown, left):
    """It is no larger than one that has ended; once it is, nobody knows."""
    assert pending(Estimate(100, 300, known=True, ended=300), grown, growing=True) == left


def test_what_still_runs_does_not_say_where_its_like_end():
    """It raises what is thought possible, but not what is known of those that have ended."""
    found = learned(*[10] * RECENT)
    found.rise("add", None, UNKNOWN, 50 * MIB)
    assert found.estimate("add", None).most == mib(50)
    assert found.estimate("add", None).ended == mib(10, STEADY)
    found.learn("add", None, 60 * MIB)
    assert found.estimate("add", None).ended == mib(60)
    before = Estimate(10 * MIB, 20 * MIB, known=True)
    assert found.rise("add", None, before, 30 * MIB) == Estimate(10 * MIB, mib(60), known=True, ended=mib(60))
    assert found.rise("add", None, UNKNOWN, 30 * MIB) is UNKNOWN


def test_an_unknown_one_may_double():
    """As long as it grows."""
    assert pending(UNKNOWN, 0, growing=False) == 0
    assert pending(UNKNOWN, 30, growing=True) == 30
    assert pending(UNKNOWN, 30, growing=False) == 0


@given(st.lists(st.integers(0, 10_000 * MIB), min_size=1, max_size=30))
def test_an_estimate_is_no_less_than_what_was_seen_last(peaks):
    """And the worst case is no less than what is expected."""
    found = Reservations()
    for peak in peaks:
        found.learn("add", None, peak)
    estimate = found.estimate("add", None)
    assert estimate.known
    assert estimate.reserved >= max(peaks[-RECENT:])
    assert estimate.most >= max(estimate.reserved, *peaks)
