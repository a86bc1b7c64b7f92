"""The worker's memory in one place: limit, budget, what is free, what tasks need, who shares it.

For the engine, which has it do what takes more than one of these: follow the limit, look at memory while no
other worker does, describe how things are, tell the kernel's kills from others. It decides nothing, and
knows of no task but by what is read of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from celery.utils.log import get_logger

from memsafe_pool import announce, budget
from memsafe_pool.gauge import Gauge
from memsafe_pool.kernel_kills import KernelKills
from memsafe_pool.neighbours import Neighbours, key
from memsafe_pool.pauses import STUCK_SECONDS, STUCK_SHARED_SECONDS, Pauses
from memsafe_pool.probe import Probe
from memsafe_pool.room import Room
from memsafe_pool.settings import mib
from memsafe_pool.sizes import Sizes
from memsafe_pool.watch import Watch

if TYPE_CHECKING:
    from memsafe_pool.fleet import Child, Fleet
    from memsafe_pool.job import Job
    from memsafe_pool.ledger import Ledger
    from memsafe_pool.room import Look

__all__ = ["MemoryTerms", "Steward"]

logger = get_logger(__name__)

#: Seconds between two writes of what was learned of tasks.
SAVE_SECONDS = 60.0

#: What the kernel has for each child: page tables, stacks, sockets.
KERNEL_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class MemoryTerms:
    """What is done about memory.

    Attributes:
        budget: As ``memsafe_memory_budget``.
        pause: Whether children are paused when memory is short.
        tries: How often a task that was ended for want of memory is run again; the last time alone.
        state: File that keeps what tasks needed, or None.
        cores: Number of cores that may be used over time; ``cores_at_once``: at the same moment.
    """

    budget: str | float = "auto"
    pause: bool = True
    tries: int = 2
    state: str | None = None
    cores: int = 2
    cores_at_once: int = 2


class Steward:
    """The worker's memory.

    Arguments:
        terms: What is done about it.
        app: The Celery app.
        fleet: The children.
        waiting: The jobs that wait.
        starting_bytes, on_pause, on_stuck, on_limit: As for :class:`watch.Watch`.

    Attributes:
        shared: Whether other workers live under the same limit.
    """

    def __init__(
        self,
        terms: MemoryTerms,
        app: Any,
        fleet: Fleet,
        waiting: Iterable[Job],
        *,
        starting_bytes: Callable[[bool], int],
        on_pause: Callable[[Child, Job, bool, float], None],
        on_stuck: Callable[[Look], None],
        on_limit: Callable[[Child, Job, bool, int], None],
    ) -> None:
        self.terms = terms
        self.sizes = Sizes(app, terms.state)
        self.gauge = Gauge(Probe(on_warning=_warn))
        # What was acted on: the gauge reads anew by itself, whenever it is asked.
        self._known = reading = self.gauge.reading
        self._kills = KernelKills(reading, lambda: list(fleet.children), self.describe)
        self.budget = budget.find(terms.budget, reading.lowest_limit_bytes)
        self.room = Room(self.budget.bytes)
        self.sizes.budget = self.budget.bytes
        self._pauses = Pauses(terms.cores_at_once, enabled=terms.pause)
        self.watch = Watch(
            self.gauge,
            self.budget,
            own_bytes=self._own_bytes,
            starting_bytes=starting_bytes,
            known_bytes=self._known_bytes,
            on_pause=on_pause,
            on_stuck=on_stuck,
            on_limit=on_limit,
            pauses=self._pauses,
        )
        self.shared = False
        self._fleet, self._waiting, self._starting_bytes = fleet, waiting, starting_bytes
        self._neighbours = Neighbours(key(reading), on_warning=_warn)
        self._announced: set[str] = set()
        self._base_bytes = self._sized = 0
        self._saved_at = time.monotonic()

    def close(self) -> None:
        """End the watch, leave the neighbours, and keep what was learned."""
        self._kills.close(self.watch.refresh())
        self.watch.stop()
        self._neighbours.close()
        self.sizes.save()

    def _own_bytes(self) -> int:
        """What the pool has, but for what running tasks have taken."""
        return self._base_bytes + sum(child.private_bytes for child in list(self._fleet.children))

    def _known_bytes(self) -> int | None:
        """The same, with what starting children have taken, or soon will; None where others take memory, too.

        On a machine without a container many do, and next to another worker it does.
        """
        if self.shared or self.gauge.reading.limit_kind == "physical":
            return None
        starting = len(self._fleet.starting_children) * self.room.child_bytes
        return self._own_bytes() + starting - self._starting_bytes(False)

    def announce(self, worker_bytes: int, bound: int, *, again: bool = False) -> None:
        """Say what there is, and what would defeat us: once, or ``again`` with other numbers."""
        self._base_bytes = worker_bytes
        if self._announced and not again:
            return
        reading = self.gauge.reading
        line, warnings = announce.lines(
            reading,
            self.budget,
            announce.Surroundings.read(),
            worker_bytes=worker_bytes,
            child_bytes=self.room.child_bytes,
            bound=bound,
        )
        announce.say(line, [text for text in warnings if text not in self._announced])
        self._announced |= {line, *warnings}

    # -- now and then

    def tick(self, ledger: Ledger, forkserver: int | None) -> bool:
        """Follow the limit, who shares it, and the kernel's kills; return whether the budget has changed."""
        before, reading = self._known, self.watch.refresh()
        self._known = reading
        changed = reading.lowest_limit_bytes != before.lowest_limit_bytes
        if changed:
            logger.warning(
                "The memory limit is now %s (%s), after %s (%s).",
                mib(reading.lowest_limit_bytes),
                reading.lowest_limit_source,
                mib(before.lowest_limit_bytes),
                before.lowest_limit_source,
            )
            self.budget = budget.find(self.terms.budget, reading.lowest_limit_bytes)
            self.watch.budget, self.room.budget = self.budget, self.budget.bytes
            self.sizes.budget, self._sized = self.budget.bytes, -1  # waiting jobs are sized anew
            if self.budget.warning:
                logger.warning("%s", self.budget.warning)
        self._kills.tick(reading, forkserver)
        if key(reading) != key(before):
            self._neighbours.close()
            self._neighbours = Neighbours(key(reading), on_warning=_warn)
        self.shared = not self._neighbours.alone
        # Where there are others, not at the same moment as they.
        self._pauses.stuck_seconds = (
            STUCK_SHARED_SECONDS + os.getpid() % 16 / 8 if self.shared else STUCK_SECONDS
        )
        if not self.budget.auto:
            self._base_bytes = ledger.account(forkserver, children=False).total
        if time.monotonic() - self._saved_at > SAVE_SECONDS:
            self._saved_at = time.monotonic()
            self.sizes.save()
        return changed

    def learn_start(self, private_bytes: int) -> None:
        """Remember what a child has when it is ready: it will not cost less."""
        self.room.child_bytes = max(self.room.child_bytes, private_bytes + KERNEL_BYTES)

    def learn_child(self, private_bytes: int) -> None:
        """Remember what a child has after its first task: what every child needs beside its tasks."""
        self.room.child_bytes += (private_bytes + KERNEL_BYTES - self.room.child_bytes) // 4

    # -- looks

    def look(self, decide: Callable[[Look], None], starting: Callable[[], int]) -> None:
        """Look at memory, and have it decided what follows, while no other worker does.

        Arguments:
            decide: Called with the look; sets memory aside for what is to begin.
            starting: Returns the number of children that are starting or about to.
        """
        with self._neighbours.turn() as others:
            look = self.watch.look(others)
            for seen in look.running:
                job = cast("Job", seen.task)
                if seen.grown > job.estimate.reserved:
                    self.sizes.rise(job, seen.grown)
            self.resize_waiting()
            decide(look)
            self._neighbours.publish(self._promised + starting() * self.room.child_bytes)

    @property
    def _promised(self) -> int:
        """What running tasks are still going to take, as far as it is for others to leave that to them.

        Not to one that is said to need as much as all may have: nobody can leave it so much, and what
        somebody has written into a header must not hold up all workers.
        """
        return self.room.pending - sum(
            left
            for task, left in self.room.running.items()
            if task.estimate.reserved >= self.room.budget and not cast("Job", task).memory_tries
        )

    def resize_waiting(self) -> None:
        """Size waiting jobs anew when more is known than when they came."""
        version = self.sizes.learned.version
        if version != self._sized:
            self._sized = version
            for job in self._waiting:
                if not job.memory_tries:
                    self.sizes.size_up(job)

    # -- for people

    def describe(self) -> str:
        """Say what the limit is, and who has how much."""
        fleet = self._fleet
        limit, size = self.gauge.reading, self.budget.bytes
        rows = [
            f"{child.job.name} {mib(child.job.grown)}" + " (paused)" * (child.job.paused_at is not None)
            for child in fleet.children
            if child.job is not None
        ]
        idle_bytes = sum(child.private_bytes for child in fleet.idle)
        return (
            f"Limit {mib(limit.lowest_limit_bytes)} ({limit.lowest_limit_source}), budget {mib(size)}, "
            f"used {mib(size - self.room.headroom)}; running: {', '.join(rows) or 'nothing'}; "
            f"{len(fleet.idle)} idle children {mib(idle_bytes)}."
        )

    def killed_by_kernel(self) -> bool:
        """Whether the kernel has killed a child for want of memory; each of its kills is told once."""
        return self._kills.claim(self.watch.refresh())


def _warn(text: str) -> None:
    logger.warning("%s", text)
