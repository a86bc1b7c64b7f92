"""SIGCHLD: ignored by whoever starts the worker, or handled by the app."""

from __future__ import annotations

import sys

import pytest
from billiard.exceptions import WorkerLostError

#: The app of a test: it counts ended processes, by the pid of the process that is told of them.
HANDLES = """
import os, signal, subprocess
from faulty import app

def on_child_end(signum, frame):
    with open("told", "a") as file:
        print(os.getpid(), file=file)

signal.signal(signal.SIGCHLD, on_child_end)

@app.task(name="handles.run")
def run():
    subprocess.run(["true"], check=True)
    return signal.getsignal(signal.SIGCHLD).__name__, os.getpid()
"""

#: Runs a command with the signal ignored. A shell may not do that: dash does not.
IGNORES = """
import os, signal, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.also_start_method("fork")
@pytest.mark.ours_only("what is inherited as ignored is heeded; prefork takes each exit as status 0")
def test_ignored(start_worker, start_method):
    """How a child has ended is known all the same, and how a program that a task started has."""

    def ignore(worker):
        worker.command = [sys.executable, "-c", IGNORES, *worker.command]

    worker = start_worker("faulty", start_method=start_method, prepare=ignore)
    with pytest.raises(WorkerLostError, match="signal 9 \\(SIGKILL\\)"):
        worker.run("proj.die")
    assert worker.run("faulty.status_of", ["false"]) == 1
    worker.stop()


@pytest.mark.also_start_method("fork")
@pytest.mark.ours_only("nobody but worker and children")
def test_handled(start_worker, start_method):
    """The app's handler is in children as well, and hears of their programs; not in the forkserver."""

    def prepare(worker):
        (worker.folder / "handles.py").write_text(HANDLES)

    worker = start_worker("handles", start_method=start_method, prepare=prepare)
    name, child = worker.run("handles.run")
    assert name == "on_child_end"
    told = set((worker.folder / "told").read_text().split())
    assert str(child) in told
    assert told <= {str(child), str(worker.pid)}
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        worker.run("proj.die")
