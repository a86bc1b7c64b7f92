"""CPU that a child's report on its memory adds to a no-op task, and what the meter costs by itself.

First row: worker and children of our pool at `-c 4`, against the same with a meter that measures nothing and
a worker that does not look at reports (`no_meter`); see `turns` for how the two are compared. The median of
all pairs' differences is held to the bound, and that of their ratios; the middle half is in brackets.
Second: `Meter.begin()` and `Meter.end()` in a loop in one process, the median of many short loops.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import broker
import row
import turns
from workers import Worker

from memsafe_pool.meter import Meter

if TYPE_CHECKING:
    from collections.abc import Iterator

CONCURRENCY = 4
TASKS = 150
BATCHES = 40
MUST_US = 30.0
MUST_RATIO = 1.03
TRIM_BYTES = 8 << 20  # of memsafe_trim_min


def middle(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


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
    tasks, batches = (150, 6) if options.quick else (TASKS, BATCHES)
    pairs: list[tuple[float, float]] = []
    with broker.redis_url() as url:
        for repetition in range(options.repeats(1)):
            with (
                Worker(url, options.ours, CONCURRENCY, BENCH_METER="none") as without,
                Worker(url, options.ours, CONCURRENCY) as mine,
            ):
                sides = [(without, CONCURRENCY), (mine, CONCURRENCY)]
                pairs += turns.per_task_ms(sides, tasks, batches, second_first=bool(repetition % 2))
            without_ms, with_ms = (statistics.median(side) for side in zip(*pairs[-batches:], strict=True))
            row.say(f"without a report {without_ms:.3f}, with it {with_ms:.3f} ms per task")
    low, added, high = middle([(mine - without) * 1e3 for without, mine in pairs])
    least, ratio, most = middle([mine / without for without, mine in pairs])
    yield row.Row(
        f"CPU that the report adds to a no-op task, -c {CONCURRENCY}",
        f"without it {statistics.median(without for without, _ in pairs):.3f} ms",
        f"+{added:.0f} us ({low:.0f} to {high:.0f})",
        f"{ratio:.3f} x ({least:.3f}-{most:.3f}, n={len(pairs)})",
        must=f"<= {MUST_US:.0f} us and <= {MUST_RATIO:.2f} x",
        met=added <= MUST_US and ratio <= MUST_RATIO,
    )
    low, median, high = middle(meter_us(20 if options.quick else 200))
    yield row.Row("Meter.begin() and end(), in a loop", "", f"{median:.1f} us ({low:.1f} to {high:.1f})")


if __name__ == "__main__":
    row.main(rows, __doc__)
