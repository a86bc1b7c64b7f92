"""The probe on trees of ``/proc`` and ``/sys``: it reads what is there, and says what it cannot read."""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import sys
import tempfile
from types import SimpleNamespace

import psutil
import pytest
from harness import trees
from harness.trees import GB, KB, MB, UNREADABLE, tree
from hypothesis import given
from hypothesis import strategies as st

from memsafe_pool.probe import Pressure, Probe

MEMORY = "/sys/fs/cgroup/memory"
V2 = "/sys/fs/cgroup"


class Seen:
    """A probe on a tree that can be changed; paths of a reading are given as beneath the tree."""

    def __init__(self, folder):
        self.folder = folder
        self.warnings = []
        self.probe = Probe(folder, on_warning=self.warnings.append)

    def change(self, *changes, **files):
        for change in changes:
            tree(self.folder, change)
        return self

    def read(self):
        return self.probe.read()

    def path(self, text):
        return text.replace(str(self.folder), "")

    def limit(self):
        """The limit with the least room, and the file it is from."""
        reading = self.read()
        return reading.limit_bytes, self.path(reading.limit_source)

    def used(self):
        return self.read().used_bytes

    def warning(self):
        """The only warning, without the folder."""
        [text] = self.warnings
        return self.path(text)


@pytest.fixture
def seen(tmp_path):
    """``seen(tree, changes...)``: a probe on a tree."""

    def see(*files):
        return Seen(tmp_path).change(*files)

    return see


# Recorded trees

FOUND = {
    #                    limit   kind   file of the limit   used     cgroup  kills  group
    "DOCKER_V1": (512 * MB, "max", f"{MEMORY}/memory.limit_in_bytes", 200 * MB, MEMORY, 2, False),
    "DOCKER_V2": (512 * MB, "max", f"{V2}/memory.max", 200 * MB, V2, 2, False),
    "DOCKER_V2_HOST": (
        512 * MB,
        "max",
        f"{V2}/system.slice/docker-3f2a.scope/memory.max",
        200 * MB,
        f"{V2}/system.slice/docker-3f2a.scope",
        2,
        False,
    ),
    "DOCKER_V2_ROOTLESS": (512 * MB, "max", f"{V2}/memory.max", 200 * MB, V2, 2, False),
    "KUBERNETES_V2": (1 * GB, "max", f"{V2}/memory.max", 650 * MB, f"{V2}/worker.service", 3, True),
    "KUBERNETES_V2_HOST": (
        2 * GB,
        "max",
        f"{V2}{trees._POD}/memory.max",
        1980 * MB,
        f"{V2}{trees._POD}/cri-containerd-9a1.scope",
        1,
        False,
    ),
    "KUBERNETES_V1": (1 * GB, "max", f"{MEMORY}/memory.stat", 300 * MB, MEMORY, 0, False),
    "KUBERNETES_V1_HOST": (
        1 * GB,
        "max",
        f"{trees._V1_POD}/memory.limit_in_bytes",
        400 * MB,
        f"{trees._V1_POD}/9a1",
        1,
        False,
    ),
    "SYSTEMD_USER": (
        4 * GB,
        "high",
        f"{V2}/user.slice/memory.high",
        2 * GB,
        f"{V2}/user.slice/user-1000.slice/user@1000.service",
        5,
        False,
    ),
    "LXC": (
        512 * MB,
        "max",
        f"{V2}/system.slice/celery.service/memory.max",
        100 * MB,
        f"{V2}/system.slice/celery.service",
        0,
        False,
    ),
    "HYBRID": (24683656 * KB, "physical", "physical memory", 626620 * KB, trees._HYBRID, 0, False),
    "WSL": (16 * GB, "physical", "physical memory", 4 * GB, None, None, None),
    "UNLIMITED_V2": (
        16 * GB,
        "physical",
        "physical memory",
        4 * GB,
        f"{V2}/system.slice/celery.service",
        6,
        False,
    ),
}

#: Trees in which something cannot be seen; see below.
WARNED = {"HIDDEN_V2", "OUTSIDE_V2"}


def test_every_tree_is_looked_at():
    """What is recorded is tested."""
    assert {*FOUND, *WARNED} == set(trees.ALL)


