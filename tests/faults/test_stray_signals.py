"""Signals that come late, or from people and service managers: to one child, or to all processes at once."""

from __future__ import annotations

import os
import signal

import pytest
from billiard.exceptions import WorkerLostError
from harness import processes

pytestmark = pytest.mark.ours_only("how this pool takes faults")


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method):
    return start_module_worker("faulty", start_method=start_method, concurrency=2)


def test_a_soft_limit_that_comes_late(worker):
    """SIGUSR1 between two tasks: the child lives on, and the next task is not hit."""
    seen = set()
    for _ in range(20):
        child = worker.run("proj.pid")
        seen.add(child)
        # The result is there before the task has ended, and a connection does not survive being hit.
        worker.until(lambda: not worker.stats()["pool"]["memsafe"]["busy"], "the task to have ended")
        os.kill(child, signal.SIGUSR1)
    assert worker.run("proj.add", 1, 1) == 2
    assert seen <= set(worker.children())


def test_soft_limits_that_pass_as_the_task_ends(start_worker, start_method, tally):
    """Whether the limit or the end comes first: no child is lost by it, and the next tasks run."""
    # Results go nowhere: a connection does not survive an exception in the middle of its talk.
    worker = start_worker("faulty", start_method=start_method, config={"task_ignore_result": True})
    # Long enough for a task to have begun, on a machine with much to do, before its limit passes.
    for offset in range(-10, 10):
        limit = 0.5 + offset / 1000
        worker.call("faulty.work", tally.path, str(offset), 0.5, soft_time_limit=limit)
    worker.call("faulty.work", tally.path, "last", 0)
    worker.until(lambda: len(tally.of("began")) == 21, "all tasks to have begun")
    worker.until(lambda: not worker.inspect("active"), "all tasks to have ended")
    assert set(tally.of("began").values()) == {1}
    assert "exited with" not in worker.log()
    assert "WorkerLost" not in worker.log()


def test_sigterm_to_an_idle_child(worker):
    """It leaves; the next task runs in another one."""
    child = worker.run("proj.pid")
    os.kill(child, signal.SIGTERM)
    assert worker.run("proj.pid") != child
    worker.until(lambda: child not in processes.children(worker.pid), "the child to be reaped")


def test_sigterm_to_a_busy_child(worker):
    """Its task is lost, as with prefork; the others are not."""
    gate, beside = worker.gate(), worker.gate()
    result, other = worker.call("faulty.hold", gate.path), worker.call("faulty.hold", beside.path)
    child = gate.wait_started()[result.id]
    beside.wait_started()
    os.kill(child, signal.SIGTERM)
    with pytest.raises(WorkerLostError):
        worker.get(result)
    beside.open()
    assert worker.get(other) > 0


def test_sighup_to_a_child(worker):
    """A child that gets the signal meant for its worker ends, and is replaced."""
    child = worker.run("proj.pid")
    os.kill(child, signal.SIGHUP)
    assert worker.run("proj.add", 1, 1) == 2


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGCHLD"])
def test_the_forkserver_takes_no_orders(worker, start_method, number):
    """Signals meant for worker or children do not end it."""
    if start_method != "forkserver":
        return
    before = worker.stats()["pool"]["memsafe"]["forkserver"]
    os.kill(before, getattr(signal, number))
    os.kill(worker.run("proj.pid"), signal.SIGKILL)
    assert worker.run("proj.add", 1, 1) == 2
    assert worker.stats()["pool"]["memsafe"]["forkserver"] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("broker_kind", ["redis", "filesystem"], scope="function")
def test_everybody_is_told_to_end(start_worker, start_method, broker_kind, number):
    """One signal to all processes, as from a service manager: a clean end, and nothing is left."""
    worker = start_worker("faulty", start_method=start_method, broker=broker_kind, concurrency=3)
    gate, beside = worker.gate(), worker.gate()
    idle = [worker.call("faulty.hold", beside.path) for _ in range(2)]
    beside.wait_started(2)
    busy = worker.call("faulty.hold", gate.path)
    gate.wait_started()
    beside.open()
    for result in idle:
        worker.get(result)
    os.killpg(worker.pid, number)
    if number == signal.SIGINT:
        # Ctrl-C is for the worker, which waits for the task.
        worker.wait_for_log("Warm shutdown")
        gate.open()
        assert worker.get(busy) > 0
    # Celery itself ends with 1 where the main thread was waiting when Ctrl-C came.
    assert worker.wait_exit() in ((0, 1) if number == signal.SIGINT else (0,))
    worker.until(lambda: not worker.pids(), "every process to end")
