"""Who has how much memory: the worker's account of its children and of what tasks needed.

Runs in the worker. It keeps what children report, looks at those that are in the middle of a
task, and adds up. It decides nothing.

How pages that several processes share are counted once: all children of a forkserver share with it and
with each other nothing that is not the forkserver's, too. So everything of the forkserver is counted, and
of the others what is theirs alone. Pages of files are not counted: the kernel can drop most of
them, and the limit of a container counts them for whoever read them first.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from memsafe_pool import memory
from memsafe_pool.fleet import Child, State
from memsafe_pool.peaks import Peaks

if TYPE_CHECKING:
    from memsafe_pool.fleet import Fleet
    from memsafe_pool.wire import Report

__all__ = ["Account", "Ledger"]


@dataclass(frozen=True, slots=True)
class Account:
    """Memory of the pool in bytes, pages of files left out.

    Attributes:
        worker: What is the worker's alone; all it has where no forkserver shares that.
        forkserver: All that the forkserver has; 0 where there is none.
        children: What is theirs alone, for all children; those that end are in it until they are reaped.
    """

    worker: int
    forkserver: int
    children: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.worker + self.forkserver + self.children


class Ledger:
    """The account.

    Arguments:
        fleet: The children, kept up to date by the engine.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.peaks = Peaks()
        self.trims = self.trimmed_bytes = 0
        self._fleet = fleet

    def ended(self, child: Child, name: str, report: Report) -> None:
        """Enter what a child said at the end of a task."""
        child.report = report
        child.most_bytes = max(child.most_bytes, report.high)
        self.peaks.add(name, report.peak, exact=report.exact)

    def trimmed(self, child: Child, report: Report, won: int) -> None:
        """Enter what a child has given back; what its last task needed stays known."""
        child.report = report._replace(peak=child.report.peak, hidden=child.report.hidden)
        child.trims += 1
        child.trimmed_bytes += won
        self.trims += 1
        self.trimmed_bytes += won

    def private_bytes(self, child: Child) -> int:
        """Return what is a child's alone, now.

        A child that does nothing has what it said last. One that runs a task has grown since; one
        that is starting has said nothing yet; one that is ending may have given something back
        already, which counts as its own until the kernel has it all.
        """
        with contextlib.suppress(OSError):  # it has just ended
            if child.state is State.BUSY:
                now = memory.anonymous_bytes(child.pid)
                if now:
                    return max(child.report.private + now - child.report.anonymous, 0)
                # A zombie: the kernel shows nothing of it any more.
                return child.private_bytes + (child.job.grown if child.job is not None else 0)
            if child.state is State.STARTING and child.pid:
                return memory.private_bytes(child.pid)
        return child.private_bytes

    def coming_bytes(self, child_bytes: int, *, forked: bool = True) -> int:
        """Return what starting children are still going to take; may be called in any thread.

        Arguments:
            child_bytes: What a child has when it is ready.
            forked: Whether those that are forked count, of which it is not known what they have taken.
        """
        coming = 0
        for child in list(self._fleet.starting_children):
            if child.start_method != "spawn" and not forked:
                continue
            coming += child_bytes
            # One that is forked has taken what it needs within milliseconds.
            if child.pid and child.start_method == "spawn":
                with contextlib.suppress(OSError, ValueError, IndexError):  # it has just ended
                    coming -= min(memory.anonymous_bytes(child.pid), child_bytes)
        return coming

    def account(self, forkserver: int | None, *, children: bool = True) -> Account:
        """Return who has how much now.

        Arguments:
            forkserver: Pid of the forkserver, or None.
            children: Whether to look at them; else they count as 0.
        """
        shared = 0
        if forkserver:
            with contextlib.suppress(OSError):
                shared = memory.anonymous_bytes(forkserver)
        return Account(
            worker=_own_bytes(alone=bool(shared)),
            forkserver=shared,
            children=sum(map(self.private_bytes, list(self._fleet.children))) if children else 0,
        )

    def table(self) -> list[dict[str, Any]]:
        """Return one row for each child, in the order of their pids."""
        now = time.monotonic()
        return [self._row(child, now) for child in sorted(self._fleet.children, key=lambda child: child.pid)]

    def _row(self, child: Child, now: float) -> dict[str, Any]:
        report, job = child.report, child.job
        row = {
            "pid": child.pid,
            "state": child.state.value,
            "start_method": child.start_method,
            "generation": child.generation,
            "age": round(now - child.born, 3),
            "tasks": child.tasks,
            "rss": report.resident,
            "private": self.private_bytes(child),
            "private_growth": report.private - child.first_private_bytes,
            "peak": report.peak,
            "peak_rss": child.most_bytes,
            "trimmable": report.trimmable,
            "trims": child.trims,
            "trimmed": child.trimmed_bytes,
            "task": None,
            "task_id": None,
            "running": None,
        }
        if job is not None:
            row |= {"task": job.name, "task_id": job.correlation_id}
            if job.paused_at is not None:
                row["state"] = "paused"
            if job.accepted_at is not None:
                row["running"] = round(now - job.accepted_at, 3)
        return row


def _own_bytes(*, alone: bool) -> int:
    """What this process has, or what is its alone; as far as it can be read."""
    for read in (memory.private_bytes, memory.anonymous_bytes) if alone else (memory.anonymous_bytes,):
        with contextlib.suppress(OSError):  # no smaps_rollup before Linux 4.14; no descriptor left
            return read()
    return 0