@pytest.mark.parametrize("name", FOUND)
def test_recorded(seen, name):
    """All is read that the tree has, and nothing is wrong with it."""
    it = seen(trees.ALL[name])
    reading = it.read()
    assert (
        reading.limit_bytes,
        reading.limit_kind,
        it.path(reading.limit_source),
        reading.used_bytes,
        reading.cgroup and it.path(reading.cgroup),
        reading.oom_kills,
        reading.oom_group,
    ) == FOUND[name]
    assert reading.headroom_bytes == reading.limit_bytes - reading.used_bytes
    assert it.warnings == []


def test_least_room_and_lowest_limit(seen):
    """A pod that its neighbours have filled counts before the container's lower limit; both are reported."""
    it = seen(trees.KUBERNETES_V2_HOST)
    reading = it.read()
    assert reading.headroom_bytes == 68 * MB
    assert reading.lowest_limit_bytes == 1 * GB
    assert reading.lowest_limit_source.endswith("/cri-containerd-9a1.scope/memory.max")


def test_a_full_machine_counts_before_a_low_limit(seen):
    """What the machine has left is less than what the container may have."""
    it = seen(trees.DOCKER_V2, {"/proc/meminfo": trees.meminfo(16 * GB, 100 * MB)})
    reading = it.read()
    assert (reading.limit_kind, reading.headroom_bytes) == ("physical", 100 * MB)
    assert reading.lowest_limit_bytes == 512 * MB


@pytest.mark.parametrize("name", ["DOCKER_V1", "DOCKER_V2", "DOCKER_V2_HOST"])
def test_limit_above_the_machine(seen, name):
    """A limit above physical memory is none."""
    folder = FOUND[name][4]
    file = "memory.limit_in_bytes" if name == "DOCKER_V1" else "memory.max"
    it = seen(trees.ALL[name], {f"{folder}/{file}": f"{17 * GB}\n"})
    if name == "DOCKER_V1":
        it.change({f"{folder}/memory.stat": f"hierarchical_memory_limit {17 * GB}\ntotal_inactive_file 0\n"})
    assert it.limit() == (16 * GB, "physical memory")
    assert it.warnings == []


@pytest.mark.parametrize("number", [9223372036854771712, 9223372036854775807, 18446744073709551615, 2**60])
def test_numbers_that_mean_no_limit(seen, number):
    """What kernels write for "no limit" counts as none, in both versions."""
    it = seen(trees.DOCKER_V2, {f"{V2}/memory.max": f"{number}\n"})
    assert it.limit() == (16 * GB, "physical memory")
    it.change(trees.DOCKER_V1, trees.v1(MEMORY, limit=number))
    assert it.limit() == (16 * GB, "physical memory")
    assert it.warnings == []


def test_high_below_max(seen):
    """``memory.high`` is the limit where it is lower, and reported in any case."""
    it = seen(trees.DOCKER_V2, {f"{V2}/memory.high": f"{400 * MB}\n"})
    reading = it.read()
    assert (reading.limit_bytes, reading.limit_kind) == (400 * MB, "high")
    assert (reading.high_bytes, it.path(reading.high_source)) == (400 * MB, f"{V2}/memory.high")
    it.change({f"{V2}/memory.high": f"{600 * MB}\n"})
    reading = it.read()
    assert (reading.limit_bytes, reading.limit_kind, reading.high_bytes) == (512 * MB, "max", 600 * MB)


def test_the_lowest_high(seen):
    """Of several, the lowest is reported, wherever it stands."""
    it = seen(trees.SYSTEMD_USER)
    for folder, high in [("user.slice/user-1000.slice", 3 * GB), ("user.slice", 2 * GB)]:
        it.change({f"{V2}/{folder}/memory.high": f"{high}\n"})
        reading = it.read()
        assert (reading.high_bytes, it.path(reading.high_source)) == (high, f"{V2}/{folder}/memory.high")


def test_above_high_the_room_is_negative(seen):
    """Use may be above ``memory.high``: that is not hidden."""
    it = seen(trees.DOCKER_V2, {f"{V2}/memory.high": f"{150 * MB}\n"})
    assert it.read().headroom_bytes == -50 * MB


def test_a_limit_that_cannot_be_seen(seen):
    """Version 1 tells it all the same; under it is used at least what the highest visible cgroup uses."""
    it = seen(
        trees.KUBERNETES_V1,
        {"/proc/self/cgroup": "11:memory:/kubepods/burstable/podc0f3/9a1/nested\n"},
        trees.v1(f"{MEMORY}/nested", hierarchical=1 * GB, used=200 * MB),
    )
    assert it.limit() == (1 * GB, f"{MEMORY}/nested/memory.stat")
    assert it.used() == 300 * MB


