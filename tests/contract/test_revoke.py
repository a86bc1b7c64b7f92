"""``revoke`` of tasks that wait and of tasks that run."""

from __future__ import annotations

import psutil
import pytest
from celery.exceptions import TaskRevokedError


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method):
    return start_module_worker(start_method=start_method, concurrency=1)


@pytest.mark.parametrize("options", [{}, {"signal": "SIGKILL"}, {"signal": "SIGTERM"}])
def test_a_running_task_is_terminated(worker, options):
    """``revoke(terminate=True)`` ends the child and the task, by default and by name of the signal."""
    gate = worker.gate()
    result = worker.call("proj.hold", gate.path)
    child = gate.wait_started()[result.id]
    result.revoke(terminate=True, **options)
    with pytest.raises(TaskRevokedError):
        worker.get(result)
    assert result.state == "REVOKED"
    worker.until(lambda: not psutil.pid_exists(child), f"child {child} to end")
    assert worker.run("proj.pid") != child


def test_a_waiting_task_is_revoked_and_never_runs(worker):
    """A task revoked while it waits for a child is not run."""
    first, second = worker.gate(), worker.gate()
    running = worker.call("proj.hold", first.path)
    first.wait_started()
    waiting = worker.call("proj.hold", second.path)
    worker.until(lambda: waiting.id in str(worker.inspect("reserved")), "the task to be reserved")
    worker.control("revoke", task_id=waiting.id)
    first.open()
    worker.get(running)
    with pytest.raises(TaskRevokedError):
        worker.get(waiting)
    assert worker.run("proj.add", 1, 1) == 2
    assert second.started() == {}


def test_a_waiting_task_is_terminated_and_never_runs(worker):
    """``terminate=True`` for a task that still waits harms neither it that runs nor the child."""
    first, second = worker.gate(), worker.gate()
    running = worker.call("proj.hold", first.path)
    child = first.wait_started()[running.id]
    waiting = worker.call("proj.hold", second.path)
    worker.until(lambda: waiting.id in str(worker.inspect("reserved")), "the task to be reserved")
    worker.control("revoke", task_id=waiting.id, terminate=True)
    first.open()
    assert worker.get(running) == child
    with pytest.raises(TaskRevokedError):
        worker.get(waiting)
    assert second.started() == {}


def test_a_finished_task_is_not_terminated(worker):
    """Terminating a task that is over does not touch the child that ran it."""
    result = worker.call("proj.pid")
    child = worker.get(result)
    # The caller can have the result before the worker knows that the task is over.
    worker.until(lambda: not worker.inspect("active"), "the task to be over for the worker")
    worker.control("revoke", task_id=result.id, terminate=True, signal="SIGKILL")
    assert worker.run("proj.pid") == child
