"""Run every `ladder_*` script, one after the other, and print one table: about 20 minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ladder_equal
import ladder_giant
import ladder_leak
import ladder_lowered
import ladder_mixed
import ladder_restart
import ladder_sampler
import ladder_shared
import ladder_starved
import ladder_unknown
import row

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPTS = (
    *(ladder_equal, ladder_mixed, ladder_unknown, ladder_giant, ladder_leak),
    *(ladder_lowered, ladder_shared, ladder_starved, ladder_sampler, ladder_restart),
)


def rows(options: row.Options) -> Iterator[row.Row]:
    """All rows, in the order above."""
    for script in SCRIPTS:
        row.say(script.__name__)
        yield from script.rows(options)


if __name__ == "__main__":
    row.main(rows, __doc__)
