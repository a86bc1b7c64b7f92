"""A worker in a real memory cgroup: it knows its limit, follows it, and counts what the kernel counts."""

from __future__ import annotations

import pytest
from billiard.exceptions import WorkerLostError

from memsafe_pool import MemoryLimitExceeded

pytestmark = pytest.mark.ours_only("other pools do not look at the limit")

MIB = 1 << 20


@pytest.fixture
def cgroup(container):
    return container(600)


@pytest.fixture
def worker(cgroup, start_worker, start_method):
    """A worker that was started in the cgroup, as in a container."""
    return start_worker(start_method=start_method, prepare=cgroup.hold)


def memory(worker):
    return worker.stats()["pool"]["memsafe"]["memory"]


def test_a_limit_that_is_changed_is_followed(worker, cgroup):
    """Lowered and raised while the worker runs, with a task under way: known a moment later, said once."""
    assert memory(worker)["limit"] == 600 * MIB
    assert memory(worker)["limit_source"].startswith(str(cgroup.folder))
    gate = worker.gate()
    running = worker.call("proj.hold", gate.path)
    gate.wait_started()
    for mib in (400, 500):
        cgroup.limit(mib * MIB)
        worker.wait_for_log(f"The memory limit is now {mib} MiB")
        assert memory(worker)["limit"] == mib * MIB
    assert worker.log().count("The memory limit is now") == 2
    gate.open()
    worker.get(running)


def test_use_is_what_the_kernel_charges(worker, cgroup):
    """What a task keeps is used; it is also what the pool counts as its children's."""
    worker.run("proj.pid")
    before = memory(worker)
    worker.run("proj.keep", 100)
    worker.until(lambda: memory(worker)["used"] - before["used"] > 95 * MIB, "the growth to be seen")
    after = memory(worker)
    assert after["used"] - before["used"] < 140 * MIB  # also files that were read, page tables
    assert 95 * MIB < after["children"] - before["children"] < 115 * MIB
    assert after["headroom"] == after["limit"] - after["used"]
    # The worker has read it a moment earlier: a page that went since then makes the other number smaller.
    worker.until(lambda: memory(worker)["used"] <= cgroup.usage(), "no more to be used than is charged")


def test_the_kernel_takes_the_child(start_contained, start_method):
    """Its kill costs a child, not the worker; it is counted, and told from somebody else's."""
    worker = start_contained(300, start_method=start_method, config={"memsafe_pause": False})
    with pytest.raises(MemoryLimitExceeded, match=r"signal 9 \(SIGKILL\): .*the kernel has ended its child"):
        worker.run("proj.keep", 1000)
    worker.until(lambda: memory(worker)["oom_kills"] == 1, "the kill to be counted")
    assert worker.run("proj.add", 1, 2) == 3
    with pytest.raises(WorkerLostError, match="signal 9") as caught:
        worker.run("proj.die")
    assert not isinstance(caught.value, MemoryLimitExceeded)
    assert worker.run("proj.add", 1, 2) == 3
    assert memory(worker)["oom_kills"] == 1
