"""CPU that real work takes in a child, against prefork's child; and what the child has 3 s later.

For each kind of work (see `real_tasks`) a worker of either pool with one child, both alive at the same time.
They take turns with batches of 4 tasks. CPU is that of the child, user and system time, from the first line
of a batch's first task to the last line of its last: what the pool does between tasks is in it. The ratio is
the median over all pairs of neighbouring batches; the first pair, in which caches are filled, does not count.
Page faults are those of the last batch.
Then both are idle for 3 s, and what is resident in our child is held against what it was before all of the
work, but after a twentieth of one task, which imports what that takes.

`--jemalloc`: with jemalloc in place of the C library's malloc, for both.
"""

from __future__ import annotations

import ctypes.util
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING

import broker
import processes
import row
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

TASKS = 4
PAIRS = 7
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


def resident(worker: Worker) -> int:
    """Wait for idle children to give back what they do, and read what the one of this worker has."""
    time.sleep(IDLE_SECONDS)
    return processes.resident_bytes(worker.stamps("done")[-1]["pid"])


def compare(url: str, options: row.Options, kind: str, suffix: str, **environment: object) -> list[row.Row]:
    """Measure one kind of work."""
    with (
        Worker(url, "prefork", 1, **environment) as stock,
        Worker(url, options.ours, 1, **environment) as mine,
    ):
        turns = [stock, mine]
        before = {}
        for worker in turns:
            worker.ready()
            worker.run("real", kind, WARM_SHARE)
            before[worker] = resident(worker)
        pairs = []
        for _ in range(options.repeats(PAIRS) + 1):
            spent = {worker: batch(worker, kind, 1 if options.quick else TASKS) for worker in turns}
            pairs.append((spent[stock][0], spent[mine][0]))
            turns.reverse()
        after = {worker: resident(worker) for worker in turns}
    ratios = sorted(ours / theirs for theirs, ours in pairs[1:])
    ratio, quarter = statistics.median(ratios), len(ratios) // 4
    cpu = [statistics.median(side) / (1 if options.quick else TASKS) for side in zip(*pairs[1:], strict=True)]
    back = {worker: after[worker] / before[worker] for worker in turns}

    def grown(worker: Worker) -> str:
        return f"{before[worker] / 1e6:.0f} to {after[worker] / 1e6:.0f} MB, {back[worker]:.2f} x"

    return [
        row.Row(
            f"{kind}{suffix}: CPU of a task",
            f"prefork {cpu[0]:.3f} s, {spent[stock][1]:,} page faults",
            f"{cpu[1]:.3f} s, {spent[mine][1]:,} page faults",
            f"{ratio:.2f} x ({ratios[quarter]:.2f}-{ratios[-1 - quarter]:.2f}, n={len(ratios)})",
            f"<= {MUST:.2f} x",
            met=ratio <= MUST,
        ),
        row.Row(
            f"the child {IDLE_SECONDS:.0f} s later, against before",
            f"prefork {grown(stock)}",
            grown(mine),
            "",
            f"<= {MUST_IDLE:.2f} x",
            met=back[mine] <= MUST_IDLE,
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
