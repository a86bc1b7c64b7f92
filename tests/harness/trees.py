"""Trees of ``/proc`` and ``/sys`` as machines and containers show them, for tests of what reads these.

``HYBRID`` is recorded (Linux 6.18). The others are written by hand in the same form; identifiers are
shortened, and lines that have nothing to do with memory are left out, except some that a careless reader
would fall for.
A tree is a dictionary from a path to what is in the file; ``tree`` writes one to a folder.
"""

from __future__ import annotations

import os
import shutil

KB = 1024
MB = 1024 * KB
GB = 1024 * MB

#: What version 1 writes for no limit: the largest number of whole pages of 4096 bytes.
V1_NO_LIMIT = 9223372036854771712

#: In place of a text: a folder stands where the file should be, so that nobody can read it, not even root.
UNREADABLE = object()


def tree(folder, files):
    """Write files into a folder and return it as text; ``None`` removes one."""
    for path, text in files.items():
        target = os.path.join(folder, path.lstrip("/"))
        if os.path.isdir(target):
            shutil.rmtree(target)
        elif os.path.lexists(target):
            os.unlink(target)
        if text is UNREADABLE:
            os.makedirs(target)
        elif text is not None:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "wb") as file:
                file.write(text if isinstance(text, bytes) else text.encode())
    return str(folder)


def meminfo(total=16 * GB, available=12 * GB, swap=0):
    return f"""\
MemTotal:       {total // KB:8d} kB
MemFree:        {available // 2 // KB:8d} kB
MemAvailable:   {available // KB:8d} kB
Buffers:            4904 kB
Cached:           499948 kB
SwapCached:            0 kB
Inactive(file):   284088 kB
SwapTotal:      {swap // KB:8d} kB
SwapFree:       {swap // KB:8d} kB
HugePages_Total:       0
Hugepagesize:       2048 kB
"""


def psi(some=0.0, full=0.0, some_total=0, full_total=0):
    return (
        f"some avg10={some:.2f} avg60=0.00 avg300=0.00 total={some_total}\n"
        f"full avg10={full:.2f} avg60=0.00 avg300=0.00 total={full_total}\n"
    )


def proc(cgroup, mountinfo, *, memory=None, pressure=None):
    """The files of ``/proc`` that count, for the process that calls."""
    return {
        "/proc/meminfo": meminfo() if memory is None else memory,
        "/proc/pressure/memory": psi(some=0.12, full=0.05, some_total=1234, full_total=567)
        if pressure is None
        else pressure,
        "/proc/self/cgroup": cgroup,
        "/proc/self/mountinfo": mountinfo,
    }


def v1(
    folder,
    *,
    limit=V1_NO_LIMIT,
    used=0,
    inactive=0,
    kills=0,
    hierarchical=None,
    active=0,
    unwritten=0,
    kernel=0,
):
    """The files of a cgroup of version 1; ``hierarchical`` is the limit that its ancestors leave it.

    Arguments:
        used: What is charged, all of the following included.
        inactive, active: Pages of files.
        unwritten: Of these, what has to be written first; a quarter of it is being written.
        kernel: What is the kernel's, dentries among it.
    """
    hierarchical = limit if hierarchical is None else hierarchical
    return {
        f"{folder}/memory.limit_in_bytes": f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{used}\n",
        f"{folder}/memory.kmem.usage_in_bytes": f"{kernel}\n",
        f"{folder}/memory.kmem.slabinfo": "",
        f"{folder}/memory.oom_control": f"oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n",
        f"{folder}/memory.stat": f"""\
cache {inactive}
rss 5320704
rss_huge 0
shmem 81920
mapped_file 94208
dirty 10358784
writeback 4096
inactive_anon 0
active_anon 1531904
inactive_file 4096
active_file 503808
unevictable 0
hierarchical_memory_limit {hierarchical}
hierarchical_memsw_limit {V1_NO_LIMIT}
total_cache {inactive + active}
total_rss 162299904
total_shmem 81920
total_mapped_file 94208
total_dirty {unwritten * 3 // 4}
total_writeback {unwritten // 4}
total_inactive_anon 196030464
total_active_anon 24522752
total_inactive_file {inactive}
total_active_file {active}
total_unevictable 0
""",
    }


