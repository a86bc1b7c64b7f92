"""The same behaviour on all four brokers, with and without an event loop under Celery."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from celery.exceptions import TaskRevokedError


@pytest.fixture(scope="module")
def worker(start_module_worker, broker_kind):
    return start_module_worker(broker=broker_kind)


def test_results_and_failures_come_back(worker):
    """What a task returns or raises is what the caller gets."""
    assert worker.run("proj.add", 2, 3) == 5
    with pytest.raises(ValueError, match="no such thing"):
        worker.run("proj.fail", "ValueError", "no such thing")


def test_tasks_run_side_by_side_and_none_is_blocked(worker):
    """Two children, two tasks; while one is held, others go through the other child."""
    gate, late = worker.gate(), worker.gate()
    results = [worker.call("proj.hold", path) for path in (gate.path, late.path)]
    gate.wait_started()
    late.wait_started()
    gate.open()
    children = {worker.get(results[0])}
    assert {worker.run("proj.add", number, 1) for number in range(3)} == {1, 2, 3}
    late.open()
    children.add(worker.get(results[1]))
    assert len(children) == 2


def test_a_burst_ends_completely_and_once(worker):
    """Of many tasks each runs exactly once."""
    runs = worker.folder / "runs"
    results = [worker.call("proj.note", str(runs), number) for number in range(40)]
    assert [worker.get(result) for result in results] == list(range(40))
    assert sorted(int(line) for line in runs.read_text().split()) == list(range(40))


def test_a_large_argument_arrives(worker):
    """10 MB get through broker and pipe."""
    assert worker.run("proj.length", "x" * 10_000_000) == 10_000_000


def test_time_limits(worker):
    """Soft limits are raised in the task, hard ones end it, and the pool goes on."""
    gate = worker.gate()
    with pytest.raises(SoftTimeLimitExceeded):
        worker.run("proj.hold", gate.path, soft_time_limit=3)
    assert worker.run("proj.hold_through_soft_limit", gate.path, soft_time_limit=3) == "caught"
    with pytest.raises(TimeLimitExceeded):
        worker.run("proj.hold", gate.path, time_limit=3)
    assert worker.run("proj.add", 1, 1) == 2


def test_a_lost_child_costs_its_task_only(worker):
    """A child killed during a task: the caller learns it, and the pool goes on."""
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        worker.run("proj.die")
    assert worker.run("proj.add", 1, 1) == 2


@pytest.mark.stock_differs("without an event loop it freezes for ever", run=False)
def test_all_idle_children_lost_costs_nothing(worker):
    """All idle children killed: the next tasks run."""
    gate = worker.gate()
    held = [worker.call("proj.hold", gate.path) for _ in range(2)]
    children = set(gate.wait_started(2).values())
    gate.open()
    for result in held:
        worker.get(result)
    for child in children:
        os.kill(child, signal.SIGKILL)
    worker.until(lambda: not any(map(psutil.pid_exists, children)), "the killed children to be reaped")
    results = [worker.call("proj.add", number, number) for number in range(6)]
    assert [worker.get(result) for result in results] == [2 * number for number in range(6)]


def test_acks_late_with_reject_runs_the_task_again(worker):
    """The message of a lost task goes back to the broker and the second run succeeds."""
    assert worker.run("proj.die_once_rejected", str(worker.folder / "rejected")) == 2


@pytest.mark.stock_differs("a MemoryError in a task ends the whole worker", run=False)
def test_a_task_without_memory_fails_alone(worker):
    """MemoryError reaches the caller, and the worker goes on."""
    with pytest.raises(MemoryError):
        worker.run("proj.fail", "MemoryError", "too much")
    assert worker.run("proj.add", 1, 1) == 2


def test_countdown_and_retries(worker):
    """A task does not run before its time; a task may send itself again."""
    soon = time.time() + 1
    assert worker.run("proj.now", countdown=1) >= soon - 0.001
    assert worker.run("proj.third_time") == 2


def test_remote_control(worker):
    """Where the broker carries remote control: ping, stats, active, grow and shrink, terminate."""
    if not worker.broker.has_remote_control:
        assert worker.broker.kind == "sqlite"
        return
    assert worker.inspect("ping") == {"ok": "pong"}
    assert worker.stats()["pool"]["max-concurrency"] == 2
    gate = worker.gate()
    result = worker.call("proj.hold", gate.path)
    child = gate.wait_started()[result.id]
    worker.until(
        lambda: [task["worker_pid"] for task in worker.inspect("active")] == [child], "the task to be shown"
    )
    worker.control("revoke", task_id=result.id, terminate=True)
    with pytest.raises(TaskRevokedError):
        worker.get(result)
    worker.until(lambda: not psutil.pid_exists(child), "the child to end")
    assert "ok" in worker.control("pool_grow", n=1)
    gate = worker.gate()
    held = [worker.call("proj.hold", gate.path) for _ in range(3)]
    gate.wait_started(3)
    gate.open()
    assert len({worker.get(result) for result in held}) == 3
    assert "ok" in worker.control("pool_shrink", n=1)
    assert worker.run("proj.add", 1, 1) == 2


def test_children_of_few_tasks(start_worker, broker):
    """``--max-tasks-per-child``: each child runs so many tasks, none is lost."""
    worker = start_worker("proj", "--max-tasks-per-child", "2", broker=broker)
    results = [worker.call("proj.pid") for _ in range(8)]
    children = [worker.get(result) for result in results]
    assert all(children.count(child) <= 2 for child in children)
    assert "WorkerLost" not in worker.log()


def test_warm_shutdown_ends_what_runs(start_worker, broker):
    """SIGTERM: running tasks end in order, the worker exits with 0."""
    worker = start_worker(broker=broker)
    gate = worker.gate()
    result = worker.call("proj.hold", gate.path)
    child = gate.wait_started()[result.id]
    worker.signal(signal.SIGTERM)
    worker.wait_for_log("Warm shutdown")
    gate.open()
    assert worker.wait_exit() == 0
    assert worker.get(result) == child