@pytest.mark.parametrize("name", ["DOCKER_V2_HOST", "KUBERNETES_V1_HOST"])
def test_an_ancestor_with_a_lower_limit(seen, name):
    """The lowest limit of all ancestors is found, however far up."""
    it = seen(trees.ALL[name])
    top = {
        "DOCKER_V2_HOST": trees.v2(f"{V2}/system.slice", maximum=256 * MB, used=210 * MB),
        "KUBERNETES_V1_HOST": trees.v1(f"{MEMORY}/kubepods", limit=256 * MB, used=210 * MB),
    }[name]
    it.change(top)
    reading = it.read()
    assert (reading.limit_bytes, reading.used_bytes) == (256 * MB, 210 * MB)
    assert reading.lowest_limit_bytes == 256 * MB


def test_inactive_file_pages_above_use(seen):
    """Two files that were read one after the other never make use negative."""
    it = seen(trees.DOCKER_V2, trees.v2(V2, maximum=1 * GB, used=10 * MB, inactive=11 * MB))
    assert it.used() == 0


SWAP = {"/proc/meminfo": trees.meminfo(swap=2 * GB)}


@pytest.mark.parametrize(
    ("swap_max", "current", "left"),
    [
        ("max", 500 * MB, 2 * GB),
        (1 * GB, 0, 1 * GB),
        (1 * GB, 300 * MB, 1 * GB - 300 * MB),
        (4 * GB, 300 * MB, 2 * GB),
        (100 * MB, 300 * MB, 0),
        (0, 0, 0),
        ("garbage", 0, 0),
        (None, None, 2 * GB),
    ],
)
def test_swap_in_version_2(seen, swap_max, current, left):
    """What is left of the machine's and of the cgroup's is no room, but may become some."""
    files = {"memory.swap.max": swap_max, "memory.swap.current": current}
    files = {f"{V2}/{name}": None if value is None else f"{value}\n" for name, value in files.items()}
    it = seen(trees.DOCKER_V2, SWAP, files)
    reading = it.read()
    assert reading.swap_bytes == left
    assert reading.headroom_bytes == 312 * MB
    assert (
        reading.uncertain_bytes - left == it.change({"/proc/meminfo": trees.meminfo()}).read().uncertain_bytes
    )
    assert it.warnings == []


@pytest.mark.parametrize(
    ("both", "swapped", "swappiness", "left"),
    [
        (trees.V1_NO_LIMIT, 900 * MB, 60, 2 * GB),
        (1 * GB, 0, 60, 512 * MB),
        (1 * GB, 100 * MB, 60, 412 * MB),
        (512 * MB, 0, 60, 0),
        (1 * GB, 0, 0, 0),
        (1 * GB, 0, None, 512 * MB),
        (None, None, None, 2 * GB),
    ],
)
def test_swap_in_version_1(seen, both, swapped, swappiness, left):
    """The limit for memory and swap together, less that for memory, and what has been swapped out."""
    it = seen(trees.DOCKER_V1, SWAP)
    charged = it.read().levels[0].charged
    files = {
        "memsw.limit_in_bytes": both,
        "memsw.usage_in_bytes": None if swapped is None else charged + swapped,
        "swappiness": swappiness,
    }
    it.change({f"{MEMORY}/memory.{name}": f"{value}\n" for name, value in files.items() if value is not None})
    assert it.read().swap_bytes == left


def test_swap_by_the_stricter(seen):
    """Our own cgroup may swap less than the one with the limit."""
    files = {f"{V2}/memory.swap.max": "max\n", f"{V2}/worker.service/memory.swap.max": "0\n"}
    assert seen(trees.KUBERNETES_V2, SWAP, files).read().swap_bytes == 0


def test_swap_of_a_machine(seen):
    """Without a cgroup it is what is free."""
    assert seen(trees.UNLIMITED_V2, SWAP).read().swap_bytes == 2 * GB


def test_group_kills_of_an_ancestor(seen):
    """``memory.oom.group`` counts wherever above it stands; a kernel without the file has no such kills."""
    own, above = (f"{V2}/system.slice{tail}/memory.oom.group" for tail in ("/docker-3f2a.scope", ""))
    it = seen(trees.DOCKER_V2_HOST, {above: "1\n"})
    assert it.read().oom_group is True
    it.change({own: "1\n", above: "0\n"})
    assert it.read().oom_group is True
    it.change({own: None, above: None})
    assert it.read().oom_group is False
    assert it.warnings == []


