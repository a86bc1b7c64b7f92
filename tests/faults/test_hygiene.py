"""What stays behind in the worker after many children, and what a child has that is not its own: nothing."""

from __future__ import annotations

import re
from collections import Counter

import psutil
import pytest
from billiard.exceptions import WorkerLostError
from harness import processes

pytestmark = pytest.mark.ours_only("how this pool takes faults")


@pytest.fixture(scope="module")
def recycling_worker(start_module_worker, start_method, broker_kind):
    """A worker each of whose children runs one task."""
    return start_module_worker(
        "faulty", start_method=start_method, broker=broker_kind, concurrency=4,
        config={"worker_max_tasks_per_child": 1, "worker_prefetch_multiplier": 4},
    )  # fmt: skip


def kinds(pid):
    """How many descriptors of each kind a process has."""
    return Counter(re.sub(r"\d+", "N", target) for target in processes.descriptors(pid).values())


def at_a_glance(worker):
    """What the worker has now, also what it is about to close or to reap."""
    return {
        "descriptors": kinds(worker.pid),
        "threads": psutil.Process(worker.pid).num_threads(),
        "children": len(processes.children(worker.pid)),
    }


def possessions(worker):
    """What the worker has for good: at two glances the same, and nobody who has ended."""
    worker.until(lambda: not processes.zombies(worker.pid), "all zombies to be reaped")
    glances = [at_a_glance(worker)]

    def is_same():
        glances.append(at_a_glance(worker))
        return glances[-1] == glances[-2]

    worker.until(is_same, "nothing to come and go")
    return glances[-1]


def wait_has(worker, before):
    """Wait until the worker has what it had before, and nothing else."""
    worker.until(lambda: at_a_glance(worker) == before, f"the worker to have what it had before: {before}")


def kill_some(worker, number):
    for result in [worker.call("proj.die") for _ in range(number)]:
        with pytest.raises(WorkerLostError):
            worker.get(result)
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["children"] == 0, "all children to be gone")


def run_all(worker, number):
    for result in [worker.call("faulty.count", "/dev/null", number) for _ in range(number)]:
        worker.get(result)
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["children"] == 0, "all children to leave")


def test_many_children_leave_nothing(recycling_worker, start_method):
    """After 200 children the worker has as many descriptors, threads and children as after a few."""
    worker = recycling_worker
    run_all(worker, 4)
    before = possessions(worker)
    number = 200 if start_method == "forkserver" else 10
    run_all(worker, number)
    assert worker.stats()["pool"]["memsafe"]["starts"] >= 4 + number
    wait_has(worker, before)


def test_many_killed_children_leave_nothing(recycling_worker, start_method):
    """The same for children that are killed in their task."""
    worker = recycling_worker
    kill_some(worker, 2)  # the worker stores these results itself, and has a connection for it from now on
    before = possessions(worker)
    kill_some(worker, 60 if start_method == "forkserver" else 6)
    wait_has(worker, before)


def test_what_a_child_has_open(start_worker, start_method, broker_kind):
    """Of sockets only its own, to the worker, and what it opened itself; no pipe and no pidfd."""
    config = {"task_ignore_result": True}  # so that no child connects to anything
    worker = start_worker(
        "faulty", start_method=start_method, broker=broker_kind, concurrency=4, config=config
    )
    gate = worker.gate()
    for _ in range(4):
        worker.call("faulty.hold", gate.path)
    children = set(gate.wait_started(4).values())
    assert len(children) == 4
    sockets = Counter()
    for child in children:
        found = {fd: target for fd, target in processes.descriptors(child).items() if fd > 2}
        own = [target for target in found.values() if target.startswith("socket:")]
        assert len(own) == 1, f"{child} has {found}"
        sockets.update(own)
        assert not [target for target in found.values() if target.startswith("pipe:") or "pidfd" in target], (
            found
        )
    assert set(sockets.values()) == {1}
    # Nobody else has a child's socket, neither the worker nor the forkserver nor its helper.
    for pid in worker.pids() - children:
        assert not set(processes.descriptors(pid).values()) & set(sockets)
    gate.open()
