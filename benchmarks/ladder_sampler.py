"""CPU of the worker process (without children) for watching memory: an idle pool, and 20 steady children.

The steady children each have 5 MB and sleep. The same is measured of prefork, and subtracted; all threads
of the process count, in nanoseconds (schedstat). Both are given 5 s to come to rest.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import processes
import row
import scenario
from scenario import MB, MIB, Batch

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = {True: 1024 * MIB, False: 2048 * MIB}  # stock needs more; it does not look at the limit
SETTLE_SECONDS = 5
SECONDS = 30
MUST = 0.003


@scenario.rows
def rows(url: str, options: row.Options) -> Iterator[row.Row]:
    """Both states."""
    seconds = 5 if options.quick else SECONDS
    for children, measure in ((0, "idle pool"), (scenario.CONCURRENCY, "20 steady children")):
        pairs = [
            (share(url, "prefork", children, seconds), share(url, options.ours, children, seconds))
            for _ in range(options.repeats(3))
        ]
        stock, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
        more = [ours - stock for stock, ours in pairs]
        cost = statistics.median(more)
        yield row.Row(
            f"CPU of the worker, {measure}, of one core",
            f"prefork {stock:.2%}",
            f"{ours:.2%}",
            f"{cost:+.2%} ({min(more):+.2%} to {max(more):+.2%})",
            f"<= {MUST:.1%} more",
            met=cost <= MUST,
        )


def share(url: str, pool: str, children: int, seconds: float) -> float:
    """Measure the share of one core that the worker process takes."""
    with scenario.Scene(url) as scene:
        worker = scene.worker(scene.container(LIMIT[pool != "prefork"]), pool, scenario.CONCURRENCY)
        scene.must_be_ready()
        if children:
            scene.send([Batch(children, "hold", (5 * MB, SETTLE_SECONDS + seconds + 30))])
            if not scene.wait(lambda: len(scene.stamps("begun")) == children, timeout=30):
                raise worker.fail(f"{len(scene.stamps('begun'))} of {children} tasks have begun")
        time.sleep(SETTLE_SECONDS)
        before, at = processes.cpu_seconds([worker.pid]), time.monotonic()
        time.sleep(seconds)
        found = (processes.cpu_seconds([worker.pid]) - before) / (time.monotonic() - at)
        row.say(f"{pool}, {children} busy: {found:.2%}")
        scene.kill()  # a warm shutdown would wait for the tasks
        return found


if __name__ == "__main__":
    row.main(rows, __doc__)
