"""Run every benchmark but the `ladder_*` scripts, one after the other, and print one table."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

import accounting
import burst_memory
import celery
import fragmentation
import idle_memory
import jemalloc
import many_children
import native_calls
import peak_accuracy
import ready_time
import real_work
import report_cost
import row
import shared_model
import slow_imports
import start_latency
import task_cpu

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRIPTS = (
    *(idle_memory, burst_memory, ready_time, start_latency, shared_model, slow_imports),
    *(task_cpu, real_work),
    *(peak_accuracy, report_cost, many_children, accounting),
    *(fragmentation, jemalloc, native_calls),
)


def rows(options: row.Options) -> Iterator[row.Row]:
    """All rows, in the order above."""
    row.say(f"Celery {celery.__version__}, Python {platform.python_version()}, {platform.platform()}")
    for script in SCRIPTS:
        row.say(script.__name__)
        yield from script.rows(options)


if __name__ == "__main__":
    row.main(rows, __doc__)
