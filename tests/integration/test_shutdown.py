"""How a worker ends: exit code, tasks and processes, each as with Celery's own pool.

Celery's exit code is 0 after a cold shutdown, too.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from harness.worker import OURS

POOLS = ["forkserver", "spawn", "prefork"] if OURS else ["prefork"]


@pytest.fixture(params=POOLS)
def start(start_worker, request):
    """Start a worker on this pool with each start method, and on Celery's own for comparison."""

    def start(*arguments, **options):
        if request.param == "prefork":
            return start_worker(*arguments, pool="prefork", **options)
        return start_worker(*arguments, start_method=request.param, **options)

    return start


def end(worker, *signals):
    """Send signals, each when the one before it has been noticed; the log has a line for each."""
    for number, line in signals:
        worker.signal(number)
        worker.wait_for_log(line)


def begun(worker, *gates):
    """Wait until tasks have begun and the worker knows: only then does a shutdown treat them as running."""
    started = {}
    for gate in gates:
        started |= gate.wait_started()
    worker.until(lambda: len(worker.inspect("active")) >= len(started), "the worker to know")
    return started


TERM = (signal.SIGTERM, r"worker: Warm shutdown")
QUIT = (signal.SIGQUIT, r"worker: Cold shutdown")
FIRST_INT = (signal.SIGINT, r"initiate cold shutdown(.|\n)*worker: Warm shutdown")
SECOND_INT = (signal.SIGINT, r"Hitting Ctrl\+C again will terminate all running tasks")


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"])
def test_warm_shutdown(start, open_broker, kind):
    """SIGTERM: what runs ends in order and its result arrives; what waits is left for another worker."""
    broker = open_broker(kind)
    worker = start(broker=broker, concurrency=1)
    gate = worker.gate()
    running = worker.call("proj.hold", gate.path)
    child = begun(worker, gate)[running.id]
    waiting = worker.call("proj.add", 1, 2)
    worker.until(lambda: worker.inspect("reserved"), "the other task to wait in the worker")
    end(worker, TERM)
    gate.open()
    assert worker.wait_exit() == 0
    assert worker.get(running) == child
    assert start(broker=broker).get(waiting) == 3


@pytest.mark.needs_celery("5.5")
@pytest.mark.parametrize(
    ("kind", "signals"),
    [
        ("redis", [QUIT]),
        ("redis", [FIRST_INT, SECOND_INT]),
        ("redis", [TERM, QUIT]),
        ("filesystem", [QUIT]),
    ],
    ids=["redis-QUIT", "redis-INT-INT", "redis-TERM-QUIT", "filesystem-QUIT"],
)
def test_cold_shutdown(start, open_broker, kind, signals):
    """Running tasks are ended; those that are acknowledged late run again elsewhere."""
    broker = open_broker(kind)
    worker = start(broker=broker)
    gate, late = worker.gate(), worker.gate()
    lost, again = worker.call("proj.hold", gate.path), worker.call("proj.hold_late", late.path)
    children = set(begun(worker, gate, late).values())
    end(worker, *signals)
    # SIGINT asks for a warm shutdown with exit code 1, which may have begun when the second one arrives.
    assert worker.wait_exit() in ([0, 1] if FIRST_INT in signals else [0])
    worker.until(lambda: not any(map(psutil.pid_exists, children)), "the children to be gone")
    second = start(broker=broker)
    late.open()
    assert second.get(again) not in children
    assert not lost.successful()


@pytest.mark.needs_celery("5.5")
def test_cold_shutdown_by_another_signal(start, redis):
    """``REMAP_SIGTERM=SIGQUIT``: SIGTERM is a cold shutdown, too."""
    worker = start(broker=redis, env={"REMAP_SIGTERM": "SIGQUIT"})
    gate = worker.gate()
    again = worker.call("proj.hold_late", gate.path)
    child = begun(worker, gate)[again.id]
    end(worker, (signal.SIGTERM, "worker: Cold shutdown"))
    assert worker.wait_exit() == 0
    gate.open()
    assert start(broker=redis).get(again) != child


