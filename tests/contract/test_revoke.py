"""``revoke`` of tasks that wait and of tasks that run."""

from __future__ import annotations

import json
from datetime import timedelta

import psutil
import pytest
from celery.exceptions import TaskRevokedError


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method):
    return start_module_worker("revoking", "-E", start_method=start_method, concurrency=1)


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


# Tasks that wait until they are not to be run any more


class Waiting:
    """A task that is sent, waits, and is not to be run any more before its turn comes.

    Arguments:
        how: What happens to it meanwhile: it ``expires``, or is revoked by ``id``, with ``terminate``, or by
            a ``stamp``.
    """

    def __init__(self, worker, how, task="proj.hold", **options):
        self.worker, self.how, self.task = worker, how, task
        self.gate = worker.gate()
        self.expires = worker.app.now() + timedelta(seconds=4) if how == "expires" else None
        signature = worker.signature(task, self.gate.path)
        if how == "stamp":
            signature.stamp(gate=self.gate.path)
        self.result = signature.apply_async(expires=self.expires, **options)

    def wait_reserved(self):
        self.worker.until(lambda: self.result.id in str(self.worker.inspect("reserved")), "it to be reserved")

    def revoke(self):
        """Have that happen to it."""
        match self.how:
            case "expires":
                self.worker.until(lambda: self.worker.app.now() > self.expires, "it to expire")
            case "stamp":
                self.worker.control("revoke_by_stamped_headers", headers={"gate": [self.gate.path]})
            case _:
                self.worker.control("revoke", task_id=self.result.id, terminate=self.how == "terminate")

    def check(self, events):
        """Client, events, signal and log say what prefork has them say; it has not begun, and is gone."""
        task_id, expired = self.result.id, self.how == "expires"
        with pytest.raises(TaskRevokedError, match="expired" if expired else "revoked"):
            self.worker.get(self.result)
        assert self.result.state == "REVOKED"
        event = events.wait_for("task-revoked", task_id)
        assert (event["terminated"], event["signum"], event["expired"]) == (False, None, expired)
        assert "task-started" not in events.kinds(task_id)
        said = [json.loads(line) for line in (self.worker.folder / "revoked").read_text().splitlines()]
        assert [row[1:] for row in said if row[0] == task_id] == [[False, None, expired]]
        assert self.worker.log().count(f"Discarding revoked task: {self.task}[{task_id}]") == 1
        assert self.gate.started() == {}
        self.worker.until(lambda: task_id not in str(self.worker.inspect("reserved")), "it to be forgotten")


@pytest.mark.parametrize("options", [{}, {"countdown": 0.5}, {"task": "proj.hold_late"}], ids=str)
@pytest.mark.parametrize("how", ["expires", "id", "terminate", "stamp"])
def test_what_waits_for_a_child_is_not_run(worker, how, options):
    """It has expired, or was revoked, before there was a child for it."""
    gate = worker.gate()
    with worker.events() as events:
        running = worker.call("proj.hold", gate.path)
        gate.wait_started()
        waiting = Waiting(worker, how, **options)
        waiting.wait_reserved()
        waiting.revoke()
        gate.open()
        worker.get(running)
        waiting.check(events)
    assert worker.run("proj.add", 1, 1) == 2


@pytest.mark.ours_only("prefork lets no task wait for memory")
@pytest.mark.parametrize("how", ["expires", "id", "terminate", "stamp"])
def test_what_waits_for_memory_is_not_run(start_contained, how):
    """It is discarded while it waits: nobody has to wait behind it."""
    worker = start_contained(400, "revoking", "-E")
    large = {"headers": {"memsafe_memory": "300MiB"}}
    gate = worker.gate()
    with worker.events() as events:
        running = worker.call("proj.hold", gate.path, **large)
        gate.wait_started()
        waiting = Waiting(worker, how, task="proj.hold_late", **large)
        waiting.wait_reserved()
        worker.until(lambda: worker.stats()["pool"]["memsafe"]["waiting"] == 1, "it to wait")
        waiting.revoke()
        waiting.check(events)
        gate.open()
        worker.get(running)
    assert worker.broker.waiting() == 0
    assert worker.run("proj.add", 1, 1) == 2


@pytest.mark.ours_only("prefork's children are there before tasks are")
@pytest.mark.parametrize("how", ["expires", "id", "terminate", "stamp"])
def test_what_waits_for_a_start_is_not_run(start_worker, how):
    """It has expired, or was revoked, before the child was ready that was started for it."""
    worker = start_worker("revoking", "-E", prepare=lambda made: (made.folder / "wait").touch())
    with worker.events() as events:
        waiting = Waiting(worker, how)
        waiting.wait_reserved()
        waiting.revoke()
        (worker.folder / "wait").unlink()
        waiting.check(events)
    assert worker.run("proj.add", 1, 1) == 2
