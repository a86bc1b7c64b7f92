"""1 GiB: 10 tasks of 300 MB that nobody knows, at once, on a warm pool of 10 idle children.

The children have each run a task that sleeps. Each task writes its memory as fast as one core can, and holds
it 0.2 s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import row
import scenario
from scenario import MB, MIB, Batch

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 1024 * MIB
CHILDREN = 10
BATCHES = [Batch(CHILDREN, "hold", (300 * MB, 0.2))]
TRIES = 5


@scenario.rows
def rows(url: str, options: row.Options) -> Iterator[row.Row]:
    """All done, nothing killed by anyone, each time."""
    for _ in range(options.repeats(TRIES)):
        with scenario.Scene(url) as scene:
            worker = scene.worker(scene.container(LIMIT), options.ours, scenario.CONCURRENCY)
            scene.must_be_ready()
            for _ in range(TRIES):  # they may not all be started for the first naps
                worker.nap(CHILDREN, 1.0)
                if scene.pool_stats(worker).get("children", CHILDREN) >= CHILDREN:
                    break
            children = scene.pool_stats(worker).get("children", scenario.CONCURRENCY)
            scene.send(BATCHES)
            outcome = scene.settle(timeout=60)
        measure = f"1 GiB, 10 unknown tasks of 300 MB at once, {children} idle children"
        yield row.Row(measure, "", str(outcome), must="all done, none killed", met=outcome.clean)


if __name__ == "__main__":
    row.main(rows, __doc__)
