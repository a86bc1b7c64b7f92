"""512 MiB full of what the kernel can take back: 72 tasks of 100 MB, against prefork and a cold cache.

The cache holds a file that was read three times, a model that children have mapped, or names of files that
do not exist (dentries); or a task writes a file all the time. Prefork has its best safe concurrency, our pool
-c 20 and no setting. The cache is filled by tasks, which do not count.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import row
import scenario
from scenario import MB, MIB, Batch, Bounds, Work

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 512 * MIB
CACHED = 350 * MIB
NAMES = 700_000  # half a KB each
BATCHES = [Batch(72, "hold", (100 * MB, 0.2))]
KINDS = {
    "cold": "nothing in the cache",
    "read": "350 MiB of a file read three times",
    "map": "a model of 350 MiB that 3 tasks have mapped",
    "miss": "700,000 names that do not exist",
    "write": "a task that writes a file of 200 MiB again and again",
}
#: When prefork was last looked at; the task that writes takes one of its children.
QUICK = {"write": 4}


@contextlib.contextmanager
def cached(kind: str, scene: scenario.Scene) -> Iterator[None]:
    """Have tasks fill the cache, or keep writing."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        path = Path(folder) / "file"
        if kind in ("read", "map"):
            _write(path)
        count, amount = {"map": 3}.get(kind, 1), {"miss": NAMES, "write": 200 * MIB}.get(kind, 0)
        where = f"/sys/kernel/{os.getpid()}-{time.monotonic_ns()}" if kind == "miss" else str(path)
        if kind != "cold":
            scene.send([Batch(count, "fill", (kind, where, amount))])
            begun = lambda: len(scene.stamps("begun")) == count  # noqa: E731
            scene.wait(begun if kind == "write" else scene.over, timeout=120)
        if kind == "write":
            time.sleep(2)  # so that the container is full of it
        try:
            yield
        finally:
            path.with_suffix(".end").touch()
            scene.wait(scene.over, timeout=30)


def _write(path: Path) -> None:
    """Make a file that is in nobody's cache, so that the container is charged for it."""
    with path.open("wb") as file:
        for _ in range(CACHED >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@scenario.rows
def rows(url: str, options: row.Options) -> Iterator[row.Row]:
    """All done, nothing ended, and not slower than prefork, nor than with a cold cache."""
    times: dict[str, float] = {}
    for kind, what in KINDS.items():
        work = Work(LIMIT, BATCHES, before=partial(cached, kind))
        bounds = Bounds(ratio=1.1, quick=QUICK.get(kind, 3), clean=True)
        found: list[float] = []
        yield from scenario.against_prefork(url, options, f"512 MiB, {what}", work, bounds, times=found)
        times[kind] = statistics.median(found) if found else float("inf")
    for kind, what in KINDS.items():
        if kind != "cold":
            pair = times["cold"], times[kind]
            yield row.paired(f"{what}: time", [pair], "s", against="cold cache", digits=1)


if __name__ == "__main__":
    row.main(rows, __doc__)
