"""A simulated machine: the pool's own rules, with tasks and memory that are only numbers.

Scheduler, supervisor, room, pauses and reservations are the real ones; what the engine, its crew and the
watch do with processes is done here with a heap of events. Between two events memory
changes in straight lines, so peaks and the moment at which a limit is reached are exact. For
``simulate``, and for tests that search for what the rules do not think of.

What is left out: the broker and prefetching, time limits, trimming, the page cache, what other workers have
set aside, and that tasks slow each other down where there are more of them than cores.

All sizes are bytes, all times seconds. No I/O, no clock; imports neither Celery nor billiard.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from itertools import count
from typing import Any, cast

from memsafe_pool import budget, events, recycle
from memsafe_pool.pauses import Pauses, Sample
from memsafe_pool.reservations import LITTLE_BYTES, UNKNOWN, Estimate, Reservations, after_loss
from memsafe_pool.rest import Rest
from memsafe_pool.room import Look, Room, Seen
from memsafe_pool.scheduler import RETRY_SECONDS, TICK_SECONDS, Scheduler
from memsafe_pool.supervisor import Supervisor
from memsafe_pool.watch import DOZE_SECONDS, STUCK_AGAIN_SECONDS

__all__ = ["Counts", "Fleet", "Machine", "SimulatedChild", "Terms", "Work"]

_MIB = 1 << 20


class Work:
    """One task.

    Arguments:
        name: Its name.
        curve: Points ``(seconds since it began, bytes beyond what its child had)``, in straight lines from
            one to the next, up or down. The last one is its end: what its child keeps for ever.
        declared: What it is said to need, or None.
        label: What else its size is known by, or None.
        redeliverable: Whether it may be run again after it was ended in the middle.
        hangs: Whether it stays at its last point for ever.
        waits: Whether it uses no CPU where it takes no memory.
        unseen: Whether what it takes is in files in memory, or in a program: nobody is seen to have it. It is
            gone when the task ends.

    Attributes:
        arrived, began, ended: When (seconds); None as long as it did not. ``began`` is the first time.
        outcome: ``"done"``, ``"failed"`` or None.
        runs: How often it began.
        task_id, parent_id: Its id, and that of the task that has sent it.
        held: Whether it had to wait for memory when there was a child for it.
        paused_at: When it was paused (seconds), or None.
    """

    def __init__(
        self,
        name: str,
        curve: Sequence[tuple[float, int]],
        *,
        declared: int | None = None,
        label: str | None = None,
        redeliverable: bool = True,
        hangs: bool = False,
        waits: bool = False,
        unseen: bool = False,
    ) -> None:
        self.name, self.label, self.curve, self.unseen = name, label, tuple(curve), unseen
        self.declared, self.redeliverable, self.hangs, self.waits = declared, redeliverable, hangs, waits
        self.task_id: str | None = None
        self.parent_id: str | None = None
        self.estimate = UNKNOWN
        self.alone = False
        self.since = 0.0
        self.tries = self.runs = 0
        self.arrived = 0.0
        self.began: float | None = None
        self.ended: float | None = None
        self.outcome: str | None = None
        self.held = False
        self.paused_at: float | None = None

    @property
    def peak(self) -> int:
        """The most it needs."""
        return max(size for _, size in self.curve)

    @property
    def seconds(self) -> float:
        """How long it takes if it is never paused."""
        return self.curve[-1][0]

    def __repr__(self) -> str:
        return f"{self.name}({self.curve}, reserved {self.estimate.reserved}, {self.outcome})"


class _Run:
    """A task in a child: where it is on its curve, and on which line of it."""

    __slots__ = (
        "_end",
        "_high",
        "_low",
        "_rate",
        "_start",
        "at",
        "going",
        "point",
        "progress",
        "version",
        "work",
    )

    def __init__(self, work: Work, now: float) -> None:
        self.work, self.at = work, now
        self.going = True
        self.version = 0
        self.reach(0)

    def reach(self, point: int) -> None:
        """Be at a point of the curve, the last one that was reached."""
        curve = self.work.curve
        self.point = point
        self._start, self._low = curve[point]
        self._end, self._high = curve[min(point + 1, len(curve) - 1)]
        self.progress = self._start
        seconds = self._end - self._start
        self._rate = (self._high - self._low) / seconds if seconds > 0 else 0.0

    def move(self, now: float) -> None:
        if self.going:
            self.progress += now - self.at
        self.at = now

    @property
    def slope(self) -> float:
        """Bytes per second, now."""
        return self._rate if self.going else 0.0

    def cpu_seconds(self, now: float) -> float:
        """What it has used, as far as that tells whether it uses some."""
        if self.work.waits and not self._rate:
            return self._start
        return min(self.progress + (now - self.at if self.going else 0.0), self._end)

    def grown(self, now: float) -> float:
        progress = self.progress + (now - self.at if self.going else 0.0)
        if progress >= self._end:
            return self._high
        return self._low + self._rate * (progress - self._start)


class SimulatedChild:
    """One child, as ``fleet.Child``.

    Attributes:
        kept: What it has kept of the tasks it ran.
        loaded_bytes, ran, loads: See ``recycle.FirstRuns``.
        state: ``"starting"``, ``"idle"``, ``"busy"``, ``"leaving"`` or ``"gone"``.
        run: What it runs, or None.
    """

    def __init__(self, index: int, born: float, cost: int) -> None:
        self.index, self.born, self.cost = index, born, cost
        self.tasks = 0
        self.kept = self.loaded_bytes = 0
        self.ran: dict[str, int] = {}
        self.loads = False
        self.idle_since = 0.0
        self.outdated = False
        self.state = "starting"
        self.run: _Run | None = None
        self.frozen: float | None = None  # what it has while it ends

    @property
    def private_bytes(self) -> int:
        """As it reported after its last task; 0 before it was ready."""
        return 0 if self.state == "starting" else self.cost + self.kept

    @property
    def growth_bytes(self) -> int:
        """What it has kept that another one would not."""
        return self.kept - self.loaded_bytes

    @property
    def leaving(self) -> bool:
        """Whether it was told or made to go."""
        return self.state == "leaving"


class Fleet:
    """All children, as ``fleet.Fleet``."""

    def __init__(self) -> None:
        self.children: dict[SimulatedChild, None] = {}
        self.idle: list[SimulatedChild] = []
        self.starting_children: dict[SimulatedChild, None] = {}
        self.leaving = 0

    @property
    def starting(self) -> int:
        """Number of those that are not ready yet."""
        return len(self.starting_children)

    @property
    def size(self) -> int:
        """Number of children that exist or are starting."""
        return len(self.children)

    def take(self) -> SimulatedChild:
        """Return the idle child that was used last, which is busy from now on."""
        child = self.idle[-1]
        self.move(child, "busy")
        return child

    def rest(self, child: SimulatedChild, now: float) -> None:
        """Enter a child as idle, at ``now``."""
        child.idle_since = now
        self.move(child, "idle")

    def move(self, child: SimulatedChild, state: str) -> None:
        """Change a child's state."""
        if child in self.idle:
            self.idle.remove(child)
        self.starting_children.pop(child, None)
        self.leaving += (state == "leaving") - (child.state == "leaving")
        child.state = state
        if state == "gone":
            self.children.pop(child, None)
        else:
            self.children[child] = None
        if state == "idle":
            self.idle.append(child)
        elif state == "starting":
            self.starting_children[child] = None


