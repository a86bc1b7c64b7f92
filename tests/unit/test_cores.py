"""How many cores there are: what the kernel's files say of quotas."""

from __future__ import annotations

import os

import pytest

from memsafe_pool import cores

MANY = 64

V1 = "36 32 0:31 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "36 32 0:31 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 64 cores with these files."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(MANY)), raising=False)

    def made(**files):
        for path, text in files.items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return str(tmp_path)

    return made


@pytest.mark.parametrize(
    ("own", "parent", "expected"),
    [
        ("max 100000", "max 100000", MANY),
        ("200000 100000", "max 100000", 2),
        ("150000 100000", "max 100000", 2),
        ("1000 100000", "max 100000", 1),
        ("max 100000", "300000 100000", 3),
        ("200000 100000", "100000 100000", 1),
        ("9900000 100000", "max 100000", MANY),
        ("", "nonsense", MANY),
    ],
)
def test_version_2(machine, own, parent, expected):
    """The lowest of the cgroup and its ancestors, rounded up."""
    root = machine(
        **{
            "proc/self/cgroup": "0::/pod/main\n",
            "proc/self/mountinfo": V2,
            "sys/fs/cgroup/pod/cpu.max": parent,
            "sys/fs/cgroup/pod/main/cpu.max": own,
        }
    )
    assert cores.count(root) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", MANY), ("50000", 1), ("250000", 3)])
def test_version_1(machine, quota, expected):
    """A quota and a period in two files; -1 is none."""
    root = machine(
        **{
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/1\n4:memory:/docker/2\n",
            "proc/self/mountinfo": V1,
            "sys/fs/cgroup/cpu/docker/1/cpu.cfs_quota_us": quota,
            "sys/fs/cgroup/cpu/docker/1/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/cpu/docker/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/docker/cpu.cfs_period_us": "100000",
        }
    )
    assert cores.count(root) == expected


def test_no_cgroups(machine):
    """What cannot be read is no quota."""
    assert cores.count(machine()) == MANY


def test_the_affinity_cannot_be_asked(machine, monkeypatch):
    """As where a seccomp profile refuses that."""

    def refuse(_):
        raise PermissionError

    monkeypatch.setattr(os, "sched_getaffinity", refuse, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert cores.count(machine()) == cores.at_once() == 3
