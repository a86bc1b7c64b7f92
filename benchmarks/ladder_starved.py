"""Two workers on one queue, one in 256 MiB, one in 2 GiB: what the first keeps that it cannot run.

Both have -c 20. 20 tasks of 80 MB, so that sizes can be known, then 100 of them, each held 0.3 s. While these
run, the first worker is asked again and again what it has reserved and not begun. What is still there 0.25 s
later, it holds.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import row
import scenario
from scenario import MB, MIB, Batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workers import Worker

STARVED, LARGE = 256 * MIB, 2048 * MIB
FIRST, MORE = Batch(20, "hold", (80 * MB, 0.3)), Batch(100, "hold", (80 * MB, 0.3))
HELD_SECONDS = 0.25
MUST = 1


@scenario.rows
def rows(url: str, options: row.Options) -> Iterator[row.Row]:
    """It holds one at most, and all is done."""
    for _ in range(options.repeats(3)):
        yield starved(url, options.ours)


def starved(url: str, pool: str) -> row.Row:
    """Run the tasks, and look at what is reserved."""
    with scenario.Scene(url) as scene:
        hungry = scene.worker(scene.container(STARVED), pool, scenario.CONCURRENCY)
        scene.worker(scene.container(LARGE), pool, scenario.CONCURRENCY)
        scene.must_be_ready()
        scene.send([FIRST])
        scene.settle(timeout=60)
        scene.send([MORE])
        seen: list[tuple[float, set[str]]] = []
        scene.wait(lambda: look(scene, hungry, seen), timeout=90, interval=0.05)
        outcome = scene.settle(timeout=5)
        own = sum(stamp["worker"] == hungry.pid for stamp in scene.stamps("done"))
    held = max(
        (len(now & before) for at, now in seen for then, before in seen if at - then >= HELD_SECONDS),
        default=0,
    )
    most = max((len(ids) for _, ids in seen), default=0)
    return row.Row(
        "two workers on one queue, one in 256 MiB: what that one holds",
        "",
        f"holds up to {held} ({most} for a moment), did {own}; {outcome}",
        must=f"<= {MUST}, all done",
        met=bool(seen) and held <= MUST and outcome.safe,
    )


def look(scene: scenario.Scene, worker: Worker, seen: list[tuple[float, set[str]]]) -> bool:
    """Note what the worker has reserved; whether all tasks are over."""
    with contextlib.suppress(RuntimeError):
        seen.append(
            (time.monotonic(), {request["id"] for request in worker.lane.ask(worker.name, "reserved", 2)})
        )
    return scene.over()


if __name__ == "__main__":
    row.main(rows, __doc__)
