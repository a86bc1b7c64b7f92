"""From 1 GiB to 256 MiB while 6 children run: how soon the pool knows, and whether anything is lost.

Six tasks have 15 MB each for 4 s; the limit is lowered when all have begun. 2 s later come 40 tasks of
50 MB, of which 1 GiB would hold many at once. Version 1 of cgroups refuses a limit below what is in use: it
is tried until it is accepted.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import row
import scenario
from scenario import MB, MIB, Batch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from memory_cgroup import MemoryCgroup

LIMIT, LOWERED = 1024 * MIB, 256 * MIB
RUNNING = Batch(6, "hold", (15 * MB, 4.0))
AFTER = Batch(40, "hold", (50 * MB, 0.2))
MUST_SECONDS = 2.0


@scenario.rows
def rows(url: str, options: row.Options) -> Iterator[row.Row]:
    """Known within 2 s, nothing lost, nothing killed."""
    for _ in range(options.repeats(3)):
        yield lowered(url, options.ours)


def lowered(url: str, pool: str) -> row.Row:
    """Lower it once."""
    with scenario.Scene(url) as scene:
        cgroup = scene.container(LIMIT)
        worker = scene.worker(cgroup, pool, scenario.CONCURRENCY)
        scene.must_be_ready()
        scene.send([RUNNING])
        scene.wait(lambda: len(scene.stamps("begun")) == RUNNING.count, timeout=10)
        time.sleep(0.3)  # they have what they want
        began = time.monotonic()
        accepted = scene.wait(lambda: accepts(cgroup), timeout=10, interval=0.02)
        lowered_at = time.monotonic()
        known = scene.wait(
            lambda: scene.pool_stats(worker).get("memory", {}).get("limit") == LOWERED,
            timeout=10,
            interval=0.02,
        )
        seconds = time.monotonic() - lowered_at
        time.sleep(max(0.0, MUST_SECONDS - seconds))
        scene.send([AFTER])
        outcome = scene.settle(timeout=60)
    said = f"known after {seconds:.2f} s" if known else "not known within 10 s"
    if not accepted:
        said = "the lower limit was not accepted"
    elif lowered_at - began > 0.1:
        said += f" (it was accepted after {lowered_at - began:.1f} s)"
    return row.Row(
        "lowered from 1 GiB to 256 MiB while 6 children run",
        "",
        f"{said}; {outcome}",
        must=f"{MUST_SECONDS:g} s, nothing lost",
        met=known and accepted and seconds <= MUST_SECONDS and outcome.safe,
    )


def accepts(cgroup: MemoryCgroup) -> bool:
    """Whether the limit could be lowered."""
    try:
        cgroup.limit(LOWERED)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    row.main(rows, __doc__)
