"""The gauge against the probe: on trees that change, and in a real cgroup."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from harness import trees
from harness.cgroup import limited
from harness.residue import descriptors
from harness.trees import GB, MB, UNREADABLE, tree, v2

from memsafe_pool import gauge as gauge_module
from memsafe_pool.gauge import Gauge
from memsafe_pool.probe import Probe

V1 = "/sys/fs/cgroup/memory"
V2 = "/sys/fs/cgroup"


class Seen:
    """A gauge on a tree that can be changed, with a clock that stands still."""

    def __init__(self, folder, files):
        self.folder, self.now, self.warnings = folder, 0.0, []
        self.change(files)
        self.probe = Probe(folder, on_warning=self.warnings.append)
        # Reading takes no time by this clock, so nothing is held back.
        self.gauge = Gauge(self.probe, clock=lambda: self.now, timer=lambda: self.now)
        self.full = 0
        self.read, self.probe.read = self.probe.read, self.counted

    def counted(self):
        self.full += 1
        return self.read()

    def change(self, files):
        # In place: descriptors are kept open, and in /sys a file stays what it is.
        for path, text in files.items():
            if isinstance(text, str) and os.path.isfile(self.folder + path):
                with open(self.folder + path, "r+") as file:
                    file.write(text)
                    file.truncate()
            else:
                tree(self.folder, {path: text})

    def headroom(self, *arguments, **options):
        return self.gauge.headroom(*arguments, **options)


@pytest.fixture
def seen(tmp_path):
    made = []

    def see(files):
        made.append(Seen(str(tmp_path), files))
        return made[-1]

    yield see
    for each in made:
        each.gauge.close()


@pytest.mark.parametrize("name", sorted(trees.ALL))
def test_it_says_what_the_probe_says(seen, name):
    """On each tree, from open files alone, without a full reading."""
    it = seen(trees.ALL[name])
    assert it.headroom() == it.read().headroom_bytes
    assert it.full == 0


@pytest.mark.parametrize("name", sorted(trees.ALL))
def test_descriptors_are_closed(seen, name):
    """All of them; and the gauge can be used again."""
    before = descriptors()
    it = seen(trees.ALL[name])
    assert descriptors() != before
    it.gauge.close()
    assert descriptors() == before
    assert it.headroom() == it.read().headroom_bytes


@pytest.mark.parametrize(
    ("files", "file"),
    [
        (trees.DOCKER_V1, f"{V1}/memory.usage_in_bytes"),
        (trees.DOCKER_V2, f"{V2}/memory.current"),
    ],
)
def test_use_is_seen_at_once(seen, files, file):
    """Each reading has the number of this moment; inactive pages are those of the last full reading."""
    it = seen(files)
    for used in (310, 350, 290):
        it.change({file: f"{used * MB}\n"})
        assert it.headroom() == (512 - used + 100) * MB
    assert it.full == 0


def test_machine_memory(seen):
    """Without a limit it is what the machine has available."""
    it = seen(trees.UNLIMITED_V2)
    it.change({"/proc/meminfo": trees.meminfo(available=5 * GB)})
    assert it.headroom() == 5 * GB
    assert it.full == 0


def test_what_can_be_taken_back_is_read_where_it_matters(seen):
    """Near the limit, or when use has changed: what was reclaimed is no room. Else the number may be old."""
    it = seen(trees.DOCKER_V2)
    changed = v2(V2, maximum=512 * MB, used=310 * MB, inactive=10 * MB)
    it.change({path: changed[path] for path in (f"{V2}/memory.current", f"{V2}/memory.stat")})
    assert it.headroom() == (202 + 100) * MB
    it.change({f"{V2}/memory.current": f"{320 * MB}\n"})
    assert it.headroom() == (192 + 10) * MB
    it.change({f"{V2}/memory.stat": v2(V2, maximum=512 * MB, used=0, inactive=5 * MB)[f"{V2}/memory.stat"]})
    assert it.headroom() == (192 + 10) * MB
    it.change({f"{V2}/memory.current": f"{400 * MB}\n"})
    assert it.headroom() == (112 + 5) * MB
    assert it.full == 0


@pytest.mark.parametrize("files", ["v1", "v2"])
def test_a_full_cache_is_room(seen, files):
    """Tasks take the place of files and dentries: what is charged stays, and what is left is told."""

    def full(grown):
        if files == "v1":
            numbers = {"active": (380 - grown) * MB, "kernel": 52 * MB + 1}
            return trees.v1(V1, limit=512 * MB, used=512 * MB, **numbers)
        return v2(V2, maximum=512 * MB, used=512 * MB, active=(380 - grown) * MB, slab=40 * MB)

    it = seen({**(trees.DOCKER_V1 if files == "v1" else trees.DOCKER_V2), **full(0)})
    for grown in (0, 100, 50, 300, 380):
        it.change(full(grown))
        assert abs(it.headroom(grown * MB) - (420 - grown) * MB) < 26 * MB
        if files == "v2":
            assert it.headroom(grown * MB) == (420 - grown) * MB
    assert it.full == 0


class Timer:
    """A gauge on a full cache, whose ``memory.stat`` takes so many seconds to read."""

    def __init__(self, it, monkeypatch, cost):
        self.it, self.now, self.cost, self.spent = it, 0.0, cost, 0.0
        find = gauge_module.reclaim.find

        def dear(*arguments):
            self.now += self.cost
            self.spent += self.cost
            return find(*arguments)

        it.gauge.close()
        it.gauge = Gauge(it.probe, refresh=1e9, clock=lambda: 0.0, timer=lambda: self.now)
        monkeypatch.setattr(gauge_module.reclaim, "find", dear)


def full_cache(used=512, active=400):
    return {**trees.DOCKER_V2, **v2(V2, maximum=512 * MB, used=used * MB, active=active * MB)}


@pytest.mark.parametrize("cost", [1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize(("active", "share"), [(400, 0.01), (100, 0.05)])
def test_reading_takes_a_part_of_the_time(seen, monkeypatch, cost, active, share):
    """One hundredth, a twentieth where little is left; however long it takes, and as often as it may be."""
    it = seen(full_cache(active=active))
    timer = Timer(it, monkeypatch, cost)
    for _ in range(4000):
        timer.now += 0.005
        it.headroom()
    assert timer.spent <= share * timer.now + cost
    assert timer.spent >= 0.8 * min(4000 * cost, share * timer.now)


def test_what_is_taken_in_between_counts(seen, monkeypatch):
    """By what is charged; by what tasks say where it takes the place of files; and is put right later."""
    it = seen(full_cache(used=450))
    timer = Timer(it, monkeypatch, 0.01)
    assert it.headroom(10 * MB) == 462 * MB
    it.change(full_cache(used=470, active=420))
    assert it.headroom(10 * MB) == 442 * MB
    it.change(full_cache(used=512, active=300))
    assert it.headroom(170 * MB) == 302 * MB
    it.change(full_cache(used=512, active=450))
    assert it.headroom(20 * MB) == 400 * MB
    assert it.headroom(20 * MB, exact=True) == 450 * MB
    it.change(full_cache(used=480, active=400))
    assert it.headroom(0) == 450 * MB
    timer.now += 10.0
    assert it.headroom(0) == 432 * MB


def test_what_is_uncertain(seen):
    """As the probe says: what may be free soon counts only where no other limit is in the way."""
    full = v2(V2, maximum=512 * MB, used=512 * MB, active=400 * MB, unwritten=30 * MB)
    it = seen({**trees.DOCKER_V2, **full})
    assert it.read().uncertain_bytes == 30 * MB
    assert (it.headroom(), it.gauge.uncertain) == (370 * MB, 30 * MB)
    it.change({"/proc/meminfo": trees.meminfo(available=390 * MB)})
    assert it.read().uncertain_bytes == 20 * MB
    assert (it.headroom(), it.gauge.uncertain) == (370 * MB, 20 * MB)
    it.change({"/proc/meminfo": trees.meminfo(available=300 * MB)})
    assert it.read().uncertain_bytes == 0
    assert (it.headroom(), it.gauge.uncertain) == (300 * MB, 0)


def test_swap_is_uncertain(seen):
    """Also between two full readings: what is free of it at the last one."""
    it = seen({**trees.DOCKER_V2, "/proc/meminfo": trees.meminfo(swap=100 * MB)})
    uncertain = it.read().uncertain_bytes
    assert uncertain >= 100 * MB
    full = it.full
    assert it.headroom() == 312 * MB
    assert (it.gauge.uncertain, it.full) == (uncertain, full)


def test_error_by_reclaim_is_less_than_what_is_free(seen):
    """Whatever was reclaimed since the last reading: what is called room and is none is less than is free."""
    for used in range(0, 513, 8):
        it = seen({**trees.DOCKER_V2, **v2(V2, maximum=512 * MB, used=512 * MB, inactive=300 * MB)})
        it.change(v2(V2, maximum=512 * MB, used=used * MB, inactive=0))
        excess = it.headroom() - (512 - used) * MB
        assert excess == 0 or 512 - used >= 128
        it.gauge.close()


def test_another_level_is_followed_too(seen):
    """The pod fills up while the container has room: seen at once."""
    it = seen(trees.KUBERNETES_V2_HOST)
    pod = f"{V2}{trees._POD}/memory.current"
    it.change({pod: f"{1000 * MB}\n"})
    it.gauge.refresh()
    assert it.headroom() == (1024 - 150) * MB
    it.change({pod: f"{2000 * MB}\n"})
    it.gauge.refresh()
    it.change({f"{V2}{trees._POD}/cri-containerd-9a1.scope/memory.current": f"{1070 * MB}\n"})
    it.gauge.refresh()
    assert it.headroom() == 1024 * MB - 1020 * MB
    assert it.headroom() == it.read().headroom_bytes


def test_a_full_reading_now_and_then(seen):
    """A second after the last one; it finds another limit, and another level that binds."""
    it = seen(trees.DOCKER_V2)
    it.change({f"{V2}/memory.high": f"{400 * MB}\n"})
    it.now = 0.9
    assert it.headroom() == 312 * MB
    it.now = 1.1
    assert it.headroom() == 200 * MB
    assert it.gauge.reading.limit_kind == "high"
    it.change({f"{V2}/memory.max": "max\n", f"{V2}/memory.high": "max\n"})
    it.now = 2.2
    assert it.headroom() == 12 * GB
    assert it.gauge.reading.limit_kind == "physical"
    it.change({"/proc/meminfo": trees.meminfo(available=5 * GB)})
    assert it.headroom() == 5 * GB
    assert it.full == 2


@pytest.mark.parametrize("files", [trees.DOCKER_V2, trees.DOCKER_V1])
def test_a_limit_that_changes(seen, files):
    """It is followed at once: lowered, raised, and taken away."""
    it = seen(files)
    name = f"{V2}/memory.max" if files is trees.DOCKER_V2 else f"{V1}/memory.limit_in_bytes"
    used = it.gauge.reading.used_bytes
    for size in (400 * MB, 300 * MB, 500 * MB):
        it.change({name: f"{size}\n"})
        assert it.headroom() == size - used
    assert it.full == 3
    it.change({name: "max\n" if files is trees.DOCKER_V2 else "9223372036854771712\n"})
    assert it.headroom() == it.read().headroom_bytes


def test_on_demand(seen):
    """``refresh`` reads in full, and starts the time anew."""
    it = seen(trees.DOCKER_V2)
    it.change({f"{V2}/memory.high": f"{400 * MB}\n"})
    it.now = 0.8
    assert it.gauge.refresh().limit_bytes == 400 * MB
    it.now = 1.6
    assert it.headroom() == 200 * MB
    assert it.full == 1


@pytest.mark.parametrize("text", ["", "garbage", "-1x"])
@pytest.mark.parametrize("name", ["memory.current", "memory.stat"])
def test_files_that_stop_making_sense(seen, name, text):
    """Then it is the probe's to say so, and to say what is used instead."""
    it = seen({**trees.DOCKER_V2, f"{V2}/memory.current": f"{450 * MB}\n"})
    it.change({f"{V2}/{name}": text})
    for _ in range(3):
        assert it.headroom() == it.read().headroom_bytes
    [warning] = it.warnings
    assert name in warning


