"""Memory of 4 children with a 400 MB numpy array loaded at import, against `-P solo` with the same.

Each child has run a task that reads the whole array.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import broker
import row
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

CHILDREN = 4
MODEL_MB = 400


def model_mb(url: str, pool: str) -> float:
    """Measure PSS of the tree 1 s after every child read the array."""
    with Worker(url, pool, CHILDREN, BENCH_MODEL_MB=MODEL_MB) as worker:
        worker.ready()
        worker.nap(1 if pool == "solo" else CHILDREN, 1.0)
        time.sleep(1)
        return worker.pss_mb()


def rows(options: row.Options) -> Iterator[row.Row]:
    """Run solo and our pool in turn; prefork too, for information."""
    pairs, preforks = [], []
    with broker.redis_url() as url:
        for _ in range(options.repeats(3)):
            pairs.append((model_mb(url, "solo"), model_mb(url, options.ours)))
            preforks.append((model_mb(url, "prefork"), pairs[-1][1]))
            row.say(
                f"model: solo {pairs[-1][0]:.1f}, ours {pairs[-1][1]:.1f}, prefork {preforks[-1][0]:.1f} MB"
            )
    name = f"{CHILDREN} children, {MODEL_MB} MB array loaded at import"
    yield row.paired(name, pairs, "MB", 1.15, 1.05, against="solo")
    yield row.paired("the same, against prefork", preforks, "MB")


if __name__ == "__main__":
    row.main(rows, __doc__)
