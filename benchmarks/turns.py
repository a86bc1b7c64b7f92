"""Two workers take turns with short batches of no-op tasks.

Whatever else the machine does meets both alike, so the pairs of neighbouring batches can be compared when
the batches of one worker differ by more than what is looked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from workers import Worker


def warm(worker: Worker, children: int, tasks: int) -> None:
    """Have every child run something, then let a batch of no-ops through."""
    worker.ready()
    for _ in range(5):
        worker.nap(children, 1.0, timeout=120)
        if len({stamp["pid"] for stamp in worker.stamps("done")}) == children:
            break
    else:
        raise worker.fail(f"not all of {children} children run")
    worker.noops(tasks)


def per_task_ms(
    sides: Sequence[tuple[Worker, int]], tasks: int, batches: int, *, second_first: bool, in_flight: int = 0
) -> list[tuple[float, float]]:
    """CPU milliseconds per task of both workers, batch by batch; each comes with its number of children.

    `in_flight`: as for `Worker.noops`.
    """
    (first, _), (second, _) = sides
    turns = [second, first] if second_first else [first, second]
    for worker, children in sides:
        warm(worker, children, tasks)
    pairs = []
    for _ in range(batches):
        spent = {worker: worker.noops(tasks, in_flight=in_flight) / tasks * 1e3 for worker in turns}
        pairs.append((spent[first], spent[second]))
        turns.reverse()
    return pairs
