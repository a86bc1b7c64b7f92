"""How many cores there are for this process; neither Celery nor billiard is needed for that."""

from __future__ import annotations

import os

from memsafe_pool.cgroups import Files, Place, find, whole_number

__all__ = ["at_once", "count"]


def at_once() -> int:
    """Return the number of cores on which this process may run at the same moment.

    A quota does not change that: it is what may be used within 0.1 s, and all of it may be used at the
    beginning, on all cores.
    """
    try:
        return len(os.sched_getaffinity(0))
    except (AttributeError, OSError):  # not on this platform, or forbidden
        return os.cpu_count() or 1


def count(root: str = "/") -> int:
    """Return the number of cores that this process may use over time, rounded up.

    The lowest of its affinity and of the quotas of its cgroup and all ancestors that can be seen
    (``cpu.max``, in version 1 ``cpu.cfs_quota_us``). About 0.1 ms.

    Arguments:
        root: What stands in front of ``/proc`` and ``/sys``.
    """
    # What is not to be read is no limit. Why it is not is said of memory, which has the same files.
    files = Files(root, lambda _: None)
    place = find(files, "self", "cpu")
    quotas = [] if place is None else [_quota(files, place, folder) for folder in place.folders]
    return min([at_once(), *(cores for cores in quotas if cores)])


def _quota(files: Files, place: Place, folder: str) -> int:
    """Return the cores that the quota of one cgroup allows; 0 where there is none."""
    if place.version == 1:
        names = "cpu.cfs_quota_us", "cpu.cfs_period_us"
        words = [files.get(f"{folder}/{name}", "", optional=True) or b"" for name in names]
    else:
        words = (files.get(f"{folder}/cpu.max", "", optional=True) or b"").split()
    # "max 100000" in version 2, -1 in version 1, for no quota.
    quota, period = (whole_number(word) for word in (*words, b"", b"")[:2])
    return -(-quota // period) if quota and period else 0