def v2(
    folder,
    *,
    maximum="max",
    high="max",
    used=0,
    inactive=0,
    kills=0,
    group=0,
    pressure=None,
    active=0,
    unwritten=0,
    slab=0,
):
    """The files of a memory cgroup of version 2 that is not the root of all.

    Arguments:
        used: What is charged, all of the following included.
        inactive, active: Pages of files.
        unwritten: Of these, what has to be written first; a quarter of it is being written.
        slab: Dentries, inodes and the like.
    """
    return {
        f"{folder}/memory.max": f"{maximum}\n",
        f"{folder}/memory.high": f"{high}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.oom.group": f"{group}\n",
        f"{folder}/memory.events": f"low 0\nhigh 0\nmax 7\noom 3\noom_kill {kills}\noom_group_kill 0\n",
        f"{folder}/memory.pressure": psi(some=1.5, full=0.75, some_total=2345, full_total=678)
        if pressure is None
        else pressure,
        f"{folder}/memory.stat": f"""\
anon 162299904
file {inactive + active + 81920}
kernel {slab + 5320704}
kernel_stack 376832
pagetables 2248704
shmem 81920
file_mapped 94208
file_dirty {unwritten * 3 // 4}
file_writeback {unwritten // 4}
inactive_anon 196030464
active_anon 24522752
inactive_file {inactive}
active_file {active}
unevictable 0
slab_reclaimable {slab}
slab_unreclaimable 1396736
slab {slab + 1396736}
""",
    }


V2_ROOT = {
    "/sys/fs/cgroup/cgroup.controllers": "cpuset cpu io memory hugetlb pids rdma misc\n",
    "/sys/fs/cgroup/memory.stat": "anon 162299904\ninactive_file 98304\n",
    "/sys/fs/cgroup/memory.pressure": psi(),
}

V2_MOUNT = (
    "26 25 0:23 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - "
    "cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
)

