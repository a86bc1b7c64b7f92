"""Workers in memory cgroups with a limit, tasks for them, and what became of each task.

The whole worker is in the cgroup from its first instruction; this process and Redis are not. No `memsafe_*`
setting is made. Sizes of tasks are in MB (10^6 bytes), limits in MiB, as in the names of the constants.

Every task stamps its begin and its end with its id and the time (see `app`); failures are stamped by the
signal `task_failure`. Of a task without "done" and without "failed" one says that it was lost.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import broker
import processes
import row
from memory_cgroup import MemoryCgroup, UnavailableError
from workers import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

MB = 1_000_000
MIB = 1 << 20
CONCURRENCY = 20
#: What the pool counts in `inspect stats`: which rung of the ladder acted. None: this pool does not count it.
COUNTERS = ("pauses", "kills", "redelivered", "retired", "starts", "trims")
CANDIDATES = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20)
TRIES = 3  # pairs of runs
SETTLE_SECONDS = 0.5  # after the last outcome: a second run of a task would show


@dataclass(frozen=True)
class Batch:
    """So many calls of one task."""

    count: int
    name: str
    args: tuple[object, ...]


@dataclass(frozen=True)
class Work:
    """What is to be done in a container of that size, in at most `timeout` seconds.

    `before`: is called with the scene when all workers are ready, and does what is not measured.
    """

    limit_bytes: int
    batches: Sequence[Batch]
    timeout: float = 120
    before: Callable[[Scene], contextlib.AbstractContextManager[None]] | None = None

    @property
    def count(self) -> int:
        """Number of tasks."""
        return sum(batch.count for batch in self.batches)


@dataclass(frozen=True)
class Outcome:
    """What became of the tasks.

    `twice` counts tasks that began more than once. `seconds` is from the release of the tasks to the last
    "done", `from_exec` the same from the exec of the (first) worker; both None when none was done.
    `cpu_seconds`: of all workers and children since the release; None when a worker is dead.
    """

    sent: int
    done: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    twice: int = 0
    oom_kills: int = 0
    seconds: float | None = None
    from_exec: float | None = None
    cpu_seconds: float | None = None
    peak_bytes: int | None = None
    counters: dict[str, int | None] = field(default_factory=dict)
    alive: bool = True

    @property
    def safe(self) -> bool:
        """All done, the worker lives, and the kernel killed nothing."""
        return self.alive and self.done == self.sent and self.oom_kills == 0

    @property
    def clean(self) -> bool:
        """As `safe`, and the pool has neither killed a task nor run one twice."""
        return self.safe and self.twice == 0 and not self.counters.get("kills")

    def __str__(self) -> str:
        parts = [f"{self.done} of {self.sent} done"]
        parts += [f"{count} {error}" for error, count in self.errors.items()]
        parts += [f"{count} {what}" for what, count in (("lost", self.lost), ("twice", self.twice)) if count]
        parts.append(f"{self.oom_kills} kernel kills")
        if not self.alive:
            parts.append("worker dead")
        if self.seconds is not None:
            parts.append(f"{self.seconds:.1f} s ({self.from_exec:.1f} s from exec)")
        if self.cpu_seconds is not None:
            parts.append(f"CPU {self.cpu_seconds:.1f} s")
        if self.peak_bytes is not None:
            parts.append(f"peak {self.peak_bytes / MIB:.0f} MiB")
        parts += [f"{name} {'?' if count is None else count}" for name, count in self.counters.items()]
        return ", ".join(parts)


@dataclass(frozen=True)
class Bounds:
    """What our pool is held to in comparison with prefork.

    `ratio`: of times, at most. `clean`: nothing killed or run twice. `quick`: prefork's best safe concurrency
    when it was last looked for.
    """

    ratio: float
    quick: int
    clean: bool = False


class Scene:
    """Cgroups and workers, all on one queue; as a context, nothing of it is left behind."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.cgroups: list[MemoryCgroup] = []
        self.workers: list[Worker] = []
        self.ids: list[str] = []
        self.released_at = self._cpu_at_release = 0.0
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Scene:  # noqa: PYI034  (typing.Self is of Python 3.11)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def container(self, limit_bytes: int) -> MemoryCgroup:
        """Make a memory cgroup."""
        self.cgroups.append(self._stack.enter_context(MemoryCgroup(limit_bytes)))
        return self.cgroups[-1]

    def worker(self, cgroup: MemoryCgroup, pool: str, concurrency: int, **environment: object) -> Worker:
        """Start a worker in the cgroup; those after the first share its queue and its file of stamps."""
        worker = Worker(self.url, pool, concurrency, **environment)
        if self.workers:
            first, own_name = self.workers[0], worker.name
            worker.lane.close()
            worker.lane, worker.name = first.lane, f"{len(self.workers)}-{first.name}"
            worker.command[worker.command.index(own_name)] = worker.name
            shared = ("BENCH_PREFIX", "BENCH_STAMPS")
            worker.environment |= {name: first.environment[name] for name in shared}
        worker.command = cgroup.inside(worker.command)
        self.workers.append(worker)
        return self._stack.enter_context(worker)

    @property
    def first(self) -> Worker:
        """The worker that was started first."""
        return self.workers[0]

    def alive(self) -> bool:
        """Whether all workers live."""
        return all(worker.process is not None and worker.process.poll() is None for worker in self.workers)

    def ready(self, timeout: float = 30) -> bool:
        """Wait until all workers answer; whether they did."""
        deadline = time.monotonic() + timeout
        for worker in self.workers:
            while self.alive() and time.monotonic() < deadline:
                with contextlib.suppress(RuntimeError, KeyError):
                    worker.lane.ask(worker.name, "ping", timeout=0.25)
                    break
            else:
                return False
        return True

    def must_be_ready(self) -> None:
        """Wait until all workers answer, or fail."""
        if not self.ready():
            raise self.first.fail("not all workers are ready")

    def send(self, batches: Iterable[Batch]) -> None:
        """Let the workers have these tasks, all at once and in this order."""
        for batch in batches:
            self.ids += self.first.lane.stage(batch.name, *batch.args, count=batch.count)
        self._cpu_at_release = self._cpu_seconds()
        self.released_at = time.monotonic()
        self.first.lane.release()

    def _cpu_seconds(self) -> float:
        return sum(processes.cpu_seconds(processes.tree(worker.pid)) for worker in self.workers)

    def stamps(self, event: str) -> list[dict[str, Any]]:
        """Read the stamps of all tasks sent, also of those of another worker."""
        mine = set(self.ids)
        return [stamp for stamp in self.first.stamps(event) if stamp["id"] in mine]

    def wait(self, condition: Callable[[], bool], timeout: float, interval: float = 0.1) -> bool:
        """Wait until it is so, a worker has ended, or the time is over; whether it is so."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.alive() or time.monotonic() > deadline:
                return condition()
            time.sleep(interval)
        return True

    def settle(self, timeout: float) -> Outcome:
        """Wait until each task has an outcome, or none is to be expected any more."""
        self.wait(self.over, timeout)
        time.sleep(SETTLE_SECONDS)
        outcome = self.outcome()
        row.say(f"{self.first.pool}: {outcome}")
        if "BENCH_SHOW_LOG" in os.environ:
            self.show_log()
        return outcome

    def over(self) -> bool:
        """Whether each task has an outcome."""
        ended = {stamp["id"] for event in ("done", "failed") for stamp in self.stamps(event)}
        return len(ended) == len(set(self.ids))

    def outcome(self) -> Outcome:
        """What can be said now."""
        done = {stamp["id"]: stamp["at"] for stamp in self.stamps("done")}
        failed = {stamp["id"]: stamp["error"] for stamp in self.stamps("failed") if stamp["id"] not in done}
        begun = Counter(stamp["id"] for stamp in self.stamps("begun"))
        last = max(done.values(), default=None)
        peaks = [peak for cgroup in self.cgroups if (peak := cgroup.peak_bytes()) is not None]
        return Outcome(
            sent=len(self.ids),
            done=len(done),
            errors=Counter(failed.values()),
            lost=len(self.ids) - len(done) - len(failed),
            twice=sum(count > 1 for count in begun.values()),
            oom_kills=sum(cgroup.oom_kills() for cgroup in self.cgroups),
            seconds=None if last is None else last - self.released_at,
            from_exec=None if last is None else last - self.first.executed_at,
            cpu_seconds=self._cpu_seconds() - self._cpu_at_release if self.alive() else None,
            peak_bytes=max(peaks, default=None),
            counters=self.counters(),
            alive=self.alive(),
        )

    def counters(self) -> dict[str, int | None]:
        """Return the sums of the pools' counters; empty for stock pools, or without an answer."""
        sums: dict[str, int | None] = {}
        for worker in self.workers if self.alive() else ():
            stats = self.pool_stats(worker)
            for name in COUNTERS if stats else ():
                count = stats.get(name)
                sums[name] = sums.get(name) if count is None else (sums.get(name) or 0) + count
        return sums

    def pool_stats(self, worker: Worker) -> dict[str, Any]:
        """Return `inspect stats`' part about our pool; empty for stock ones, and without an answer."""
        try:
            return worker.lane.ask(worker.name, "stats", timeout=10)["pool"].get("memsafe", {})
        except RuntimeError as error:
            row.say(str(error))
            return {}

    def kill(self) -> None:
        """End the workers at once: their tasks do not matter any more."""
        for worker in self.workers:
            os.kill(worker.pid, signal.SIGKILL)

    def show_log(self) -> None:
        """Print the ends of the logs: where something went wrong, they say what."""
        for worker in self.workers:
            row.say(f"end of the log of {worker.name}:\n{worker.log.read_text()[-4000:]}---")


