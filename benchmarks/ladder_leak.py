"""600 MiB: 500 tasks that each keep 2 MB for ever, against prefork where nobody has to be replaced for it.

Each uses the CPU for 20 ms. A task that keeps its memory has page faults that one which gives it back for
the next task has not, with any pool, so prefork does the same tasks, in 3 GiB; the times are compared in
pairs, and the median of the ratios is held to the bound. What the same tasks take without the leak is for
information, and so is the CPU time of the whole tree: all cores are busy, so that it says much the same,
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
ROOMY = 3072 * MIB
TASKS = 500
CPU_SECONDS = 0.02
MUST = 1.05


@scenario.rows
def rows(url: str, options: row.Options) -> Iterator[row.Row]:
    """All done, no kernel kill, and not much slower."""
    runs: list[tuple[Outcome, Outcome, Outcome]] = []
    for _ in range(options.repeats(5)):
        without, leak = leaking(url, options.ours, LIMIT, keep=False), leaking(url, options.ours, LIMIT)
        runs.append((without, leak, leaking(url, "prefork", ROOMY)))
        names = "600 MiB, nothing kept", "600 MiB, 2 MB each kept", "prefork in 3 GiB, 2 MB each kept"
        for name, outcome in zip(names, runs[-1], strict=True):
            yield row.Row(f"{TASKS} tasks, {name}", "", str(outcome), must="all done", met=outcome.safe)
    never = float("inf")
    seconds = [tuple(outcome.seconds or never for outcome in run) for run in runs]
    found = row.paired(
        "time with the leak",
        [(stock, leak) for _, leak, stock in seconds],
        "s",
        MUST,
        against="prefork in 3 GiB",
        digits=1,
    )
    all_safe = all(outcome.safe for run in runs for outcome in run)
    yield replace(found, met=found.met and all_safe)
    if all_safe:
        cpu = [(stock.cpu_seconds or 0.0, leak.cpu_seconds or 0.0) for _, leak, stock in runs]
        yield row.paired("CPU with the leak", cpu, "s", against="prefork in 3 GiB", digits=1)
        pairs = [(without, leak) for without, leak, _ in seconds]
        yield row.paired("time with the leak", pairs, "s", against="without it", digits=1)


def leaking(url: str, pool: str, limit_bytes: int, *, keep: bool = True) -> Outcome:
    """Run the tasks once."""
    work = Work(limit_bytes, [Batch(TASKS, "leak", (2 * MB, CPU_SECONDS, keep))])
    return scenario.run(url, pool, scenario.CONCURRENCY, work)


if __name__ == "__main__":
    row.main(rows, __doc__)
