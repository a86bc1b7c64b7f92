"""Which task runs when: fair scheduling, prefetch, ETA, countdown, rate limits."""

from __future__ import annotations

import time

import celery
import pytest

#: By so much may a task with a rate limit be early; by more before Celery 5.6, in any pool.
EARLY_SECONDS = 0.1 if celery.VERSION[:2] >= (5, 6) else 0.5


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method):
    return start_module_worker(start_method=start_method)


def test_a_long_task_does_not_block_short_ones(worker):
    """While one child is busy, everything else goes through the other."""
    gate = worker.gate()
    long = worker.call("proj.hold", gate.path)
    gate.wait_started()
    short = [worker.call("proj.add", number, number) for number in range(20)]
    assert [worker.get(result) for result in short] == [2 * number for number in range(20)]
    assert long.state != "SUCCESS"
    gate.open()
    worker.get(long)


def test_a_burst_ends_completely_and_once(worker):
    """Of many tasks at once each runs exactly once."""
    runs = worker.folder / "runs"
    results = [worker.call("proj.note", str(runs), number) for number in range(200)]
    assert [worker.get(result) for result in results] == list(range(200))
    assert sorted(int(line) for line in runs.read_text().split()) == list(range(200))


def test_countdown_and_eta(worker):
    """A task does not run before its time."""
    assert not worker.inspect("scheduled")  # the first time takes longer
    soon = time.time() + 8
    results = [worker.call("proj.now", countdown=8), worker.call("proj.now", eta=_utc(soon))]
    scheduled = worker.until(lambda: worker.inspect("scheduled"), "the tasks to be scheduled")
    assert {entry["request"]["id"] for entry in scheduled} <= {result.id for result in results}
    assert all(worker.get(result) >= soon - 0.001 for result in results)


def spreads(worker, task):
    """Check that five tasks limited to two a second do not all start before their turn.

    The first may start at once, the fifth two seconds after it was sent; delays only add to that.
    """
    sent = time.time()
    results = [worker.call(task) for _ in range(5)]
    assert worker.run("proj.add", 1, 1) == 2, "others pass by"
    assert max(worker.get(result) for result in results) > sent + 2 - EARLY_SECONDS


def test_a_rate_limit_spreads_tasks(worker):
    """``rate_limit="2/s"`` of a task holds for it and not for others."""
    spreads(worker, "proj.rare")


def test_a_rate_limit_by_remote_control(worker):
    """``control rate_limit`` sets and removes a limit while the worker runs."""
    worker.control("rate_limit", task_name="proj.now", rate_limit="2/s")
    try:
        spreads(worker, "proj.now")
    finally:
        worker.control("rate_limit", task_name="proj.now", rate_limit=0)
    assert worker.run("proj.now") > 0


@pytest.mark.parametrize(("late", "taken"), [(True, 4), (False, 6)])
def test_no_more_is_prefetched_than_asked(start_worker, start_method, late, taken):
    """Two children, multiplier two: four unacknowledged messages; with acks_late the running ones count."""
    worker = start_worker(config={"worker_prefetch_multiplier": 2}, start_method=start_method)
    gate = worker.gate()
    results = [worker.call("proj.hold_late" if late else "proj.hold", gate.path) for _ in range(10)]
    gate.wait_started(2)
    worker.until(lambda: worker.broker.waiting() == 10 - taken, f"{taken} messages to be fetched")
    assert len(worker.inspect("active")) == 2
    assert len(worker.inspect("active")) + len(worker.inspect("reserved")) == taken
    assert worker.broker.waiting() == 10 - taken
    gate.open()
    assert len({worker.get(result) for result in results}) == 2


def _utc(seconds):
    from datetime import datetime, timezone

    return datetime.fromtimestamp(seconds, tz=timezone.utc)