def run(url: str, pool: str, concurrency: int, work: Work) -> Outcome:
    """Do the work with one worker in a cgroup of its own."""
    row.say(f"{pool} -c {concurrency}")
    with Scene(url) as scene:
        scene.worker(scene.container(work.limit_bytes), pool, concurrency)
        if not scene.ready():
            row.say("not ready in time")
            scene.show_log()
            oom_kills = scene.cgroups[0].oom_kills()
            return Outcome(work.count, lost=work.count, oom_kills=oom_kills, alive=False)
        with work.before(scene) if work.before else contextlib.nullcontext():
            scene.ids.clear()
            scene.send(work.batches)
            return scene.settle(work.timeout)


def safe_concurrencies(url: str, work: Work) -> list[int]:
    """Find at which -c prefork is safe, the fastest first: upwards until two in a row were not."""
    times: dict[int, float] = {}
    unsafe = 0
    for concurrency in CANDIDATES:
        outcome = run(url, "prefork", concurrency, work)
        if outcome.safe and outcome.seconds is not None:
            times[concurrency], unsafe = outcome.seconds, 0
        elif (unsafe := unsafe + 1) == 2:
            break
    return sorted(times, key=times.__getitem__)


def against_prefork(
    url: str,
    options: row.Options,
    measure: str,
    work: Work,
    bounds: Bounds,
    *,
    times: list[float] | None = None,
) -> Iterator[row.Row]:
    """Hold our pool at -c 20 against prefork at its best safe concurrency, in turn.

    The seconds that our pool took are added to `times`.

    A concurrency at which prefork turns out not to be safe each time is given up for the next fastest.
    """
    accepted = True
    for concurrency in [bounds.quick] if options.quick else safe_concurrencies(url, work):
        pairs = []
        for _ in range(options.repeats(TRIES)):
            stock = run(url, "prefork", concurrency, work)
            if not stock.safe:
                break
            ours = run(url, options.ours, CONCURRENCY, work)
            met = ours.clean if bounds.clean else ours.safe
            yield row.Row(measure, "", str(ours), must="all done", met=met)
            accepted &= met
            if times is not None and ours.seconds is not None:
                times.append(ours.seconds)
            pairs.append((stock.seconds, ours.seconds or float("inf")))
        else:
            found = row.paired(
                f"{measure}: time",
                pairs,
                "s",
                bounds.ratio,
                against=f"prefork -c {concurrency}",
                digits=1,
            )
            yield replace(found, met=found.met and accepted)
            return
    yield row.Row(f"{measure}: time", "prefork: no safe -c", "not compared", met=False)


def rows(
    measure: Callable[[str, row.Options], Iterable[row.Row]],
) -> Callable[[row.Options], Iterator[row.Row]]:
    """Decorate: give the URL of a Redis database; and without cgroups, a row that says so."""

    @functools.wraps(measure)
    def guarded(options: row.Options) -> Iterator[row.Row]:
        try:
            with broker.redis_url() as url:
                yield from measure(url, options)
        except UnavailableError as error:
            yield row.Row("not run", "", str(error))

    return guarded
