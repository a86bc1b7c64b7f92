"""Resident memory of a child that has fragmented its heap, 3 s after its last task, against before the first.

6 tasks, each of which makes 300,000 byte strings of 700 bytes (from malloc) and keeps each hundredth of them,
so that what is kept is scattered over all of the heap and holds a page each. In the first row it is kept
until the end of the task, in the second until the next task, in the third until the end of the measurement,
so that up to six times as many pages are held: 18,000 of 4 KiB are 74 MB, which no allocator can give back.
The fourth is the second with 100 bytes, which live in Python's own arenas: what is kept there holds whole
arenas. The last two have no bound.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import broker
import processes
import row
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

TASKS = 6
OBJECTS = 300_000
IDLE_SECONDS = 3.0
MUST = 1.25


@dataclass(frozen=True)
class Growth:
    """Resident bytes of a child before and after."""

    before: int
    after: int

    @property
    def ratio(self) -> float:
        return self.after / self.before

    def __str__(self) -> str:
        return f"{self.before / 1e6:.0f} to {self.after / 1e6:.0f} MB, {self.ratio:.2f} x"


def growth(
    url: str, pool: str, name: str, *args: object, tasks: int, idle: float, **environment: object
) -> Growth:
    """Run the tasks in one child, wait, and look at it from outside."""
    with Worker(url, pool, 1, **environment) as worker:
        worker.ready()
        pid = worker.run("nap", 0.0)["pid"]
        time.sleep(0.2)
        before = processes.resident_bytes(pid)
        for _ in range(tasks):
            if worker.run(name, *args)["pid"] != pid:
                raise worker.fail("the tasks did not run in one child")
        time.sleep(idle)
        return Growth(before, processes.resident_bytes(pid))


def result(measure: str, stock: Growth, mine: Growth, *, bound: bool) -> row.Row:
    """Both, and our ratio held to the bound."""
    must = f"<= {MUST:.2f} x" if bound else ""
    met = mine.ratio <= MUST if bound else None
    return row.Row(measure, f"prefork {stock}", str(mine), f"{mine.ratio:.2f} x", must, met=met)


def fragmented(
    url: str,
    options: row.Options,
    measure: str,
    length: int = 700,
    most: int = 1,
    *,
    scattered: bool = True,
    bound: bool = False,
    **environment: object,
) -> row.Row:
    """Fragment a child of prefork and one of ours; the arguments are those of the task."""
    arguments = (OBJECTS // 10 if options.quick else OBJECTS, length, most, scattered)
    stock, mine = (
        growth(url, pool, "fragment", *arguments, tasks=TASKS, idle=IDLE_SECONDS, **environment)
        for pool in ("prefork", options.ours)
    )
    return result(measure, stock, mine, bound=bound)


def rows(options: row.Options) -> Iterator[row.Row]:
    """Run prefork and our pool in turn, for each kind of object."""
    with broker.redis_url() as url:
        name = f"child after {TASKS} tasks of {OBJECTS:,} objects, 1 % kept until"
        yield fragmented(url, options, f"{name} the task's end", most=0, bound=True)
        yield fragmented(url, options, f"{name} the next task", bound=True)
        yield fragmented(url, options, f"{name} the end", most=TASKS)
        yield fragmented(url, options, "as the second, objects of 100 bytes", length=100)


if __name__ == "__main__":
    row.main(rows, __doc__)
