"""The forkserver killed, stopped and robbed of its helpers: no running child notices, no task is lost."""

from __future__ import annotations

import os
import random
import signal
import threading

import psutil
import pytest
from harness import processes
from harness.worker import Worker

pytestmark = pytest.mark.ours_only("a forkserver")


@pytest.fixture(scope="module", params=["begun as a fork", "begun fresh", "one for each child"])
def worker(start_module_worker, broker_kind, request):
    """Each child runs one task, so that the forkserver is asked all the time."""
    config = {"worker_max_tasks_per_child": 1, "worker_prefetch_multiplier": 4}
    if request.param == "begun fresh":
        config["memsafe_child_env"] = {"SOMETHING": "1"}
    env = {"FAULTY_THREAD": "1"} if request.param == "one for each child" else {}
    return start_module_worker(
        "faulty", start_method="forkserver", broker=broker_kind, config=config, concurrency=4, env=env
    )


def counts(worker):
    return worker.stats()["pool"]["memsafe"]


def forkserver(worker):
    """The pid of the forkserver; waits until there is one."""
    return worker.until(lambda: counts(worker)["forkserver"], "a forkserver")


def all_run_once(worker, tally, results):
    for result in results:
        worker.get(result)
    assert set(tally.runs().values()) == {1}


def settled(worker):
    """Wait until nothing is left but the worker and one forkserver."""

    def is_settled():
        pid = counts(worker)["forkserver"]
        return worker.pids() - {worker.pid} <= {pid, *processes.children(pid)} if pid else False

    worker.until(is_settled, "the worker to have a forkserver and nothing else")
    assert not processes.zombies(worker.pid)
    assert len(processes.children(worker.pid)) == 1


def test_while_nothing_happens(worker, tally):
    """A new one begins by itself, the old one is reaped, and the next task runs."""
    all_run_once(worker, tally, [worker.call("faulty.count", tally.path, "before")])
    before = forkserver(worker)
    processes.kill(before)
    worker.until(lambda: counts(worker)["forkserver"] not in (None, before), "a new forkserver")
    worker.wait_for_log(rf"forkserver \(pid {before}\) has died")
    all_run_once(worker, tally, [worker.call("faulty.count", tally.path, "after")])
    settled(worker)


def test_while_tasks_run(worker):
    """Running children keep their parent, their tasks and their results."""
    gate = worker.gate()
    results = [worker.call("faulty.hold", gate.path) for _ in range(4)]
    children = gate.wait_started(4)
    before = forkserver(worker)
    processes.kill(before)
    worker.until(lambda: counts(worker)["forkserver"] not in (None, before), "a new forkserver")
    for child in children.values():
        assert psutil.Process(child).ppid() == worker.pid
        assert processes.is_alive(child)
    gate.open()
    assert {result.id: worker.get(result) for result in results} == children
    settled(worker)


def test_while_it_is_asked(worker, tally):
    """Killed at random moments of a burst, round after round: every task runs, once."""
    moments = random.Random(2)
    pause = threading.Event()
    for number in range(5):
        results = [worker.call("faulty.count", tally.path, f"{number}.{task}") for task in range(6)]
        pause.wait(moments.choice([0, 0.01, 0.03, 0.06, 0.1]))
        processes.kill(forkserver(worker))
        all_run_once(worker, tally, results)
    assert len(tally.runs()) == 30
    settled(worker)


def test_again_and_again(worker, tally):
    """Killed as soon as there is a new one, also before that is ready; then work goes on."""
    seen = set()
    for _ in range(4):
        before = forkserver(worker)
        seen.add(before)
        processes.kill(before)
        worker.until(lambda before=before: counts(worker)["forkserver"] != before, "its end to be noticed")
        all_run_once(worker, tally, [worker.call("faulty.count", tally.path, f"after{before}")])
    assert len(seen) == 4
    settled(worker)


def test_stopped_and_killed(worker, tally):
    """Stopped by SIGSTOP while tasks wait for children, then killed: the tasks run."""
    before = forkserver(worker)
    os.kill(before, signal.SIGSTOP)
    results = [worker.call("faulty.count", tally.path, str(number)) for number in range(4)]
    worker.until(lambda: counts(worker)["starting"] > 0, "the forkserver to be asked")
    processes.kill(before)
    all_run_once(worker, tally, results)
    settled(worker)


@pytest.mark.parametrize("step", ["before", "after"])
def test_its_midwife_is_killed(start_worker, tally, step):
    """Killed before or after the child is forked, the forkserver ends with it: the task runs, once."""

    def prepare(worker):
        worker.env["FORK_GATES"] = str(worker.gates)

    worker = start_worker("stuck_in_fork", start_method="forkserver", prepare=prepare)
    pid = forkserver(worker)
    gate = worker.gates / step
    gate.touch()
    try:
        result = worker.call("faulty.count", tally.path, "a")
        midwives = worker.until(lambda: processes.children(pid), "a midwife")
        assert processes.kill(*midwives) == 1
        worker.wait_for_log(rf"forkserver \(pid {pid}\) has died")
    finally:
        gate.unlink()
    all_run_once(worker, tally, [result])
    assert forkserver(worker) != pid
    worker.until(lambda: len(processes.children(worker.pid)) == 2, "nobody but a forkserver and a child")
    assert not processes.zombies(worker.pid)


def test_its_midwives_are_killed_where_they_are_forks(start_worker, tally):
    """Killed whenever there are any: every task runs, once, and the forkserver lives on."""
    worker = start_worker(
        "faulty",
        start_method="forkserver",
        prepare=Worker.hide_extension,
        config={"worker_max_tasks_per_child": 1},
        concurrency=4,
    )
    stop = threading.Event()
    killed = []

    def hunt():
        while not stop.wait(0.005):
            killed.append(processes.kill(*processes.children(pid)))

    results = []

    def some_are_killed():
        results.append(worker.call("faulty.count", tally.path, str(len(results))))
        return sum(killed) > 2

    pid = forkserver(worker)
    hunter = threading.Thread(target=hunt)
    hunter.start()
    try:
        worker.until(some_are_killed, "some midwives to be killed")
    finally:
        stop.set()
        hunter.join()
    all_run_once(worker, tally, results)
    assert len(tally.runs()) == len(results)
    assert forkserver(worker) == pid
    settled(worker)


def test_a_forkserver_that_hangs_is_replaced(start_worker, tally):
    """One that is stopped for good: after the start timeout there is another one, and the task runs."""
    worker = start_worker("faulty", start_method="forkserver", config={"memsafe_start_timeout": 15})
    hanging = forkserver(worker)
    os.kill(hanging, signal.SIGSTOP)
    try:
        assert worker.run("faulty.count", tally.path, "a") > 0
        assert tally.runs() == {"a": 1}
        assert forkserver(worker) != hanging
    finally:
        processes.kill(hanging)
    worker.until(lambda: not processes.zombies(worker.pid), "the one that hung to be reaped")