def test_version_1_kills_of_an_old_kernel(seen):
    """Before Linux 4.13 nobody counted: that is a warning, and None."""
    it = seen(trees.DOCKER_V1, {f"{MEMORY}/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"})
    assert it.read().oom_kills is None
    assert "kills are not counted" in it.warning()


def test_kills_of_the_machine(seen):
    """Where memory is charged to no cgroup, all kills count; an old kernel has no such line."""
    it = seen(trees.UNLIMITED_V2, {"/proc/self/cgroup": "0::/\n", f"{V2}/memory.current": None})
    assert it.read().oom_kills is None
    it.change({"/proc/vmstat": "pgfault 7\noom_kill 3\noom_kill_more 9\n"})
    assert it.read().oom_kills == 3
    it.change({"/proc/vmstat": "pgfault 7\n"})
    assert it.read().oom_kills is None


# Pressure


def test_pressure_of_the_cgroup(seen):
    """In version 2 it is the cgroup's, in percent and microseconds."""
    it = seen(trees.DOCKER_V2)
    assert it.read().pressure == Pressure(1.5, 0.75, 2345, 678, f"{it.folder}{V2}/memory.pressure")


def test_pressure_without_a_controller(seen):
    """The lowest cgroup has its pressure even where memory is charged further up."""
    assert seen(trees.SYSTEMD_USER).read().pressure.some_avg10 == 3.0


@pytest.mark.parametrize(
    "files", [trees.DOCKER_V1, trees.WSL, {**trees.DOCKER_V2, f"{V2}/memory.pressure": None}]
)
def test_pressure_of_the_machine(seen, files):
    """Where the cgroup has none, it is the machine's."""
    it = seen(files)
    assert it.read().pressure == Pressure(0.12, 0.05, 1234, 567, f"{it.folder}/proc/pressure/memory")
    assert it.warnings == []


def test_no_pressure(seen):
    """A kernel that does not measure it is nothing to warn about."""
    it = seen(trees.DOCKER_V1, {"/proc/pressure/memory": None})
    assert it.read().pressure is None
    assert it.warnings == []


@pytest.mark.parametrize("text", ["", "some\n", "some avg10=x total=1\nfull avg10=0 total=0\n", UNREADABLE])
def test_odd_pressure(seen, text):
    """What is no pressure is a warning, and the machine's is used."""
    it = seen(trees.DOCKER_V2, {f"{V2}/memory.pressure": text})
    assert it.read().pressure.some_avg10 == 0.12
    assert it.warning().startswith(f"{V2}/memory.pressure ")
    assert "the machine's pressure is used" in it.warning()


# Change


def test_a_changed_limit_is_followed(seen):
    """The next read has it, also when it goes away and comes back."""
    it = seen(trees.DOCKER_V2)
    for number in (256 * MB, 1 * GB, "max", 128 * MB):
        it.change({f"{V2}/memory.max": f"{number}\n"})
        assert it.limit()[0] == (16 * GB if number == "max" else number)
    assert it.warnings == []


def test_a_move_is_followed(seen):
    """A process that was put into another cgroup has that one's limit, kills and name."""
    it = seen(trees.UNLIMITED_V2, trees.v2(f"{V2}/system.slice/small", maximum=100 * MB, kills=1))
    assert it.limit() == (16 * GB, "physical memory")
    it.change({"/proc/self/cgroup": "0::/system.slice/small\n"})
    reading = it.read()
    assert (reading.limit_bytes, reading.oom_kills) == (100 * MB, 1)
    assert it.path(reading.cgroup) == f"{V2}/system.slice/small"


@pytest.mark.parametrize("name", ["DOCKER_V2_HOST", "KUBERNETES_V1_HOST"])
def test_a_cgroup_that_is_removed(seen, name):
    """Its ancestors count then; that is said once, however often it comes and goes."""
    it = seen(trees.ALL[name])
    folder = FOUND[name][4]
    if name == "DOCKER_V2_HOST":
        it.change(trees.v2(f"{V2}/system.slice", maximum=1 * GB))
    files = {path: text for path, text in trees.ALL[name].items() if path.startswith(folder + "/")}
    for _ in range(3):
        tree(it.folder, {folder: None})
        assert it.read().lowest_limit_bytes == 1 * GB
        it.change(files)
        it.read()
    assert it.warning().startswith(f"{folder} is not there")


