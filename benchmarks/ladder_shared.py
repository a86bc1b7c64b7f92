"""1 GiB with three workers of -c 8 in it, one queue: 60 tasks of 100 MB, each held 0.3 s."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import row
import scenario
from scenario import MB, MIB, Batch

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 1024 * MIB
WORKERS = 3
BATCHES = [Batch(60, "hold", (100 * MB, 0.3))]


@scenario.rows
def rows(url: str, options: row.Options) -> Iterator[row.Row]:
    """All done, nothing killed by the kernel."""
    for _ in range(options.repeats(3)):
        with scenario.Scene(url) as scene:
            cgroup = scene.container(LIMIT)
            for _ in range(WORKERS):
                scene.worker(cgroup, options.ours, 8)
            scene.must_be_ready()
            scene.send(BATCHES)
            outcome = scene.settle(timeout=90)
            shares = Counter(stamp["worker"] for stamp in scene.stamps("done"))
        yield row.Row(
            "1 GiB, 3 workers with -c 8, 60 tasks of 100 MB",
            "",
            f"{outcome}; done by each: {sorted(shares.values())}",
            must="all done, no kernel kill",
            met=outcome.safe,
        )


if __name__ == "__main__":
    row.main(rows, __doc__)
