"""Children are replaced after so many tasks, or when they have really grown; never at a task's expense."""

from __future__ import annotations

import time

import psutil
import pytest


def lost_none(worker):
    assert "WorkerLost" not in worker.log()


def test_a_child_is_replaced_after_so_many_tasks(start_worker, start_method):
    """``--max-tasks-per-child 2``: two tasks each, then another child."""
    worker = start_worker("proj", "--max-tasks-per-child", "2", start_method=start_method, concurrency=1)
    assert worker.stats()["pool"]["max-tasks-per-child"] == 2
    children = [worker.run("proj.pid") for _ in range(6)]
    assert children[0::2] == children[1::2]
    assert len(set(children)) == 3
    worker.until(lambda: not psutil.pid_exists(children[0]), "the first child to end")
    lost_none(worker)


def test_a_burst_through_children_of_one_task_each(start_worker, start_method):
    """``--max-tasks-per-child 1`` and many tasks: each runs once, each in a child of its own."""
    worker = start_worker("proj", "--max-tasks-per-child", "1", start_method=start_method)
    results = [worker.call("proj.pid") for _ in range(12)]
    assert len({worker.get(result) for result in results}) == 12
    lost_none(worker)


#: A child of the test project has some 50 MB of its own at most; what the tasks take is far above this.
LIMIT_KIB = 150 * 1024


@pytest.fixture(scope="module")
def limited(start_module_worker, start_method):
    return start_module_worker(
        "proj", "--max-memory-per-child", str(LIMIT_KIB), start_method=start_method, concurrency=1
    )


def test_a_child_that_has_grown_is_replaced(limited):
    """A child whose memory is over ``--max-memory-per-child`` after a task runs no other; nothing is lost."""
    for _ in range(3):
        grown = limited.run("proj.keep", 200)
        assert limited.run("proj.pid") != grown
        limited.until(lambda pid=grown: not psutil.pid_exists(pid), "the grown child to end")
    lost_none(limited)


def test_a_burst_of_growing_tasks(limited):
    """Tasks that are already waiting when a child has to go are run by the next one."""
    results = [limited.call("proj.keep", 200) for _ in range(4)]
    assert len({limited.get(result) for result in results}) == 4
    lost_none(limited)


def test_a_child_that_grows_slowly_is_replaced_when_it_is_over(limited):
    """Several tasks can share the way to the limit."""
    first = limited.run("proj.keep", 30)
    children = [limited.run("proj.keep", 30) for _ in range(7)]
    assert children[0] == first
    assert children[-1] != first
    lost_none(limited)


@pytest.mark.stock_differs("it looks at the peak, which never falls")
def test_a_peak_that_was_given_back_is_no_reason(limited):
    """A task that needed much for a moment and gave it back leaves its child in service."""
    children = {limited.run("proj.peak", 250) for _ in range(4)}
    assert len(children) == 1
    lost_none(limited)


# By our own settings: the replacement is ready before the old one leaves


def until_another(worker, first, task, *arguments, timeout=60):
    """Run a task again and again until another child runs it; how often the first one did."""
    deadline, runs = time.monotonic() + timeout, 0
    while worker.run(task, *arguments) == first:
        runs += 1
        assert time.monotonic() < deadline, "no other child has come"
        time.sleep(0.02)
    return runs


@pytest.mark.ours_only("memsafe_max_child_growth")
def test_a_child_whose_tasks_leak_is_replaced(start_worker, start_method):
    """``memsafe_max_child_growth``: what tasks keep for ever goes with the child, and no task is lost."""
    worker = start_worker(
        start_method=start_method,
        concurrency=1,
        config={"memsafe_max_child_growth": "60MiB"},
        loglevel="DEBUG",
    )
    first = worker.run("proj.keep", 10)
    assert worker.run("proj.pid") == first
    # Its limit is up to a fifth lower; and it goes on while its replacement starts.
    assert until_another(worker, first, "proj.keep", 10) >= 4
    worker.wait_for_log(rf"Retiring \S+ \(pid {first}, \w+, \d+ tasks\): grown by \d+ MiB, at most 60 MiB")
    worker.until(lambda: not psutil.pid_exists(first), "the first child to end")
    lost_none(worker)


@pytest.mark.ours_only("memsafe_max_child_growth")
def test_a_child_whose_tasks_load_something_once_stays(start_worker, start_method):
    """Every other child would load it, too. What is kept later is counted as ever."""
    worker = start_worker(
        start_method=start_method, concurrency=1, config={"memsafe_max_child_growth": "60MiB"}
    )
    first = worker.run("proj.pid")
    for _ in range(6):
        assert worker.run("proj.load", 90) == first
        time.sleep(0.3)  # what is looked at seldom is looked at, too
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["idle"] == 1, "an idle child")
    [row] = worker.stats()["pool"]["memsafe"]["table"]
    assert row["pid"] == first
    assert row["private_growth"] > 80 << 20
    until_another(worker, first, "proj.keep", 10)
    lost_none(worker)


@pytest.mark.ours_only("memsafe_max_child_age")
def test_an_old_child_is_replaced(start_worker, start_method):
    """``memsafe_max_child_age``: after its next task, when another one is ready."""
    worker = start_worker(
        start_method=start_method, concurrency=1, config={"memsafe_max_child_age": 2}, loglevel="DEBUG"
    )
    first = worker.run("proj.pid")
    until_another(worker, first, "proj.pid")
    worker.wait_for_log(rf"Retiring \S+ \(pid {first}, \w+, \d+ tasks\): \d+ s old, at most 2 s")
    worker.until(lambda: not psutil.pid_exists(first), "the first child to end")
    lost_none(worker)


@pytest.mark.ours_only("prefork ends all children at once")
def test_a_restart_under_load(start_worker, start_method):
    """``pool_restart`` replaces all children while tasks go on: most of them are there all the time."""
    worker = start_worker(
        start_method=start_method,
        concurrency=4,
        config={"worker_pool_restarts": True, "worker_prefetch_multiplier": 64},
        loglevel="DEBUG",
    )
    gate = worker.gate()
    held = [worker.call("proj.hold", gate.path) for _ in range(4)]
    old = set(gate.wait_started(4).values())
    results = [worker.call("proj.sleep", 0.2) for _ in range(240)]
    gate.open()
    assert "ok" in worker.control("pool_restart")
    fewest, deadline = 4, time.monotonic() + 120
    while worker.log().count("the pool was restarted") < 4:
        pool = worker.stats()["pool"]["memsafe"]
        fewest = min(fewest, pool["idle"] + pool["busy"])
        if results[-160].ready():
            results += [worker.call("proj.sleep", 0.2) for _ in range(40)]
        assert time.monotonic() < deadline, "not all children are replaced"
    assert fewest >= 3
    for result in results:
        worker.get(result)
    assert {worker.get(result) for result in held} == old
    assert {worker.run("proj.pid") for _ in range(8)}.isdisjoint(old)
    assert worker.log().count("the pool was restarted") == 4
    lost_none(worker)
