"""Memory of an idle worker of up to 20 children, 5 s after it is ready, against `-P solo`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import broker
import row
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator


def idle_mb(url: str, pool: str) -> float:
    """Measure PSS of the tree 5 s after ready."""
    with Worker(url, pool, 20) as worker:
        worker.ready()
        time.sleep(5)
        return worker.pss_mb()


def rows(options: row.Options) -> Iterator[row.Row]:
    """Run solo and our pool in turn; prefork too, for information."""
    pairs, preforks = [], []
    with broker.redis_url() as url:
        for _ in range(options.repeats(3)):
            pairs.append((idle_mb(url, "solo"), idle_mb(url, options.ours)))
            preforks.append((idle_mb(url, "prefork"), pairs[-1][1]))
            row.say(
                f"idle: solo {pairs[-1][0]:.1f}, ours {pairs[-1][1]:.1f}, prefork {preforks[-1][0]:.1f} MB"
            )
    yield row.paired("idle memory, 5 s after ready", pairs, "MB", 1.15, 1.05, against="solo")
    yield row.paired("the same, against prefork", preforks, "MB")


if __name__ == "__main__":
    row.main(rows, __doc__)
