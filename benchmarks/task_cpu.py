"""CPU of worker and children per no-op task, against prefork, at `-c 20` and `-c 40`; all children run.

Both workers are started afresh in every repetition, warmed up, and then take turns with short batches (see
`turns`). The ratio is the median over all pairs of neighbouring batches.
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
import turns
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

TASKS = 1000
BATCHES = 8


def profile(url: str, pool: str, folder: Path, concurrency: int, tasks: int) -> None:
    """Record the worker process, without its children, while it runs a batch: py-spy's collapsed stacks."""
    spy = shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy")
    if spy is None:
        message = "--profile needs py-spy: pip install py-spy"
        raise SystemExit(message)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        worker = stack.enter_context(Worker(url, pool, concurrency))
        turns.warm(worker, concurrency, tasks)
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
                with (
                    Worker(url, "prefork", concurrency) as stock,
                    Worker(url, options.ours, concurrency) as mine,
                ):
                    sides = [(stock, concurrency), (mine, concurrency)]
                    pairs += turns.per_task_ms(sides, tasks, batches, second_first=bool(repetition % 2))
                medians = (statistics.median(side) for side in zip(*pairs[-batches:], strict=True))
                row.say("-c {}: prefork {:.3f}, ours {:.3f} ms per task".format(concurrency, *medians))
            yield row.paired(f"CPU per no-op task, -c {concurrency}", pairs, "ms", must, aim, digits=2)
            if options.profile:
                for pool in ("prefork", options.ours):
                    profile(url, pool, Path(options.profile), concurrency, tasks)


if __name__ == "__main__":
    row.main(rows, __doc__)
