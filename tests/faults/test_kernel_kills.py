"""The kernel kills a child for want of memory, whatever that does: the log says so, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
from harness import processes
from harness.waiting import DEADLINE

pytestmark = pytest.mark.ours_only("other pools do not ask the kernel")

#: MiB: the limit, and what an idle child has, so that it is the largest by far.
LIMIT, FAT = 400, 200

#: Takes memory in a cgroup until the kernel has killed somebody else, and holds it.
HOG = """
import re, sys
entrance, counter = sys.argv[1:]
open(entrance, "w").write("0")
def kills():
    return int(re.search(r"^oom_kill (\\d+)", open(counter).read(), re.MULTILINE)[1])
before, hoard = kills(), []
while kills() == before:
    hoard.append(bytearray(b"x") * (1 << 20))
print("killed", flush=True)
sys.stdin.read()
"""

KILLED = r"exited with 'signal 9 \(SIGKILL\)': the kernel has killed it, as memory was out"


@contextmanager
def shortage(cgroup):
    """Have the kernel kill the largest process in a cgroup; memory is short until the end of the block."""
    command = [sys.executable, "-c", HOG, str(cgroup.folder / "cgroup.procs"), str(cgroup.kills_file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hog:
        try:
            assert hog.stdout.readline() == "killed\n"
            yield
        finally:
            hog.stdin.close()
            hog.wait(DEADLINE)


@pytest.fixture
def cgroup(container):
    return container(LIMIT)


def has_kept(worker):
    """Have a fat child, idle; its pid."""
    child = worker.run("proj.keep", FAT)
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["idle"] == 1, "the child to be idle")
    return child


def test_an_idle_child(start_contained, cgroup):
    """It is told from a stray SIGKILL: also from one that comes right after it."""
    worker = start_contained(cgroup, config={"memsafe_max_child_growth": "1GiB"})
    child = has_kept(worker)
    worker.signal(signal.SIGSTOP)  # else it would let the child go when memory is short
    try:
        with shortage(cgroup):
            worker.until(lambda: child in processes.zombies(worker.pid), "the child to be killed")
    finally:
        worker.signal(signal.SIGCONT)
    worker.wait_for_log(rf"pid:{child} {KILLED}")
    child = worker.run("proj.pid")
    os.kill(child, signal.SIGKILL)
    worker.wait_for_log(rf"pid:{child} exited with 'signal 9 \(SIGKILL\)'(?!:)")


def test_a_task_that_had_not_begun(start_contained, cgroup):
    """It runs in another child, also if it is acknowledged early."""
    config = {"memsafe_max_child_growth": "1GiB", "memsafe_pause": False}
    worker = start_contained(cgroup, concurrency=1, config=config)
    child = has_kept(worker)
    os.kill(child, signal.SIGSTOP)
    result = worker.call("proj.pid")
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["busy"] == 1, "the child to be given the task")
    with shortage(cgroup):
        worker.wait_for_log(rf"pid:{child} {KILLED}")
        worker.wait_for_log(r"is run again: proj\.pid had taken 0 MiB when looked at last, and the kernel")
    assert worker.get(result) != child


def test_a_child_that_starts(start_contained, cgroup):
    """That says nothing of the app: it is tried again, and is no reason to stop the worker."""
    worker = start_contained(cgroup, "obstacle")
    (worker.folder / "init").write_text("hoard")
    assert worker.run("obstacle.pid")
    worker.wait_for_log(
        r"failed to start: it ended before it was ready: signal 9 \(SIGKILL\): the kernel has killed it, "
    )
