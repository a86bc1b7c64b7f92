"""From a task waiting in the worker to its first line in a child that did not exist then; median of 50.

The worker stamps `task_received`, the task stamps its own first line, both on the machine's one monotonic
clock. With `max_tasks_per_child=1` and a pause until the last child is gone, every task finds no child; one
that does is reported and misses the bound. The way between is split at the fork (the last one, for a child
forked twice) and at `worker_process_init`; with a fresh interpreter "fork" is when it imports the app. Stock
prefork has its children ready, so its number is a warm one; ours with a warm child is shown beside it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING

import broker
import processes
import row
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

MUST_MS = 20.0
AIM_MS = 8.0
PAUSE = 0.1
START_METHOD = "MEMSAFE_START_METHOD"


def gone(pid: int) -> bool:
    """Tell whether the child has ended."""
    return not processes.is_alive(pid)


@dataclass
class Samples:
    """Milliseconds of each task's way, in parts; and how many tasks found a child where none was wanted."""

    parts: list[list[float]]
    warm: int = 0

    @property
    def whole(self) -> list[float]:
        """The whole times, sorted."""
        return sorted(sum(part) for part in self.parts)

    def __str__(self) -> str:
        """Median, 95th percentile and maximum."""
        whole = self.whole
        text = f"{median(whole):.1f} ms (p95 {whole[int(len(whole) * 0.95)]:.1f}, max {whole[-1]:.1f})"
        return text + (f", {self.warm} found a child" if self.warm else "")


def measure(url: str, pool: str, count: int, *, cold: bool, **environment: object) -> Samples:
    """Run one worker; its first task does not count, as even a warm worker may start a child for it."""
    options = ("--max-tasks-per-child", "1") if cold else ()
    with Worker(url, pool, 20, *options, BENCH_RECEIVED=1, **environment) as worker:
        worker.ready()
        for _ in range(count + 1):
            worker.nap(1, 0.0)
            if cold:
                worker.wait("the child to go", partial(gone, worker.stamps("done")[-1]["pid"]), 10)
            time.sleep(PAUSE)
        received = {stamp["id"]: stamp["at"] for stamp in worker.stamps("received")}
        samples = Samples([])
        for stamp in worker.stamps("begun")[1:]:
            at = received[stamp["id"]]
            steps = [at, stamp["started"], stamp["initialized"], stamp["at"]]
            if stamp["started"] < at:
                steps[1:3] = []
                samples.warm += cold
            samples.parts.append([(after - before) * 1e3 for before, after in pairwise(steps)])
        return samples


def rows(options: row.Options) -> Iterator[row.Row]:
    """Run prefork's warm children, then ours: started by the forkserver, spawned, and warm."""
    count = 5 if options.quick else 50
    with broker.redis_url() as url:
        stock = f"prefork, child there: {measure(url, 'prefork', count, cold=False)}"
        cold = measure(url, options.ours, count, cold=True, **{START_METHOD: "forkserver"})
        if not cold.warm:
            parts = " + ".join(f"{median(part):.1f}" for part in zip(*cold.parts, strict=True))
            row.say(f"of it, medians: {parts} ms to the fork + to process_init + to the first line")
        yield row.Row(
            f"task waiting, to accepted by a new child (forkserver, median of {count})",
            stock,
            str(cold),
            must=f"<= {MUST_MS:.0f} ms",
            aim=f"{AIM_MS:.0f} ms",
            met=median(cold.whole) <= MUST_MS and not cold.warm,
        )
        spawned = measure(url, options.ours, max(count // 5, 2), cold=True, **{START_METHOD: "spawn"})
        yield row.Row("the same, spawn", stock, str(spawned))
        warm = measure(url, options.ours, count, cold=False, **{START_METHOD: "forkserver"})
        yield row.Row("the same, child there", stock, str(warm))


if __name__ == "__main__":
    row.main(rows, __doc__)