def test_a_cgroup_that_goes_while_it_is_read(seen, monkeypatch):
    """Each file may vanish between two others: no exception, no limit made up."""
    for name in ("DOCKER_V2_HOST", "KUBERNETES_V1_HOST"):
        it = seen(trees.ALL[name])
        folder = FOUND[name][4]
        original = it.probe._files.read
        for count in range(30):
            left = [count]

            def read(path, left=left, folder=folder, original=original, it=it):
                left[0] -= 1
                if left[0] == 0:
                    tree(it.folder, {folder: None})
                return original(path)

            monkeypatch.setattr(it.probe._files, "read", read)
            reading = it.read()
            assert reading.limit_bytes in (512 * MB, 1 * GB, 15 * GB, 16 * GB)
            it.change(trees.ALL[name])
        assert it.warnings


# What is wrong is said once

ODD = [
    "",
    "many\n",
    "-1\n",
    "1.5\n",
    "0x10\n",
    "1_000\n",
    "²\n",
    "0\n",
    "9" * 5000,
    b"\xff\x00\n",
    UNREADABLE,
]


@pytest.mark.parametrize("odd", ODD, ids=[str(index) for index in range(len(ODD))])
@pytest.mark.parametrize(
    ("name", "file"), [("DOCKER_V1", "memory.limit_in_bytes"), ("DOCKER_V2", "memory.max")]
)
def test_an_odd_limit(seen, name, file, odd):
    """It is no limit, and one warning names the file, what is wrong and what follows."""
    it = seen(trees.ALL[name])
    folder = FOUND[name][4]
    it.change({f"{folder}/{file}": odd})
    # Version 1 says it in another file, too.
    expected = 512 * MB if name == "DOCKER_V1" else 16 * GB
    for _ in range(3):
        assert it.read().lowest_limit_bytes == expected
    assert it.warning().startswith(f"{folder}/{file} ")
    assert it.warning().endswith(": taken as no limit")


@pytest.mark.parametrize("odd", [None, "", "-5\n", "many\n", UNREADABLE])
@pytest.mark.parametrize(
    ("name", "file"), [("DOCKER_V1", "memory.usage_in_bytes"), ("DOCKER_V2", "memory.current")]
)
def test_odd_use(seen, name, file, odd):
    """Resident memory of our processes is used instead."""
    it = seen(trees.ALL[name], processes({os.getpid(): (1, 3 * MB, None)}))
    folder = FOUND[name][4]
    it.change({f"{folder}/{file}": odd})
    reading = it.read()
    assert (reading.limit_bytes, reading.used_bytes) == (512 * MB, 3 * MB)
    assert it.warning().startswith(f"{folder}/{file} ")
    assert "resident memory of our own processes" in it.warning()


@pytest.mark.parametrize(
    "odd", [None, "", "inactive_file 9\nactive_file\n", "inactive_file x\nactive_file 9\n", UNREADABLE]
)
def test_odd_stat(seen, odd):
    """Without it, pages of files count as used: too much rather than too little."""
    it = seen(trees.DOCKER_V2, {f"{V2}/memory.stat": odd})
    assert it.used() == 300 * MB
    assert it.used() == 300 * MB
    assert "pages of files are counted as used" in it.warning()


@pytest.mark.parametrize("file", ["/proc/self/cgroup", "/proc/self/mountinfo"])
@pytest.mark.parametrize("odd", [None, "", "nothing to see\n", b"\x00\xff", UNREADABLE])
def test_cgroups_that_cannot_be_found(seen, file, odd):
    """The machine's memory is the limit then, and that is said."""
    it = seen(trees.DOCKER_V2, {file: odd})
    for _ in range(2):
        assert it.limit() == (16 * GB, "physical memory")
    assert it.warning().startswith(f"{file} ")
    assert "only the machine's memory" in it.warning()


def test_hidden_names(seen):
    """Where a namespace hides the names between, the highest cgroup is looked at, and a warning says so."""
    it = seen(trees.HIDDEN_V2)
    assert it.limit() == (2 * GB, f"{V2}/memory.max")
    assert "limits between are not seen" in it.warning()


def test_outside_of_what_is_mounted(seen):
    """The limit of a cgroup that the process is not in does not count."""
    it = seen(trees.OUTSIDE_V2)
    assert it.limit() == (16 * GB, "physical memory")
    assert "'/../other'" in it.warning()


