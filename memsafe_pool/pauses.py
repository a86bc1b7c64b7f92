"""Which running children are stopped for a while because memory is about to run out.

A paused task loses nothing: it goes on where it was when others have ended. The policy, sample by sample:

* What each task is still going to take is what is left of its reservation, and for one that has gone
  over that and grows, as much as the largest of its kind needed, or as much again as it has
  (``reservations.pending``).
* While that fits into what is left, nothing is done. Else the newest tasks that are still going to take
  something are stopped until it does: early, when they are small, so that the rest can finish. The oldest of
  them, the *leader*, goes on: it is to end, and its memory comes back.
* The leader is stopped, too, when the limit is near: nearer than the others may come, as it alone can take
  something until the next sample, and its speed is known. What the kernel may be able to take back is room
  for it alone: so the kernel has to find out, and nobody is ended for what may be free soon. If then nothing
  runs that could end, we are stuck, and say so: something has to be ended.
* What is taken and nobody is known to have (``unseen``) may be any task's: while it grows each may go on to
  take as much again. So the newest are stopped here, too, and the oldest leads.
* A task that rests (``rest``) is going to take nothing, and leads nobody. When it takes something after all,
  it is the last of the line: whoever went on meanwhile is to end first.
* Paused tasks go on, the oldest first, when what they may need fits again, the leader as soon as there is
  a little. All of them grew when they were stopped, so each may need what the largest of its kind did: it
  goes on by itself, and shows whether it does.

The next sample is taken in half the time in which the tasks could fill what is left, at the speed at
which cores can touch memory; tasks that have what they need, and do not grow, are trusted to begin slowly.

Pure: no I/O and no clock. Imports neither Celery nor billiard.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from math import inf

from memsafe_pool.reservations import LITTLE_BYTES, Estimate, pending
from memsafe_pool.unseen import Unseen

__all__ = ["Decision", "Pauses", "Sample"]

_MIB = 1 << 20

#: Bytes per second that one core can touch: 2 to 4 GB/s were measured. Where nothing grew lately, a tenth.
FAST, SLOW = 4e9, 0.4e9

#: Shortest and longest time between samples, and the longest while a task is paused, in seconds.
SHORTEST, LONGEST, LONGEST_PAUSED = 0.005, 1.0, 0.02

#: Nobody but the leader goes on when less is left than this share of the limit, and this many bytes.
MARGIN_SHARE, MARGIN_BYTES = 0.03, 8 * _MIB

#: The leader does so until less is left than this, and than it can take before the next sample.
LEAST_SHARE, LEAST_BYTES = 0.01, 4 * _MIB

#: A task grows that takes more than so many bytes per second; that is forgotten by half in so many seconds.
GROWING, HALF_LIFE = 4 * _MIB, 0.2

#: Less is growth, too, if all tasks at that speed would fill what is left in so many seconds.
FILL_SECONDS = 2.0

#: A task is new for so many seconds, and may begin to grow at full speed.
NEW_SECONDS = 0.3

#: What is left to take matters from so many bytes on.
MATTERS_BYTES = 4 * _MIB

#: Of what is left, the share that paused tasks may be expected to fill when they go on.
RESUME_SHARE = 0.9

#: Seconds without room after which we are stuck: what has just ended may still be giving its memory back.
#: The second number is for workers that share the memory with others, whose tasks may end, too.
STUCK_SECONDS, STUCK_SHARED_SECONDS = 0.1, 4.0

#: Seconds for which all wait for others' memory to come back where none of them has any to give.
HOPELESS_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One running task.

    Attributes:
        task: Who.
        estimate: What was known when it was admitted.
        grown: Bytes it has taken since it began.
        spared: Whether it is not to be stopped now.
        free: Bytes that its child had free before it began, at most, and which it need not take.
        resting: See ``rest``.
    """

    task: Hashable
    estimate: Estimate
    grown: int
    spared: bool = False
    free: int = 0
    resting: bool = False


@dataclass(slots=True)
class Decision:
    """What to do now.

    Attributes:
        stop: Tasks to stop.
        go_on: Tasks to let go on.
        growing: Tasks that grow.
        stuck: Whether all are paused and there is no room for any of them.
        wait: Seconds until the next sample.
    """

    stop: list[Hashable] = field(default_factory=list)
    go_on: list[Hashable] = field(default_factory=list)
    growing: set[Hashable] = field(default_factory=set)
    stuck: bool = False
    wait: float = LONGEST


