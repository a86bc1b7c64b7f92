"""What the pool says a task needed at its peak, against what the task asked the allocator for.

200 tasks of 1 to 500 MB in one child, in an order that is the same each time: sizes are evenly spread on a
logarithmic scale and shuffled, so most are small and come after larger ones, which leave free heap behind. A
quarter each has one bytearray, one numpy array, objects of 700 bytes (from malloc) and objects of 100 bytes
(from Python's own arenas). The pool's number is `peaks[name].last` in `inspect stats` right after the task.

The truth is computed by the task: the length of the block; for objects their number times `sys.getsizeof`,
rounded up to 16 as the allocator does (with 8 more for malloc's head, so 752 and 144 bytes), and their list.
What the allocator and the interpreter need beyond that counts as an error of the pool's number.

All run one after the other without a pause. A peak that is not called exact is a lower bound, by the pool's
own words: it must not be above the truth; those that are called exact must be right. How many there are is in
the row: the first of a child, and those before which it has trimmed to find out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import broker
import row
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

TASKS = 200
SMALLEST, LARGEST = 1e6, 500e6
KINDS = ("take_bytearray", "take_numpy", "take_malloced", "take_small")
SEED = 20
MUST_SHARE, MUST_BYTES = 0.05, 4 << 20


@dataclass(frozen=True)
class Sample:
    """One task: what it asked for, and what the pool said."""

    kind: str
    truth: int
    peak: int
    exact: bool

    @property
    def error(self) -> int:
        """What the pool's number is wrong by, in bytes; a lower bound may be too low."""
        return abs(self.peak - self.truth) if self.exact else max(self.peak - self.truth, 0)

    @property
    def met(self) -> bool:
        """Whether it is within the bound."""
        return self.error <= max(MUST_SHARE * self.truth, MUST_BYTES)

    def __str__(self) -> str:
        name = self.kind.removeprefix("take_")
        text = f"{name} {self.truth / 1e6:.1f} MB reported as {self.peak / 1e6:.1f}"
        return text + ("" if self.exact else ", not exact")


def plan(count: int) -> list[tuple[str, int]]:
    """Return the tasks, in their order."""
    ratio = LARGEST / SMALLEST
    tasks = [(KINDS[i % len(KINDS)], int(SMALLEST * ratio ** (i / (count - 1)))) for i in range(count)]
    random.Random(SEED).shuffle(tasks)
    return tasks


def measure(url: str, pool: str, count: int) -> list[Sample]:
    """Run all tasks, one at a time."""
    samples = []
    with Worker(url, pool, 1) as worker:
        worker.ready()
        before = {kind: {"count": 0, "exact": 0} for kind in KINDS}
        for kind, size in plan(count):
            truth = worker.run(kind, size)["bytes"]
            while (after := worker.stats()["peaks"].get(kind, before[kind]))["count"] == before[kind][
                "count"
            ]:
                pass
            samples.append(Sample(kind, truth, after["last"], after["exact"] > before[kind]["exact"]))
            before[kind] = after
        row.say(f"gave memory back {worker.stats()['trims']} times")
        pids = {stamp["pid"] for stamp in worker.stamps("done")}
        if len(pids) != 1:
            raise worker.fail(f"{len(pids)} children ran the tasks")
    return samples


def result(measure: str, samples: list[Sample]) -> row.Row:
    """Put the errors in words."""
    wrong = [sample for sample in samples if not sample.met]
    for sample in wrong:
        row.say(f"{measure}: {sample}")
    exact = sum(sample.exact for sample in samples)
    largest = max(samples, key=lambda sample: sample.error)
    return row.Row(
        measure,
        f"truth {min(s.truth for s in samples) / 1e6:.0f} to {max(s.truth for s in samples) / 1e6:.0f} MB",
        f"{exact} of {len(samples)} called exact; error up to {largest.error / 1e6:.2f} MB, "
        f"{largest.error / largest.truth:.1%} of it",
        f"{len(wrong)} outside",
        must=f"<= {MUST_SHARE:.0%} or {MUST_BYTES >> 20} MiB, all",
        met=not wrong,
    )


def rows(options: row.Options) -> Iterator[row.Row]:
    """Run our pool; stock has no such number."""
    count = 20 if options.quick else TASKS
    with broker.redis_url() as url:
        yield result(f"peak of each of {count} tasks", measure(url, options.ours, count))


if __name__ == "__main__":
    row.main(rows, __doc__)
