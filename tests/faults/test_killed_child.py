"""Children killed at the worst moments: a task is lost only if it ran in the child that was killed."""

from __future__ import annotations

import os
import signal

import pytest
from billiard.exceptions import WorkerLostError
from harness import processes
from harness.tally import Tally

pytestmark = pytest.mark.ours_only("how this pool takes faults")

SIZE = 50_000_000


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method, broker_kind):
    return start_module_worker("faulty", start_method=start_method, broker=broker_kind, concurrency=4)


@pytest.fixture
def rounds(start_method):
    """A fresh interpreter takes its time to start."""
    return 25 if start_method == "forkserver" else 5


def hold(worker, number):
    """Have so many children, idle; their pids."""
    gate = worker.gate()
    results = [worker.call("faulty.hold", gate.path) for _ in range(number)]
    pids = set(gate.wait_started(number).values())
    gate.open()
    for result in results:
        worker.get(result)
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["idle"] == number, f"{number} idle children")
    return pids


def settle(worker):
    """Wait until no child is killed and not yet reaped."""
    worker.until(lambda: not processes.zombies(worker.pid), "the killed children to be reaped")


def test_right_before_a_task_is_sent(worker, tally, rounds):
    """The idle child is killed, and at once a task comes: it runs, in another child, and once."""
    for number in range(rounds):
        child = worker.run("faulty.count", tally.path, f"before{number}")
        os.kill(child, signal.SIGKILL)
        assert worker.run("faulty.count", tally.path, f"after{number}") != child
    assert set(tally.runs().values()) == {1}
    assert len(tally.runs()) == 2 * rounds


def test_right_after_a_task_is_sent(worker, tally, rounds):
    """A task that the child had begun is reported lost, any other runs all the same; none runs twice."""
    for number in range(rounds):
        child = worker.run("faulty.count", tally.path, f"before{number}")
        result = worker.call("faulty.count", tally.path, f"after{number}")
        os.kill(child, signal.SIGKILL)
        try:
            worker.get(result)
        except WorkerLostError:
            assert tally.runs()[f"after{number}"] <= 1
        else:
            assert tally.runs()[f"after{number}"] == 1
    assert all(tally.runs()[f"before{number}"] == 1 for number in range(rounds))


def test_all_idle_children_at_once(worker, tally):
    """All children of the pool are killed while idle; the ten tasks sent at once all run, once each."""
    for number in range(3):
        for child in hold(worker, 4):
            os.kill(child, signal.SIGKILL)
        results = [worker.call("faulty.count", tally.path, f"{number}.{task}") for task in range(10)]
        for result in results:
            worker.get(result)
    assert len(tally.runs()) == 30
    assert set(tally.runs().values()) == {1}


def test_all_children_while_tasks_flow(worker, tally, start_method):
    """Round after round all children are killed: what ran in them is lost, everything else runs, once."""
    results = {
        f"t{number}": worker.call("faulty.work", tally.path, f"t{number}", 0.05) for number in range(60)
    }
    killed = 0
    for ended in (5, 20, 35) if start_method == "forkserver" else (5, 30):
        worker.until(lambda ended=ended: len(tally.of("ended")) >= ended, f"{ended} tasks to end")
        forkserver = worker.stats()["pool"]["memsafe"]["forkserver"]
        killed += processes.kill(*(pid for pid in processes.children(worker.pid) if pid != forkserver))
    lost = set()
    for value, result in results.items():
        try:
            assert worker.get(result) == value
        except WorkerLostError:
            lost.add(value)
    assert len(lost) <= killed
    began, ended = tally.of("began"), tally.of("ended")
    assert all(began[value] == ended[value] == 1 for value in results if value not in lost)
    assert all(began[value] <= 1 for value in lost)
    assert worker.run("faulty.work", tally.path, "last", 0) == "last"
    settle(worker)


def test_a_task_that_is_acknowledged_late_runs_again(worker):
    """Killed in the middle of a task that is to be rejected then: the task begins again elsewhere."""
    gate = worker.gate()
    result = worker.call("faulty.hold_rejected", gate.path)
    child = gate.wait_started()[result.id]
    os.kill(child, signal.SIGKILL)
    worker.until(lambda: gate.started().get(result.id) not in (None, child), "the task to begin again")
    gate.open()
    assert worker.get(result) == gate.started()[result.id]


