"""Children and forkserver killed and stopped at random while tasks flow, and the account afterwards."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

import pytest
from billiard.exceptions import WorkerLostError
from harness import processes

pytestmark = pytest.mark.ours_only("how this pool takes faults")

#: Seconds of disturbance, and the order of events. A long search by hand: TEST_SECONDS=60 TEST_SEED=$RANDOM.
DURATION = float(os.environ.get("TEST_SECONDS", "8"))
SEED = int(os.environ.get("TEST_SEED", "20"))


class Disturbance(threading.Thread):
    """Does something bad every now and then, and remembers whom it killed."""

    def __init__(self, worker, seed):
        super().__init__(name="disturbance")
        self.worker, self.moments = worker, random.Random(seed)
        self.killed = 0
        self.over = threading.Event()

    def is_recovered(self):
        found = self.worker.stats()["pool"]["memsafe"]
        return self.over.is_set() or (
            found["starting"] == 0 and (found["waiting"] == 0 or found["children"] == 4)
        )

    def run(self):
        end, number = time.monotonic() + DURATION, 0
        while time.monotonic() < end and not self.over.wait(self.moments.uniform(0.02, 0.5)):
            number += 1
            if number % 3 == 0:
                # A worker none of whose children ever gets ready gives up, and rightly so.
                self.worker.until(self.is_recovered, "the pool to recover")
            victims = sorted(processes.children(self.worker.pid))
            if not victims:
                continue
            deed = self.moments.choice(["one", "one", "one", "some", "all", "helpers", "pause"])
            if deed == "one":
                victims = [self.moments.choice(victims)]
            elif deed == "some":
                victims = self.moments.sample(victims, (len(victims) + 1) // 2)
            elif deed == "helpers":
                victims = [pid for child in victims for pid in processes.children(child)]
            if deed == "pause":
                processes.kill(*victims, number=signal.SIGSTOP)
                self.over.wait(0.3)
                processes.kill(*victims, number=signal.SIGCONT)
            else:
                self.killed += processes.kill(*victims)


@pytest.mark.parametrize(
    ("kind", "broker_kind"),
    [("forkserver", "redis"), ("forkserver", "filesystem"), ("spawn", "redis")],
    scope="function",
)
def test_any_disturbance(start_worker, broker_kind, kind, tally):
    """Only tasks of children that were killed are lost; every other runs once; the pool is as before."""
    worker = start_worker(
        "faulty", start_method=kind, broker=broker_kind, concurrency=4, config={"memsafe_idle_timeout": 1}
    )
    worker.run("faulty.work", tally.path, "first", 0)
    disturbance = Disturbance(worker, SEED)
    lengths, results = random.Random(SEED + 1), {}
    disturbance.start()
    try:
        while disturbance.is_alive():
            for _ in range(lengths.randrange(1, 8)):
                value = f"t{len(results)}"
                seconds = lengths.choice([0, 0, 0.01, 0.1, 0.3])
                results[value] = worker.call("faulty.work", tally.path, value, seconds)
            worker.until(
                lambda: len(tally.of("began")) > len(results) - 20 or not disturbance.is_alive(), "work"
            )
    finally:
        disturbance.over.set()
        disturbance.join()
    lost = set()
    for value, result in results.items():
        try:
            assert worker.get(result) == value
        except WorkerLostError:
            lost.add(value)
    began, ended = tally.of("began"), tally.of("ended")
    assert [value for value in results if value not in lost and not began[value] == ended[value] == 1] == []
    assert [value for value in lost if began[value] > 1] == []
    assert len(lost) <= disturbance.killed
    assert worker.exitcode is None
    assert [worker.run("proj.add", 1, number) for number in range(8)] == list(range(1, 9))
    # After the idle timeout nothing is left but the forkserver.
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["children"] == 0, "the children to retire")
    forkserver = worker.stats()["pool"]["memsafe"]["forkserver"]
    worker.until(lambda: set(processes.children(worker.pid)) <= {forkserver}, "nobody else to be left")
    assert worker.stop() == 0