def test_two_mounts(seen):
    """Of several mounts, the one that shows more ancestors is taken, if it is there."""
    part = "30 1 0:23 /system.slice /mnt/part rw - cgroup2 cgroup2 rw\n"
    gone = "31 1 0:23 / /mnt/gone rw - cgroup2 cgroup2 rw\n"
    it = seen(trees.DOCKER_V2_HOST, {"/proc/self/mountinfo": part + gone + trees.V2_MOUNT})
    it.change({"/mnt/part/cgroup.controllers": "memory\n"})
    assert it.limit()[1] == FOUND["DOCKER_V2_HOST"][2]
    assert it.warnings == []


def test_a_mount_point_with_a_space(seen):
    """``mountinfo`` writes a space as an octal number."""
    it = seen(
        trees.proc("0::/\n", "30 1 0:23 / /mnt/my\\040groups rw - cgroup2 cgroup2 rw\n"),
        trees.v2("/mnt/my groups", maximum=1 * GB),
    )
    assert it.limit() == (1 * GB, "/mnt/my groups/memory.max")


def test_a_path_with_colons(seen):
    """Some runtimes name cgroups that way; a colon separates only what stands before the path."""
    path = "/system.slice/containerd.service/kubepods-podc0f3.slice:cri-containerd:6ef1"
    mount = f"1801 1790 0:41 {path} /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n"
    it = seen(trees.DOCKER_V1, {"/proc/self/cgroup": f"3:memory:{path}\n", "/proc/self/mountinfo": mount})
    assert it.limit() == (512 * MB, f"{MEMORY}/memory.limit_in_bytes")
    assert it.warnings == []


def test_no_memory_controller_in_version_1(seen):
    """A kernel that was told to do without it limits nothing; nothing is wrong with that."""
    it = seen(trees.DOCKER_V1, {"/proc/self/cgroup": "3:cpu,cpuacct:/\n1:name=systemd:/\n"})
    assert it.limit() == (16 * GB, "physical memory")
    assert it.warnings == []


@pytest.mark.parametrize("point", ["/mnt/gone", "/mnt/\\000"])
def test_a_mount_point_that_is_not_there(seen, point):
    """What is mounted outside of what the process can see is not seen, and a warning says so."""
    it = seen(trees.DOCKER_V2, {"/proc/self/mountinfo": f"30 1 0:23 / {point} rw - cgroup2 cgroup2 rw\n"})
    assert it.limit() == (16 * GB, "physical memory")
    assert "is not there" in it.warning()


def test_a_missing_limit(seen):
    """A cgroup of version 2 that has its use in a file, but no limit, is not as it should be."""
    it = seen(trees.DOCKER_V2, {f"{V2}/memory.max": None})
    assert it.limit() == (16 * GB, "physical memory")
    assert it.warning() == f"{V2}/memory.max is not there: taken as no limit"


@pytest.mark.parametrize("odd", ["", "2\n", UNREADABLE])
def test_odd_group_kills(seen, odd):
    """They are taken as none, with a warning."""
    it = seen(trees.KUBERNETES_V2, {f"{V2}/memory.oom.group": odd})
    assert it.read().oom_group is False
    assert it.warning().endswith(": taken as 0")


@pytest.mark.parametrize("odd", [None, "", "MemTotal: many kB\n", "MemTotal: 0 kB\n", UNREADABLE])
def test_odd_meminfo(seen, odd):
    """The C library is asked, and the limit is more than 0."""
    it = seen(trees.WSL, {"/proc/meminfo": odd})
    reading = it.read()
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert abs(reading.limit_bytes - pages) < 1 * MB
    assert "the C library is asked instead" in it.path(it.warnings[0])


def test_meminfo_of_an_old_kernel(seen):
    """Without ``MemAvailable`` only free memory counts as available: use is too high rather than too low."""
    it = seen(trees.WSL, {"/proc/meminfo": "MemTotal: 1000000 kB\nMemFree: 400000 kB\n"})
    assert it.used() == 600000 * KB
    assert "MemAvailable" in it.warning()


