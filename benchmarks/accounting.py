"""What the pool says it has, against what the kernel has charged to it, each second for 60 s.

The worker is in a memory cgroup of its own, with up to 20 children that run a mixture of tasks: some
allocate and hold it for a moment, some cache, fragment, sleep or do nothing. Two comparisons:

* `memory.total` of `inspect stats`, and what the cgroup says is no memory of processes (the kernel's own,
  pages of files in use), against all that is charged to the cgroup less inactive file pages.
* The stricter one: `memory.total` against the anonymous memory in the cgroup's `memory.stat`.

The children are stopped (SIGSTOP) for the 0.1 s of reading: a task that takes 60 MB and frees them needs
less time than there is between two readings. The cgroup is read right before and right after the stats, and
the mean counts. Where the two differ by more than 1 % they are read again, up to 20 times in that second; how
many of the samples were never steady is in the row. The bound is for the largest error of all.

Needs root and a hierarchy of memory cgroups that may be written to; without, a row says that it was not run.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import broker
import psutil
import row
from memory_cgroup import Charged, MemoryCgroup, UnavailableError
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

CHILDREN = 20
SECONDS = 60
SEED = 20
MUST = 0.05
STEADY = 0.01
SETTLE_SECONDS = 0.05
TRIES = 20
PENDING = 10  # tasks that are sent ahead of the worker
MEGABYTE = 1_000_000


@dataclass(frozen=True)
class Sample:
    """The cgroup before and after, and what the pool said in between, in bytes."""

    before: Charged
    total: int
    after: Charged

    @property
    def used(self) -> float:
        return (self.before.used + self.after.used) / 2

    @property
    def anonymous(self) -> float:
        return (self.before.anonymous + self.after.anonymous) / 2

    @property
    def steady(self) -> bool:
        """Whether memory stayed as it was while the numbers were read."""
        moved = abs(self.after.anonymous - self.before.anonymous)
        return moved <= STEADY * self.anonymous

    @property
    def error(self) -> float:
        """Relative error against all that is charged."""
        said = self.total + (self.before.others + self.after.others) / 2
        return said / self.used - 1

    @property
    def strict_error(self) -> float:
        """Relative error against anonymous memory alone."""
        return self.total / self.anonymous - 1


def task(chance: random.Random) -> tuple[str, list[object]]:
    """Choose the next task."""
    kind = chance.choice(["allocate", "allocate", "cache", "fragment", "sleep", "nothing"])
    if kind == "allocate":
        names = ["take_bytearray", "take_numpy", "take_malloced", "take_small"]
        return chance.choice(names), [chance.randrange(1, 60) * MEGABYTE, chance.uniform(0.0, 1.5)]
    if kind == "cache":
        return "cache", [chance.randrange(MEGABYTE // 10, 2 * MEGABYTE)]
    if kind == "fragment":
        return "fragment", [chance.randrange(10_000, 60_000), 700, 3, True]
    return ("nap", [chance.uniform(0.2, 2.0)]) if kind == "sleep" else ("noop", [])


@contextlib.contextmanager
def stopped(worker: Worker) -> Iterator[None]:
    """Stop the worker's children, so that nothing moves between the readings."""
    children = psutil.Process(worker.pid).children()
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.suspend()
    try:
        time.sleep(SETTLE_SECONDS)  # what they have said has to be read
        yield
    finally:
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.resume()


def sample(worker: Worker, cgroup: MemoryCgroup) -> Sample:
    """Read all, again and again until it is steady."""
    for _ in range(TRIES):
        with stopped(worker):
            before = cgroup.charged()
            found = Sample(before, worker.stats()["memory"]["total"], cgroup.charged())
        if found.steady:
            break
    return found


def measure(url: str, pool: str, seconds: float) -> list[Sample]:
    """Run the mixture, and read every second."""
    chance = random.Random(SEED)
    samples: list[Sample] = []
    with MemoryCgroup() as cgroup, broker_worker(url, pool, cgroup) as worker:
        worker.ready()
        end = time.monotonic() + seconds
        at = time.monotonic() + 2
        while time.monotonic() < end:
            if worker.lane.pending() < PENDING:
                name, arguments = task(chance)
                worker.lane.send(name, *arguments)
            time.sleep(0.02)
            if time.monotonic() >= at:
                samples.append(sample(worker, cgroup))
                at += 1
        stats = worker.stats()
        row.say(
            f"{stats['tasks']} tasks, {stats['children']} children, {stats['memory']['total'] / 1e6:.0f} MB"
        )
    return samples


def broker_worker(url: str, pool: str, cgroup: MemoryCgroup) -> Worker:
    """Make a worker that runs in the cgroup."""
    worker = Worker(url, pool, CHILDREN)
    worker.command = cgroup.inside(worker.command)
    return worker


def result(measure: str, samples: list[Sample], against: list[float], errors: list[float]) -> row.Row:
    """Put the errors in words."""
    sizes = sorted(map(abs, errors))
    p95 = sizes[int(len(sizes) * 0.95)]
    restless = sum(not sample.steady for sample in samples)
    return row.Row(
        measure,
        f"cgroup {min(against) / 1e6:.0f} to {max(against) / 1e6:.0f} MB",
        f"median {statistics.median(errors):+.1%}",
        f"error {statistics.median(sizes):.1%}, p95 {p95:.1%}, max {sizes[-1]:.1%} "
        f"(n={len(sizes)}, {restless} not steady)",
        must=f"<= {MUST:.0%}",
        met=sizes[-1] <= MUST,
    )


def rows(options: row.Options) -> Iterator[row.Row]:
    """Run our pool; stock has no such number."""
    name = f"the pool's account of its memory, {CHILDREN} children"
    try:
        with broker.redis_url() as url:
            samples = measure(url, options.ours, 10 if options.quick else SECONDS)
    except UnavailableError as error:
        yield row.Row(name, "", f"not run: {error}")
        return
    for each in sorted(samples, key=lambda each: abs(each.strict_error))[-5:]:
        row.say(
            f"said {each.total / 1e6:.1f}, anonymous {each.before.anonymous / 1e6:.1f} to "
            f"{each.after.anonymous / 1e6:.1f}, used {each.before.used / 1e6:.1f} to "
            f"{each.after.used / 1e6:.1f}, not of processes {each.before.others / 1e6:.1f} MB"
        )
    yield result(name, samples, [each.used for each in samples], [each.error for each in samples])
    yield result(
        "the same, anonymous memory alone",
        samples,
        [each.anonymous for each in samples],
        [each.strict_error for each in samples],
    )


if __name__ == "__main__":
    row.main(rows, __doc__)
