"""Processes that are not the pool's: who started one gets its exit status, and none is left behind."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter

import pytest
from harness import processes

#: Programs that a thread of the worker starts.
PROGRAMS = 200


@pytest.mark.also_start_method("fork")
def test_programs_of_another_thread(start_worker, start_method, broker_kind):
    """It waits for them long after their end: it gets the status of each."""
    worker = start_worker(
        "bystander",
        start_method=start_method,
        broker=broker_kind,
        concurrency=4,
        config={"worker_max_tasks_per_child": 1, "worker_prefetch_multiplier": 4},
    )

    def run_tasks(number):
        """Have so many children start."""
        for result in [worker.call("faulty.count", "/dev/null", number) for _ in range(number)]:
            worker.get(result)

    (worker.folder / "programs.new").write_text(str(PROGRAMS))
    (worker.folder / "programs.new").rename(worker.folder / "programs")
    while not (worker.folder / "started").exists():
        run_tasks(4)
    for _ in range(1 if start_method == "spawn" else 10):
        run_tasks(8)
    (worker.folder / "wait").touch()
    statuses = worker.folder / "statuses"
    worker.until(statuses.exists, "the statuses of all programs")
    assert Counter(json.loads(statuses.read_text())) == {3: PROGRAMS}


@pytest.mark.ours_only("with prefork they stay")
def test_a_worker_that_is_init(start_worker):
    """Where nothing else is, as in a container, all orphans are the worker's: those of tasks do not stay."""

    def prepare(worker):
        worker.command = ["unshare", "--pid", "--fork", "--mount-proc", *worker.command]

    worker = start_worker("faulty", start_method="forkserver", prepare=prepare)
    [init] = processes.children(worker.pid)
    worker.run("faulty.leave_orphans", 5, 0.1)
    worker.until(lambda: len(processes.children(init)) == 2, "the forkserver and a child to be all there is")
    os.kill(init, signal.SIGTERM)
    assert worker.wait_exit() == 0
