"""The probe in real memory cgroups: what it says is what the kernel does."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys

import pytest
from harness.cgroup import limited
from harness.waiting import DEADLINE, until

from memsafe_pool.probe import Probe

pytestmark = pytest.mark.cgroup

MB = 1024 * 1024

#: A process that enters a cgroup, before it has much memory, and then does what the lines it gets say.
INSIDE = """
import os, sys
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
import dataclasses, json, mmap
from memsafe_pool.probe import Probe
warnings, held = [], []
probe = Probe(on_warning=warnings.append)
probe.read()
for line in sys.stdin:
    what, _, value = line.strip().partition(" ")
    if what == "allocate":
        held.append(bytearray(b"x") * int(value))
    elif what == "free":
        held.clear()
    elif what in ("look", "reread"):
        for _ in range(1 + (what == "reread")):
            with open(value, "rb", buffering=0) as file:
                buffer = bytearray(65536)
                while file.readinto(buffer):
                    pass
    elif what == "map":
        with open(value, "rb") as file:
            held.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
        for _ in range(2):
            sum(held[-1][::4096])
    elif what == "miss":
        for number in range(int(value)):
            os.path.exists(f"/sys/kernel/{os.getpid()}-{number:0>200}")
    elif what == "write":
        with open(value, "wb", buffering=0) as file:
            for _ in range(20):
                file.write(bytes(1 << 20))
    answer = dataclasses.asdict(probe.read())
    del answer["levels"]
    print(json.dumps({**answer, "tree_bytes": probe.tree_bytes(), "warnings": warnings}), flush=True)
"""

#: A process that is the first to be killed, and asks for more and more, but not without end.
GREEDY = """
import os, sys
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("1000")
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
held = [bytearray(b"x") * (1 << 20) for _ in range(int(sys.argv[2]))]
"""


class Inside:
    """A process in a cgroup that is told what to do, and answers with what its probe reads then."""

    def __init__(self, cgroup):
        self.process = subprocess.Popen(
            [sys.executable, "-c", INSIDE, str(cgroup.folder / "cgroup.procs")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate(timeout=DEADLINE)

    def __call__(self, order="read"):
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE)
        assert ready, f"no answer to {order!r} within {DEADLINE:g} s"
        line = self.process.stdout.readline()
        assert line, f"the process has ended at {order!r}"
        answer = json.loads(line)
        assert answer.pop("warnings") == []
        return answer


@pytest.fixture
def outer():
    """A cgroup of 200 MB, with nothing in it."""
    with limited(200 * MB) as cgroup:
        yield cgroup


@pytest.fixture
def inner(outer):
    """A cgroup without a limit in the one of 200 MB."""
    return outer.child("inner")


@pytest.fixture
def inside(inner):
    """A process in the inner cgroup."""
    with Inside(inner) as process:
        process()  # so that it is there
        yield process


def test_limits_are_followed(outer, inner, inside):
    """The lowest limit of the cgroup and its ancestors is read, whenever one of them changes."""
    name = {1: "memory.limit_in_bytes", 2: "memory.max"}[outer.version]
    for cgroup, limit in [(outer, 200), (inner, 150), (outer, 100), (inner, 80)]:
        cgroup.limit(limit * MB)
        answer = inside()
        assert (answer["limit_bytes"], answer["limit_kind"]) == (limit * MB, "max")
        assert answer["limit_source"] == str(cgroup.folder / name)
        assert answer["cgroup"] == str(inner.folder)


def test_high_is_a_limit(outer, inner, inside):
    """In version 2 ``memory.high`` of an ancestor counts as well."""
    if outer.version == 1:
        pytest.skip("version 1 has no memory.high")
    outer.write("memory.high", 120 * MB)
    answer = inside()
    assert (answer["limit_bytes"], answer["limit_kind"]) == (120 * MB, "high")
    assert answer["high_source"] == str(outer.folder / "memory.high")


def test_group_kills(outer, inside):
    """In version 2 ``memory.oom.group`` of an ancestor is seen; version 1 has no such kills."""
    assert inside()["oom_group"] is False
    if outer.version == 2:
        outer.write("memory.oom.group", 1)
        assert inside()["oom_group"] is True


def test_a_move_is_followed(outer, inner, inside):
    """A process that is moved has the limit of where it is then."""
    assert inside()["limit_bytes"] == 200 * MB
    other = outer.child("other")
    other.limit(90 * MB)
    other.add(inside.process.pid)
    answer = inside()
    assert (answer["limit_bytes"], answer["cgroup"]) == (90 * MB, str(other.folder))


@pytest.fixture
def path(tmp_path):
    """A file of 50 MB that is in nobody's cache, so that the one who reads it is charged."""
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.write(bytes(50 * MB))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


