"""Tasks that do what no task should: the worker, the pool and all other tasks go on."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from harness import processes

pytestmark = pytest.mark.ours_only("how this pool takes faults")


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method):
    return start_module_worker("faulty", start_method=start_method, concurrency=2)


@pytest.fixture(autouse=True)
def as_before(worker):
    """After each test other tasks run, and the worker has no dead children that it does not know of."""
    yield
    assert worker.exitcode is None
    assert [worker.run("proj.add", number, 1) for number in range(4)] == [1, 2, 3, 4]
    worker.until(lambda: not processes.zombies(worker.pid), "all children that ended to be reaped")


def test_a_task_closes_all_descriptors(worker):
    """The child cannot report: it is replaced, the task is lost unless it could store its result."""
    result = worker.call("faulty.close_descriptors")
    try:
        assert worker.get(result) == "went on"
    except WorkerLostError:
        assert result.state == "FAILURE"


def test_a_task_closes_all_descriptors_and_does_not_end(worker):
    """The end of its socket is noticed, and it is killed although it takes no notice of SIGTERM."""
    with pytest.raises(WorkerLostError):
        worker.run("faulty.close_descriptors_and_hold", worker.gate().path)


@pytest.mark.parametrize("code", [0, 3])
def test_a_task_ends_its_process(worker, code):
    """``os._exit``, also with 0: the task is lost, with the exit code in words."""
    with pytest.raises(WorkerLostError, match=f"exitcode {code}"):
        worker.run("proj.vanish", code)


@pytest.mark.parametrize("code", [0, 3])
def test_a_task_leaves(worker, code):
    """``sys.exit`` ends the child as it does with prefork: the task is lost or fails, the pool goes on."""
    with pytest.raises((WorkerLostError, SystemExit)):
        worker.run("proj.leave", code)


def test_a_grandchild_holds_the_socket(worker):
    """A process that outlives the child and has its descriptors does not hide the child's end."""
    gate = worker.gate()
    with pytest.raises(WorkerLostError, match="exitcode 3"):
        worker.run("faulty.leave_grandchild", gate.path, 3)
    [grandchild] = worker.until(lambda: len(found := strays(worker)) == 1 and found, "one stray")
    assert worker.run("proj.add", 1, 1) == 2
    gate.open()
    worker.until(lambda: not processes.is_alive(grandchild), "the grandchild to end")


def test_a_grandchild_outlives_an_idle_child(worker):
    """The same for a child that is killed between two tasks."""
    gate = worker.gate()
    grandchild = worker.run("faulty.leave_grandchild", gate.path)
    child = psutil.Process(grandchild).ppid()
    assert child in worker.children()
    processes.kill(child)
    worker.until(lambda: child not in worker.children(), "the end of the child to be noticed")
    assert processes.is_alive(grandchild)
    gate.open()
    worker.until(lambda: not processes.is_alive(grandchild), "the grandchild to end")


def strays(worker):
    """Processes of the worker that are not its own children, nor their helpers."""
    known = {worker.pid, *worker.children()}
    if forkserver := worker.stats()["pool"].get("memsafe", {}).get("forkserver"):
        known |= {forkserver, *processes.children(forkserver)}
    return {pid for pid in worker.pids() - known if processes.is_alive(pid)}


def test_orphans(worker):
    """Processes that tasks have left to themselves end without a trace, whoever has adopted them."""
    orphans = worker.run("faulty.leave_orphans", 5, 0.5)
    assert len(orphans) == 5
    # New children are started meanwhile, when the worker adopts whoever is left.
    for child in worker.children():
        os.kill(child, signal.SIGKILL)
    assert worker.run("proj.add", 1, 1) == 2
    worker.until(lambda: not any(map(psutil.pid_exists, orphans)), "the orphans to be reaped by somebody")


def test_orphans_that_outlive_many_children(worker, start_method):
    """Orphans that appear while children start are not taken for children, and are reaped."""
    gate = worker.gate()
    for _ in range(4 if start_method == "forkserver" else 2):
        results = [
            worker.call("faulty.leave_orphans", 2, 1.0),
            worker.call("proj.die"),
            worker.call("proj.add", 1, 1),
        ]
        orphans = worker.get(results[0])
        with pytest.raises(WorkerLostError):
            worker.get(results[1])
        assert worker.get(results[2]) == 2
        assert not set(orphans) & set(worker.children())
    gate.open()
    worker.until(lambda: not any(map(psutil.pid_exists, orphans)), "the orphans to be reaped")


def test_a_task_that_returns_twice(worker, tally):
    """It forks and both processes return: one result counts, and neither takes the other's tasks."""
    worker.run("faulty.return_twice", tally.path)
    results = [worker.call("faulty.count", tally.path, f"t{number}") for number in range(20)]
    for result in results:
        worker.get(result)
    runs = tally.runs()
    assert all(runs[f"t{number}"] == 1 for number in range(20))
    worker.until(lambda: not strays(worker), "the copy to be gone")


def test_an_exception_that_only_the_child_knows(worker):
    """Its class cannot be imported in the worker: the task has failed, and says with what."""
    result = worker.call("faulty.raise_what_only_this_process_knows")
    with pytest.raises(Exception, match="who knows me"):
        worker.get(result)
    assert result.state == "FAILURE"


def test_a_task_that_takes_no_notice_of_sigterm(worker):
    """A hard time limit ends it all the same."""
    gate = worker.gate()
    result = worker.call("faulty.hold_through_sigterm", gate.path, time_limit=3)
    child = gate.wait_started()[result.id]
    with pytest.raises(TimeLimitExceeded):
        worker.get(result)
    worker.until(lambda: not processes.is_alive(child), "the child to be killed")


def test_a_task_that_takes_no_notice_of_its_revocation(worker):
    """``revoke(terminate=True)`` with SIGKILL ends it all the same."""
    gate = worker.gate()
    result = worker.call("faulty.hold_through_sigterm", gate.path)
    child = gate.wait_started()[result.id]
    result.revoke(terminate=True, signal="SIGKILL")
    worker.until(lambda: not processes.is_alive(child), "the child to be killed")
    worker.until(lambda: result.state == "REVOKED", "the task to be revoked")
