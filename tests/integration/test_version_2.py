"""What only version 2 of cgroups has, and what containers make of it; `make test-v2` runs these anywhere."""

from __future__ import annotations

import re

import pytest
from harness.growth import MIB, memory
from harness.tally import Tally

pytestmark = pytest.mark.ours_only("other pools do not look at memory")

#: MiB: where at most eight of ``TASKS`` fit beside the worker.
LIMIT = 350

#: MiB for each task.
TASKS = [30] * 40

#: Takes so many MiB in a cgroup, and holds them.
HOLDER = """
import sys
open(sys.argv[1], "w").write("0")
held = bytearray(b"x") * (int(sys.argv[2]) << 20)
print("has it", flush=True)
sys.stdin.read()
"""


#: Runs a script in a cgroup, in a namespace whose root that is; and what mounts its cgroups there.
NAMESPACE = 'echo $$ > "$0" && exec unshare --cgroup --mount sh -c "$@"'
MOUNT = "umount /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup"


@pytest.fixture
def tally(tmp_path):
    return Tally(tmp_path / "runs")


@pytest.fixture
def group(container):
    """A cgroup without a limit that matters here."""
    made = container(2000)
    if made.version == 1:
        pytest.skip("version 1 has nothing like it")
    return made


def events(group):
    """What has happened in a cgroup, and in those beneath it."""
    text = (group.folder / "memory.events").read_text()
    return {name: int(number) for name, number in (line.split() for line in text.splitlines())}


def all_done(worker, tally, sizes=TASKS):
    """Send a task for each size in MiB; each runs once, and nobody is killed."""
    results = [worker.call("hungry.need", tally.path, number, mib, 0.1) for number, mib in enumerate(sizes)]
    for result in results:
        worker.get(result)
    assert tally.of("began") == tally.of("ended") == {str(number): 1 for number in range(len(sizes))}
    assert memory(worker)["oom_kills"] == 0


@pytest.mark.parametrize(
    ("limit", "sizes"),
    [(512, [60] * 60), (1024, [*[20] * 60, *[300] * 12, *[20] * 60])],
    ids=["one size", "big ones in a row"],
)
def test_twenty_children(start_contained, group, tally, limit, sizes):
    """At ``-c 20``, where a few fit: without a setting all is done, and the kernel has killed nobody."""
    group.limit(limit * MIB)
    worker = start_contained(group, "hungry", concurrency=20)
    all_done(worker, tally, sizes)
    assert events(group)["oom"] == events(group)["oom_kill"] == 0


def test_high(start_contained, group, tally):
    """``memory.high`` is a limit as well: the kernel need not slow anybody down for long."""
    group.write("memory.high", LIMIT * MIB)
    worker = start_contained(group, "hungry", concurrency=20)
    assert memory(worker)["limit"] == LIMIT * MIB
    all_done(worker, tally)
    assert events(group)["max"] == events(group)["oom"] == 0


def test_group_kills(start_contained, group, tally):
    """Where the kernel would kill the whole container at once, as in Kubernetes, it has no reason to."""
    group.limit(LIMIT * MIB)
    group.write("memory.oom.group", 1)
    worker = start_contained(group, "hungry", concurrency=20)
    all_done(worker, tally)
    assert events(group)["oom_kill"] == 0


def test_the_limit_is_an_ancestors(start_contained, group, tally):
    """The lowest limit holds, whoever has it; what others use of it is not there."""
    group.limit((LIMIT + 100) * MIB)
    middle = group.child("middle")
    middle.limit(1000 * MIB)
    inner, beside = middle.child("inner"), group.child("beside")
    with beside.running(HOLDER, 100, says="has it"):
        worker = start_contained(inner, "hungry", concurrency=20)
        assert memory(worker)["limit"] == (LIMIT + 100) * MIB
        all_done(worker, tally)
    assert events(group)["oom_kill"] == 0


def in_namespace(worker, group, script):
    """Have the worker run in a cgroup namespace whose root is this cgroup."""
    entrance = str(group.folder / "cgroup.procs")
    worker.command = ["sh", "-c", NAMESPACE, entrance, f'{script} && exec "$@"', "sh", *worker.command]


def test_a_namespace(start_worker, group, tally):
    """A container sees its own cgroup as the root of all: the limit is there."""
    group.limit(LIMIT * MIB)
    worker = start_worker("hungry", concurrency=20, prepare=lambda worker: in_namespace(worker, group, MOUNT))
    assert memory(worker)["limit"] == LIMIT * MIB
    assert re.search(r"limit 350 MiB \(/sys/fs/cgroup/memory\.max\)", worker.log())
    all_done(worker, tally)
    assert events(group)["oom_kill"] == 0


def test_a_namespace_that_hides_the_limit(start_worker, group, tally):
    """With ``memsafe_memory_budget`` all is done, although the limit of an ancestor cannot be seen."""
    group.limit(LIMIT * MIB)
    inner = group.child("inner")
    worker = start_worker(
        "hungry",
        concurrency=20,
        config={"memsafe_memory_budget": f"{LIMIT - 30}MiB"},
        prepare=lambda worker: in_namespace(worker, inner, MOUNT),
    )
    assert memory(worker)["limit"] > LIMIT * MIB
    all_done(worker, tally)
    assert events(group)["oom_kill"] == 0


def test_mounts_from_outside_a_namespace(start_worker, group):
    """Where nothing says which cgroup is ours, that is said."""
    worker = start_worker("hungry", prepare=lambda worker: in_namespace(worker, group, "true"))
    worker.wait_for_log(r"is mounted from outside the cgroup namespace, which hides where '/' is in it")
    worker.run("hungry.pid")
