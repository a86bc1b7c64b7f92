"""The worker itself killed by SIGKILL: whatever it was doing, soon nothing is left of it."""

from __future__ import annotations

import signal
import threading

import pytest
from harness import processes

pytestmark = pytest.mark.ours_only("children that end with their worker")

#: An app that says when it is imported, and takes its time from the second process on.
SLOW_APP = """
import os, sys, time
from pathlib import Path

first = not Path("imported").exists()
with open("imported", "a") as file:
    file.write(f"{os.getpid()}\\n")
if not first:
    time.sleep(60)
from faulty import app
"""


def nothing_survives(worker):
    """Kill the worker and wait for all its processes to end by themselves.

    Fresh interpreters see it when they have imported what they need, which takes seconds on a busy machine.
    """
    worker.signal(signal.SIGKILL)
    assert worker.wait_exit() == -signal.SIGKILL
    worker.until(
        lambda: not worker.pids(), f"the worker's processes to end: {sorted(worker.pids())}", timeout=30
    )


@pytest.mark.also_start_method("fork")
def test_with_idle_and_busy_children(start_worker, start_method):
    """A forkserver, an idle child and three that run a task end with it."""
    worker = start_worker("faulty", start_method=start_method, concurrency=4)
    gate, beside = worker.gate(), worker.gate()
    for _ in range(3):
        worker.call("faulty.hold", gate.path)
    worker.call("faulty.hold", beside.path)
    gate.wait_started(3)
    children = {*gate.started().values(), *beside.wait_started(1).values()}
    beside.open()
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["idle"] == 1, "an idle child")
    assert children <= worker.pids()
    nothing_survives(worker)


@pytest.mark.parametrize("moment", [0.0, 0.02, 0.05, 0.15])
@pytest.mark.also_start_method("fork")
def test_while_children_start(start_worker, start_method, moment):
    """In the middle of a burst: children on their way to their place find it gone, and end."""
    worker = start_worker("faulty", start_method=start_method, concurrency=8)
    gate = worker.gate()
    for _ in range(8):
        worker.call("faulty.hold", gate.path)
    worker.until(lambda: worker.log().count("received") >= 4, "tasks to arrive")
    threading.Event().wait(moment)
    nothing_survives(worker)


def test_while_a_fresh_process_imports_the_app(start_worker, start_method):
    """The forkserver that begins fresh, and a spawned child, end in the middle of their imports."""

    def prepare(worker):
        (worker.folder / "slow_app.py").write_text(SLOW_APP)

    worker = start_worker(
        "slow_app",
        start_method=start_method,
        config={"memsafe_child_env": {"SOMETHING": "1"}},
        prepare=prepare,
    )
    worker.call("faulty.hold", worker.gate().path)
    imported = worker.folder / "imported"
    worker.until(lambda: len(imported.read_text().split()) >= 2, "the import in the second process")
    assert len(worker.pids()) >= 2
    nothing_survives(worker)


def test_while_a_fresh_interpreter_begins(start_worker, start_method, tally):
    """A process that has only just begun to be Python, and finds its worker dead, does not stay."""
    config = {"memsafe_child_env": {"SOMETHING": "1"}, "memsafe_min_children": 1}
    worker = start_worker("faulty", start_method=start_method, config=config, concurrency=2)
    worker.run("faulty.count", tally.path, "a")
    gate = worker.gate()
    for _ in range(2):
        worker.call("faulty.hold", gate.path)
    before = set(gate.wait_started(2).values())
    known = set(processes.children(worker.pid))
    if start_method == "forkserver":
        processes.kill(worker.stats()["pool"]["memsafe"]["forkserver"])
    else:
        processes.kill(*before)
    worker.until(lambda: set(processes.children(worker.pid)) - known, "a new process")
    nothing_survives(worker)
