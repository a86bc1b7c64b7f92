"""A worker in a real memory cgroup: it knows its limit, follows it, and counts what the kernel counts."""

from __future__ import annotations

import re

import pytest
from billiard.exceptions import WorkerLostError
from test_broker_loss import lose, start_behind

from memsafe_pool import MemoryLimitExceeded

pytestmark = pytest.mark.ours_only("other pools do not look at the limit")

MIB = 1 << 20

#: What the worker says when it starts.
START = re.compile(
    r"INFO/MainProcess\] Memory: limit (\d+) MiB \((.*)\), budget (\d+) MiB; the worker has (\d+) MiB, "
    r"a child about (\d+) MiB before its first task: room for (\d+) child(?:ren)? at once, -c is (\d+)\.\n"
)


@pytest.fixture
def cgroup(container):
    return container(600)


@pytest.fixture
def worker(cgroup, start_worker, start_method):
    """A worker that was started in the cgroup, as in a container."""
    return start_worker(start_method=start_method, prepare=cgroup.hold)


def memory(worker):
    return worker.stats()["pool"]["memsafe"]["memory"]


def test_it_says_what_there_is_when_it_starts(worker, cgroup):
    """One line has the limit and its file, the budget, what the worker has, and how many children fit."""
    limit, file, budget, own, child, count, concurrency = worker.wait_for_log(START.pattern).groups()
    assert file.startswith(str(cgroup.folder))
    assert list(map(int, (limit, budget, concurrency))) == [600, 540, 2]
    assert abs(int(child) - memory(worker)["child"] / MIB) <= 0.5
    assert 0 < int(own) < 540
    assert 0 < int(count) <= 540 // int(child)
    worker.run("proj.pid")
    assert len(START.findall(worker.log())) == 1
    assert "memsafe_memory_budget" not in worker.log()


def test_it_says_so_once(cgroup, start_worker, redis, open_proxy):
    """Also when it connects to the broker a second time, and begins its event loop anew."""
    proxy = open_proxy(redis)
    worker = start_behind(start_worker, proxy, redis, prepare=cgroup.hold)
    lose(worker, proxy.cut)
    proxy.restore()
    worker.wait_for_log("Connected to", count=2)
    assert worker.run("proj.add", 1, 2) == 3
    assert len(START.findall(worker.log())) == 1


def budget_warning(setting, limit, used):
    return (
        f"WARNING/MainProcess] memsafe_memory_budget is {setting} MiB, but the memory limit is {limit} MiB: "
        f"{used} MiB are used as the budget.\n"
    )


def test_a_budget_above_the_limit(start_contained):
    """It is a warning at the start, which says what is used instead; that is used."""
    worker = start_contained(600, config={"memsafe_memory_budget": "1GiB"})
    assert worker.wait_for_log(START.pattern)[3] == "540"
    worker.wait_for_log(re.escape(budget_warning(1024, 600, 540)))
    assert memory(worker)["budget"] == 540 * MIB
    assert worker.log().count("memsafe_memory_budget") == 1


def test_a_limit_that_falls_below_the_budget(start_contained, cgroup):
    """It is a warning then, and not before."""
    worker = start_contained(cgroup, config={"memsafe_memory_budget": "500MiB"})
    assert memory(worker)["budget"] == 500 * MIB
    assert "memsafe_memory_budget" not in worker.log()
    cgroup.limit(400 * MIB)
    worker.wait_for_log(re.escape(budget_warning(500, 400, 360)))
    assert memory(worker)["budget"] == 360 * MIB


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


def test_a_size_that_nobody_has_stops_no_other_worker(start_contained, container):
    """A call that is said to need more than there is has the budget, and the worker beside it goes on."""
    group = container(600)
    first, second = start_contained(group), start_contained(group, concurrency=4)
    alone, gate = first.gate(), second.gate()
    running = first.call("proj.hold", alone.path, headers={"memsafe_memory": "1000000TiB"})
    alone.wait_started()
    first.wait_for_log(
        "memsafe_memory='1000000TiB' of the header of proj.hold is more than the budget, "
        "and is taken as 540 MiB"
    )
    results = [second.call("proj.hold", gate.path, headers={"memsafe_memory": "40MiB"}) for _ in range(4)]
    gate.wait_started(4, timeout=20)
    gate.open()
    alone.open()
    for result in results:
        second.get(result)
    first.get(running)
