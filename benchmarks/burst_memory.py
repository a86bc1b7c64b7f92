"""Memory after 20 one-second tasks at once, against prefork: each of 20 children has run one and is idle."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import broker
import row
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

TASKS = 20


def burst_mb(url: str, pool: str) -> float:
    """Measure PSS of the tree 1 s after the last of the tasks, with all children still there."""
    with Worker(url, pool, TASKS) as worker:
        worker.ready()
        worker.nap(TASKS, 1.0)
        time.sleep(1)
        pids = {stamp["pid"] for stamp in worker.stamps("done")}
        if len(pids) != TASKS:
            row.say(f"{pool}: only {len(pids)} children ran the {TASKS} tasks")
        return worker.pss_mb()


def rows(options: row.Options) -> Iterator[row.Row]:
    """Run prefork and our pool in turn."""
    pairs = []
    with broker.redis_url() as url:
        for _ in range(options.repeats(3)):
            pairs.append((burst_mb(url, "prefork"), burst_mb(url, options.ours)))
            row.say(f"after a burst: prefork {pairs[-1][0]:.1f}, ours {pairs[-1][1]:.1f} MB")
    yield row.paired(f"memory after {TASKS} one-second tasks at once", pairs, "MB", 0.30, 0.20)


if __name__ == "__main__":
    row.main(rows, __doc__)
