"""Memory and time to the first results at `-c 4`, with pandas and pyarrow imported, against prefork.

pyarrow's allocator has a thread of its own; both pools fork beside it.
Time is from the tasks being there to the last one done, less the 0.2 s that they take. Needs pyarrow.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import broker
import row
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

TASKS = 4
SECONDS = 0.2


def first_results(url: str, pool: str) -> tuple[float, float]:
    """Measure PSS of the tree 1 s after the first results, in MB, and the seconds to them."""
    with Worker(url, pool, TASKS, BENCH_IMPORTS="pyarrow") as worker:
        worker.ready()
        time.sleep(1)
        begun = time.monotonic()
        worker.nap(TASKS, SECONDS)
        seconds = time.monotonic() - begun - SECONDS
        time.sleep(1)
        return worker.pss_mb(), seconds


def rows(options: row.Options) -> Iterator[row.Row]:
    """Run prefork and our pool in turn."""
    pairs = []
    with broker.redis_url() as url:
        for _ in range(options.repeats(3)):
            pairs.append((first_results(url, "prefork"), first_results(url, options.ours)))
            (stock_mb, stock), (our_mb, ours) = pairs[-1]
            row.say(
                f"first results: prefork {stock_mb:.0f} MB {stock:.2f} s, ours {our_mb:.0f} MB {ours:.2f} s"
            )
    memory = [(stock[0], ours[0]) for stock, ours in pairs]
    yield row.paired("pandas and pyarrow, after the first results", memory, "MB", 1.0)
    yield row.paired("the same, time to them", [(stock[1], ours[1]) for stock, ours in pairs], "s", digits=2)


if __name__ == "__main__":
    row.main(rows, __doc__)
