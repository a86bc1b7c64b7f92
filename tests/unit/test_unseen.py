"""Memory that is taken and that nobody is known to have."""

from __future__ import annotations

import pytest

from memsafe_pool.unseen import LEAST_BYTES, LESS_SECONDS, MORE_SECONDS, PART, Unseen

MIB = 1 << 20
LIMIT = 1024 * MIB


@pytest.fixture
def look():
    unseen, now = Unseen(), 100.0

    def look(mib, after=0.01):
        nonlocal now
        now += after
        unseen.look(now, None if mib is None else mib * MIB, LIMIT)
        return unseen

    return look


def test_what_was_there_before_is_usual(look):
    assert look(700).bytes == 0
    assert look(700, after=10).bytes == 0


def test_what_is_taken_at_once_counts_and_so_does_its_speed(look):
    look(100)
    unseen = look(150)
    assert unseen.bytes == pytest.approx(50 * MIB, rel=0.01)
    assert unseen.rate == pytest.approx(50 * MIB / 0.01, rel=0.01)
    assert unseen.matters


def test_a_little_does_not_matter(look):
    look(100)
    assert not look(99 + LEAST_BYTES // MIB).matters
    assert not look(99 + LIMIT // PART // MIB).matters
    assert look(102 + LIMIT // PART // MIB).matters


def test_it_becomes_usual_with_time(look):
    look(100)
    look(200)
    unseen = look(200, after=MORE_SECONDS)
    assert unseen.bytes == pytest.approx(50 * MIB, rel=0.02)
    assert unseen.rate < MIB


def test_a_short_dip_is_no_growth_afterwards(look):
    """A child that starts is known to have what it has not taken yet."""
    look(100)
    look(88)
    unseen = look(100)
    assert unseen.bytes < 2 * MIB
    assert not unseen.matters


def test_what_was_deleted_may_come_again(look):
    """Less is soon usual: what is written then is as new as the first time."""
    look(100)
    look(200)
    assert look(100).bytes == 0
    look(100, after=10 * LESS_SECONDS)
    assert look(180).bytes == pytest.approx(80 * MIB, rel=0.02)


def test_where_others_take_memory_nothing_is_known(look):
    look(100)
    assert look(200).bytes
    unseen = look(None)
    assert (unseen.bytes, unseen.rate, unseen.matters) == (0, 0, False)
    assert look(400).bytes == 0
