"""Resident memory of a child right after tasks that had 60 buffers of 8 MB at a time, against that before.

Trim is off: what is given back is given back by freeing it. In the first row it is one task; in the second
three, each of which keeps 100 kB that it made when all buffers were there: by then glibc, left alone, takes
blocks of that size from its heap, and what is kept above them holds them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import broker
import fragmentation
import row

if TYPE_CHECKING:
    from collections.abc import Iterator

BUFFERS = 60
BUFFER_BYTES = 8_000_000
KEPT_BYTES = 100_000
SETTLE_SECONDS = 0.1  # "done" is stamped while the task still has its buffers


def rows(options: row.Options) -> Iterator[row.Row]:
    """Run prefork and our pool in turn."""
    name = f"child after {BUFFERS} buffers of {BUFFER_BYTES / 1e6:.0f} MB, trim off"
    with broker.redis_url() as url:
        for measure, tasks, keep in (
            (name, 1, 0),
            (f"the same, three times, {KEPT_BYTES // 1000} kB kept", 3, KEPT_BYTES),
        ):
            stock, mine = (
                fragmentation.growth(
                    url,
                    pool,
                    "buffers",
                    BUFFERS,
                    BUFFER_BYTES,
                    keep,
                    tasks=tasks,
                    idle=SETTLE_SECONDS,
                    MEMSAFE_TRIM_IDLE="none",
                )
                for pool in ("prefork", options.ours)
            )
            yield fragmentation.result(measure, stock, mine, bound=True)


if __name__ == "__main__":
    row.main(rows, __doc__)
