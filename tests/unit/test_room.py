"""The arithmetic of admission."""

from __future__ import annotations

import pytest

from memsafe_pool.machine import Work
from memsafe_pool.reservations import UNKNOWN, Estimate
from memsafe_pool.room import Look, Room, Seen


def task(reserved, most=None, *, alone=False):
    work = Work("any", [(1.0, 0)])
    work.estimate = UNKNOWN if reserved is None else Estimate(reserved, most or reserved, known=True)
    work.alone = alone
    return work


@pytest.fixture
def room():
    return Room(1000)


def test_all_is_free_at_first(room):
    """Before the first look nothing is known to be used."""
    assert room.free == 1000
    assert room.pending == 0


def test_a_task_fits_exactly(room):
    """Up to the last byte."""
    assert room.lacks(task(1000)) == 0
    assert room.lacks(task(1001)) == 1


def test_what_is_set_aside_beside_it_counts(room):
    """Such as the child that it needs."""
    assert room.lacks(task(900), extra=150) == 50


def test_memory_is_set_aside_from_begin_to_end(room):
    """As long as nobody looks, all of the reservation."""
    first = task(300)
    room.begin(first)
    assert room.pending == 300
    assert room.lacks(task(800)) == 100
    room.end(first)
    assert room.free == 1000


def test_what_its_child_had_free_is_not_set_aside_once_more(room):
    """It counts as used already; what is left over is no one else's."""
    first, second = task(300), task(100)
    room.begin(first)
    room.begin(second)
    room.look(Look(1.0, 500, [Seen(first, 50, free=200), Seen(second, 0, free=400)]))
    assert room.running == {first: 50, second: 0}


def test_what_a_task_has_taken_is_not_counted_twice(room):
    """It is in what is used; only the rest of its reservation is set aside."""
    first = task(300)
    room.begin(first)
    room.look(Look(1.0, 900, [Seen(first, 100)]))
    assert room.running[first] == 200
    assert room.free == 900 - 200
    room.look(Look(2.0, 650, [Seen(first, 350)]))
    assert room.free == 650


def test_one_that_lies_and_grows_may_double(room):
    """Nobody knows how far a task goes that has passed its reservation."""
    first = task(100)
    room.begin(first)
    room.look(Look(1.0, 800, [Seen(first, 200, growing=True)]))
    assert room.free == 800 - 200
    room.look(Look(2.0, 800, [Seen(first, 200)]))
    assert room.free == 800


def test_one_that_may_need_more_gets_a_reserve(room):
    """The largest difference to what is expected is kept free, once, and no more than a third."""
    assert room.lacks(task(900, 950)) == -50
    first = task(100, 300)
    room.begin(first)
    assert room.lacks(task(100, 150)) == -(1000 - 100 - 100 - 200)
    assert room.lacks(task(0, 900)) == -(1000 - 100 - 333)


def test_the_reserve_goes_as_the_task_grows(room):
    """What it has taken beyond its reservation needs no reserve any more."""
    first = task(100, 300)
    room.begin(first)
    room.look(Look(1.0, 750, [Seen(first, 250)]))
    assert room.lacks(task(0)) == -(750 - 50)
    room.look(Look(2.0, 900, []))
    room.end(first)
    assert room.lacks(task(0)) == -900


def test_what_others_have_set_aside_counts(room):
    """Other workers under the same limit are not robbed of what they were promised."""
    room.look(Look(1.0, 800, others=300))
    assert room.free == 500


def test_a_look_may_be_older_than_the_end_of_a_task(room):
    """A task that has ended meanwhile is left out."""
    first = task(100)
    room.begin(first)
    room.end(first)
    room.look(Look(1.0, 900, [Seen(first, 50)]))
    assert room.pending == 0
    assert room.grown == {}


def test_the_end_of_a_task_that_never_began(room):
    """It may have been revoked before; that is no error, and it may be said twice."""
    room.end(task(100))
    assert room.free == 1000


def test_one_that_is_to_run_alone_excludes_others_and_the_reverse(room):
    """Until it has ended."""
    single, other = task(10, alone=True), task(10)
    assert not room.excludes(single)
    room.begin(single)
    assert room.excludes(other)
    room.end(single)
    assert not room.excludes(other)
    room.begin(other)
    assert room.excludes(single)
    assert not room.excludes(task(10))


def test_a_lower_budget_holds_at_once(room):
    """Free may be less than nothing then."""
    room.begin(task(600))
    room.look(Look(1.0, -100, []))
    assert room.free == -700


def test_whether_all_rest(room):
    """Those that run, and not those that have begun since; what is set aside for them stays so."""
    first, second = task(300), task(200)
    room.begin(first)
    room.begin(second)
    for resting in (False, True):
        room.look(Look(0.0, 900, [Seen(first, 100, resting=True), Seen(second, 0, resting=resting)]))
        assert room.rests is resting
        assert room.free == 900 - 200 - 200
    room.begin(task(50))
    assert not room.rests
    room.look(Look(1.0, 900))
    assert not room.rests