@pytest.mark.needs_celery("5.5")
@pytest.mark.parametrize("enough", [True, False], ids=["enough time", "too little time"])
def test_soft_shutdown(start, redis, enough):
    """``worker_soft_shutdown_timeout``: the task may end within that time, else the shutdown is cold."""
    worker = start(broker=redis, config={"worker_soft_shutdown_timeout": 20 if enough else 1})
    gate = worker.gate()
    result = worker.call("proj.hold_late", gate.path)
    child = begun(worker, gate)[result.id]
    end(worker, (signal.SIGQUIT, "Initiating Soft Shutdown, terminating in"))
    if enough:
        gate.open()
    assert worker.wait_exit() == 0
    if not enough:
        gate.open()
        worker = start(broker=redis)
    assert (worker.get(result) == child) is enough


@pytest.mark.needs_celery("5.5")
@pytest.mark.ours_only("children that are heard to the end")
def test_a_task_that_ends_during_a_soft_shutdown(start_worker, start_method, redis, tmp_path):
    """It has begun and ended while the worker could not listen: it has run, and does not run again."""
    config = {"worker_soft_shutdown_timeout": 10}
    worker = start_worker(broker=redis, start_method=start_method, config=config)
    gate, runs = worker.gate(), tmp_path / "runs"
    both = [worker.call("proj.hold", gate.path) for _ in range(2)]
    gate.wait_started(2)
    gate.open()
    for result in both:
        worker.get(result)
    gate = worker.gate()
    holding = worker.call("proj.hold", gate.path)
    [busy] = begun(worker, gate).values()
    [idle] = set(worker.children()) - {busy}
    os.kill(idle, signal.SIGSTOP)
    try:
        short = worker.call("proj.note", str(runs), 1)
        worker.until(lambda: worker.stats()["pool"]["memsafe"]["busy"] == 2, "the task to be with a child")
        end(worker, (signal.SIGQUIT, "Initiating Soft Shutdown, terminating in"))
    finally:
        os.kill(idle, signal.SIGCONT)
    assert worker.get(short) == 1
    assert worker.wait_exit() == 0
    assert not holding.ready()
    second = start_worker(broker=redis, start_method=start_method)
    assert second.run("proj.add", 1, 1) == 2
    assert runs.read_text().split() == ["1"]
    assert redis.waiting() == 0


@pytest.mark.parametrize(
    ("number", "exitcode"), [(signal.SIGTERM, 0), (signal.SIGINT, 1), (signal.SIGQUIT, 0)]
)
def test_an_idle_worker_ends(start, number, exitcode):
    """With children that have nothing to do the worker ends as soon as it is told to."""
    worker = start()
    worker.run("proj.add", 1, 2)
    worker.signal(number)
    assert worker.wait_exit() == exitcode


@pytest.mark.ours_only("children that start on demand")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
@pytest.mark.parametrize(("method", "step"), [("spawn", "import"), ("spawn", "init"), ("forkserver", "init")])
def test_a_child_that_is_starting_does_not_keep_the_worker(start_worker, redis, method, step, number):
    """A worker that is told to end while a child starts ends at once, and leaves the task for another."""
    worker = start_worker("obstacle", broker=redis, start_method=method)
    obstacle = worker.folder / step
    obstacle.write_text("wait")
    result = worker.call("obstacle.pid")
    worker.until((worker.folder / f"{step}.waits").exists, "the child to stop in the middle of its start")
    child = int((worker.folder / f"{step}.waits").read_text())
    worker.signal(number)
    assert worker.wait_exit() == 0
    worker.until(lambda: not worker.pids(), "the child to be gone too")
    assert start_worker("obstacle", broker=redis, start_method=method).get(result) != child


@pytest.mark.ours_only("Celery's own leaves a temporary folder behind")
def test_hangup_restarts_the_worker(start_worker, start_method):
    """SIGHUP: the same process begins anew, with new children, and works."""

    def as_script(worker):
        # Celery runs sys.argv again, which "-m celery" leaves incomplete.
        worker.command[:3] = [str(Path(sys.executable).with_name("celery"))]

    worker = start_worker(start_method=start_method, prepare=as_script)
    gate = worker.gate()
    running = worker.call("proj.hold", gate.path)
    child = gate.wait_started()[running.id]
    before = worker.pids()
    worker.signal(signal.SIGHUP)
    worker.wait_for_log("Restarting celery worker")
    gate.open()
    assert worker.get(running) == child
    worker.wait_for_log(r"\S+@\S+ ready\.", count=2)
    assert worker.exitcode is None
    assert worker.run("proj.pid") != child
    assert worker.pids() & before == {worker.pid}
    assert worker.stop() == 0
