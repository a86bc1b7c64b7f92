"""Children start when there is work for them, and go when there is none."""

from __future__ import annotations

import psutil
import pytest

pytestmark = pytest.mark.ours_only("children that start on demand")


def counts(worker):
    return worker.stats()["pool"]["memsafe"]


def forkserver_pids(worker):
    """The processes children are forked from; none where they are not."""
    pid = counts(worker)["forkserver"]
    if pid is None:
        return set()
    return {pid, *(process.pid for process in psutil.Process(pid).children(recursive=True))}


def hold(worker, number):
    """Run so many tasks at once; their children's pids."""
    gate = worker.gate()
    results = [worker.call("proj.hold", gate.path) for _ in range(number)]
    pids = gate.wait_started(number)
    gate.open()
    for result in results:
        worker.get(result)
    return set(pids.values())


def one_after_the_other(worker, number):
    """Run so many tasks, each when the one before is over for the worker too; their children's pids."""
    pids = set()
    for _ in range(number):
        # The caller can have the result before the worker knows that the child is free again.
        worker.until(lambda: counts(worker)["busy"] + counts(worker)["starting"] == 0, "nothing to run")
        pids.add(worker.run("proj.pid"))
    return pids


def test_no_child_at_ready(start_worker, start_method):
    """A worker that has nothing to do has no child."""
    worker = start_worker(start_method=start_method, concurrency=8)
    assert counts(worker)["children"] == 0
    assert counts(worker)["starts"] == 0
    assert worker.children() == []
    assert counts(worker)["start_method"] == start_method
    assert worker.pids() == {worker.pid} | forkserver_pids(worker)


def test_a_burst_starts_as_many_children_as_tasks_wait(start_worker, start_method):
    """N tasks at once get N children, and no more than the concurrency."""
    worker = start_worker(start_method=start_method, concurrency=4)
    gate = worker.gate()
    results = [worker.call("proj.hold", gate.path) for _ in range(6)]
    assert len(set(gate.wait_started(4).values())) == 4
    worker.until(lambda: len(worker.inspect("reserved")) == 2, "the others to wait")
    found = counts(worker)
    assert {name: found[name] for name in ("children", "busy", "idle", "starting")} == {
        "children": 4, "busy": 4, "idle": 0, "starting": 0,
    }  # fmt: skip
    gate.open()
    assert len({worker.get(result) for result in results}) == 4
    assert counts(worker)["starts"] == 4


def test_light_load_keeps_one_child(start_worker, start_method):
    """Work goes to the child used last: one task after the other needs one child only."""
    worker = start_worker(start_method=start_method, concurrency=8)
    assert len(one_after_the_other(worker, 10)) == 1
    assert counts(worker)["starts"] == 1


def test_light_load_after_a_burst_keeps_to_one_child(start_worker, start_method):
    """After a burst the child used last gets the work, so that the others can go."""
    worker = start_worker(start_method=start_method, concurrency=4)
    assert len(hold(worker, 4)) == 4
    worker.until(lambda: counts(worker)["idle"] == 4, "all children to be idle")
    assert len(one_after_the_other(worker, 10)) == 1


def test_idle_children_retire(start_worker, start_method):
    """After ``memsafe_idle_timeout`` without work children end, all of them; the next task gets a new one."""
    worker = start_worker(config={"memsafe_idle_timeout": 1}, start_method=start_method, concurrency=3)
    before = hold(worker, 3)
    worker.until(lambda: counts(worker)["children"] == 0, "the idle children to retire")
    assert counts(worker)["retired"] == 3
    worker.until(lambda: not before & worker.pids(), "their processes to end")
    assert worker.run("proj.pid") not in before
    assert "WorkerLost" not in worker.log()


def test_a_minimum_of_children_stays(start_worker, start_method):
    """``memsafe_min_children`` are kept when the others retire."""
    config = {"memsafe_idle_timeout": 1, "memsafe_min_children": 1}
    worker = start_worker(config=config, start_method=start_method, concurrency=3)
    before = hold(worker, 3)
    worker.until(lambda: counts(worker)["children"] == 1, "children above the minimum to retire")
    survivor = worker.children()[0]
    assert survivor in before
    assert worker.run("proj.pid") == survivor


def test_a_busy_child_does_not_retire(start_worker, start_method):
    """A task may take longer than the idle timeout."""
    worker = start_worker(config={"memsafe_idle_timeout": 1}, start_method=start_method, concurrency=2)
    gate = worker.gate()
    long = worker.call("proj.hold", gate.path)
    child = gate.wait_started()[long.id]
    assert worker.run("proj.pid") != child
    worker.until(lambda: worker.children() == [child], "the idle child beside it to retire")
    gate.open()
    assert worker.get(long) == child


@pytest.mark.also_start_method("fork")
def test_children_of_each_start_method(start_worker, start_method):
    """Each start method runs tasks side by side and reports its own name."""
    worker = start_worker(start_method=start_method, concurrency=3)
    assert len(hold(worker, 3)) == 3
    assert counts(worker)["start_method"] == start_method