@pytest.mark.parametrize("order", ["look", "reread", "map"])
def test_use(outer, inside, path, order):
    """What a process allocates is used; what it has read from a file is not, however it has read it."""
    first, charged = inside(), outer.usage()
    before = first["used_bytes"]
    assert 0 < before < 50 * MB
    grown = inside("allocate " + str(50 * MB))
    assert grown["tree_bytes"] - first["tree_bytes"] == pytest.approx(50 * MB, abs=2 * MB)
    # The kernel gathers its statistics in portions, and every 2 s.
    is_grown = lambda more: abs(inside()["used_bytes"] - before - more) < 2 * MB  # noqa: E731 - one line each
    until(lambda: is_grown(50 * MB), "50 MB to be used")
    inside(f"{order} {path}")
    if outer.usage() - charged < 95 * MB:
        pytest.skip(f"the file system of {path} has no page cache of its own")
    until(lambda: is_grown(50 * MB), "50 MB to be used, without what was read")
    inside("free")
    until(lambda: is_grown(0), "as much to be used as before")


#: In version 1 so much of the kernel's memory counts as used although it can be taken back.
KERNEL = 12 * MB


def test_dentries(outer, inside):
    """What the kernel remembers of names that do not exist is not used."""
    first, charged = inside(), outer.usage()
    answer = inside("miss 100000")
    assert outer.usage() - charged > 30 * MB
    until(lambda: inside()["used_bytes"] - first["used_bytes"] < KERNEL, "dentries not to be used")
    assert answer["uncertain_bytes"] < KERNEL


def test_pages_to_be_written(outer, inside, path):
    """As long as they are that they are used, and nothing to end anybody for; then they are files."""
    first, charged = inside(), outer.usage()
    answer = inside(f"write {path}")
    if outer.usage() - charged < 15 * MB:
        pytest.skip(f"the file system of {path} has no page cache of its own")
    more = answer["used_bytes"] - first["used_bytes"]
    assert abs(more - (answer["uncertain_bytes"] - first["uncertain_bytes"])) < 4 * MB
    os.sync()
    until(lambda: inside()["used_bytes"] - first["used_bytes"] < 4 * MB, "what was written not to be used")
    assert outer.usage() - charged > 15 * MB


def test_files_in_memory(inside):
    """Nobody can take them back: they are used until they are deleted."""
    path = f"/dev/shm/memsafe-test-{os.getpid()}"
    before = inside()["used_bytes"]
    is_grown = lambda more: abs(inside()["used_bytes"] - before - more) < 2 * MB  # noqa: E731 - one line each
    try:
        inside(f"write {path}")
        until(lambda: is_grown(20 * MB), "a file of 20 MB in memory to be used")
    finally:
        os.unlink(path)
    until(lambda: is_grown(0), "as much to be used as before")


def test_a_kill_is_counted(outer, inner, inside):
    """Each process that the kernel kills for want of memory is counted, also from outside; no other is."""
    limit = 100
    outer.limit(limit * MB)
    probe = Probe(pid=inside.process.pid)
    before = inside()["oom_kills"]
    assert (before, probe.read().oom_kills) == (0, 0)
    command = [sys.executable, "-c", GREEDY, str(inner.folder / "cgroup.procs")]
    modest = subprocess.run([*command, "10"], timeout=DEADLINE, check=False)
    assert (modest.returncode, inside()["oom_kills"]) == (0, 0)
    greedy = subprocess.run([*command, str(2 * limit)], timeout=DEADLINE, check=False)
    assert greedy.returncode == -signal.SIGKILL
    assert (inside()["oom_kills"], probe.read().oom_kills) == (1, 1)
    with Inside(inner) as other:
        other()
    assert other.process.returncode == -signal.SIGKILL
    assert inside()["oom_kills"] == 1


def test_a_process_that_ends(inside):
    """There is no exception for one that has gone: the machine's memory is the limit, with a warning."""
    warnings = []
    probe = Probe(pid=inside.process.pid, on_warning=warnings.append)
    assert probe.read().limit_bytes == 200 * MB
    inside.process.kill()
    inside.process.wait(DEADLINE)
    assert probe.read().limit_kind == "physical"
    assert probe.tree_bytes() == 0
    [warning] = warnings
    assert f"/proc/{inside.process.pid}/cgroup " in warning
