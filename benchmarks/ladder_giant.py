"""1 GiB: one task of 2 GB among 40 of 30 MB, all with acks_late; also with reject_on_worker_lost.

The 40 are each held 0.2 s. The one can not be done by anyone: it has to fail with MemoryLimitExceeded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import row
import scenario
from scenario import MB, MIB, Batch, Work

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 1024 * MIB
OTHERS = 40
ERROR = "MemoryLimitExceeded"


@scenario.rows
def rows(url: str, options: row.Options) -> Iterator[row.Row]:
    """The others are done, the worker lives, and the kernel has killed nothing."""
    for name in ("hold_late", "hold_requeued"):
        small, giant = Batch(OTHERS // 2, name, (30 * MB, 0.2)), Batch(1, name, (2000 * MB, 0.2))
        work = Work(LIMIT, [small, giant, small], timeout=90)
        for _ in range(options.repeats(1)):
            outcome = scenario.run(url, options.ours, scenario.CONCURRENCY, work)
            explained = outcome.done == OTHERS and outcome.errors == {ERROR: 1}
            yield row.Row(
                f"1 GiB, one task of 2 GB among 40 of 30 MB, {name}",
                "",
                str(outcome),
                must=f"40 done, 1 {ERROR}, no kernel kill",
                met=explained and outcome.alive and not outcome.oom_kills,
            )


if __name__ == "__main__":
    row.main(rows, __doc__)