@dataclass(slots=True)
class Terms:
    """The machine and the settings.

    Attributes:
        limit: Memory there is.
        bound: Upper bound of the number of children.
        budget: As ``memsafe_memory_budget``.
        cores: Number of cores.
        pause: As ``memsafe_pause``.
        tries: As ``memsafe_memory_tries``.
        base: What the worker itself takes.
        child: What each child takes.
        start_seconds: How long a child takes to start; its memory comes evenly in that time.
        exit_seconds: How long a child takes to end; then its memory is free.
        late: How much later than asked for each sample is taken.
        others: Further arguments of the supervisor.
    """

    limit: int
    bound: int
    budget: str | float = "auto"
    cores: int = 2
    pause: bool = True
    tries: int = 2
    base: int = 64 * _MIB
    child: int = 12 * _MIB
    start_seconds: float = 0.05
    exit_seconds: float = 0.01
    late: float = 0.0
    others: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Counts:
    """What has happened so far.

    Attributes:
        peak: The most memory that was used at any time.
        paused, killed, retired, starts, redelivered: How often.
        kernel_kills: How often the limit was reached, so that the kernel would have killed somebody.
        samples: How often memory was looked at by the watch.
    """

    peak: int = 0
    paused: int = 0
    killed: int = 0
    kernel_kills: int = 0
    retired: int = 0
    starts: int = 0
    redelivered: int = 0
    samples: int = 0


