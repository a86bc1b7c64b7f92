"""What of the memory charged to a cgroup is used: what the kernel cannot take back.

Before the kernel kills anybody under a limit it drops pages of files and frees caches of its own. These are
room, however often a file was read, and whoever has it mapped. So are pages that have to be written to disk
first: whoever needs memory waits for that, and nobody is killed. (With a disk of 4 MB/s and 160 MiB of
512 being written, in version 2 100, a process got the 450 MiB that it took, in 24 s and 15 s.) All else
is used: memory of processes, files in tmpfs and shared memory (they are on the lists of anonymous pages),
locked pages, and what the kernel itself needs. Found by taking off what can be taken back, and not by adding
up the rest, so that whatever nobody thought of counts as used.

One thing is neither one nor the other: in version 1, memory of the kernel. Dentries and inodes are in one
number with stacks and page tables: ``memory.stat`` has no slab there, and ``memory.kmem.slabinfo`` is empty
since Linux 5.9. It counts as used up to a bound, which ``Use.uncertain`` tells, so that nothing is begun in
haste and nobody is ended for it.

Formats: ``admin-guide/cgroup-v2.rst`` and ``admin-guide/cgroup-v1/memory.rst``. Pure: no file is read here.
Imports neither Celery nor billiard.
"""

from __future__ import annotations

from dataclasses import dataclass

from memsafe_pool.cgroups import field

__all__ = ["Use", "find"]

#: In version 1 the kernel's memory counts as used up to so many bytes and this part of what is no file.
#: Stacks, page tables and the like of 18 processes with 180 MB were 6.6 MB, of 17 with 480 MB 5.8 MB.
KERNEL_BYTES, KERNEL_PART = 8 << 20, 16

#: Pages of files, used of late and not. In version 1 the sums over all below begin with ``total_``.
_FILES = {
    1: (b"total_active_file ", b"total_inactive_file "),
    2: (b"active_file ", b"inactive_file "),
}


@dataclass(frozen=True, slots=True)
class Use:
    """What is used of a cgroup's charge, in bytes.

    Attributes:
        used: What the kernel cannot take back.
        uncertain: What of ``used`` it may be able to take back all the same.
    """

    used: int
    uncertain: int = 0


def find(version: int, charged: int, stat: bytes, kernel: int = 0) -> Use | None:
    """Return what is used; None where ``stat`` does not say how many pages of files there are.

    The kernel charges ahead, and gathers the numbers of ``stat`` from all cores in portions, of 64 pages for
    each core. So all of them may be a little off, and together make no sense: what is used is between 0 and
    what is charged.

    Arguments:
        version: Of the cgroup, 1 or 2.
        charged: What is charged, in bytes: ``memory.usage_in_bytes`` or ``memory.current``.
        stat: What is in ``memory.stat``.
        kernel: In version 1, what of it is the kernel's, in bytes: ``memory.kmem.usage_in_bytes``.
    """
    active, inactive = (field(stat, name) for name in _FILES[version])
    if active is None or inactive is None:
        return None
    rest = charged - active - inactive
    if version == 1:
        needed = min(kernel, KERNEL_BYTES + max(rest - kernel, 0) // KERNEL_PART)
        slab = kernel - needed
    else:
        needed, slab = 0, field(stat, b"slab_reclaimable ") or 0
    used = min(max(rest - slab, 0), charged)
    return Use(used, min(needed, used))