@contextlib.contextmanager
def no_descriptor_left():
    """No file can be opened."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", ["DOCKER_V1", "DOCKER_V2"])
def test_no_descriptor_is_left(seen, name):
    """A limit that cannot be looked at just now is still there."""
    it = seen(getattr(trees, name))
    before = it.read()
    assert before.limit_bytes == 512 * MB
    with no_descriptor_left():
        assert it.read() == before
    assert it.warnings == []
    assert it.read() == before


def test_no_descriptor_was_ever_left(seen):
    """Then nothing is known of limits, and that is said."""
    it = seen(trees.DOCKER_V2)
    with no_descriptor_left():
        assert it.read().limit_kind == "physical"
    assert any("/proc/self/cgroup cannot be read (Too many open files)" in text for text in it.warnings)
    assert it.read().limit_bytes == 512 * MB


def test_warnings_go_to_the_log(tmp_path, caplog):
    """By default a warning is a record of the module's logger; a percent sign in it is not a format."""
    files = {**trees.DOCKER_V2, "/proc/self/cgroup": "0::/100%s\n"}
    with caplog.at_level(logging.WARNING):
        Probe(tree(tmp_path, files)).read()
    [record] = caplog.records
    assert record.name == "memsafe_pool.probe"
    assert "/100%s is not there" in record.getMessage()


def test_another_process(tmp_path):
    """The cgroup of any process can be asked for by its pid."""
    files = {
        **trees.UNLIMITED_V2,
        **trees.v2(f"{V2}/other", maximum=1 * GB),
        "/proc/42/cgroup": "0::/other\n",
    }
    assert Probe(tree(tmp_path, files), pid=42).read().limit_bytes == 1 * GB


def texts(original):
    """What may stand in a file: anything, or the right thing with one place changed."""
    right = original.encode()
    changed = st.tuples(st.integers(0, len(right)), st.binary(max_size=4), st.integers(0, 4)).map(
        lambda edit: right[: edit[0]] + edit[1] + right[edit[0] + edit[2] :]
    )
    numbers = st.integers().map(lambda number: b"%d\n" % number)
    return st.one_of(st.binary(max_size=60), changed, numbers, st.none(), st.just(UNREADABLE))


@st.composite
def broken_trees(draw):
    files = dict(trees.ALL[draw(st.sampled_from(["DOCKER_V1", "KUBERNETES_V2", "SYSTEMD_USER"]))])
    for path in draw(st.lists(st.sampled_from(sorted(files)), unique=True, max_size=6)):
        files[path] = draw(texts(files[path]))
    return files


@given(broken_trees())
def test_whatever_is_in_the_files(files):
    """It raises nothing, gives a limit of more than 0, and does not repeat itself."""
    warnings = []
    with tempfile.TemporaryDirectory() as folder:
        probe = Probe(tree(folder, files), on_warning=warnings.append)
        reading = probe.read()
        said = len(warnings)
        probe.read()
    assert reading.limit_bytes >= reading.lowest_limit_bytes > 0
    assert reading.used_bytes >= 0
    assert len(warnings) == said
    assert all(": " in text for text in warnings)


# Our own processes


def processes(known):
    """Files of processes: pid -> (parent, resident bytes, PSS bytes or what stands in place of the file)."""
    files = {}
    for pid, (parent, resident, proportional) in known.items():
        files[f"/proc/{pid}/stat"] = f"{pid} (a) b) S {parent} 1 1 0 -1 4194304\n"
        files[f"/proc/{pid}/statm"] = f"999 {resident // os.sysconf('SC_PAGE_SIZE')} 10 1 0 5 0\n"
        files[f"/proc/{pid}/smaps_rollup"] = (
            f"55-7f ---p 0 00:00 0  [rollup]\nRss:  {resident // KB} kB\nPss:  {proportional // KB} kB\n"
            "Pss_Dirty:  1 kB\n"
            if isinstance(proportional, int)
            else proportional
        )
    return files


FAMILY = {
    10: (1, 9 * MB, 5 * MB),
    11: (10, 8 * MB, 4 * MB),
    12: (11, 7 * MB, 3 * MB),
    20: (1, 99 * MB, 99 * MB),
}


def test_tree(tmp_path):
    """PSS of a process and of all its descendants, of nobody else."""
    assert Probe(tree(tmp_path, processes(FAMILY)), pid=10).tree_bytes() == 12 * MB


def test_tree_of_given_processes(tmp_path):
    """Whoever knows the processes may say them; one that has ended has no memory."""
    assert Probe(tree(tmp_path, processes(FAMILY)), pids=lambda: [11, 12, 13]).tree_bytes() == 7 * MB


@pytest.mark.parametrize("odd", [None, UNREADABLE, "", "Pss: x kB\n"])
def test_tree_without_pss(tmp_path, odd):
    """Resident memory is used where PSS cannot be read, with one warning for all processes."""
    known = {pid: (parent, resident, odd) for pid, (parent, resident, _) in FAMILY.items()}
    warnings = []
    probe = Probe(tree(tmp_path, processes(known)), pid=10, on_warning=warnings.append)
    for _ in range(2):
        assert probe.tree_bytes() == 24 * MB
    [warning] = warnings
    assert "smaps_rollup" in warning
    assert "resident memory is taken" in warning