@pytest.mark.parametrize("name", ["memory.current", "memory.stat"])
def test_files_that_cannot_be_read(seen, name):
    """The probe's answer from the beginning; one warning."""
    it = seen({**trees.DOCKER_V2, f"{V2}/{name}": UNREADABLE})
    for _ in range(3):
        assert it.headroom() == it.read().headroom_bytes
    assert len(it.warnings) == 1


def test_no_descriptor_left(seen, monkeypatch):
    """Without descriptors for itself each reading is a full one."""
    it = seen(trees.DOCKER_V2)
    it.gauge.close()

    def refuse(path):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(gauge_module, "_open", refuse)
    assert [it.headroom(), it.headroom()] == [312 * MB, 312 * MB]
    assert it.full == 2
    monkeypatch.undo()
    assert [it.headroom(), it.headroom()] == [312 * MB, 312 * MB]
    assert it.full == 3


def test_half_of_the_descriptors(seen, monkeypatch):
    """What was opened before one could not be is closed."""
    it = seen(trees.DOCKER_V2)
    it.gauge.close()
    before = descriptors()
    real = gauge_module._open

    def refuse(path):
        if path.endswith("memory.stat"):
            raise OSError(24, "Too many open files")
        return real(path)

    monkeypatch.setattr(gauge_module, "_open", refuse)
    assert it.headroom() == 312 * MB
    assert descriptors() == before


