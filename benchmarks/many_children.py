"""CPU per no-op task with 100 children alive, against 5.

Both workers get their tasks through a window of 4 at a time, so that the number of children is all that
differs: see `turns` for how they are compared. All children have run a task, and stay.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import broker
import row
import turns
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

FEW, MANY = 5, 100
IN_FLIGHT = 4
TASKS = 400
BATCHES = 20


def rows(options: row.Options) -> Iterator[row.Row]:
    """Run our pool twice."""
    tasks, batches = (200, 3) if options.quick else (TASKS, BATCHES)
    pairs: list[tuple[float, float]] = []
    with broker.redis_url() as url:
        for repetition in range(options.repeats(1)):
            with (
                Worker(url, options.ours, FEW, MEMSAFE_MIN_CHILDREN=FEW) as few,
                Worker(url, options.ours, MANY, MEMSAFE_MIN_CHILDREN=MANY) as many,
            ):
                sides = [(few, FEW), (many, MANY)]
                pairs += turns.per_task_ms(
                    sides, tasks, batches, second_first=bool(repetition % 2), in_flight=IN_FLIGHT
                )
    name = f"CPU per no-op task, {MANY} children alive against {FEW}"
    yield row.paired(name, pairs, "ms", 1.05, against=f"{FEW} children:", digits=3)


if __name__ == "__main__":
    row.main(rows, __doc__)
