"""20 tasks with `max_tasks_per_child=1` for an app that takes 8 s to import: all done, and nobody killed.

At `-c 20` all children start at once; at `-c 4` each child has to be replaced while tasks wait. Stock prefork
is run with both of its start methods, and is given the same time.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import broker
import row
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

TASKS = 20
IMPORT_SECONDS = 8
TIMEOUT = 120.0
KILLS = re.compile(r"signal 9|SIGKILL|Timed out waiting for UP|WorkerLostError")


def outcome(
    url: str, pool: str, concurrency: int, seconds: float, **environment: object
) -> tuple[int, int, float]:
    """How many tasks were done (each once), how many log lines tell of a kill, and how long it took."""
    environment |= {"BENCH_IMPORT_SECONDS": seconds}
    with Worker(url, pool, concurrency, "--max-tasks-per-child", "1", **environment) as worker:
        took = TIMEOUT
        try:
            ready = worker.ready(timeout=TIMEOUT)
            worker.nap(TASKS, 0.1, timeout=TIMEOUT)
            took = worker.stamps("done")[-1]["at"] - worker.executed_at - ready
        except RuntimeError as error:
            row.say(str(error).splitlines()[0])
        ids = [stamp["id"] for stamp in worker.stamps("done")]
        done = len(set(ids)) if len(ids) == len(set(ids)) else -len(ids)
        return done, len(KILLS.findall(worker.log.read_text())), took


def shown(result: tuple[int, int, float]) -> str:
    """Put the outcome in words."""
    done, kills, took = result
    ran = f"{done} of {TASKS} done" if done >= 0 else f"{-done} runs of {TASKS} tasks"
    return f"{ran}, {kills} kills, {took:.0f} s"


def rows(options: row.Options) -> Iterator[row.Row]:
    """Each start method against its stock counterpart."""
    seconds = 2 if options.quick else IMPORT_SECONDS
    with broker.redis_url() as url:
        for concurrency in (20,) if options.quick else (20, 4):
            for method, counterpart in (("forkserver", "fork"), ("spawn", "spawn")):
                stock = outcome(url, "prefork", concurrency, seconds, BENCH_START_METHOD=counterpart)
                ours = outcome(url, options.ours, concurrency, seconds, MEMSAFE_START_METHOD=method)
                row.say(
                    f"-c {concurrency}: prefork {counterpart} {shown(stock)}; ours {method} {shown(ours)}"
                )
                yield row.Row(
                    f"{seconds} s of imports, max_tasks_per_child=1, {method}, -c {concurrency}",
                    f"prefork {counterpart}: {shown(stock)}",
                    shown(ours),
                    must=f"{TASKS} done, no kill",
                    met=ours[:2] == (TASKS, 0),
                )


if __name__ == "__main__":
    row.main(rows, __doc__)
