"""600 MiB: 500 tasks that each keep 2 MB for ever, against the same tasks without the leak in the same pool.

Each uses the CPU for 20 ms. The times are compared in pairs; the median of the ratios is held to the bound.
The same of the CPU of the whole tree is for information: all cores are busy, so that it says much the same,
and what else runs on the machine does not count in it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import row
import scenario
from scenario import MB, MIB, Batch, Work

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scenario import Outcome

LIMIT = 600 * MIB
TASKS = 500
CPU_SECONDS = 0.02
MUST = 1.05


@scenario.rows
def rows(url: str, options: row.Options) -> Iterator[row.Row]:
    """All done, no kernel kill, and not much slower."""
    pairs: list[tuple[Outcome, Outcome]] = []
    for _ in range(options.repeats(5)):
        pairs.append((leaking(url, options.ours, False), leaking(url, options.ours, True)))
        for what, outcome in zip(("nothing", "2 MB each"), pairs[-1], strict=True):
            measure = f"600 MiB, {TASKS} tasks that keep {what}"
            yield row.Row(measure, "", str(outcome), must="all done", met=outcome.safe)
    never = float("inf")
    seconds = [(without.seconds or never, leak.seconds or never) for without, leak in pairs]
    found = row.paired("time with the leak", seconds, "s", MUST, against="without", digits=1)
    all_safe = all(outcome.safe for pair in pairs for outcome in pair)
    yield replace(found, met=found.met and all_safe)
    if all_safe:
        cpu = [(without.cpu_seconds or 0.0, leak.cpu_seconds or 0.0) for without, leak in pairs]
        yield row.paired("CPU with the leak", cpu, "s", against="without", digits=1)


def leaking(url: str, pool: str, keep: bool) -> Outcome:
    """Run the tasks once."""
    work = Work(LIMIT, [Batch(TASKS, "leak", (2 * MB, CPU_SECONDS, keep))])
    return scenario.run(url, pool, scenario.CONCURRENCY, work)


if __name__ == "__main__":
    row.main(rows, __doc__)
