"""`pool_restart` of 20 children under load: throughput in every second, against the seconds before.

Tasks that sleep 0.1 s, more than can be done: 20 at a time, about 200 each second. "Every second" is each
that begins at a tenth of a second, from the restart until 10 s later; it is held against the median of the
seconds before. The container is larger than it has to be.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING

import row
import scenario
from scenario import Batch

if TYPE_CHECKING:
    from collections.abc import Iterator

BEFORE, AFTER = 6, 10
TASKS = Batch(200 * (BEFORE + AFTER + 2), "nap", (0.1,))
LIMIT = 4 << 30
MUST = 0.8


@scenario.rows
def rows(url: str, options: row.Options) -> Iterator[row.Row]:
    """Ours is held to the bound; prefork for information."""
    for pool in ("prefork", options.ours):
        for _ in range(options.repeats(3)):
            yield restarted(url, pool, held=pool == options.ours)


def restarted(url: str, pool: str, *, held: bool) -> row.Row:
    """Restart once."""
    with scenario.Scene(url) as scene:
        worker = scene.worker(scene.container(LIMIT), pool, scenario.CONCURRENCY, BENCH_POOL_RESTARTS=1)
        scene.must_be_ready()
        scene.send([TASKS])
        time.sleep(BEFORE)
        at = time.monotonic()
        worker.lane.app.control.broadcast("pool_restart", destination=[worker.name])
        time.sleep(AFTER)
        done = scene.stamps("done")
        scene.kill()
    times = [stamp["at"] for stamp in done]
    first = min(times, default=at)
    usual = statistics.median(count(times, at - second) for second in range(1, int(at - first)))
    lowest = min(count(times, at + tenth / 10) for tenth in range((AFTER - 1) * 10))
    row.say(f"{pool}, each second: {[count(times, at + second) for second in range(-BEFORE, AFTER)]}")
    old = {stamp["pid"] for stamp in done if stamp["at"] < at}
    last_old = max(stamp["at"] for stamp in done if stamp["pid"] in old) - at
    new = {stamp["pid"] for stamp in done} - old
    return row.Row(
        f"pool_restart of {len(old)} children under load",
        "" if held else f"{pool}: {lowest / usual:.0%}",
        "" if not held else f"{lowest / usual:.0%}",
        f"lowest {lowest}, usual {usual:.0f} tasks/s; {len(new)} new, last old one after {last_old:.1f} s",
        f">= {MUST:.0%}" if held else "",
        met=lowest >= MUST * usual if held else None,
    )


def count(times: list[float], start: float) -> int:
    """Count what was done in the second that begins then."""
    return sum(start <= at < start + 1 for at in times)


if __name__ == "__main__":
    row.main(rows, __doc__)
