"""Time from exec to answering `ping` at `-c 20`, against `-P solo`.

A default worker waits 1 s for its neighbours (mingle) in this time, whatever its pool; the second row leaves
that out. The third is the CPU that the workers of the second have used by then: it depends far less on what
else the machine does, so when a time looks wrong, look there first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import broker
import processes
import row
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator


def ready(url: str, pool: str, *options: str) -> tuple[float, float]:
    """Measure the seconds from exec to the first answer, and the CPU seconds of the tree until then."""
    with Worker(url, pool, 20, *options) as worker:
        return worker.ready(), processes.cpu_seconds(processes.tree(worker.pid))


def rows(options: row.Options) -> Iterator[row.Row]:
    """Run solo and our pool in turn, after one discarded run of each."""
    pools = ["solo", options.ours]
    with broker.redis_url() as url:
        for pool in pools:
            ready(url, pool)
        for measure, extra, bounds in (
            ("exec to answering ping", (), (1.15, 1.05)),
            ("the same, --without-mingle", ("--without-mingle",), (None, None)),
        ):
            times, cpu = [], []
            for _ in range(options.repeats(9)):
                runs = {pool: ready(url, pool, *extra) for pool in pools}
                pools.reverse()
                both = runs["solo"], runs[options.ours]
                times.append((both[0][0], both[1][0]))
                cpu.append((both[0][1], both[1][1]))
                row.say(f"{measure}: solo {times[-1][0]:.2f}, ours {times[-1][1]:.2f} s")
            yield row.paired(measure, times, "s", *bounds, against="solo", digits=2)
        yield row.paired("CPU used by then", cpu, "s", against="solo", digits=2)


if __name__ == "__main__":
    row.main(rows, __doc__)
