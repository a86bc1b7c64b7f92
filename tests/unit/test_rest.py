"""When a task rests: it neither takes memory nor uses CPU."""

from __future__ import annotations

import pytest

from memsafe_pool.rest import LOOK_SECONDS, NOISE_SHARE, REST_SECONDS, Rest

MIB = 1 << 20


def watch(seconds, cpu, *, grown=lambda passed: 0, every=0.5, rest=None, began=100.0):
    """Look at a task for so long; its CPU time and what it has taken are functions of the time passed."""
    rest = rest or Rest(began)
    passed = 0.0
    while passed < seconds:
        passed += every
        if rest.is_due(began + passed, grown(passed)):
            rest.see(began + passed, cpu(passed))
    return rest


def test_one_that_does_nothing_rests():
    """Not at once: some seconds after its CPU time was first looked at."""
    assert not watch(REST_SECONDS, lambda passed: 3.0).resting
    assert watch(REST_SECONDS + 2 * LOOK_SECONDS, lambda passed: 3.0).resting


def test_one_that_asks_again_and_again_rests():
    """As clients of Redis do for a lock or a result; one that works a little does not."""
    assert watch(20, lambda passed: passed * NOISE_SHARE / 2).resting
    assert not watch(20, lambda passed: passed * NOISE_SHARE * 2).resting


def test_one_that_takes_memory_does_not_rest():
    """However little CPU it uses for it, as one that reads from a slow disk; noise is nothing."""
    assert not watch(20, lambda passed: 0.0, grown=lambda passed: int(passed * MIB)).resting
    assert watch(20, lambda passed: 0.0, grown=lambda passed: int(passed) % 2 * MIB // 2).resting


@pytest.mark.parametrize("cpu", [1.0, None])
def test_it_wakes(cpu):
    """It has used CPU since, or programs that it has started may have; then it has to rest anew."""
    rest = watch(10, lambda passed: 0.0)
    assert rest.resting
    assert rest.is_due(111.0, 0)
    rest.see(111.0, cpu)
    assert not rest.resting
    assert not watch(REST_SECONDS - 1, lambda passed: 1.0, rest=rest, began=111.0).resting
    assert watch(3, lambda passed: 1.0, rest=rest, began=111.0 + REST_SECONDS - 1).resting


def test_it_wakes_at_once_when_it_takes_memory():
    """Whether or not its CPU time is to be looked at."""
    rest = watch(10, lambda passed: 0.0)
    assert not rest.is_due(110.01, 3 * MIB)
    assert not rest.resting


def test_one_that_is_kept_from_it_does_not_rest():
    """While it is paused it can do nothing."""
    rest = watch(10, lambda passed: 0.0)
    rest.wake(110.0, 0)
    assert not rest.resting
    assert not watch(REST_SECONDS, lambda passed: 0.0, rest=rest, began=110.0).resting


def test_it_is_looked_at_once_in_a_while():
    """Looks at memory are each few milliseconds."""
    rest, looks = Rest(0.0), 0
    for step in range(1000):
        if rest.is_due(step * 0.01, 0):
            rest.see(step * 0.01, 0.0)
            looks += 1
    assert looks <= 10 / LOOK_SECONDS