MACHINE_MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
23 27 0:22 / /sys rw,relatime - sysfs sysfs rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
28 27 0:25 / /mnt/a\\040cgroup rw - tmpfs cgroup rw,memory
"""

#: Docker, version 1, no cgroup namespace: the path is the machine's, but its end is what is mounted.
DOCKER_V1 = {
    **proc(
        "12:pids:/docker/3f2a\n9:name=systemd:/docker/3f2a\n4:memory:/docker/3f2a\n1:cpu,cpuacct:/docker/3f2a\n",
        "629 567 0:94 / / rw,relatime - overlay overlay rw,lowerdir=/var/lib/docker/l/A\n"
        "640 629 0:98 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime - tmpfs tmpfs rw,mode=755\n"
        "641 640 0:30 /docker/3f2a /sys/fs/cgroup/cpu,cpuacct ro,nosuid - cgroup cgroup rw,cpu,cpuacct\n"
        "645 640 0:33 /docker/3f2a /sys/fs/cgroup/memory ro,nosuid,nodev,noexec,relatime master:15 - "
        "cgroup cgroup rw,memory\n",
    ),
    **v1("/sys/fs/cgroup/memory", limit=512 * MB, used=300 * MB, inactive=100 * MB, kills=2),
}

#: Docker, version 2, a cgroup namespace of its own: everything is the root.
DOCKER_V2 = {
    **proc(
        "0::/\n",
        "1023 1020 0:57 / /sys ro,nosuid,nodev,noexec,relatime - sysfs sysfs ro\n"
        "1024 1023 0:29 / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - "
        "cgroup2 cgroup rw,nsdelegate,memory_recursiveprot\n",
    ),
    **v2("/sys/fs/cgroup", maximum=512 * MB, used=300 * MB, inactive=100 * MB, kills=2),
}

_SCOPE = "/system.slice/docker-3f2a.scope"

#: Docker, version 2, ``--cgroupns=host``: the whole tree of the machine is there.
DOCKER_V2_HOST = {
    **proc(f"0::{_SCOPE}\n", V2_MOUNT),
    **V2_ROOT,
    **v2("/sys/fs/cgroup/system.slice", used=3 * GB, inactive=1 * GB, kills=9),
    **v2(f"/sys/fs/cgroup{_SCOPE}", maximum=512 * MB, used=300 * MB, inactive=100 * MB, kills=2),
}

#: The same without the right to mount (rootless): the container's own cgroup is bound to the mount point.
DOCKER_V2_ROOTLESS = {
    **proc(
        "0::/user.slice/docker-3f2a.scope\n",
        "900 890 0:29 /user.slice/docker-3f2a.scope /sys/fs/cgroup ro,nosuid - cgroup2 cgroup2 rw\n",
    ),
    **v2("/sys/fs/cgroup", maximum=512 * MB, used=300 * MB, inactive=100 * MB, kills=2),
}

#: Kubernetes 1.28, version 2, a namespace: the pod is not seen; a cgroup was made in the container's.
KUBERNETES_V2 = {
    **proc(
        "0::/worker.service\n",
        "2201 2190 0:31 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime - cgroup2 cgroup rw\n",
    ),
    **v2("/sys/fs/cgroup", maximum=1 * GB, used=700 * MB, inactive=50 * MB, kills=4, group=1),
    **v2("/sys/fs/cgroup/worker.service", used=500 * MB, inactive=20 * MB, kills=3),
}

_POD = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podc0f3.slice"

#: Kubernetes, version 2, seen from the machine: the pod has less room left than the container.
KUBERNETES_V2_HOST = {
    **proc(f"0::{_POD}/cri-containerd-9a1.scope\n", V2_MOUNT),
    **V2_ROOT,
    **v2("/sys/fs/cgroup/kubepods.slice", maximum=15 * GB, used=6 * GB),
    **v2("/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice", used=5 * GB),
    **v2(f"/sys/fs/cgroup{_POD}", maximum=2 * GB, used=1990 * MB, inactive=10 * MB),
    **v2(
        f"/sys/fs/cgroup{_POD}/cri-containerd-9a1.scope",
        maximum=1 * GB,
        used=200 * MB,
        inactive=50 * MB,
        kills=1,
    ),
}

#: Kubernetes, version 1: own cgroup without a limit, the pod, which is not shown, has one.
KUBERNETES_V1 = {
    **proc(
        "11:memory:/kubepods/burstable/podc0f3/9a1\n1:name=systemd:/kubepods/burstable/podc0f3/9a1\n",
        "1700 1690 0:33 /kubepods/burstable/podc0f3/9a1 /sys/fs/cgroup/memory ro,nosuid master:16 - "
        "cgroup cgroup rw,memory\n",
    ),
    **v1("/sys/fs/cgroup/memory", hierarchical=1 * GB, used=400 * MB, inactive=100 * MB),
}

_V1_POD = "/sys/fs/cgroup/memory/kubepods/burstable/podc0f3"

#: The same seen from the machine.
KUBERNETES_V1_HOST = {
    **proc(
        "11:memory:/kubepods/burstable/podc0f3/9a1\n",
        "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:14 - cgroup cgroup rw,memory\n",
    ),
    **v1("/sys/fs/cgroup/memory", used=9 * GB),
    **v1("/sys/fs/cgroup/memory/kubepods", limit=15 * GB, used=6 * GB),
    **v1("/sys/fs/cgroup/memory/kubepods/burstable", hierarchical=15 * GB, used=5 * GB),
    **v1(_V1_POD, limit=1 * GB, used=500 * MB, inactive=100 * MB),
    **v1(f"{_V1_POD}/9a1", hierarchical=1 * GB, used=400 * MB, inactive=100 * MB, kills=1),
}

_USER = "/sys/fs/cgroup/user.slice"

#: A terminal under systemd: ``user.slice`` has ``memory.high``; the lowest cgroup has no memory controller.
SYSTEMD_USER = {
    **proc(
        "0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-1.scope\n",
        MACHINE_MOUNTS + V2_MOUNT + "33 26 0:30 / /sys/fs/pstore rw - pstore pstore rw\n",
    ),
    **V2_ROOT,
    **v2(_USER, high=4 * GB, used=3 * GB, inactive=1 * GB),
    **v2(f"{_USER}/user-1000.slice", used=2 * GB),
    **v2(f"{_USER}/user-1000.slice/user@1000.service", used=1 * GB, kills=5),
    f"{_USER}/user-1000.slice/user@1000.service/app.slice/cgroup.controllers": "\n",
    f"{_USER}/user-1000.slice/user@1000.service/app.slice/run-1.scope/cgroup.controllers": "\n",
    f"{_USER}/user-1000.slice/user@1000.service/app.slice/run-1.scope/memory.pressure": psi(some=3.0),
}

#: LXC 5, version 2: a namespace, its own init, and a ``/proc/meminfo`` by lxcfs that shows the limit.
LXC = {
    **proc(
        "0::/system.slice/celery.service\n",
        "560 540 0:27 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime - cgroup2 none rw\n"
        "571 550 0:45 /proc/meminfo /proc/meminfo rw,nosuid - fuse.lxcfs lxcfs rw\n",
        memory=meminfo(1 * GB, 600 * MB),
    ),
    **v2("/sys/fs/cgroup", maximum=1 * GB, used=500 * MB, inactive=100 * MB),
    **v2("/sys/fs/cgroup/system.slice", used=300 * MB),
    **v2("/sys/fs/cgroup/system.slice/celery.service", maximum=512 * MB, used=100 * MB),
}

_HYBRID = "/sys/fs/cgroup/memory/pool/69d8"

#: Recorded: version 1 memory next to an empty version 2, no limit.
HYBRID = {
    **proc(
        """\
