"""A call on its way through the pool: its time limits, its callbacks, its end."""

from __future__ import annotations

import gc
import weakref

import pytest
from billiard.exceptions import WorkerLostError
from hypothesis import given
from hypothesis import strategies as st
from kombu.asynchronous import Hub

from memsafe_pool.job import Job, lost
from memsafe_pool.time_limits import TimeLimits


def job(limits=(None, None), **callbacks):
    return Job(print, (), {}, limits=limits, **callbacks)


# Limits


def test_a_job_that_has_ended_is_not_kept_by_its_limit():
    """The loop's timer has an entry until the limit would have passed, but what it was about is gone."""
    hub, limits = Hub(), TimeLimits(print)
    limits.attach(hub, [])
    limited = job((None, 3600.0))
    limited.accept(42, 100.0)
    limits.watch(limited)
    limits.forget(limited)
    seen = weakref.ref(limited)
    del limited
    gc.collect()
    assert seen() is None
    hub.close()


def test_the_clock_starts_when_a_child_begins():
    """A job that waits has no limit to watch, however long it waits."""
    waiting = job((1, 2))
    assert waiting.next_limit() is None
    waiting.accept(42, 100.0)
    assert waiting.next_limit() == (101.0, True)


@pytest.mark.parametrize(
    ("limits", "first", "second"),
    [
        ((None, None), None, None),
        ((0, 0), None, None),
        ((3, None), (103.0, True), None),
        ((None, 5), (105.0, False), (105.0, False)),
        ((3, 5), (103.0, True), (105.0, False)),
        ((5, 5), (105.0, True), (105.0, False)),
        # A soft limit above the hard one never comes.
        ((7, 5), (105.0, False), (105.0, False)),
        ((0.5, 0), (100.5, True), None),
    ],
)
def test_which_limit_is_next(limits, first, second):
    """First the soft limit, where there is one that comes before the hard one, then the hard one."""
    running = job(limits)
    running.accept(42, 100.0)
    assert running.next_limit() == first
    running.soft_limit_passed = True
    assert running.next_limit() == second


LIMIT = st.none() | st.floats(0, 1000)


@given(LIMIT, LIMIT, st.floats(0, 1e6))
def test_limits_pass_in_order(soft, hard, began):
    """Limits never come before the job began, the hard one never before the soft one, each at most once."""
    running = job((soft, hard))
    running.accept(1, began)
    passed = []
    while (limit := running.next_limit()) is not None:
        passed.append(limit)
        if not limit[1]:
            break
        running.soft_limit_passed = True
    assert [soft for _, soft in passed] in ([], [True], [False], [True, False])
    assert passed == sorted(passed, key=lambda limit: limit[0])
    assert all(at >= began for at, _ in passed)
    assert any(not soft for _, soft in passed) == bool(hard)


@pytest.mark.parametrize(
    ("pauses", "due"),
    [
        ([(102.0, 122.0)], 125.0),
        ([(90.0, 95.0)], 105.0),
        ([(90.0, 103.0)], 108.0),
        ([(90.0, 95.0), (101.0, 102.0), (103.0, 110.0)], 113.0),
    ],
    ids=["after", "before", "across", "several"],
)
@pytest.mark.parametrize("late", [False, True])
def test_pauses_do_not_count(pauses, due, late):
    """Only what of them is after the beginning, whether that was heard of before or after them."""
    running = job((None, 5))
    if not late:
        running.accept(42, 100.0)
    for begin, end in pauses:
        running.pause(begin)
        assert running.next_limit() is None
        running.resume(end)
    if late:
        running.accept(42, 100.0)
    assert running.next_limit() == (due, False)


def test_a_job_whose_child_has_ended():
    """In the next child its clock begins anew, and it is not paused."""
    running = job((None, 5))
    running.pause(90.0)
    running.resume(95.0)
    running.pause(96.0)
    running.leave()
    running.accept(43, 100.0)
    assert running.paused_at is None
    assert running.next_limit() == (105.0, False)


# Callbacks


def test_each_callback_gets_what_celery_expects():
    """Accept: pid and time; success or error: the value; limits: by keyword."""
    heard = []

    def on_timeout(*, soft, timeout):
        heard.append(("limit", soft, timeout))

    running = job(
        (1, 2),
        on_accept=lambda pid, at: heard.append(("accept", pid, at)),
        on_success=lambda value: heard.append(("success", value)),
        on_error=lambda value: heard.append(("error", value)),
        on_timeout=on_timeout,
    )
    running.accept(42, 7.0)
    running.time_out(soft=True)
    running.time_out(soft=False)
    running.finish(True, "a")
    running.finish(False, "b")
    assert heard == [
        ("accept", 42, 7.0), ("limit", True, 1), ("limit", False, 2), ("success", "a"), ("error", "b"),
    ]  # fmt: skip


def test_callbacks_may_be_missing():
    """A job nobody listens to runs all the same."""
    silent = job((1, 2))
    silent.accept(1, 0.0)
    silent.time_out(soft=True)
    silent.finish(True, None)


@pytest.mark.parametrize("error", [ValueError, MemoryError, OSError])
def test_an_error_in_a_callback_is_logged(caplog, error):
    """One task's trouble does not reach the event loop."""

    def fail(value):
        raise error("the callback's own")

    job(on_success=fail).finish(True, None)
    assert "the callback's own" in caplog.text


def test_errors_that_are_to_propagate_do():
    """Celery names the exceptions that it wants to see itself, such as lost connections."""

    def fail(value):
        raise ConnectionError("broker")

    with pytest.raises(ConnectionError):
        job(on_success=fail, propagate=(ConnectionError,)).finish(True, None)


def test_the_process_may_be_asked_to_end_in_a_callback():
    """SystemExit, which Celery raises for a shutdown, is not swallowed."""

    def leave(value):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        job(on_error=leave).finish(False, None)


# End


@pytest.mark.parametrize(
    ("exitcode", "words"),
    [
        (-9, "signal 9 (SIGKILL)"),
        (-11, "signal 11 (SIGSEGV)"),
        (3, "exitcode 3"),
        (None, "unknown exit status"),
    ],
)
def test_a_lost_job_says_how(exitcode, words):
    """The error has the child's end in words and the job's number, as Celery's users know it."""
    gone = job()
    error = lost(gone, exitcode)
    assert error.type is WorkerLostError
    assert str(error.exception.exc) == f"Worker exited prematurely: {words} Job: {gone.id}."


def test_numbers_are_not_used_twice():
    """A late answer can not be taken for that of another job."""
    assert len({job().id for _ in range(100)}) == 100
