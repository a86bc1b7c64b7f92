"""What the pool says a task needed at its peak, against what the task asked the allocator for.

200 tasks of 1 to 500 MB in one child, in an order that is the same each time: sizes are evenly spread on a
logarithmic scale and shuffled, so most are small and come after larger ones, which leave free heap behind. A
quarter each has one bytearray, one numpy array, objects of 700 bytes (from malloc) and objects of 100 bytes
(from Python's own arenas). The pool's number is `peaks[name].last` in `inspect stats` right after the task.

The truth is computed by the task: the length of the block; for objects their number times `sys.getsizeof`,
rounded up to 16 as the allocator does (with 8 more for malloc's head, so 752 and 144 bytes), and their list.
What the allocator and the interpreter need beyond that counts as an error of the pool's number.

Once one after the other without a pause, once with pauses in which the child gives memory back. A peak that
is not called exact is a lower bound, by the pool's own words: how many are, and how many of those that are
called exact miss the bound, is in the row. The bound is for all of them.
"""

from __future__ import annotations

import random
import time
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
MUST_SHARE, MUST_BYTES = 0.02, 1e6
TRIM_IDLE, PAUSE = 0.05, 0.12


@dataclass(frozen=True)
class Sample:
    """One task: what it asked for, and what the pool said."""

    kind: str
    truth: int
    peak: int
    exact: bool

    @property
    def error(self) -> int:
        """What the pool's number is wrong by, in bytes."""
        return abs(self.peak - self.truth)

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


def measure(url: str, pool: str, count: int, pause: float, **environment: object) -> list[Sample]:
    """Run all tasks, one at a time."""
    samples = []
    with Worker(url, pool, 1, **environment) as worker:
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
            time.sleep(pause)
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
    exact = [sample for sample in samples if sample.exact]
    largest = max(samples, key=lambda sample: sample.error)
    relative = max(sample.error / sample.truth for sample in samples)
    over_1_mb = max((s.error / s.truth for s in samples if s.error > MUST_BYTES), default=0.0)
    return row.Row(
        measure,
        f"truth {min(s.truth for s in samples) / 1e6:.0f} to {max(s.truth for s in samples) / 1e6:.0f} MB",
        f"error up to {largest.error / 1e6:.2f} MB, {relative:.1%} ({over_1_mb:.1%} where above 1 MB); "
        f"{len(exact)} of {len(samples)} called exact, {sum(not s.met for s in exact)} of them wrongly",
        f"{len(wrong)} outside",
        must=f"<= {MUST_SHARE:.0%} or {MUST_BYTES / 1e6:.0f} MB, all",
        met=not wrong,
    )


def rows(options: row.Options) -> Iterator[row.Row]:
    """Both passes; stock has no such number."""
    count = 20 if options.quick else TASKS
    with broker.redis_url() as url:
        yield result(f"peak of each of {count} tasks, no pause", measure(url, options.ours, count, 0.0))
        samples = measure(url, options.ours, count, PAUSE, MEMSAFE_TRIM_IDLE=TRIM_IDLE)
        yield result("the same, with pauses in which the child trims", samples)


if __name__ == "__main__":
    row.main(rows, __doc__)
