"""CPU of worker and children per no-op task, against prefork, at `-c 20` and `-c 40`; all children run.

Both workers are started afresh in every repetition, warmed up, and then take turns with short batches, so
that whatever else the machine does meets both alike. The ratio is the median over all pairs of neighbouring
batches.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import broker
import row
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

TASKS = 1000
BATCHES = 8


def warm(worker: Worker, concurrency: int, tasks: int) -> None:
    """Have every child run something, then let a batch of no-ops through."""
    worker.ready()
    for _ in range(5):
        worker.nap(concurrency, 1.0)
        if len({stamp["pid"] for stamp in worker.stamps("done")}) == concurrency:
            break
    else:
        raise worker.fail(f"not all of {concurrency} children run")
    worker.noops(tasks)


def per_task_ms(
    url: str, ours: str, concurrency: int, tasks: int, batches: int, *, ours_first: bool
) -> list[tuple[float, float]]:
    """Have both workers take turns: CPU milliseconds per task of (stock, ours), batch by batch."""
    pairs = []
    with Worker(url, "prefork", concurrency) as stock, Worker(url, ours, concurrency) as mine:
        turns = [mine, stock] if ours_first else [stock, mine]
        for worker in turns:
            warm(worker, concurrency, tasks)
        for _ in range(batches):
            spent = {worker: worker.noops(tasks) / tasks * 1e3 for worker in turns}
            pairs.append((spent[stock], spent[mine]))
            turns.reverse()
    return pairs


def profile(url: str, pool: str, folder: Path, concurrency: int, tasks: int) -> None:
    """Record the worker process, without its children, while it runs a batch: py-spy's collapsed stacks."""
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        message = "--profile needs py-spy: pip install py-spy"
        raise SystemExit(message)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(url, pool, concurrency))
        warm(worker, concurrency, tasks)
        file = folder / f"{pool.replace(':', '.')}-{concurrency}.txt"
        options = ["--format", "raw", "--rate", "500", "--output", str(file), "--pid", str(worker.pid)]
        recorder = subprocess.Popen(
            [spy, "record", *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        stack.callback(recorder.wait, 30)
        stack.callback(recorder.send_signal, 2)  # py-spy writes its file on SIGINT
        worker.noops(tasks * 10)
    row.say(f"profile of {pool}: {file}")


def rows(options: row.Options) -> Iterator[row.Row]:
    """Measure a row for each concurrency."""
    tasks, batches = (300, 2) if options.quick else (TASKS, BATCHES)
    with broker.redis_url() as url:
        for concurrency, must, aim in ((20, 1.03, 0.95), (40, 0.95, 0.80)):
            pairs: list[tuple[float, float]] = []
            for repetition in range(options.repeats(7)):
                ours_first = bool(repetition % 2)
                pairs += per_task_ms(url, options.ours, concurrency, tasks, batches, ours_first=ours_first)
                stock, mine = (statistics.median(side) for side in zip(*pairs[-batches:], strict=True))
                row.say(f"-c {concurrency}: prefork {stock:.3f}, ours {mine:.3f} ms per task")
            yield row.paired(f"CPU per no-op task, -c {concurrency}", pairs, "ms", must, aim, digits=2)
            if options.profile:
                for pool in ("prefork", options.ours):
                    profile(url, pool, Path(options.profile), concurrency, tasks)


if __name__ == "__main__":
    row.main(rows, __doc__)