class _Watched:
    """A running task, as the watch sees it."""

    __slots__ = ("base", "growing", "grown", "rest", "work")

    def __init__(self, work: Work, base: int, now: float) -> None:
        self.work, self.base = work, base
        self.rest = Rest(now)
        self.grown = 0
        self.growing = False


class Machine:
    """The machine, the worker and its children.

    Arguments:
        terms: The machine and the settings.

    Attributes:
        now: Seconds since the beginning.
        outside: What others use of the same memory.
        works: All tasks that ever arrived.
        ended_by: Why the worker has ended, or None.
    """

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.now = 0.0
        self.limit, self.outside = terms.limit, 0
        self.counts = Counts()
        self.works: list[Work] = []
        self.waiting: deque[Work] = deque()
        self.ended_by: str | None = None
        self.learned = Reservations()
        self.fleet = Fleet()
        self.budget = budget.find(terms.budget, terms.limit)
        self.room = Room(self.budget.bytes)
        others = {"cores": terms.cores, **terms.others}
        rules = others.pop("rules", None) or recycle.Rules()
        self._auto_growth = rules.max_growth_bytes is None
        self.supervisor = Supervisor(
            self.fleet, self.waiting, self.room, bound=terms.bound, rules=rules, **others
        )
        self.pauses = Pauses(terms.cores, enabled=terms.pause)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self.scheduler = Scheduler(self, self.supervisor, self.waiting, lambda: self.now)
        self._retrying = False
        self._first_runs = recycle.FirstRuns()
        self._sized = self._expected = 0
        self._watched: dict[SimulatedChild, _Watched] = {}
        self._wakes_at, self._wake_version, self._stuck_at = 0.0, 0, float("-inf")
        self._set_budget(self.budget)
        self._tick()
        self._sample_in(0.0)

    # -- from outside

    def arrive(self, work: Work, at: float | None = None) -> None:
        """Let a task arrive, now or at a time."""
        self._expected += 1
        self._call_at(self.now if at is None else at, self._submit, work)

    @property
    def unarrived(self) -> int:
        """Number of tasks that are still to arrive."""
        return self._expected - sum(work.outcome is None for work in self.works)

    def learn(self, work: Work) -> None:
        """Know what a task needs, as from an earlier run."""
        self.learned.learn(work.name, work.label, 0 if work.unseen else work.peak)

    def crash(self, child: SimulatedChild, *, begun: bool = True) -> None:
        """Let a child end by itself.

        Arguments:
            begun: Whether it had begun its task, which is lost then; else another child gets it.
        """
        self._gone(child, begun=begun)

    def refuse(self, child: SimulatedChild) -> None:
        """Let a start fail as there is no room for one more process."""
        self._gone(child, shortage="no room")

    def renew(self) -> None:
        """Have all children replaced."""
        for child in self.fleet.children:
            child.outdated = True
        self.scheduler.decide(events.Outdated())

    def resize(self, bound: int) -> None:
        """Change the number of children."""
        self.scheduler.decide(events.Resized(bound))
        self._set_budget(self.budget)

    def run(self, until: float = float("inf"), *, steps: int | None = None) -> int:
        """Let time pass until then, or until all tasks have ended; return the number of events.

        Arguments:
            steps: The most events there may be.
        """
        taken = 0
        while self.ended_by is None and self.next_at <= until and taken != steps:
            if until == float("inf") and self.idle:
                break
            self.step()
            taken += 1
        return taken

    @property
    def idle(self) -> bool:
        """Whether all tasks have ended, and none is to come."""
        return not self._expected

    @property
    def next_at(self) -> float:
        """When the next thing happens."""
        return self._heap[0][0]

    def step(self) -> None:
        """Let the next thing happen."""
        at, slope = self.next_at, self._slope
        if slope > 0:
            used = self.used
            if used + slope * (at - self.now) > self.limit:
                self.now = min(at, self.now + max(self.limit - used, 0) / slope)
                self._note_peak()
                self._kernel_kills()
                return
        self.now = at
        self._note_peak()
        _, _, call, arguments = heappop(self._heap)
        call(*arguments)
        while self._note_peak() > self.limit and self.ended_by is None:
            self._kernel_kills()

    # -- memory

    @property
    def used(self) -> float:
        """What is used now, by all."""
        total: float = self.terms.base + self.outside
        for child in self.fleet.children:
            total += self._has(child)
        return total

    @property
    def _slope(self) -> float:
        total = 0.0
        for child in self.fleet.children:
            if child.state == "starting":
                total += child.cost / self.terms.start_seconds
            elif child.run is not None and child.frozen is None:
                total += child.run.slope
        return total

    def _has(self, child: SimulatedChild) -> float:
        if child.frozen is not None:
            return child.frozen
        if child.state == "starting":
            return child.cost * min((self.now - child.born) / self.terms.start_seconds, 1.0)
        return child.cost + child.kept + (child.run.grown(self.now) if child.run is not None else 0)

    def _note_peak(self) -> float:
        used = self.used
        self.counts.peak = max(self.counts.peak, int(used))
        return used

    def _kernel_kills(self) -> None:
        """End the largest child, as the kernel does when the limit is reached."""
        self.counts.kernel_kills += 1
        victims = list(self.fleet.children)
        if not victims:
            self.ended_by = "the kernel has killed the worker: it does not fit under the limit"
            return
        victim = max(victims, key=self._has)
        self._gone(victim, "the kernel")

    # -- children

    def start(self, number: int) -> None:
        """Start so many children."""
        for _ in range(number):
            self.counts.starts += 1
            taken = {child.index for child in self.fleet.children}
            index = next(index for index in count() if index not in taken)
            child = SimulatedChild(index, self.now, self.terms.child)
            self.fleet.move(child, "starting")
            self._call_at(self.now + self.terms.start_seconds, self._up, child)

    def _up(self, child: SimulatedChild) -> None:
        if child.state != "starting":
            return
        self.room.child_bytes = max(self.room.child_bytes, child.cost)
        if child.outdated:
            self._let_go(child)
            return
        self.scheduler.up(child)

    def _let_go(self, child: SimulatedChild) -> None:
        self._freeze(child)
        self._call_at(self.now + self.terms.exit_seconds, self._gone, child)

    def _freeze(self, child: SimulatedChild) -> None:
        child.frozen = self._has(child)
        self.fleet.move(child, "leaving")
        self._unwatch(child)

    def _gone(
        self,
        child: SimulatedChild,
        memory: str | None = None,
        *,
        begun: bool = True,
        shortage: str | None = None,
    ) -> None:
        if child.state == "gone":
            return
        failed = child.state == "starting"
        self.fleet.move(child, "gone")
        self._unwatch(child)
        self.scheduler.gone(child)
        run, child.run = child.run, None
        if run is not None:
            run.version += 1
            grown = self.room.grown.get(run.work, 0)
            self.supervisor.ended(run.work)
            if not begun:
                run.work.runs -= 1
                run.work.began = run.work.began if run.work.runs else None
                self.scheduler.give_again(run.work)
            elif memory is None:
                self._finish(run.work, "failed")
            else:
                self._on_memory_lost(run.work, grown)
        self.scheduler.decide(events.Gone(failed, child.born, child, failed and memory is not None, shortage))

    # -- tasks

    def _submit(self, work: Work) -> None:
        self.works.append(work)
        self._size_up(work)
        work.arrived = self.now
        self.scheduler.submit(work)

    def _size_up(self, work: Work) -> None:
        if work.declared is not None:
            work.estimate = Estimate(work.declared, work.declared, known=True)
        else:
            work.estimate = self.learned.estimate(work.name, work.label)

    def size_up_waiting(self) -> None:
        """Size waiting tasks anew when more is known than when they came."""
        if self._sized != self.learned.version:
            self._sized = self.learned.version
            for work in self.waiting:
                if not work.tries:
                    self._size_up(work)

    def give(self, child: SimulatedChild, work: Work) -> None:
        """Let a child begin a task."""
        if child.run is not None or work.outcome is not None:
            raise AssertionError(f"{work} is given to a child that is busy, or has ended")
        work.runs += 1
        work.began = self.now if work.began is None else work.began
        child.run = _Run(work, self.now)
        self._next_point(child, child.run)
        self._watched[child] = _Watched(work, int(child.cost + child.kept), self.now)
        if work.estimate.reserved > LITTLE_BYTES or not work.estimate.known:
            self._hurry()
        elif self._wakes_at - self.now > self.pauses.soon:
            self._sample_in(0.0)

    def _next_point(self, child: SimulatedChild, run: _Run) -> None:
        """Be told when a task gets to the next point of its curve."""
        curve, point = run.work.curve, run.point
        run.version += 1
        if point + 1 < len(curve):
            at = run.at + max(curve[point + 1][0] - run.progress, 0.0)
            self._call_at(at, self._at_point, child, run, run.version)

    def _at_point(self, child: SimulatedChild, run: _Run, version: int) -> None:
        if version != run.version or child.frozen is not None:
            return
        run.move(self.now)
        run.reach(run.point + 1)
        if run.point + 1 < len(run.work.curve):
            self._next_point(child, run)
        elif not run.work.hangs:
            self._done(child, run)

    def _done(self, child: SimulatedChild, run: _Run) -> None:
        work = run.work
        child.run = None
        child.tasks += 1
        child.kept += work.curve[-1][1]
        # What it keeps is gone, although nobody has looked since.
        self.room.headroom -= work.curve[-1][1]
        self._first_runs.note(child, work.name, work.curve[-1][1])
        self.learned.learn(work.name, work.label, 0 if work.unseen else work.peak)
        if child.tasks == 1:
            self.room.child_bytes += (child.private_bytes - self.room.child_bytes) // 4
        self._unwatch(child)
        self.supervisor.ended(work)
        self.scheduler.free(child)
        self._finish(work, "done")

    def _finish(self, work: Work, outcome: str) -> None:
        work.outcome, work.ended = outcome, self.now
        self._expected -= 1

    def _on_memory_lost(self, work: Work, grown: int) -> None:
        was_alone = work.alone
        self.learned.rise(work.name, work.label, work.estimate, grown)
        if was_alone or work.tries >= self.terms.tries or not work.redeliverable:
            self._finish(work, "failed")
            return
        work.tries += 1
        work.estimate = after_loss(work.estimate, grown)
        work.alone = work.tries >= self.terms.tries or work.estimate.reserved > self.budget.bytes
        work.since = self.now
        self.counts.redelivered += 1
        self.scheduler.give_again(work)

    # -- what is decided, see ``scheduler.Actor``

    def _set_budget(self, found: budget.Budget) -> None:
        self.budget = found
        self.room.budget = found.bytes
        if self._auto_growth:
            self.supervisor.rules.max_growth_bytes = recycle.default_growth_bytes(
                found.bytes, self.supervisor.bound
            )

    def _tick(self) -> None:
        if self.limit != self.budget.limit:
            self._set_budget(budget.find(self.terms.budget, self.limit))
        self.scheduler.decide(events.Tick())
        self._call_at(self.now + TICK_SECONDS, self._tick)

    @property
    def shares(self) -> bool:
        """Nobody else spends this memory by looking at it first."""
        return False

    def decided(self) -> None:
        """Take note of who waits for memory alone."""
        if self.supervisor.blocked is not None:
            free = len(self.fleet.idle) + max(self.supervisor.bound - self.fleet.size, 0)
            for work, _ in zip(self.waiting, range(free), strict=False):
                work.held = True

    def retry_later(self) -> None:
        """Look at memory again in a moment."""
        if not self._retrying:
            self._retrying = True
            self._call_at(self.now + RETRY_SECONDS, self._retry)

    def _retry(self) -> None:
        self._retrying = False
        self.scheduler.decide(events.Waiting())

    def dismiss(self, child: SimulatedChild) -> None:
        """Let a child go: the worker never stops here."""
        self._let_go(child)

    def say(self, shortage: str | None) -> None:
        """Nobody listens."""

    def stop_worker(self, reason: str) -> None:
        """End the simulation."""
        self.ended_by = reason

    def retire(self, child: SimulatedChild, reason: str) -> None:
        """Let a child go that runs nothing."""
        if child.run is None and child.state in {"starting", "idle", "busy"}:
            self.counts.retired += 1
            self._let_go(child)

    def kill(self, work: Work, reason: str) -> SimulatedChild | None:
        """End the child that runs a task, and return it."""
        for child in self.fleet.children:
            if child.run is not None and child.run.work is work and child.state == "busy":
                self.counts.killed += 1
                self._freeze(child)
                self._call_at(self.now + self.terms.exit_seconds, self._gone, child, "the pool")
                return child
        return None

    def look(self) -> None:
        """Look at memory, and decide what follows."""
        self._read()
        look = self._look()
        for seen in look.running:
            work = cast("Work", seen.task)
            if seen.grown > work.estimate.reserved:
                work.estimate = self.learned.rise(work.name, work.label, work.estimate, seen.grown)
        self.size_up_waiting()
        self.scheduler.saw(look)

    # -- the watch

    def _read(self) -> None:
        for child, watched in self._watched.items():
            watched.grown = 0 if watched.work.unseen else max(int(self._has(child)) - watched.base, 0)
            if child.run is not None:
                cpu_seconds, paused = child.run.cpu_seconds, self.pauses.is_paused(watched.work)
                watched.rest.look(self.now, watched.grown, partial(cpu_seconds, self.now), paused=paused)

    def _headroom(self) -> tuple[int, int]:
        """Return what is left until the budget's ceiling, and what is left of the budget."""

        def own() -> int:
            private = sum(child.private_bytes for child in self.fleet.children)
            return self.terms.base + private + sum(watched.grown for watched in self._watched.values())

        return self.budget.left(int(self.limit - self.used), own)

    def _look(self) -> Look:
        running = [
            Seen(
                watched.work,
                watched.grown,
                growing=watched.growing,
                paused=self.pauses.is_paused(watched.work),
                resting=watched.rest.resting,
            )
            for watched in self._watched.values()
        ]
        return Look(self.now, self._headroom()[1], running, coming=self._coming_bytes())

    def _coming_bytes(self) -> int:
        starting = self.fleet.starting_children
        return int(sum(max(self.room.child_bytes - self._has(child), 0) for child in starting))

    def _unknown(self) -> float:
        """What is used, less what the pool and its tasks are known to have."""
        known = sum(self._has(child) for child in self.fleet.starting_children)
        known += sum(child.private_bytes for child in self.fleet.children)
        return self.used - known - sum(watched.grown for watched in self._watched.values())

    def _sample_in(self, seconds: float) -> None:
        self._wake_version += 1
        self._wakes_at = self.now + seconds
        self._call_at(self._wakes_at + self.terms.late, self._sample, self._wake_version)

    def _hurry(self) -> None:
        if self._wakes_at - self.now > DOZE_SECONDS:
            self._sample_in(0.0)

    def _sample(self, version: int) -> None:
        if version != self._wake_version:
            return
        self.counts.samples += 1
        if not self._watched:
            self._sample_in(1.0)
            return
        self._read()
        samples = [
            Sample(one.work, one.work.estimate, one.grown, resting=one.rest.resting)
            for one in self._watched.values()
        ]
        decision = self.pauses.decide(
            self.now,
            self._headroom()[0],
            self.budget.ceiling,
            samples,
            starting=self._coming_bytes(),
            unknown=self._unknown(),
        )
        changed = False
        for child, watched in self._watched.items():
            watched.growing = watched.work in decision.growing
            if watched.work in decision.stop:
                self.counts.paused += 1
                self._signal(child, going=False)
                changed = True
            elif watched.work in decision.go_on:
                self._signal(child, going=True)
                changed = True
        self._sample_in(decision.wait)
        stuck = decision.stuck and self.now - self._stuck_at > STUCK_AGAIN_SECONDS
        look = self._look() if stuck else None
        if changed:
            self.scheduler.decide(events.Tick())
        if look is not None:
            self._stuck_at = self.now
            self.scheduler.stuck(look)

    def _signal(self, child: SimulatedChild, *, going: bool) -> None:
        run = child.run
        if run is not None and run.going != going:
            run.move(self.now)
            run.going = going
            run.work.paused_at = None if going else self.now
            run.version += 1
            if going:
                self._next_point(child, run)

    def _unwatch(self, child: SimulatedChild) -> None:
        watched = self._watched.pop(child, None)
        if watched is not None and self.pauses.forget(watched.work):
            self._signal(child, going=True)

    # -- time

    def _call_at(self, at: float, call: Callable[..., None], *arguments: Any) -> None:
        heappush(self._heap, (at, next(self._order), call, arguments))