def test_descriptors_given_to_the_null_device(seen):
    """As a process forked from the worker does with all that it has inherited."""
    it = seen(trees.DOCKER_V2)
    null = os.open(os.devnull, os.O_RDWR)
    for dial in it.gauge._dials[:-1]:  # without the machine's
        os.dup2(null, dial._charged)
        os.dup2(null, dial._stat)
    os.close(null)
    assert [it.headroom(), it.headroom()] == [312 * MB, 312 * MB]
    assert it.full == 1


def test_descriptors_closed_by_somebody(seen):
    """The same, where a program closes all descriptors after a fork."""
    it = seen(trees.DOCKER_V1)
    for dial in it.gauge._dials[:-1]:  # without the machine's
        os.close(dial._charged)
    assert it.headroom() == it.read().headroom_bytes


def test_negative_above_high(seen):
    """``memory.high`` can be passed."""
    it = seen({**trees.DOCKER_V2, **v2(V2, maximum=512 * MB, high=256 * MB, used=300 * MB)})
    assert it.headroom() == -44 * MB
    assert it.full == 0


def test_a_hidden_limit(seen):
    """A limit that only ``hierarchical_memory_limit`` tells of is read from the cgroup that is seen."""
    it = seen(trees.KUBERNETES_V1)
    it.change({f"{V1}/memory.usage_in_bytes": f"{500 * MB}\n"})
    assert it.headroom() == (1024 - 500 + 100) * MB
    assert it.full == 0