9:name=systemd:/
8:pids:/
7:blkio:/
6:freezer:/
5:devices:/
4:memory:/pool/69d8
3:cpuset:/
2:cpuacct:/
1:cpu:/
0::/
""",
        MACHINE_MOUNTS
        + """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
""",
        memory=meminfo(24683656 * KB, 24057036 * KB),
    ),
    "/sys/fs/cgroup/unified/memory.pressure": psi(),
    **v1("/sys/fs/cgroup/memory", used=1058533376, inactive=622231552),
    **v1("/sys/fs/cgroup/memory/pool", used=1047560192, inactive=544448512),
    **v1(_HYBRID, used=1047560192, inactive=544448512),
}

#: WSL 2: cgroups, but memory is in none of them.
WSL = {
    **proc("0::/\n", MACHINE_MOUNTS + V2_MOUNT),
    "/sys/fs/cgroup/cgroup.controllers": "cpu pids\n",
}

#: Version 2 without any limit, as on a server.
UNLIMITED_V2 = {
    **proc("0::/system.slice/celery.service\n", MACHINE_MOUNTS + V2_MOUNT),
    **V2_ROOT,
    **v2("/sys/fs/cgroup/system.slice", used=2 * GB),
    **v2("/sys/fs/cgroup/system.slice/celery.service", used=1 * GB, kills=6),
}

#: A process in ``/`` of a cgroup namespace (``unshare --cgroup``) that still has the mounts of outside.
HIDDEN_V2 = {
    **proc("0::/\n", MACHINE_MOUNTS + V2_MOUNT.replace(" / /sys/fs", " /../.. /sys/fs")),
    **v2("/sys/fs/cgroup", maximum=2 * GB, used=1 * GB),
}

#: A process that was moved out of the namespace whose mounts it has.
OUTSIDE_V2 = {**DOCKER_V2, "/proc/self/cgroup": "0::/../other\n"}

ALL = {
    name: value
    for name, value in list(globals().items())
    if name.isupper() and isinstance(value, dict) and "/proc/self/cgroup" in value
}