class _Run:
    """What is remembered of one task."""

    __slots__ = (
        "at",
        "began",
        "growing",
        "grown",
        "most",
        "need",
        "paused",
        "rate",
        "resting",
        "spared",
        "speed",
        "suspect",
        "turn",
    )

    def __init__(self, now: float) -> None:
        self.began = self.at = now
        self.grown = self.most = self.need = 0
        self.rate = self.speed = 0.0
        self.growing = self.paused = self.resting = self.spared = False
        self.suspect = False  # whether it may be the one that takes what nobody is known to have
        self.turn = 0  # the lowest goes first, of the same the oldest

    def see(self, sample: Sample, now: float, slow: float, unseen: Unseen, *, suspected: bool) -> None:
        """Take note of a sample.

        Arguments:
            slow: Up to so many bytes per second are no growth.
            unseen: What nobody is known to have.
            suspected: Whether that grows, so that it may be this task's.
        """
        passed = max(now - self.at, 1e-4)
        if not self.paused:
            # A task may have taken some before its first sample: no core is faster.
            rate = min((sample.grown - self.grown) / passed, FAST)
            self.rate = max(rate, self.rate * 0.5 ** (passed / HALF_LIFE))
            self.suspect = suspected and not sample.resting
        self.grown, self.at, self.spared = sample.grown, now, sample.spared
        self.growing = self.rate > slow
        self.need = pending(
            sample.estimate, sample.grown, sample.free, growing=self.growing, resting=sample.resting
        )
        self.speed = self.rate if self.growing else 0.0
        if self.suspect:
            self.need += int(unseen.bytes)
            self.speed = max(self.speed, min(unseen.rate, FAST))
        self.most = sample.estimate.most - sample.free


