"""Soft and hard time limits: by the task's declaration, by the call, and for the whole worker."""

from __future__ import annotations

import psutil
import pytest
from billiard.exceptions import SoftTimeLimitExceeded, TimeLimitExceeded


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method):
    return start_module_worker(start_method=start_method)


@pytest.fixture
def gate(worker):
    return worker.gate()


def ends(worker, pid):
    worker.until(lambda: not psutil.pid_exists(pid), f"child {pid} to end")


def test_a_soft_limit_can_be_caught(worker, gate):
    """The soft limit is raised inside the task, which can end in order; its child lives on."""
    result = worker.call("proj.hold_through_soft_limit", gate.path, soft_time_limit=3)
    child = gate.wait_started()[result.id]
    assert worker.get(result) == "caught"
    assert worker.run("proj.pid") == child or child in worker.children()


def test_a_soft_limit_that_is_not_caught_fails_the_task(worker, gate):
    """The caller gets SoftTimeLimitExceeded; the child lives on."""
    result = worker.call("proj.hold", gate.path, soft_time_limit=3)
    child = gate.wait_started()[result.id]
    with pytest.raises(SoftTimeLimitExceeded):
        worker.get(result)
    assert child in worker.children()


def test_a_soft_limit_by_declaration(worker, gate):
    """``@app.task(soft_time_limit=...)`` holds without saying so in the call."""
    with pytest.raises(SoftTimeLimitExceeded):
        worker.run("proj.hold_softly_limited", gate.path)


def test_a_hard_limit_ends_the_child(worker, gate):
    """The caller gets TimeLimitExceeded, the child is killed, others run on and new ones run."""
    beside = worker.gate()
    other = worker.call("proj.hold", beside.path)
    beside.wait_started()
    result = worker.call("proj.hold", gate.path, time_limit=3)
    child = gate.wait_started()[result.id]
    with pytest.raises(TimeLimitExceeded):
        worker.get(result)
    ends(worker, child)
    beside.open()
    assert worker.get(other) != child
    assert worker.run("proj.add", 1, 1) == 2


def test_a_hard_limit_by_declaration(worker, gate):
    """``@app.task(time_limit=...)`` holds without saying so in the call."""
    with pytest.raises(TimeLimitExceeded):
        worker.run("proj.hold_limited", gate.path)


def test_a_hard_limit_ends_a_task_that_ignores_the_soft_one(worker, gate):
    """With both limits, a task that goes on after the soft one is ended by the hard one."""
    result = worker.call("proj.ignore_soft_limit", gate.path, soft_time_limit=3, time_limit=6)
    with pytest.raises(TimeLimitExceeded):
        worker.get(result)
    assert worker.run("proj.add", 1, 1) == 2


def test_limits_of_many_tasks_at_once(worker):
    """Several tasks over their limit at the same time each end as such, and the pool is as before."""
    gate = worker.gate()
    results = [worker.call("proj.hold", gate.path, time_limit=3) for _ in range(4)]
    for result in results:
        with pytest.raises(TimeLimitExceeded):
            worker.get(result)
    assert [worker.run("proj.add", 1, number) for number in range(4)] == [1, 2, 3, 4]


def test_a_limit_for_the_whole_worker(start_worker, start_method):
    """``--time-limit`` and ``--soft-time-limit`` hold for every task, and show in ``stats``."""
    worker = start_worker(
        "proj", "--time-limit", "6", "--soft-time-limit", "3", start_method=start_method, concurrency=1
    )
    assert worker.stats()["pool"]["timeouts"] == [3, 6]
    gate = worker.gate()
    with pytest.raises(SoftTimeLimitExceeded):
        worker.run("proj.hold", gate.path)
    with pytest.raises(TimeLimitExceeded):
        worker.run("proj.ignore_soft_limit", gate.path)
    assert worker.run("proj.add", 1, 1) == 2