def test_a_task_that_is_acknowledged_early_is_lost(worker):
    """Killed from outside in the middle of a task: its caller is told, with the signal's name."""
    gate = worker.gate()
    result = worker.call("faulty.hold", gate.path)
    child = gate.wait_started()[result.id]
    os.kill(child, signal.SIGKILL)
    with pytest.raises(WorkerLostError, match=r"signal 9 \(SIGKILL\)"):
        worker.get(result)
    worker.wait_for_log(rf"pid:{child} exited with 'signal 9 \(SIGKILL\)'")


@pytest.fixture(scope="module")
def lone_worker(start_module_worker, start_method, broker_kind):
    """A worker with one child, so that it is known who gets the next task."""
    return start_module_worker("faulty", start_method=start_method, broker=broker_kind, concurrency=1)


def test_in_the_middle_of_receiving_an_argument(lone_worker, tmp_path):
    """Half of 50 MB have been written when the child is killed: the task runs in another child, once."""
    worker, tally = lone_worker, Tally(tmp_path / "tally")
    child = worker.run("faulty.count", tally.path, "first")
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["idle"] == 1, "the child to be idle")
    os.kill(child, signal.SIGSTOP)
    try:
        result = worker.call("faulty.count_length", tally.path, "x" * SIZE)
        worker.until(
            lambda: worker.stats()["pool"]["writes"]["inqueues"]["active"] == 1, "the worker to write"
        )
    finally:
        os.kill(child, signal.SIGKILL)
    assert worker.get(result) == SIZE
    assert tally.runs() == {"first": 1, str(SIZE): 1}


def test_an_argument_that_no_child_can_receive(start_worker, redis):
    """With the fourth child that ends over it the task is lost, and acknowledged: it does not come again."""
    worker = start_worker("obstacle", broker=redis)
    (worker.folder / "init").write_text("narrow")
    with pytest.raises(WorkerLostError, match="exitcode 1"):
        worker.run("obstacle.length", "x" * SIZE)
    assert worker.log().count("exited with 'exitcode 1'") == 4
    assert worker.stop() == 0
    assert redis.waiting() == 0


def test_in_the_middle_of_sending_a_result(lone_worker):
    """Half of a failure of 50 MB can be read when the child is killed: that task has failed, others run."""
    worker, gate = lone_worker, lone_worker.gate()
    result = worker.call("faulty.fail_big", gate.path, SIZE)
    child = gate.wait_started()[result.id]
    worker.signal(signal.SIGSTOP)
    try:
        gate.open()
        # The child stores its result itself; then it fills the socket and waits for the worker to read.
        worker.until(lambda: result.state == "FAILURE", "the stored result")
        processes.wait_idle(child)
        os.kill(child, signal.SIGKILL)
    finally:
        worker.signal(signal.SIGCONT)
    worker.wait_for_log(r"WorkerLostError\('Worker exited prematurely: signal 9 \(SIGKILL\)")
    result.forget()
    assert worker.run("proj.add", 1, 1) == 2


def test_a_child_that_is_stopped_and_killed(worker):
    """A child that is stopped by SIGSTOP in a task can be killed, and is noticed."""
    gate = worker.gate()
    result = worker.call("faulty.hold", gate.path)
    child = gate.wait_started()[result.id]
    os.kill(child, signal.SIGSTOP)
    os.kill(child, signal.SIGKILL)
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        worker.get(result)


def test_children_that_are_starting(worker, tally):
    """Children killed before they were ready are started again, after a moment, and no task is lost."""
    for child in hold(worker, 4):
        os.kill(child, signal.SIGKILL)
    settle(worker)
    forkserver = worker.stats()["pool"]["memsafe"]["forkserver"]
    results = [worker.call("faulty.count", tally.path, f"t{number}") for number in range(8)]
    worker.until(lambda: set(processes.children(worker.pid)) - {forkserver}, "a child")
    processes.kill(*(set(processes.children(worker.pid)) - {forkserver}))
    lost = 0
    for result in results:
        try:
            worker.get(result)
        except WorkerLostError:
            lost += 1
    # Only what a child had begun can be lost; fresh interpreters had not begun anything.
    assert lost <= 4
    assert len(tally.runs()) >= 8 - lost
    assert set(tally.runs().values()) == {1}