class Pauses:
    """The policy, with what it remembers from sample to sample.

    Arguments:
        cores: Number of cores, which is how many tasks can take memory at the same time.
        enabled: Whether anybody is stopped at all; else it only tells who grows.

    Attributes:
        stuck_seconds: Seconds without room for any task after which we are stuck.
        soon: Seconds within which to look when a task has begun of which little is expected.
    """

    def __init__(self, cores: int, *, enabled: bool = True) -> None:
        self.stuck_seconds = STUCK_SECONDS
        self._cores = cores
        self._enabled = enabled
        self._runs: dict[Hashable, _Run] = {}
        self._no_room_since: float | None = None
        self._last_turn = 0
        self._unseen = Unseen()
        self._doubts = self._hopeless = False
        self.soon = LONGEST

    @property
    def exact(self) -> bool:
        """Whether somebody may be stopped or ended for the next numbers: none may be older than that."""
        return self._doubts or (bool(self._runs) and all(run.paused for run in self._runs.values()))

    def is_paused(self, task: Hashable) -> bool:
        """Whether a task is stopped."""
        run = self._runs.get(task)
        return run is not None and run.paused

    def forget(self, task: Hashable) -> bool:
        """Forget a task, which has ended; return whether it was paused."""
        run = self._runs.pop(task, None)
        if not self._runs:
            self._no_room_since = None
            self._last_turn = 0
        return run is not None and run.paused

    def decide(
        self,
        now: float,
        headroom: float,
        limit: float,
        samples: Sequence[Sample],
        *,
        uncertain: float = 0.0,
        starting: float = 0.0,
        unknown: float | None = None,
    ) -> Decision:
        """Return what to do.

        Arguments:
            now: Monotonic seconds.
            headroom: Bytes left until something bad happens.
            limit: Bytes there are in all.
            samples: The running tasks, the oldest first, paused ones as well.
            uncertain: Bytes more that there may be, and for which a task may have to wait.
            starting: Bytes of it that children which are starting will take, and who cannot be stopped.
            unknown: Bytes in use that nobody is known to have, up to a constant; None where others take and
                give back memory, so that it says nothing of our tasks.
        """
        decision = Decision()
        runs: list[tuple[Hashable, _Run]] = []
        slow = min(GROWING, max(headroom - starting, 0.0) / (FILL_SECONDS * max(len(samples), 1)))
        suspected = self._suspect(now, unknown, limit, slow)
        for sample in samples:
            run = self._runs.get(sample.task)
            if run is None:
                run = self._runs[sample.task] = _Run(now)
            run.see(sample, now, slow, self._unseen, suspected=suspected)
            if run.resting and not sample.resting:
                self._last_turn += 1
                run.turn = self._last_turn
            run.resting = sample.resting
            runs.append((sample.task, run))
            if run.growing and not run.paused:
                decision.growing.add(sample.task)
        if self._last_turn:
            runs.sort(key=lambda pair: pair[1].turn)
        room = headroom - starting - max(MARGIN_SHARE * limit, MARGIN_BYTES)
        leaders = headroom - starting + uncertain - max(LEAST_SHARE * limit, LEAST_BYTES)
        if self._is_hopeless(now, runs, room):
            leaders = inf
        if (decision.growing or suspected) and self._enabled:
            self._stop(runs, room, leaders, decision)
        if not decision.stop:
            self._go_on(runs, room, leaders, decision)
        self._find_stuck(now, runs, decision)
        decision.wait = self._wait(now, runs, room, slow)
        return decision

    def _suspect(self, now: float, unknown: float | None, limit: float, slow: float) -> bool:
        """Whether what nobody is known to have grows, by two looks, the second of them exact."""
        self._unseen.look(now, unknown, limit)
        doubted, self._doubts = self._doubts, self._unseen.matters and self._unseen.rate > slow
        return doubted and self._doubts

    def _is_hopeless(self, now: float, runs: list[tuple[Hashable, _Run]], room: float) -> bool:
        """Whether all have waited for room that nobody's end would make: then the oldest goes on anyway."""
        if room > 0 or any(run.grown > LITTLE_BYTES for _, run in runs):
            self._hopeless = False
        elif self._no_room_since is not None and now - self._no_room_since >= HOPELESS_SECONDS:
            self._hopeless = True
        return self._hopeless

    def _stop(
        self, runs: list[tuple[Hashable, _Run]], room: float, leaders: float, decision: Decision
    ) -> None:
        active = [(task, run) for task, run in runs if not run.paused]
        over = sum(run.need for _, run in active) - room
        leader = next((run for _, run in runs if run.need > 0), None)
        for task, run in reversed(active):
            # At the speed at which it grows, the leader comes that far until it is looked at again.
            if run is leader and leaders > 2 * SHORTEST * run.speed:
                continue
            if over > 0 and run.need > 0 and not run.spared:
                over -= run.need
                run.paused = True
                decision.stop.append(task)

    def _go_on(
        self, runs: list[tuple[Hashable, _Run]], room: float, leaders: float, decision: Decision
    ) -> None:
        needed = sum(run.need for _, run in runs if not run.paused)
        leading = True
        for task, run in runs:
            if run.paused:
                need = max(run.need, run.most - run.grown, MATTERS_BYTES)
                # At the speed at which it grew, the leader must not come to the limit before the next sample.
                may_lead = leading and leaders > SHORTEST * max(run.rate, run.speed)
                if not (needed + need <= RESUME_SHARE * room or may_lead):
                    break  # nobody passes
                needed += need
                run.paused = False
                decision.go_on.append(task)
            if run.need > 0:
                leading = False

    def _find_stuck(self, now: float, runs: list[tuple[Hashable, _Run]], decision: Decision) -> None:
        if not runs or any(not run.paused for _, run in runs):
            self._no_room_since = None
        elif self._no_room_since is None:
            self._no_room_since = now
        else:
            decision.stuck = now - self._no_room_since >= self.stuck_seconds

    def _wait(self, now: float, runs: list[tuple[Hashable, _Run]], room: float, slow: float) -> float:
        active = [run for _, run in runs if not run.paused]
        longest = LONGEST if len(active) == len(runs) else LONGEST_PAUSED
        self.soon = min(max(room / (2 * FAST * self._cores), SHORTEST), longest)
        if not active:
            return longest
        fast = self._unseen.rate > slow or any(
            run.growing or run.need > MATTERS_BYTES or now - run.began < NEW_SECONDS for run in active
        )
        speed = (FAST if fast else SLOW) * min(len(active), self._cores)
        return min(max(room / (2 * speed), SHORTEST), longest)