def test_elsewhere(monkeypatch):
    """Not on Linux: psutil each time."""
    monkeypatch.setattr(sys, "platform", "darwin")
    memory = SimpleNamespace(total=8 * GB, available=3 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    it = Gauge(Probe())
    assert it.headroom() == 3 * GB
    memory.available = 2 * GB
    assert it.headroom() == 2 * GB
    it.close()


REAL = """
import sys
from memsafe_pool.gauge import Gauge
from memsafe_pool.probe import Probe

sys.stdin.readline()
gauge = Gauge(Probe(), refresh=1000.0)
print(gauge.reading.lowest_limit_bytes, len(gauge._dials), gauge.headroom(), flush=True)
block = bytearray(64 << 20)
block[::4096] = b"x" * len(block[::4096])
print(gauge.headroom(), flush=True)
del block
print(gauge.headroom(), gauge.refresh().headroom_bytes, flush=True)
sys.stdin.readline()
print(gauge.headroom(), gauge.reading.lowest_limit_bytes, flush=True)
"""


def test_in_a_real_cgroup():
    """64 MiB that a process takes are seen, and when they are given back; its removal is survived."""
    with limited(512 * MB) as group, limited(256 * MB) as other:
        process = subprocess.Popen(
            [sys.executable, "-c", REAL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

        def answer():
            return [int(word) for word in process.stdout.readline().split()]

        with process:
            group.add(process.pid)
            process.stdin.write("\n")
            limit, dials, before = answer()
            assert (limit, dials) == (512 * MB, 2)
            [grown] = answer()
            assert 60 * MB < before - grown < 80 * MB
            back, fully = answer()
            assert abs(back - before) < 20 * MB
            assert abs(back - fully) < 20 * MB
            other.add(process.pid)
            group.remove()
            process.stdin.write("\n")
            headroom, limit = answer()
            assert limit == 256 * MB
            assert 0 < headroom < 256 * MB
        assert process.returncode == 0
