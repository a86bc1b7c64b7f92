"""CPU that real work takes in a child, against prefork's child; and what the child has 3 s later.

For each kind of work (see `real_tasks`) a worker of either pool with one child, both alive at the same time.
They take turns with batches of 4 tasks. CPU is that of the child, user and system time, from the first line
of a batch's first task to the last line of its last: what the pool does between tasks is in it. A child's
number is the median of its batches; the first pair of them, in which caches are filled, does not count.
What depends on what lies where in the heap is the same for the life of a process, and another in the next
one: so all of this is done with several workers one after the other, and the ratio is that of their means.
Page faults are those of the last batch, as a mean.
Then both are idle for 3 s, and what is resident in our child is held against what it was before all of the
work, but after a twentieth of one task, which imports what that takes; the highest ratio counts.

`--jemalloc`: with jemalloc in place of the C library's malloc, for both.
"""

from __future__ import annotations

import ctypes.util
import os
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import broker
import processes
import row
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

TASKS = 4
BATCHES = 3
WORKERS = 5
WARM_SHARE = 0.05
IDLE_SECONDS = 3.0
MUST, MUST_IDLE = 1.05, 1.25
NO_PILLOW = "not run: Pillow is not installed (of the bench extra)"


def batch(worker: Worker, kind: str, tasks: int) -> tuple[float, int]:
    """Run some tasks one after the other; return the child's CPU seconds and page faults."""
    worker.run("real", kind, count=tasks, timeout=300)
    stamps = worker.stamps("done")[-tasks:]
    if len({stamp["pid"] for stamp in stamps}) != 1:
        raise worker.fail("the tasks did not run in one child")
    return stamps[-1]["cpu"] - stamps[0]["cpu_before"], stamps[-1]["faults"] - stamps[0]["faults_before"]


def resident(workers: list[Worker]) -> dict[Worker, int]:
    """Wait for idle children to give back what they do, and read what that of each worker has."""
    time.sleep(IDLE_SECONDS)
    return {worker: processes.resident_bytes(worker.stamps("done")[-1]["pid"]) for worker in workers}


@dataclass(frozen=True)
class Child:
    """What was measured: CPU seconds and page faults of a task, resident bytes before all and after."""

    cpu: float
    faults: float
    before: int
    after: int


def children(url: str, options: row.Options, kind: str, **environment: object) -> list[Child]:
    """Measure one child of prefork's and one of ours."""
    tasks = 1 if options.quick else TASKS
    with (
        Worker(url, "prefork", 1, **environment) as stock,
        Worker(url, options.ours, 1, **environment) as ours,
    ):
        turns = [stock, ours]
        for worker in turns:
            worker.ready()
            worker.run("real", kind, WARM_SHARE)
        before = resident(turns)
        spent: dict[Worker, list[tuple[float, int]]] = {stock: [], ours: []}
        for _ in range(1 if options.quick else 1 + BATCHES):
            for worker in turns:
                spent[worker].append(batch(worker, kind, tasks))
            turns.reverse()
        after = resident(turns)
        return [
            Child(
                statistics.median(cpu for cpu, _ in spent[worker][-BATCHES:]) / tasks,
                spent[worker][-1][1] / tasks,
                before[worker],
                after[worker],
            )
            for worker in (stock, ours)
        ]


def compare(url: str, options: row.Options, kind: str, suffix: str, **environment: object) -> list[row.Row]:
    """Measure one kind of work."""
    pairs = [children(url, options, kind, **environment) for _ in range(options.repeats(WORKERS))]
    ratios = [ours.cpu / stock.cpu for stock, ours in pairs]
    sides = list(zip(*pairs, strict=True))
    cpu = [statistics.mean(child.cpu for child in side) for side in sides]
    faults = [statistics.mean(child.faults for child in side) for side in sides]
    last = [max(side, key=lambda child: child.after / child.before) for side in sides]
    grown = [
        f"{child.before / 1e6:.0f} to {child.after / 1e6:.0f} MB, {child.after / child.before:.2f} x"
        for child in last
    ]
    return [
        row.Row(
            f"{kind}{suffix}: CPU of a task",
            f"prefork {cpu[0]:.3f} s, {faults[0]:,.0f} page faults",
            f"{cpu[1]:.3f} s, {faults[1]:,.0f} page faults",
            f"{cpu[1] / cpu[0]:.2f} x ({min(ratios):.2f}-{max(ratios):.2f}, n={len(ratios)})",
            f"<= {MUST:.2f} x",
            met=cpu[1] / cpu[0] <= MUST,
        ),
        row.Row(
            f"the child {IDLE_SECONDS:.0f} s later, against before",
            f"prefork {grown[0]}",
            grown[1],
            "",
            f"<= {MUST_IDLE:.2f} x",
            met=last[1].after / last[1].before <= MUST_IDLE,
        ),
    ]


def rows(options: row.Options, *, jemalloc: bool = False) -> Iterator[row.Row]:
    """Measure all kinds."""
    import real_tasks

    environment: dict[str, object] = {"BENCH_REAL": 1}
    suffix = ", with jemalloc" if jemalloc else ""
    if jemalloc:
        library = ctypes.util.find_library("jemalloc")
        if library is None:
            yield row.Row("real work, with jemalloc", "", "not run: libjemalloc is not installed")
            return
        environment["LD_PRELOAD"] = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), library]))
    with broker.redis_url() as url:
        for kind in real_tasks.KINDS:
            if kind.startswith("Pillow") and real_tasks.Image is None:
                yield row.Row(f"{kind}{suffix}", "", NO_PILLOW)
                continue
            row.say(kind)
            yield from compare(url, options, kind, suffix, **environment)


if __name__ == "__main__":
    with_jemalloc = "--jemalloc" in sys.argv
    if with_jemalloc:
        sys.argv.remove("--jemalloc")
    row.main(lambda options: rows(options, jemalloc=with_jemalloc), __doc__)
