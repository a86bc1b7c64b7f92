"""A child that is lost in the middle of a task costs at most that task."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
from billiard.exceptions import WorkerLostError


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method):
    return start_module_worker(start_method=start_method)


def test_the_caller_learns_that_the_child_was_lost(worker):
    """A child killed during a task: WorkerLostError with the signal's name, and the pool goes on."""
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        worker.run("proj.die")
    assert [worker.run("proj.add", 1, number) for number in range(4)] == [1, 2, 3, 4]


def test_a_child_that_leaves_during_a_task_is_lost_too(worker):
    """``os._exit`` in a task: WorkerLostError with the exit status."""
    with pytest.raises(WorkerLostError, match="exitcode 3"):
        worker.run("proj.vanish", 3)
    assert worker.run("proj.add", 1, 1) == 2


def test_a_lost_child_harms_no_other_task(worker):
    """What the other children do while one is lost is not disturbed."""
    gate = worker.gate()
    other = worker.call("proj.hold", gate.path)
    gate.wait_started()
    with pytest.raises(WorkerLostError):
        worker.run("proj.die")
    gate.open()
    assert worker.get(other) > 0


def test_an_idle_child_that_is_lost_costs_nothing(worker):
    """Children killed between tasks are replaced without an error for anyone."""
    gate = worker.gate()
    held = [worker.call("proj.hold", gate.path) for _ in range(2)]
    children = set(gate.wait_started(2).values())
    gate.open()
    assert {worker.get(result) for result in held} == children
    for child in children:
        os.kill(child, signal.SIGKILL)
    worker.until(lambda: not any(map(psutil.pid_exists, children)), "the killed children to be reaped")
    results = [worker.call("proj.add", number, number) for number in range(10)]
    assert [worker.get(result) for result in results] == [2 * number for number in range(10)]


def test_children_lost_one_after_the_other(worker):
    """Ten tasks in a row that kill their child are ten failures, and the worker still runs."""
    for result in [worker.call("proj.die") for _ in range(10)]:
        with pytest.raises(WorkerLostError):
            worker.get(result)
    assert worker.run("proj.add", 1, 1) == 2


def test_acks_late_with_reject_runs_the_task_again(worker):
    """With ``acks_late`` and ``reject_on_worker_lost`` the message goes back and the second run succeeds."""
    assert worker.run("proj.die_once_rejected", str(worker.folder / "rejected")) == 2


@pytest.mark.needs_celery("5.7")
def test_retry_on_worker_lost_runs_the_task_again(worker):
    """With ``retry_on_worker_lost`` the task is sent again and the second run succeeds."""
    assert worker.run("proj.die_once_retried", str(worker.folder / "retried")) == 2


@pytest.mark.needs_celery("5.7")
def test_retry_on_worker_lost_has_an_end(worker):
    """``max_retries`` bounds it: one run, one retry, then the caller gets WorkerLostError."""
    mark = worker.folder / "always"
    with pytest.raises(WorkerLostError):
        worker.run("proj.die_always_retried", str(mark))
    assert mark.read_text() == "xx"


@pytest.mark.stock_differs("a MemoryError in a task ends the whole worker", run=False)
@pytest.mark.parametrize(
    ("task", "args"),
    [
        ("proj.fail", ("MemoryError", "too much")),
        ("proj.out_of_memory_late", ("too much",)),
        ("proj.allocate", (1 << 60,)),
    ],
)
def test_a_task_without_memory_fails_alone(worker, task, args):
    """MemoryError reaches the caller as such, acks_late or not; worker and child go on with the next task."""
    before = worker.run("proj.pid")
    result = worker.call(task, *args)
    with pytest.raises(MemoryError):
        worker.get(result)
    assert result.state == "FAILURE"
    assert worker.run("proj.add", 1, 1) == 2
    assert before in worker.children()
    assert worker.exitcode is None
    worker.until(lambda: worker.broker.waiting() == 0, "the message not to come back")