def test_tree_with_a_zombie(tmp_path):
    """A process that has ended has no memory, and is nothing to warn about."""
    warnings = []
    files = processes({**FAMILY, 12: (11, 0, UNREADABLE)})
    assert Probe(tree(tmp_path, files), pid=10, on_warning=warnings.append).tree_bytes() == 9 * MB
    assert warnings == []


def test_tree_with_odd_files(tmp_path):
    """A process whose files make no sense is not counted; that is said once."""
    warnings = []
    files = {
        **processes(FAMILY),
        "/proc/11/stat": "garbage",
        "/proc/10/statm": "x",
        "/proc/10/smaps_rollup": "x",
    }
    probe = Probe(tree(tmp_path, files), pid=10, on_warning=warnings.append)
    assert [probe.tree_bytes(), probe.tree_bytes()] == [0, 0]
    assert len(warnings) == 2
    shown = "".join(warnings)
    assert "/proc/<pid>/stat " in shown
    assert "/proc/<pid>/statm " in shown


def test_no_proc_at_all(tmp_path):
    """A machine that shows nothing is the C library's memory, with warnings."""
    warnings = []
    probe = Probe(tmp_path, pid=10, on_warning=warnings.append)
    assert probe.read().limit_bytes > 0
    assert probe.tree_bytes() == 0
    assert any("cannot be listed" in text for text in warnings)


def test_this_machine():
    """Its own files make sense: nothing is wrong with them, and this process uses some of what there is."""
    warnings = []
    probe = Probe(on_warning=warnings.append)
    reading = probe.read()
    assert warnings == []
    assert 0 < reading.used_bytes < reading.physical_bytes == psutil.virtual_memory().total
    assert 5 * MB < probe.tree_bytes() < reading.physical_bytes


# Not on Linux


class FakeProcess:
    known = {1: (50 * MB, 90 * MB), 2: (20 * MB, 40 * MB), 3: (None, 30 * MB)}  # noqa: RUF012 - not changed

    def __init__(self, pid=None):
        self.pid = 1 if pid is None else pid
        if self.pid not in self.known:
            raise psutil.NoSuchProcess(self.pid)

    def children(self, *, recursive):
        assert recursive
        return [FakeProcess(2), FakeProcess(3)]

    def memory_full_info(self):
        unique, _ = self.known[self.pid]
        if unique is None:
            raise psutil.AccessDenied(self.pid)
        return SimpleNamespace(uss=unique)

    def memory_info(self):
        return SimpleNamespace(rss=self.known[self.pid][1])


@pytest.fixture
def elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(psutil, "Process", FakeProcess)
    memory = SimpleNamespace(total=8 * GB, available=3 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


@pytest.mark.usefixtures("elsewhere")
def test_macos():
    """The machine's memory is the limit; no file is looked at; there are no cgroups, no kills to count."""
    warnings = []
    reading = Probe("/nothing/here", on_warning=warnings.append).read()
    assert (reading.limit_bytes, reading.used_bytes, reading.limit_kind) == (8 * GB, 5 * GB, "physical")
    assert (reading.cgroup, reading.oom_kills, reading.oom_group, reading.pressure) == (
        None,
        None,
        None,
        None,
    )
    assert warnings == []


@pytest.mark.usefixtures("elsewhere")
def test_macos_tree():
    """USS of all, RSS of whom it may not ask, with one warning."""
    warnings = []
    probe = Probe(on_warning=warnings.append)
    assert [probe.tree_bytes(), probe.tree_bytes()] == [100 * MB, 100 * MB]
    [warning] = warnings
    assert "USS" in warning
    assert Probe(pids=lambda: [2, 7]).tree_bytes() == 20 * MB
    assert Probe(pid=7).tree_bytes() == 0


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("error", [OSError("no"), RuntimeError("no"), psutil.Error("no")])
def test_macos_without_numbers(monkeypatch, error):
    """When psutil fails the C library is asked; use is not known, and that is said."""

    def fail():
        raise error

    monkeypatch.setattr(psutil, "virtual_memory", fail)
    warnings = []
    reading = Probe(on_warning=warnings.append).read()
    assert reading.limit_bytes > 0
    assert reading.used_bytes == 0
    [warning] = warnings
    assert "nothing is known" in warning
