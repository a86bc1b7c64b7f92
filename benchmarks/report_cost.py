"""CPU that a child's report on its memory adds to a no-op task, and what the meter costs by itself.

First row: our pool at `-c 4`; every other task goes without the report, in the same processes (`no_meter`).
Each task of a child is paired with the one after it, and so is what the worker does at the end of a task. Of
both the median difference is taken, as single ones are off by many times the whole when something else runs
in between. Their sum is held to the bounds: by itself, and as a share of the CPU time that a task without the
report takes in all processes of the worker. In brackets is where the sum is with 95 % confidence, by
resampling the pairs.
Second: `Meter.begin()` and `Meter.end()` in a loop in one process, the median of many short loops. Between
other things it takes several times as long, as its code and data have to come from main memory.
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import broker
import row
import turns
from workers import Worker

from memsafe_pool.meter import Meter

if TYPE_CHECKING:
    from collections.abc import Iterator

CONCURRENCY = 4
TASKS = 1000
BATCHES = 10
WORKERS = 3
WARM_ROUNDS = 100  # of each process
MUST_US = 30.0
MUST_RATIO = 1.03
TRIM_BYTES = 8 << 20  # of memsafe_trim_min
RESAMPLES = 500


def added_us(url: str, pool: str, tasks: int, batches: int) -> tuple[dict[str, list[float]], float]:
    """Run one worker: what the report added in each pair, by process, and all CPU time of a task."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        file = Path(folder, "rounds")
        with Worker(url, pool, CONCURRENCY, BENCH_METER=file) as worker:
            turns.warm(worker, CONCURRENCY, tasks)
            spent = statistics.median(worker.noops(tasks) / tasks * 1e6 for _ in range(batches))
        added: dict[str, list[float]] = {"child": [], "worker": []}
        for process in map(json.loads, file.read_text().splitlines()):
            pairs = list(zip(process["without"], process["with"], strict=False))[WARM_ROUNDS:]
            added[process["process"]] += [(mine - without) / 1e3 for without, mine in pairs]
    return added, spent


def middle(values: list[float]) -> tuple[float, list[float]]:
    """Return the median, and what it is when the values are drawn anew."""
    draw = random.Random(1)
    drawn = [statistics.median(draw.choices(values, k=len(values))) for _ in range(RESAMPLES)]
    return statistics.median(values), drawn


def meter_us(loops: int, calls: int = 500) -> list[float]:
    """Measure a pair of calls, loop by loop."""
    meter = Meter(TRIM_BYTES, None)
    spent = []
    for _ in range(loops):
        began = time.process_time()
        for _ in range(calls):
            meter.begin()
            meter.end()
        spent.append((time.process_time() - began) / calls * 1e6)
    return spent


def rows(options: row.Options) -> Iterator[row.Row]:
    """Run our pool with and without the report; then the meter by itself."""
    tasks, batches = (500, 3) if options.quick else (TASKS, BATCHES)
    pairs: dict[str, list[float]] = {"child": [], "worker": []}
    spent = []
    with broker.redis_url() as url:
        for _ in range(options.repeats(WORKERS)):
            added, task_us = added_us(url, options.ours, tasks, batches)
            medians = {process: statistics.median(values) for process, values in added.items()}
            row.say(f"of {task_us:.0f} us per task: {medians['child']:+.1f} + {medians['worker']:+.1f} us")
            spent.append(task_us)
            for process, values in added.items():
                pairs[process] += values
    (in_child, children), (in_worker, workers) = middle(pairs["child"]), middle(pairs["worker"])
    sums = sorted(map(sum, zip(children, workers, strict=True)))
    least, most = sums[RESAMPLES // 40], sums[-RESAMPLES // 40]
    total = in_child + in_worker
    without = statistics.median(spent) - total / 2  # as every other task has it
    yield row.Row(
        f"CPU that the report adds to a no-op task, -c {CONCURRENCY}",
        f"without it {without / 1e3:.3f} ms",
        f"{in_child:+.1f} us in the child, {in_worker:+.1f} in the worker, "
        f"{total:+.1f} in all ({least:+.1f} to {most:+.1f}, n={len(pairs['child'])})",
        f"{1 + total / without:.3f} x",
        must=f"<= {MUST_US:.0f} us and <= {MUST_RATIO:.2f} x",
        met=total <= MUST_US and 1 + total / without <= MUST_RATIO,
    )
    low, median, high = statistics.quantiles(meter_us(20 if options.quick else 200), n=4)
    yield row.Row("Meter.begin() and end(), in a loop", "", f"{median:.1f} us ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    row.main(rows, __doc__)
