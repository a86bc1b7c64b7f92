"""What can be seen from outside: remote inspection, events, task states."""

from __future__ import annotations

from collections import Counter

import pytest


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method):
    return start_module_worker("proj", "-E", config={"task_track_started": True}, start_method=start_method)


def test_ping_and_registered(worker):
    """The worker answers, and knows the tasks of its project."""
    assert worker.inspect("ping") == {"ok": "pong"}
    assert {"proj.add", "proj.hold"} <= set(worker.inspect("registered"))


def test_stats_has_the_fields_of_prefork(worker):
    """``inspect stats`` says about the pool what prefork says."""
    worker.run("proj.add", 1, 1)
    pool = worker.stats()["pool"]
    assert pool["max-concurrency"] == 2
    assert pool["max-tasks-per-child"] == "N/A"
    assert pool["timeouts"] == [0, 0]
    assert pool["put-guarded-by-semaphore"] is False
    assert {"total", "avg", "all", "raw", "strategy", "inqueues"} <= set(pool["writes"])
    assert set(pool["writes"]["inqueues"]) == {"total", "active"}
    assert set(pool["processes"]) <= worker.pids() - {worker.pid}


def test_active_and_reserved(worker):
    """``inspect active`` names the child of each running task, ``reserved`` those that wait."""
    gate = worker.gate()
    results = {result.id: result for result in [worker.call("proj.hold", gate.path) for _ in range(4)]}
    started = gate.wait_started(2)
    worker.until(lambda: len(worker.inspect("reserved")) == 2, "the others to be reserved")
    active = {task["id"]: task["worker_pid"] for task in worker.inspect("active")}
    assert active == started
    assert {task["id"] for task in worker.inspect("reserved")} == set(results) - set(started)
    gate.open()
    for result in results.values():
        worker.get(result)
    worker.until(lambda: not worker.inspect("active"), "nothing to be active")
    assert worker.inspect("reserved") == []


def test_a_started_task_says_where(worker):
    """With ``task_track_started`` the state STARTED names the pid of the real child, and the worker."""
    gate = worker.gate()
    result = worker.call("proj.hold", gate.path)
    pid = gate.wait_started()[result.id]
    worker.until(lambda: result.state == "STARTED", "the state STARTED")
    assert result.info == {"pid": pid, "hostname": worker.hostname}
    gate.open()
    assert worker.get(result) == pid


def test_events_of_a_task_that_succeeds(worker):
    """Received, started and succeeded, in this order, with what happened."""
    with worker.events() as events:
        result = worker.call("proj.add", 2, 3)
        assert worker.get(result) == 5
        events.wait_for("task-succeeded", result.id)
    mine = [event for event in events.seen if event.get("uuid") == result.id]
    assert events.kinds(result.id) == ["task-received", "task-started", "task-succeeded"]
    assert mine[0]["name"] == "proj.add"
    assert mine[2]["result"] == "5"
    assert mine[2]["runtime"] >= 0
    assert {event["hostname"] for event in mine} == {worker.hostname}


def test_events_of_a_task_that_fails_and_one_that_retries(worker):
    """A failure comes with its exception; each retry is told, and each start."""
    with worker.events() as events:
        failing, retrying = worker.call("proj.fail", "ValueError", "no"), worker.call("proj.third_time")
        assert "ValueError" in events.wait_for("task-failed", failing.id)["exception"]
        worker.until(lambda: len(events.kinds(retrying.id)) == 9, "all events of three runs")
    # Two children tell of a run's end and of the next one's start: their order is not fixed.
    assert Counter(events.kinds(retrying.id)) == {
        "task-received": 3, "task-started": 3, "task-retried": 2, "task-succeeded": 1,
    }  # fmt: skip


def test_the_log_names_the_task_and_its_result(worker):
    """The worker's log has one line for the arrival of a task and one for its end, with the result."""
    result = worker.call("proj.add", 20, 3)
    assert worker.get(result) == 23
    worker.wait_for_log(rf"Task proj\.add\[{result.id}\] received")
    worker.wait_for_log(rf"Task proj\.add\[{result.id}\] succeeded in \S+: 23")
