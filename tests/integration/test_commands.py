"""Other ways to run the worker: with beat, in the background, and by ``celery multi``."""

from __future__ import annotations

import os
import re
import signal
import sys

import psutil
from harness.worker import POOL


def run_to_end(worker):
    """Wait for a command that leaves the worker in the background."""
    assert worker.wait_exit() == 0, worker.log()


def living(path):
    """The pid in a pid file, when there is one and its process is alive."""
    text = path.read_text().strip() if path.exists() else ""
    return int(text) if text and psutil.pid_exists(int(text)) else 0


def test_embedded_beat(start_worker, start_method):
    """``-B``: beat runs beside the pool, its tasks run, and it ends with the worker."""
    worker = start_worker("clockwork", "-B", "-s", "schedule", start_method=start_method)
    beats = worker.folder / "beats"
    worker.until(
        lambda: beats.exists() and len(beats.read_text().split()) >= 3, "the schedule to run three times"
    )
    assert worker.run("proj.add", 1, 2) == 3
    assert worker.stop() == 0


def test_in_the_background(start_worker, start_method):
    """``-D``: the command returns, the worker runs on its own and ends on SIGTERM."""
    worker = start_worker(
        "witness", "-D", "--pidfile", "w.pid", "--logfile", "w.log", start_method=start_method, ready=False
    )
    run_to_end(worker)
    pidfile, log = worker.folder / "w.pid", worker.folder / "w.log"
    worker.until(
        lambda: log.exists() and re.search(r"\S+@\S+ ready\.", log.read_text()), "the worker to be ready"
    )
    pid = living(pidfile)
    assert pid
    place = worker.app.send_task("witness.place").get(timeout=60)
    assert place["ppid"] == pid
    os.kill(pid, signal.SIGTERM)
    worker.until(lambda: not worker.pids(), "all processes to end")
    assert not pidfile.exists()
    assert "Traceback" not in log.read_text()


def test_multi(start_worker, start_method):
    """``celery multi`` starts two workers, restarts one of them, and stops them."""
    options = [
        "-A",
        "witness",
        f"--pool={POOL}",
        "-c",
        "2",
        "-l",
        "INFO",
        "--pidfile=%n.pid",
        "--logfile=%n%I.log",
    ]

    def multi(verb, *nodes):
        # Worker.start() runs Worker.command, each time with another one here.
        worker.command = [sys.executable, "-m", "celery", "multi", verb, *nodes, *options]
        worker.start(ready=False)
        run_to_end(worker)

    def ready(node, count=1):
        log = worker.folder / f"{node}.log"
        worker.until(
            lambda: log.exists() and len(re.findall(r"\S+@\S+ ready\.", log.read_text())) >= count,
            f"{node} to be ready",
        )
        return living(worker.folder / f"{node}.pid")

    worker = start_worker(command=["true"], start_method=start_method, ready=False)
    run_to_end(worker)
    multi("start", "one", "two")
    pids = {ready("one"), ready("two")}
    assert len(pids - {0}) == 2
    assert worker.app.send_task("witness.place").get(timeout=60)["ppid"] in pids
    multi("restart", "one")
    again = ready("one", 2)
    assert again not in {0, *pids}
    multi("stopwait", "one", "two")
    worker.until(lambda: not worker.pids(), "all processes to end")
    assert not list(worker.folder.glob("*.pid"))
