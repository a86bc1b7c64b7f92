"""What a tree of processes holds and has used, read from /proc (Linux only).

A tree is a worker with everything below it, and everything else in the worker's session: a child whose parent
ended early is still counted.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def _stat(pid: int) -> list[str] | None:
    """Return /proc/<pid>/stat's fields from the third (state) on, or None when there is no such process."""
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text.rpartition(")")[2].split()


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    stat = _stat(pid)
    return stat is not None and stat[0] not in "ZX"


def tree(root: int) -> list[int]:
    """Find the pids of the worker `root` (a session leader), its descendants and others in its session."""
    parents: dict[int, int] = {}
    sessions: dict[int, int] = {}
    for pid in (int(entry.name) for entry in PROC.iterdir() if entry.name.isdigit()):
        if (stat := _stat(pid)) is not None:
            parents[pid], sessions[pid] = int(stat[1]), int(stat[3])
    found = {root} if root in parents else set()
    grown = True
    while grown:
        more = {pid for pid in parents if parents[pid] in found or sessions[pid] == root} - found
        found |= more
        grown = bool(more)
    return sorted(found)


def resident_bytes(pid: int) -> int:
    """Return the process's resident memory, shared pages included."""
    return int((PROC / str(pid) / "statm").read_text().split()[1]) * PAGE_BYTES


def pss_bytes(pids: list[int]) -> int:
    """Sum the processes' proportional set sizes: a page that n processes share counts 1/n in each."""
    total = 0
    for pid in pids:
        try:
            lines = (PROC / str(pid) / "smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return total


def cpu_seconds(pids: list[int]) -> float:
    """Sum user and system time of the processes, and of those children of theirs that were reaped.

    Living threads are read from schedstat, in nanoseconds: with the ticks of stat, 10 ms each, the rounding
    errors of 40 children would be as large as the differences looked for.
    """
    total = 0.0
    for pid in pids:
        if (stat := _stat(pid)) is None:
            continue
        total += sum(int(field) for field in stat[13:15]) / TICKS_PER_SECOND
        for thread in (PROC / str(pid) / "task").glob("*/schedstat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                total += int(thread.read_text().split()[0]) / 1e9
    return total
