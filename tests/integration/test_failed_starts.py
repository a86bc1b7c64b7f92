"""Children that cannot start: said clearly, tried again with pauses, and given up at last."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest

pytestmark = pytest.mark.ours_only("how failed starts are treated")

#: Start method, what else is set, and where the start is stopped: in the import of the app (by the child, or
#: by a forkserver that is a fresh interpreter) or in the loader's preparation of a child.
WAYS = [
    pytest.param("spawn", {}, "import", id="spawn-import"),
    pytest.param("spawn", {}, "init", id="spawn-init"),
    pytest.param("forkserver", {}, "init", id="forkserver-init"),
    pytest.param("forkserver", {"memsafe_child_env": {"A": "1"}}, "import", id="forkserver-import"),
    pytest.param("fork", {}, "init", id="fork-init"),
]


def start(start_worker, broker, way, kind):
    """A worker with an obstacle that its own start does not meet, but its children's does."""
    method, config, step = way
    worker = start_worker("obstacle", broker=broker, config=config, start_method=method)
    if step == "import" and method == "forkserver":
        # The first forkserver may have imported the app by now; the next one meets the obstacle.
        worker.run("obstacle.pid")
        (worker.folder / step).write_text(kind)
        forkserver = worker.stats()["pool"]["memsafe"]["forkserver"]
        os.kill(forkserver, signal.SIGKILL)
        worker.wait_for_log(rf"forkserver \(pid {forkserver}\) has died")
        for child in worker.children():
            os.kill(child, signal.SIGKILL)
        worker.until(lambda: not worker.children(), "the idle child to be gone")
    else:
        (worker.folder / step).write_text(kind)
    return worker
    return worker


@pytest.mark.parametrize(("method", "config", "step"), WAYS)
def test_an_obstacle_that_goes_away(start_worker, redis, method, config, step):
    """One log line with the traceback; when the obstacle is gone the task runs, and nothing is lost."""
    worker = start(start_worker, redis, (method, config, step), "raise")
    result = worker.call("obstacle.pid")
    found = worker.wait_for_log(
        rf"ERROR/MainProcess\] .*(?s:.)*?RuntimeError: something is in the way of {step}"
    )
    (worker.folder / step).unlink()
    assert re.search(r"failed to start|could not begin", found.group())
    assert "Traceback (most recent call last)" in found.group()
    assert 'obstacle.py", line' in found.group()
    assert worker.get(result) in worker.children()
    assert "WorkerLost" not in worker.log()


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("redis", ("spawn", {}, "import")),
        ("redis", ("forkserver", {}, "init")),
        ("redis", ("forkserver", {"memsafe_child_env": {"A": "1"}}, "import")),
        ("filesystem", ("forkserver", {}, "init")),
    ],
)
def test_an_obstacle_that_stays(start_worker, open_broker, kind, way):
    """The worker stops with an exit code that says so, and the task is left for another worker."""
    broker = open_broker(kind)
    worker = start(start_worker, broker, way, "raise")
    result = worker.call("obstacle.pid")
    worker.wait_for_log(
        r"CRITICAL/MainProcess\] Stopping the worker: children failed to start 5 times in a row\."
    )
    assert worker.wait_exit() == os.EX_SOFTWARE
    assert worker.log().count("failed to start:") == 5
    (worker.folder / way[2]).unlink()
    assert start_worker("obstacle", broker=broker).get(result) > 0


def test_a_start_that_ends_slowly(start_worker, redis, start_method):
    """It has failed, also if the worker cannot hear of it any more before the process has ended."""
    worker = start(start_worker, redis, (start_method, {}, "init"), "close")
    result = worker.call("obstacle.pid")
    worker.wait_for_log(r"failed to start: it ended before it was ready: (exitcode 7|signal 15)")
    (worker.folder / "init").unlink()
    assert worker.get(result) in worker.children()


CRASH_IN_A_CHILD = """
import os

worker = os.getpid()
os.register_at_fork(after_in_child=lambda: worker == os.getppid() or os._exit(11))
"""

CRASH_IN_A_FORK = """
import ctypes, os, signal

# Also in a fresh interpreter.
worker = int(os.environ.setdefault("CRASHES_UNDER", str(os.getpid())))

@ctypes.CFUNCTYPE(None)
def before():
    if worker not in (os.getpid(), os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)

ctypes.CDLL(None).__register_atfork(before, None, None, None)
"""


def start_crashing(start_worker, crashes, *, extension):
    """Start a worker whose midwives die; give it a task."""

    def prepare(worker):
        (worker.folder / "crashes.py").write_text(crashes)
        if not extension:
            worker.hide_extension()

    worker = start_worker(
        "obstacle", start_method="forkserver", config={"imports": ["crashes"]}, prepare=prepare
    )
    worker.call("obstacle.pid")
    worker.wait_for_log(r"failed to start: whoever was to fork it has died, 11 times in a row")
    return worker


def test_midwives_that_are_forks_die(start_worker):
    """As with a library that crashes in each fork of a fork: it is not tried for ever, nor at full speed."""
    worker = start_crashing(start_worker, CRASH_IN_A_CHILD, extension=False)
    worker.wait_for_log("children failed to start 5 times in a row")
    assert worker.wait_exit() == os.EX_SOFTWARE


def test_midwives_die_and_the_forkserver_with_them(start_worker):
    """It is replaced each time, and that is not tried for ever."""
    worker = start_crashing(start_worker, CRASH_IN_A_FORK, extension=True)
    assert len(re.findall(r"The forkserver \(pid \d+\) has died", worker.log())) == 11


@pytest.mark.parametrize(("method", "config", "step"), WAYS)
def test_a_child_that_hangs_at_its_start(start_worker, redis, method, config, step):
    """After ``memsafe_start_timeout`` it is killed, and the log says so; the next one runs the task."""
    worker = start(start_worker, redis, (method, {**config, "memsafe_start_timeout": 15}, step), "wait")
    result = worker.call("obstacle.pid")
    waits = worker.folder / f"{step}.waits"
    worker.until(waits.exists, "the start to hang")
    hanging = int(waits.read_text())
    worker.wait_for_log(r"failed to start: not ready after 15 s \(memsafe_start_timeout\)")
    worker.until(lambda: hanging not in worker.pids(), "what hangs to be killed")
    (worker.folder / step).unlink()
    assert worker.get(result) != hanging


def test_children_that_start_slowly(start_worker, start_method):
    """A start may take longer than what Celery's own pool allows (4 s); nothing is killed."""
    worker = start_worker("obstacle", start_method=start_method, concurrency=2)
    step = worker.folder / "init"
    step.write_text("wait")
    results = [worker.call("obstacle.pid") for _ in range(4)]
    worker.until((worker.folder / "init.waits").exists, "the start to wait")
    begin = time.monotonic()
    worker.until(lambda: time.monotonic() > begin + 5, "5 s to pass")
    step.unlink()
    assert len({worker.get(result) for result in results}) <= 2
    assert "SIGKILL" not in worker.log()
    assert "failed" not in worker.log()
