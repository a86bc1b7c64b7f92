"""What children write ends where it belongs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import harness
import pytest

pytestmark = pytest.mark.also_start_method("fork")

NAMES = {
    "forkserver": "ForkServerPoolWorker",
    "spawn": "SpawnPoolWorker",
    "fork": "ForkPoolWorker",
    "stock": "ForkPoolWorker",
}


@pytest.mark.parametrize("level", ["WARNING", "INFO"])
def test_what_a_task_prints_is_logged(start_worker, start_method, level):
    """Standard output of a task goes to the log, with level and the name of the child's process."""
    config = {"worker_redirect_stdouts_level": level}
    worker = start_worker("witness", config=config, start_method=start_method)
    worker.run("witness.say", "good morning")
    name = NAMES[start_method]
    worker.wait_for_log(rf"\[.*{level}/{name}-\d+\] good morning")
    worker.wait_for_log(rf"\[.*INFO/{name}-\d+\] Task witness\.say\[.*succeeded in")


def test_what_a_task_prints_is_left_alone(start_worker, start_method):
    """``worker_redirect_stdouts=False``: it goes to standard output as it is."""
    worker = start_worker("witness", config={"worker_redirect_stdouts": False}, start_method=start_method)
    worker.run("witness.say", "good morning")
    worker.wait_for_log(r"(?m)^good morning$")


@pytest.mark.parametrize("option", ["%I", "-%i"])
def test_each_child_has_a_log_of_its_own(start_worker, start_method, option):
    """``%i`` in the log file's name: 0 for the worker, and for a child the number of its place."""
    arguments = ["--logfile", f"log{option}.txt", "--max-tasks-per-child", "1"]
    worker = start_worker("witness", *arguments, start_method=start_method, concurrency=1, ready=False)
    main, child = ("log.txt", "log-1.txt") if option == "%I" else ("log-0.txt", "log-1.txt")

    def text(name):
        path = worker.folder / name
        return path.read_text() if path.exists() else ""

    worker.until(lambda: re.search(r"\S+@\S+ ready\.", text(main)), "the worker to be ready")
    for words in ("good morning", "good night"):
        worker.run("witness.say", words)
    worker.until(lambda: "good night" in text(child), f"the tasks' words in {child}")
    assert "good morning" in text(child)
    assert "good" not in text(main)
    assert len(set(re.findall(rf"{NAMES[start_method]}-(\d+)", text(child)))) == 2


def test_the_level_is_that_of_the_worker(start_worker, start_method):
    """With ``-l WARNING`` children write no lines of lower level."""
    worker = start_worker("witness", start_method=start_method, loglevel="WARNING", ready=False)
    worker.run("witness.say", "good morning")
    worker.wait_for_log("good morning")
    assert "succeeded" not in worker.log()
    assert worker.stop() == 0


@pytest.mark.parametrize("own", [False, True], ids=["after_setup_logger", "setup_logging"])
def test_a_project_s_own_logging(start_worker, start_method, own):
    """Handlers that the project adds, or a set-up of its own, get the lines of children, each once."""
    worker = start_worker(
        "journal", start_method=start_method, env={"TEST_OWN_LOGGING": "1" if own else ""}, ready=False
    )
    worker.run("journal.tell", "good morning")
    path = worker.folder / ("own" if own else "journal")
    line = re.compile(rf"^{NAMES[start_method]}-\d+\|INFO\|Task journal\.tell\[.*succeeded", re.MULTILINE)
    worker.until(lambda: line.search(path.read_text()), "the task's end in the journal")
    assert worker.stop() == 0
    assert len(line.findall(path.read_text())) == 1
    assert ("succeeded" in worker.log()) is not own


def test_titles(start_worker, start_method):
    """With setproctitle each process shows its own name and the worker's; the forkserver does, too."""

    def prepare(worker):
        folder = str(Path(harness.__file__).parent / "titles")
        worker.env["PYTHONPATH"] = os.pathsep.join([folder, worker.env["PYTHONPATH"]])

    worker = start_worker("witness", start_method=start_method, prepare=prepare)
    child = worker.run("witness.say", "good morning")
    titles = dict(line.split(" ", 1) for line in (worker.folder / "titles").read_text().splitlines())
    assert titles[str(worker.pid)].startswith(f"[celeryd: {worker.hostname}:MainProcess] -active- (")
    assert re.fullmatch(rf"\[celeryd: {worker.hostname}:{NAMES[start_method]}-\d+\]", titles[str(child)])
    if start_method == "forkserver":
        forkserver = worker.stats()["pool"]["memsafe"]["forkserver"]
        assert titles[str(forkserver)] == f"[celeryd: {worker.hostname}:ForkServer]"
