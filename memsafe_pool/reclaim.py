"""What of the memory charged to a cgroup is used: what the kernel cannot take back.

Before the kernel kills anybody under a limit it drops pages of files and frees caches of its own. These are
room, however often a file was read, and whoever has it mapped. All else is used: memory of processes, files
in tmpfs and shared memory (they are on the lists of anonymous pages), locked pages, and what the kernel
itself needs. Found by taking off what can be taken back, and not by adding up the rest, so that whatever
nobody thought of counts as used.

Two things are neither one nor the other. They count as used up to a bound, which ``Use.uncertain`` tells, so
that nothing is begun in haste and nobody is ended for them:

* Pages that have to be written to disk first. The kernel makes whoever needs memory wait for that.
* In version 1, memory of the kernel. Dentries and inodes are in one number with stacks and page tables:
  ``memory.stat`` has no slab there, and ``memory.kmem.slabinfo`` is empty since Linux 5.9.

Formats: ``admin-guide/cgroup-v2.rst`` and ``admin-guide/cgroup-v1/memory.rst``. Pure: no file is read here.
Imports neither Celery nor billiard.
"""

from __future__ import annotations

from dataclasses import dataclass

from memsafe_pool.cgroups import field

__all__ = ["Use", "find"]

#: Pages that wait to be written count as used up to this part of the limit. A task that writes files keeps
#: a container full of such pages for as long as it writes, and others get what they need all the same, when
#: it is on disk: nobody is killed, also with a disk of 4 MB/s and 160 MiB of 512 to be written (version 2:
#: 100), where a process got the 450 MiB that it took, in 24 s (15 s). With an eighth, 72 tasks of 100 MB in
#: 512 MiB took 1.2 x prefork's time beside a task that writes; with a sixteenth and with nothing 1.0 x. A
#: little is kept so that not all who need memory wait for the disk, the worker among them.
WRITTEN_PART = 16

#: In version 1 the kernel's memory counts as used up to so many bytes and this part of what is no file.
#: Stacks, page tables and the like of 18 processes with 180 MB were 6.6 MB, of 17 with 480 MB 5.8 MB.
KERNEL_BYTES, KERNEL_PART = 8 << 20, 16

#: Pages of files, used of late and not; what of them is to be written, and is being written; slab that can be
#: freed. Not every kernel has the last three. In version 1 the sums over all below begin with ``total_``.
_NAMES = {
    1: (b"total_active_file ", b"total_inactive_file ", b"total_dirty ", b"total_writeback ", b"slab "),
    2: (b"active_file ", b"inactive_file ", b"file_dirty ", b"file_writeback ", b"slab_reclaimable "),
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


def find(version: int, limit: int, charged: int, stat: bytes, kernel: int = 0) -> Use | None:
    """Return what is used; None where ``stat`` does not say how many pages of files there are.

    The kernel charges ahead, and gathers the numbers of ``stat`` from all cores in portions, of 64 pages for
    each core. So all of them may be a little off, and together make no sense: what is used is between 0 and
    what is charged.

    Arguments:
        version: Of the cgroup, 1 or 2.
        limit: The limit, in bytes.
        charged: What is charged, in bytes: ``memory.usage_in_bytes`` or ``memory.current``.
        stat: What is in ``memory.stat``.
        kernel: In version 1, what of it is the kernel's, in bytes: ``memory.kmem.usage_in_bytes``.
    """
    active, inactive, dirty, writeback, slab = (field(stat, name) for name in _NAMES[version])
    if active is None or inactive is None:
        return None
    files = active + inactive
    # What is swapped out is under writeback, too, and locked pages may be dirty: they are not among these.
    unwritten = min((dirty or 0) + (writeback or 0), files, limit // WRITTEN_PART)
    needed = 0
    if version == 1:
        needed = min(kernel, KERNEL_BYTES + max(charged - files - kernel, 0) // KERNEL_PART)
        slab = kernel - needed
    used = min(max(charged - files + unwritten - (slab or 0), 0), charged)
    return Use(used, min(unwritten + needed, used))
