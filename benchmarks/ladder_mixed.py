"""1 GiB: 100 tasks of 20 MB, then 12 of 280 MB in a row, then 60 of 20 MB, all of one name, each held 0.2 s.

Against prefork at its best safe concurrency: see `ladder_equal`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import row
import scenario
from scenario import MB, MIB, Batch, Bounds, Work

if TYPE_CHECKING:
    from collections.abc import Iterator

SMALL, BIG = (20 * MB, 0.2), (280 * MB, 0.2)
WORK = Work(1024 * MIB, [Batch(100, "hold", SMALL), Batch(12, "hold", BIG), Batch(60, "hold", SMALL)])
BOUNDS = Bounds(ratio=0.5, quick=3, clean=True)


@scenario.rows
def rows(url: str, options: row.Options) -> Iterator[row.Row]:
    """All done, nothing killed by anyone, nothing run twice, and twice as fast."""
    measure = "1 GiB, 100 tasks of 20 MB, 12 of 280 MB, 60 of 20 MB"
    yield from scenario.against_prefork(url, options, measure, WORK, BOUNDS)


if __name__ == "__main__":
    row.main(rows, __doc__)
