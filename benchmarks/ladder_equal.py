"""512 MiB: 80 tasks of 50 MB, each held 0.2 s; against prefork at its best safe concurrency.

Prefork is tried at -c 1, 2, 3 ... until two in a row were not safe; our pool has -c 20 and no setting.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import row
import scenario
from scenario import MB, MIB, Batch, Bounds, Work

if TYPE_CHECKING:
    from collections.abc import Iterator

WORK = Work(512 * MIB, [Batch(80, "hold", (50 * MB, 0.2))])
BOUNDS = Bounds(ratio=1.1, quick=5)


@scenario.rows
def rows(url: str, options: row.Options) -> Iterator[row.Row]:
    """All done, nothing killed by the kernel, and not slower."""
    measure = "512 MiB, 80 tasks of 50 MB"
    yield from scenario.against_prefork(url, options, measure, WORK, BOUNDS)


if __name__ == "__main__":
    row.main(rows, __doc__)
