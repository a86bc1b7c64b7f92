"""Decides who begins when, and who goes; does nothing itself.

The engine tells the supervisor what happened and carries out what it answers:
:meth:`Supervisor.handle` takes an event and the time, and returns actions. There is
no I/O, no clock and no Celery in here, so that every rule can be tested by itself.

What it covers: which waiting task gets memory and a child, how many children to start, what is done when
memory is short, when a child is retired or replaced, which task is ended when nothing else helps, and
what follows when children fail to start. What a task will need is in ``reservations``,
whether there is room in ``room``, when a child has had its time in ``recycle``; which running
child is paused in ``pauses``. Which idle child gets a task is the engine's stack: the most recently used
first.

Order. The longest waiting task goes first. One for which there is no room may be passed by smaller ones, for
``patience`` seconds; then nothing begins before it, for six times as long. As what it waits for may never
end, others may then pass for as long again, and so on in turn; but it holds them up twice as long each
time. When nothing runs, it begins whatever it needs, in a new child if the only one has kept what it lacks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Protocol

from memsafe_pool.events import (
    Action,
    Done,
    Event,
    Give,
    Gone,
    Kill,
    Looked,
    Measure,
    Outdated,
    Resized,
    Retire,
    Say,
    Start,
    StopWorker,
    Stuck,
    Tick,
    Up,
    Waiting,
)
from memsafe_pool.recycle import Child, Rules
from memsafe_pool.reservations import LITTLE_BYTES, pending

if TYPE_CHECKING:
    from memsafe_pool.room import Look, Room, Seen, Task

__all__ = ["Fleet", "IdleChild", "Supervisor"]

_MIB = 1 << 20

#: Seconds before the first new try after a failed start; doubles with each failure up to the second.
BACKOFF_SECONDS = (1.0, 30.0)

#: Failed rounds of starts, with no child there that is or was ready, after which the worker stops.
MAX_FAILED_ROUNDS = 5

#: The same in seconds, where the system has no room: others may make some. But a worker that does nothing
#: looks healthy, and what has filled a container's processes may go only with the container.
MAX_SHORTAGE_SECONDS = 300.0

#: Seconds until it is said again that there is no room for more children.
SAY_SECONDS = 60.0

#: Waiting tasks that are looked at when the first ones do not fit.
SCANNED = 64

#: Before the first child is ready only as many are started as there are cores, unless there is so much memory
#: for each.
AMPLE_START_BYTES = 256 * _MIB

#: Seconds for which a look at memory is good enough to say no.
FRESH_SECONDS = 0.02

#: Tasks of an unknown name begin slowly where there is less memory than the first number for each that
#: runs: at first one for each core and the second number of free bytes, twice as many each so many seconds,
#: and no more once one has taken so much.
AMPLE_BYTES, LEAST_BYTES, TRIAL_SECONDS, TRIAL_BYTES = 512 * _MIB, 128 * _MIB, 0.2, 8 * _MIB

#: Of tasks that do not end one more begins each so many seconds, if twice what one of them has taken is free.
ENDLESS_SECONDS = 10.0

#: When less than this share of the budget is left, busy children give back free heap before their next task;
#: when less than the second is left, children are replaced that have grown: that costs more.
TRIM_SHARE, PRESSED_SHARE = 0.15, 0.05

#: Seconds to wait for children that leave, or that start and can then be let go, before a task is ended.
MOVING_SECONDS = 3.0

#: A child that was idle for so many seconds is not needed for what goes on now.
UNNEEDED_SECONDS = 1.0

#: A task that waits for memory lets others pass, in between, for so many times the patience.
TURN = 6

#: Of so many children one may be on its way to be replaced, at least one.
REPLACED_AT_ONCE = 8


class IdleChild(Child, Protocol):
    """What is read of an idle child beside what ``recycle`` reads.

    Attributes:
        idle_since: When it last became idle (monotonic seconds).
    """

    idle_since: float


class Fleet(Protocol):
    """What the supervisor reads of all children together."""

    @property
    def size(self) -> int:
        """Number of children that exist or are starting."""

    @property
    def starting(self) -> int:
        """Number of those that are not ready yet."""

    @property
    def starting_children(self) -> Iterable[Child]:
        """Those."""

    @property
    def leaving(self) -> int:
        """Number of those that were told or made to go."""

    @property
    def idle(self) -> Sequence[IdleChild]:
        """Idle children by last use, the longest idle first."""


class _Trial:
    """Tasks of one name of which nothing is known: how many may run."""

    __slots__ = ("began", "latest", "running")

    def __init__(self, now: float) -> None:
        self.began = self.latest = now
        self.running: set[Task] = set()


@dataclass(slots=True)
class _Plan:
    """What is decided in one round for tasks that get their children later.

    ``tasks``, those of an unknown name among them, the bytes set aside for them, and children to start.
    """

    tasks: int = 0
    tries: int = 0
    bytes: int = 0
    starts: int = 0


def _backoff(rounds: int) -> float:
    """Return the seconds to wait after so many failed rounds."""
    first, longest = BACKOFF_SECONDS
    return min(first * 2.0 ** min(rounds - 1, 16), longest)


class Supervisor:
    """The rules.

    Arguments:
        fleet: The children; the engine keeps them up to date.
        queue: The waiting tasks, the one to run next first; the engine keeps it up to date.
        room: The memory.
        bound: Upper bound of the number of children.
        min_children: Number of children never retired for being idle.
        idle_timeout: Seconds after which an idle child is retired, or None for never.
        patience: Seconds for which smaller tasks may pass one that does not fit.
        max_pause: Seconds for which a task may be paused, one time, or None for ever.
        cores: Number of cores.
        rules: When a child is replaced.

    Attributes:
        blocked: The first task that waits for memory, or None.
    """

    def __init__(
        self,
        fleet: Fleet,
        queue: Iterable[Task],
        room: Room,
        *,
        bound: int,
        min_children: int = 0,
        idle_timeout: float | None = 60.0,
        patience: float = 10.0,
        max_pause: float | None = 3600.0,
        cores: int = 2,
        rules: Rules | None = None,
    ) -> None:
        self.fleet, self.queue, self.room = fleet, queue, room
        self.bound = bound
        self.min_children = min_children
        self.idle_timeout = idle_timeout
        self.patience = patience
        self.max_pause = max_pause
        self.cores = cores
        self.rules = rules or Rules()
        self.blocked: Task | None = None
        self._yields = False
        self._trials: dict[str, _Trial] = {}
        # Children that are to go as soon as another one is ready, and those that go after their task.
        self._replaced: dict[Child, str] = {}
        self._due: dict[Child, str] = {}
        self._any_up = False
        self._looked_at, self._freed = float("-inf"), 0  # bytes of tasks that have ended since
        self._has_to_look = False
        self._stuck_since: float | None = None
        self._gave_up_at = float("-inf")
        self._failed_rounds = self._futile_rounds = 0
        self._last_failure = float("-inf")
        self._not_before = float("-inf")
        # While the system refuses more: how many children there may be at once, as far as is known.
        self._capacity: int | None = None
        self._short_rounds, self._said = 0, False
        self._last_shortage = self._more_at = self._said_at = float("-inf")
        self._nobody_since: float | None = None

    # -- what is asked for every task

    def admit(self, task: Task, now: float) -> bool:
        """Whether a task may begin at once; then memory is set aside for it.

        For one that nobody is waiting before. False only means that :meth:`handle` has to be asked.
        """
        plan = _Plan()
        if self._waits_for_nobody(task, plan) and self._lacks(task, now) > 0:
            return False  # it will begin all the same, perhaps in a new child
        if self._fits(task, now, plan):
            self._begin(task, now)
            return True
        return False

    def ended(self, task: Task) -> None:
        """Take note that a task has ended, or did not begin after all."""
        self._freed += self.room.grown.get(task, 0)
        self.room.end(task)
        if not self.room.running:
            self._looked_at = float("-inf")  # what it had is free now, which decides for the next one
        if self._trials and (trial := self._trials.get(task.name)):
            trial.running.discard(task)
            if not trial.running:
                del self._trials[task.name]

    @property
    def short(self) -> bool:
        """Whether the first task that waits does so as memory is used or set aside, not by another rule.

        Not while it lets others pass after it has held them up: they may be fetched then.
        """
        return self.blocked is not None and not self._yields and self.room.lacks(self.blocked) > 0

    @property
    def watches_tasks(self) -> bool:
        """Whether :class:`Done` can lead to anything, so that it need not be told for nothing."""
        rules = self.rules
        return bool(rules.hard or rules.max_age is not None or self._due or self._surplus > 0)

    # -- what happens

    def handle(self, event: Event, now: float) -> list[Action]:  # noqa: PLR0911 - one for each event
        """Return what to do about ``event`` at monotonic time ``now`` (seconds)."""
        match event:
            case Waiting():
                return self._assign(now)
            case Done(child):
                return self._after_task(child, now)
            case Looked(look):
                self._saw(look, now)
                return self._assign(now)
            case Tick():
                # First who goes: what is decided after the look must not count on them.
                return [*self._retire_idle(now), *self._end_paused(now), Measure()]
            case Gone():
                return [*self._gone(event, now), Measure()]
            case Resized(bound):
                self.bound = bound
                return [*self._shrink(), Measure()]
            case Outdated():
                return [*self._retire_outdated(now), Measure()]
            case Up():
                self._failed_rounds, self._any_up = 0, True
                # What it has cost was not seen yet.
                return [*self._end_shortage(now), *(self._replace() or self._shrink()), Measure()]
            case Stuck(look):
                self._saw(look, now)
                return self._on_stuck(look, now)

    def _saw(self, look: Look, now: float) -> None:
        self.room.look(look)
        self._looked_at = now  # however long it has taken: there is no better one
        self._freed = 0

    # -- begin

    def _fits(self, task: Task, now: float, plan: _Plan) -> bool:
        """Whether a task may begin, beside what is planned."""
        return self._has_room(task, now, plan) and (
            task.estimate.known or self._waits_for_nobody(task, plan) or self._may_try(task, now, plan.tries)
        )

    def _has_room(self, task: Task, now: float, plan: _Plan) -> bool:
        if self._waits_for_nobody(task, plan):
            # Whatever it needs: there is nobody whose end could make room.
            return not self._needs_new_child(task, now)
        children = (self.fleet.starting + plan.starts) * self.room.child_bytes
        return not self.room.excludes(task) and self._lacks(task, now, plan.bytes + children) <= 0

    def _lacks(self, task: Task, now: float, extra: int = 0) -> int:
        """Return how much is missing for a task to begin beside ``extra``, 0 or less if it can."""
        lacks = self.room.lacks(task, extra)
        if task.estimate.known:
            return lacks
        trial = self._trials.get(task.name)
        if trial is None or now - trial.latest < ENDLESS_SECONDS:
            return lacks
        return max(lacks, 2 * self._most_grown(trial) + extra - self.room.free)

    def _most_grown(self, trial: _Trial) -> int:
        return max(self.room.grown.get(task, 0) for task in trial.running)

    def _waits_for_nobody(self, task: Task, plan: _Plan) -> bool:
        """Whether there is nobody whose end would be worth waiting for."""
        return not plan.tasks and (self._nobody_else or self._is_waited_for(task))

    def _is_waited_for(self, task: Task) -> bool:
        """Whether it may be this task that all that runs waits for: all rests, and it was sent from there.

        It need not be as large as its like; if it is it will be paused. What it was said to need has to be
        there.
        """
        room, estimate = self.room, task.estimate
        if not room.rests or (estimate.known and not estimate.ended):
            return False
        if room.free <= room.child_bytes + TRIAL_BYTES or task.parent_id is None:
            return False
        return any(running.task_id == task.parent_id for running in room.running)

    @property
    def _nobody_else(self) -> bool:
        """Whether nothing runs, and there is one child at most: the next task would be alone."""
        return not self.room.running and self.fleet.size <= 1

    def _is_stale(self, now: float) -> bool:
        """Whether the last look at memory is too old to say no by."""
        return now - self._looked_at > FRESH_SECONDS

    def _needs_new_child(self, task: Task, now: float) -> bool:
        """Whether a task could begin alone, but the only child has kept too much of earlier tasks for it."""
        if not (self._nobody_else and self.fleet.idle):
            return False
        child = self.fleet.idle[0]
        needs = task.estimate.reserved - self.room.free
        if needs <= 0 or not child.tasks:
            return False
        if self._is_stale(now):
            return True  # until it has been looked at
        kept = max(child.growth_bytes, child.private_bytes - self.room.child_bytes)
        return 2 * kept >= needs  # what it needs is a guess

    def _begin(self, task: Task, now: float) -> None:
        self.room.begin(task)
        if not task.estimate.known:
            trial = self._trials.get(task.name)
            if trial is None:
                trial = self._trials[task.name] = _Trial(now)
            trial.running.add(task)
            trial.latest = now

    def _may_try(self, task: Task, now: float, tries: int) -> bool:
        """Whether one more task of which nothing is known may begin."""
        room, trial = self.room, self._trials.get(task.name)
        if room.free // (len(room.running) + tries + 1) >= AMPLE_BYTES:
            return True
        first = max(min(room.free // LEAST_BYTES, self.cores), 1)
        if trial is None:
            return tries < first
        if self._most_grown(trial) > TRIAL_BYTES:
            return not tries and now - trial.latest >= ENDLESS_SECONDS
        running = len(trial.running) + tries
        doublings = min(int((now - trial.began) / TRIAL_SECONDS), 16)
        if first <= running < first << doublings and self._is_stale(now):
            self._has_to_look = True  # they may have grown since
            return False
        return running < first << doublings

    def _assign(self, now: float) -> list[Action]:
        """Find out what can begin, and which children have to be started for it."""
        fleet = self.fleet
        idle, coming, startable = len(fleet.idle), fleet.starting, self._startable(now)
        actions: list[Action] = []
        plan = _Plan()
        blocked: Task | None = None
        self._has_to_look = False
        for task in islice(self.queue, SCANNED):
            needs_start = not idle and not coming
            if needs_start and plan.starts >= startable:
                break  # nobody to take it, whatever room there is
            plan.starts += needs_start
            if self._fits(task, now, plan):
                if idle:
                    idle -= 1
                    self._begin(task, now)
                    actions.append(Give(task))
                    continue
                coming -= not needs_start
                plan.tasks += 1
                plan.bytes += task.estimate.reserved
                plan.tries += not task.estimate.known
                continue
            blocked = blocked or task
            # Nobody passes it any more, unless it waits for its like to tell what they need.
            held_up = self._holds_up(task, now) and not self._has_room(task, now, plan)
            plan.starts -= needs_start
            if held_up or self._needs_new_child(task, now):
                break
        self.blocked = blocked
        self._yields = (
            blocked is not None and now - blocked.since > self.patience and not self._holds_up(blocked, now)
        )
        relief: list[Action] = [Measure()] if self._has_to_look else self._relieve(idle, now)
        if relief == [Measure()]:
            return actions + relief  # what is to be started will be known with what is seen then
        actions += relief
        if blocked is None:
            room = (self.room.free - plan.bytes) // max(self.room.child_bytes, 1) - fleet.starting
            plan.starts = max(plan.starts, min(self.min_children - self._staying, startable, room))
        if plan.starts > 0:
            actions.append(Start(plan.starts))
        return actions

    def _holds_up(self, task: Task, now: float) -> bool:
        """Whether it is the turn of a task that waits for memory: others do not pass it."""
        turn = hold = TURN * self.patience
        late = now - task.since - self.patience
        while late >= hold + turn:
            late -= hold + turn
            hold *= 2
        return 0 < late < hold or (late == 0 and hold > turn)

    def _startable(self, now: float) -> int:
        if now < self._not_before:
            return 0
        count = max(self.bound + self._extra - self.fleet.size, 0)
        if self._capacity is not None:
            # One more, at times, shows whether there is room again.
            count = min(count, max(self._capacity + (now >= self._more_at) - self.fleet.size, 0))
        if not self._any_up and self.room.free < count * AMPLE_START_BYTES:
            return min(count, max(self.cores - self.fleet.size, 0))  # what one costs is known then
        return count

    def _relieve(self, idle: int, now: float) -> list[Action]:
        """Make room by letting idle children go, those with the most memory first.

        Arguments:
            idle: Number of idle children that nothing was given to.
        """
        room, blocked = self.room, self.blocked
        lacks = max(-room.free, self._lacks(blocked, now) if blocked else 0)
        # One stays for the task itself. Those that were given something stand at the end.
        spare = self.fleet.idle[: max(idle - 1, 0) if blocked else idle]
        if blocked and idle == 1:
            last = self.fleet.idle[0]
            if 0 < lacks <= last.private_bytes - room.child_bytes or self._needs_new_child(blocked, now):
                spare = [last]  # a new one in its place leaves enough, or more
        if lacks <= 0 or not (blocked or spare):
            return []
        if self._is_stale(now) or self._freed >= lacks:
            return [Measure()]  # tasks have ended since, or may have
        actions: list[Action] = []
        if not self.fleet.leaving:
            for child in sorted(spare, key=lambda child: -child.private_bytes):
                if lacks > 0:
                    lacks -= child.private_bytes
                    actions.append(Retire(child, "memory is short"))
        return actions

    # -- go

    @property
    def _extra(self) -> int:
        """Children above the bound, as replacements of others."""
        return len(self._replaced) + len(self._due)

    @property
    def _staying(self) -> int:
        return self.fleet.size - self.fleet.leaving

    @property
    def _any_ready(self) -> bool:
        """Whether there is a child that is or was ready, and stays."""
        return self._staying > self.fleet.starting

    @property
    def _is_full(self) -> bool:
        """Whether the system has no room for one more."""
        return self._capacity is not None and self.fleet.size >= self._capacity

    @property
    def _surplus(self) -> int:
        return self._staying - self.bound - self._extra

    @property
    def trims(self) -> bool:
        """Whether busy children are to give free heap back."""
        return self.room.free < TRIM_SHARE * self.room.budget

    def _after_task(self, child: Child, now: float) -> list[Action]:
        reason = self.rules.must_go(child) or self._due.get(child)
        if reason is not None:
            return [Retire(child, reason)]
        if self._surplus > 0:
            return [Retire(child, f"at most {self.bound} children")]
        if child in self._replaced:
            return []
        pressed = self.room.free < PRESSED_SHARE * self.room.budget
        reason = self.rules.should_go(child, now, pressed=pressed)
        if reason is None or self._extra + self.fleet.leaving >= max(self._staying // REPLACED_AT_ONCE, 1):
            return []
        children = (self.fleet.starting + 1) * self.room.child_bytes
        if pressed or now < self._not_before or self._is_full or self.room.free < children:
            return [Retire(child, reason)]  # no room for two, or nobody to replace it
        self._replaced[child] = reason
        return [Start(1)]

    def _replace(self) -> list[Action]:
        """Let go the child for which a replacement is ready, or have it go after its task."""
        if not self._replaced:
            return []
        child = next(iter(self._replaced))
        reason = self._replaced.pop(child)
        if child in self.fleet.idle:
            return [Retire(child, reason)]
        self._due[child] = reason
        return []

    def _gone(self, gone: Gone, now: float) -> list[Action]:
        if gone.child is not None:
            self._replaced.pop(gone.child, None)
            self._due.pop(gone.child, None)
        while len(self._replaced) > self.fleet.starting:
            self._replaced.popitem()  # its replacement is gone; it stays until it is looked at again
        if gone.no_memory:
            self._replaced.clear()
            self._not_before = max(self._not_before, now + BACKOFF_SECONDS[0])
            return []
        if not gone.failed:
            return []
        self._replaced.clear()  # they stay as long as there is nobody else
        if gone.shortage is not None:
            return self._run_short(gone.born, gone.shortage, now)
        return self._count_failure(gone.born, now)

    def _retire_outdated(self, now: float) -> list[Retire]:
        """Let outdated children go that nobody needs: those that are idle while no task runs, or for long."""
        return [
            Retire(child, "the pool was restarted")
            for child in self.fleet.idle
            if child.outdated and (not self.room.running or now - child.idle_since > UNNEEDED_SECONDS)
        ]

    def _retire_idle(self, now: float) -> list[Retire]:
        """Let outdated children go, and those of the others that have been idle for long."""
        retired = self._retire_outdated(now)
        if self.idle_timeout is None:
            return retired
        going = {action.child for action in retired}
        spare = self._staying - len(going) - self.min_children
        longest_idle = [child for child in self.fleet.idle if child not in going]
        return retired + [
            Retire(child, f"idle for {now - child.idle_since:.0f} s")
            for child in longest_idle[: max(spare, 0)]
            if now - child.idle_since >= self.idle_timeout
        ]

    def _shrink(self) -> list[Action]:
        surplus = max(self._surplus, 0)
        return [Retire(child, f"at most {self.bound} children") for child in self.fleet.idle[:surplus]]

    def _count_failure(self, born: float, now: float) -> list[Action]:
        # Children that were started together fail together: that is one round.
        if born < self._last_failure:
            return []
        self._last_failure = now
        self._failed_rounds += 1
        self._not_before = now + _backoff(self._failed_rounds)
        self._futile_rounds = 0 if self._any_ready else self._futile_rounds + 1
        if self._futile_rounds >= MAX_FAILED_ROUNDS:
            return [StopWorker(f"children failed to start {self._futile_rounds} times in a row")]
        return []

    def _run_short(self, born: float, shortage: str, now: float) -> list[Action]:
        """Go on with as many children as there are, as the system has no room for more."""
        size = self.fleet.size
        self._capacity = size if self._capacity is None else min(self._capacity, size)
        if born >= self._last_shortage:
            self._last_shortage = now
            self._short_rounds += 1
            self._more_at = now + _backoff(self._short_rounds)
        if self._any_ready:
            self._nobody_since = None
        elif self._nobody_since is None:
            self._nobody_since = now
        elif now - self._nobody_since >= MAX_SHORTAGE_SECONDS:
            return [StopWorker(f"for {MAX_SHORTAGE_SECONDS:g} s no child could be started: {shortage}")]
        if self._said or now - self._said_at < SAY_SECONDS:
            return []
        self._said, self._said_at = True, now
        return [Say(shortage)]

    def _end_shortage(self, now: float) -> list[Action]:
        """Take note of a child that is ready: there may be room for more than there was."""
        self._futile_rounds, self._nobody_since = 0, None
        if self._capacity is None or self.fleet.size - self.fleet.starting <= self._capacity:
            return []
        said, self._said = self._said, False
        self._capacity, self._short_rounds = None, 0
        return [Say(None)] if said else []

    # -- end a task

    def _end_paused(self, now: float) -> list[Kill]:
        """End the task that has been paused for too long: what runs beside it may never end."""
        longest = self.max_pause
        if longest is None:
            return []
        since = [(task.paused_at, task) for task in self.room.running if task.paused_at is not None]
        at, task = min(since, key=lambda pair: pair[0], default=(now, None))
        if task is None or now - at < longest:
            return []
        return [Kill(task, f"it was paused for {now - at:.0f} s, at most {longest:g} s (memsafe_max_pause)")]

    def _on_stuck(self, look: Look, now: float) -> list[Action]:
        """Let children go that run nothing; wait a little for those that leave or start; then end a task."""
        if self._stuck_since is None or now - self._stuck_since > 2 * MOVING_SECONDS:
            self._stuck_since = now
        if self.fleet.idle:
            return [Retire(child, "memory is short") for child in self.fleet.idle]
        excess = look.coming - max(look.headroom, 0)
        if excess > 0 and look.at > self._gave_up_at:
            # There was room when they were started, and what they take can not be held up as that of a task.
            newest_first = sorted(self.fleet.starting_children, key=lambda child: -child.born)
            surplus = -(-excess * len(newest_first) // look.coming)  # rounded up
            self._gave_up_at = now
            self._not_before = max(self._not_before, now + BACKOFF_SECONDS[0])
            self._replaced.clear()  # they stay as long as there is nobody else
            return [Retire(child, "memory is short") for child in newest_first[:surplus]]
        # Those that start still take a little, for which there is nothing left above the budget.
        moving = self.fleet.leaving or (self.fleet.starting and look.headroom > 0)
        if moving and now - self._stuck_since < MOVING_SECONDS:
            return []
        self._stuck_since = None
        return self._kill(look.running)

    def _kill(self, running: Sequence[Seen]) -> list[Action]:
        """Choose whom to end.

        One that can never fit; else the newest of those that may be run again, then of the others, whose
        memory is enough for the oldest of the rest to go on; else the largest. Nobody who has next to
        nothing: that would make no room.
        """
        used = self.room.budget - self.room.headroom
        idle = sum(child.private_bytes for child in self.fleet.idle)
        base = used - sum(seen.grown for seen in running) - idle
        for seen in running:
            if seen.grown > max(self.room.budget - base, LITTLE_BYTES):
                return [Kill(seen.task, "it can not fit, not even alone")]
        reason = "nothing that runs can go on"
        newest_first = [seen for seen in reversed(running) if seen.grown > LITTLE_BYTES]
        for victim in sorted(newest_first, key=lambda seen: not seen.task.redeliverable):
            # It has to be enough for the oldest of the others.
            other = next((seen for seen in running if seen is not victim), None)
            if other is None:
                break
            if pending(other.task.estimate, other.grown, growing=True) <= self.room.headroom + victim.grown:
                return [Kill(victim.task, reason)]
        largest = max(newest_first, key=lambda seen: seen.grown, default=None)
        return [] if largest is None else [Kill(largest.task, reason)]
