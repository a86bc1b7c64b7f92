"""Children are replaced after so many tasks, or when they have really grown; never at a task's expense."""

from __future__ import annotations

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
