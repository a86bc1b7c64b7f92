"""When the prefetch is bounded, when tasks go back, and what Celery's loop is made to tell the broker."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from kombu.common import QoS

from memsafe_pool import upstream
from memsafe_pool.prefetch import GIVE_BACK_SECONDS, RELEASE_SECONDS, Hold, Prefetch, _FollowingQoS

# Times


def test_nothing_goes_back_after_a_moment():
    """The prefetch is lowered at once; tasks go back when the block has lasted."""
    hold = Hold()
    assert not hold.follow(True, 10.0)
    assert hold.bounded
    assert not hold.follow(True, 10.0 + GIVE_BACK_SECONDS * 0.9)
    assert hold.follow(True, 10.0 + GIVE_BACK_SECONDS)


def test_a_task_that_was_admitted_begins_the_time_anew():
    """What counts is for how long nothing could be admitted."""
    hold = Hold()
    hold.follow(True, 10.0)
    hold.follow(False, 10.4)
    assert not hold.follow(True, 10.6)
    assert hold.follow(True, 10.6 + GIVE_BACK_SECONDS)


def test_it_stays_bounded_for_a_while():
    """Tasks come one by one until there was room for all of them for a second."""
    hold = Hold()
    hold.follow(True, 10.0)
    hold.follow(False, 10.0 + RELEASE_SECONDS * 0.9)
    assert hold.bounded
    hold.follow(False, 10.0 + RELEASE_SECONDS)
    assert not hold.bounded


@given(st.lists(st.tuples(st.booleans(), st.floats(0.001, 3)), min_size=1))
def test_any_course(steps):
    """Tasks go back only while blocked, and bounded; what is over for long is over."""
    hold, now, blocked_last = Hold(), 0.0, None
    for blocked, seconds in steps:
        now += seconds
        back = hold.follow(blocked, now)
        blocked_last = now if blocked else blocked_last
        assert blocked or not back
        assert hold.bounded or not blocked
        assert hold.bounded == (blocked_last is not None and now - blocked_last < RELEASE_SECONDS)


# Celery's loop


def test_the_loop_updates_when_it_is_due():
    """Celery's loop compares ``prev`` with ``value`` in each round, and updates when they differ."""
    told, due = [], [False]
    celerys = QoS(None, 8)

    def tell(prefetch_count):
        told.append(prefetch_count)

    qos = _FollowingQoS(celerys, tell, lambda: due[0])

    def rounds(count):
        for _ in range(count):
            if qos.prev != qos.value:
                qos.update()

    rounds(3)
    assert told == [8]
    due[0] = True
    rounds(1)
    due[0] = False
    rounds(3)
    assert told == [8, 8]
    qos.increment_eventually(2)
    rounds(3)
    assert told == [8, 8, 10]
    assert getattr(qos, "max_prefetch", None) == getattr(celerys, "max_prefetch", None)


def test_without_a_consumer_nothing_is_done():
    """Before the first connection and while there is none, and where there is an obstacle."""
    prefetch = Prefetch(waiting=[], drop=lambda job: None)
    prefetch.follow(blocked=False)
    prefetch.follow(blocked=True)
    prefetch.detach()
    prefetch.follow(blocked=True)
    assert prefetch.count == 0
    assert prefetch.given_back == 0


def test_only_requests_are_requests():
    """A call that is none of Celery's has callbacks of another kind, or none."""
    assert upstream.request_of(None) is None
    assert upstream.request_of(print) is None
    assert upstream.request_of([].append) is None
