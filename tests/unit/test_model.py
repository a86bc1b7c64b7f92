"""The rules against a simulated machine: whatever comes, in whatever order, some things always hold.

The machine is ``memsafe_pool.machine``: children that start with a delay and cost memory, tasks that grow,
free some and grow again, hang, keep memory for ever, or lie about what they need, limits that move, others
that use the same memory. An *honest* machine has none of the latter four. What must not happen is found out
from what children do, not from what the rules say of it. ``make check-model`` runs 10,000 examples.
"""

from __future__ import annotations

import os

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from memsafe_pool.machine import Machine, Terms, Work
from memsafe_pool.pauses import FAST, LEAST_BYTES, LEAST_SHARE, SHORTEST
from memsafe_pool.recycle import Rules
from memsafe_pool.reservations import LITTLE_BYTES
from memsafe_pool.rest import REST_SECONDS

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "240"))
MIB = 1 << 20

#: No task takes memory faster than this, in bytes per second: what one core can touch.
FASTEST = 4e9

#: What others leave, and what a lower limit leaves, beside what is used (bytes).
LEFT_BYTES = 40 * MIB

#: What a task's child keeps at most where nobody lies (bytes).
KEPT_BYTES = 5 * MIB

#: Seconds in which something begins when nothing runs: the time until the next look at memory, and some more.
NOTHING_RUNS_SECONDS = 2.5

#: Seconds after which one more begins of tasks of which nothing is known: the others may never end.
ENDLESS_SECONDS = 10.0

#: So near to the beginning or end of a turn both are right (seconds).
ROUNDING = 1e-6

#: Seconds after which the model ends a task that hangs, when all is to end.
HANGING_SECONDS = 5.0

one_of = st.sampled_from

machines = st.fixed_dictionaries(
    {
        "limit": one_of([256, 512, 1024]).map(lambda size: size * MIB),
        "budget": one_of(["auto", "auto", 0.7, 200 * MIB]),
        "bound": one_of([1, 2, 4, 10]),
        "cores": one_of([1, 2, 8]),
        "tries": one_of([2, 1, 0]),
        "base": one_of([30, 80]).map(lambda size: size * MIB),
        "child": one_of([2, 12, 30]).map(lambda size: size * MIB),
        "start_seconds": one_of([0.02, 0.3]),
        "late": one_of([0.0, 0.001]),
    }
)
policies = st.fixed_dictionaries(
    {"idle_timeout": one_of([None, 0.0, 0.5, 60.0]), "patience": one_of([10.0, 1.0, 0.1])}
)
rules = st.builds(
    Rules,
    max_tasks=one_of([None, 1, 3]),
    max_private_bytes=one_of([None, 40 * MIB]),
    max_growth_bytes=one_of([None, 20 * MIB]),
    max_age=one_of([None, 2.0]),
)
tasks = st.fixed_dictionaries(
    {
        "peak": one_of([0, 1, 2, 5, 10, 20, 50, 100, 200, 400, 1000]).map(lambda size: size * MIB),
        "seconds": one_of([0.0, 0.01, 0.05, 0.2, 1.0, 5.0]),
        "rise": one_of([0.1, 0.5, 1.0]),  # the share of its time in which it gets to its peak
        "first": one_of([0.0, 0.0, 0.5]),  # the share of its peak that it takes as fast as it can
        # Shares of its peak between which it falls and rises afterwards.
        "waves": one_of([(), (), (0.0,), (0.5, 1.0), (0.0, 0.7), (0.1, 1.0, 0.1, 1.0)]),
        "kept": one_of([0.0, 0.0, 0.0, 0.02, 0.5, 1.0]),  # of its peak: what its child keeps at most
        "declared": one_of([None, None, 1.0, 0.5, 0.1, 2.0]),  # of its peak
        "hangs": one_of([False] * 9 + [True]),
        # Whether it uses no CPU where it takes no memory, and for how long it does so half way.
        "waits": one_of([0.0] * 6 + [2.0, 8.0, 30.0]),
        "unseen": one_of([False] * 6 + [True]),  # in files in memory
        "redeliverable": st.booleans(),
        "name": one_of("ab"),
    }
)
#: Small tasks that keep coming: with so many at a time, the next before the last ones have ended.
streams = st.fixed_dictionaries(
    {
        "peak": one_of([1, 5, 20]).map(lambda size: size * MIB),
        "seconds": one_of([0.2, 1.0, 3.0]),
        "number": one_of([1, 2]),
    }
)


def curve(task, peak, kept):
    """The points of a task that gets to its peak, and then goes down and up in equal times until its end."""
    first = int(task["first"] * peak)
    at = max(task["rise"] * task["seconds"], peak / FASTEST)
    points = [(0.0, 0), (first / FASTEST, first)]
    if task["waits"]:
        points.append((first / FASTEST + task["waits"], first))
        at += task["waits"]
    points.append((at, peak))
    step = max(task["seconds"] + task["waits"] - at, 0.0) / (len(task["waves"]) + 1)
    size = peak
    for share in task["waves"]:
        before, size = size, int(share * peak)
        at += max(step, (size - before) / FASTEST)
        points.append((at, size))
    end = max(task["seconds"] + task["waits"], at)
    return [*points, (end, size), (end, 0 if task["unseen"] else min(int(kept * peak), size))]


def turns(patience):
    """The times in which nobody passes a task that waits for memory: pairs of seconds that it has waited."""
    begin, length = patience, 6 * patience
    while True:
        yield begin, begin + length
        begin += length + 6 * patience
        length *= 2


def is_its_turn(waited, patience):
    for begin, end in turns(patience):
        if waited < end - ROUNDING:
            return waited > begin + ROUNDING
    raise AssertionError


def turn_for(needed, waited, patience):
    """How long a task will have waited after ``needed`` seconds of the next turn that is long enough."""
    for begin, end in turns(patience):
        if end - max(begin, waited) >= needed:
            return max(begin, waited) + needed
    raise AssertionError


class Watched(Machine):
    """The machine, with a second look at each step that is taken.

    Attributes:
        came: Number of each task, in the order in which they came.
        since: When each task began to wait.
        runs: What each task was in its children, one after the other.
        crashed: Tasks whose child ended by itself when it had begun them.
        unbegun: Runs that had not begun when their child ended by itself.
        lost: Runs that were ended for want of memory.
        beside: Runs that had others beside them.
        most_unloaded: The most memory that was used, less twice what was kept of first runs.
        tried_at: When there was last no reason to begin one more task of which nothing is known.
        still_since: Since when runs neither take memory nor use CPU.
        held_up_at: When they last held nobody up.
    """

    def __init__(self, terms):
        self.used_at_sample = self.slope_at_sample = self.active_at = self.tried_at = 0.0
        self.most_unloaded = 0.0
        self.came, self.since, self.runs = {}, {}, {}
        self.still_since, self.held_up_at = {}, 0.0
        self.crashed, self.unbegun, self.lost, self.beside = set(), set(), set(), set()
        super().__init__(terms)

    def _submit(self, work):
        self.came[work], self.since[work] = len(self.came), self.now
        super()._submit(work)

    def _note_peak(self):
        used = super()._note_peak()
        thought = max(self.room.child_bytes - self.terms.child, 0)  # to be loaded by a new one
        loaded = thought + sum(child.loaded_bytes for child in self.fleet.children)
        self.most_unloaded = max(self.most_unloaded, used - 2 * loaded)
        return used

    def _sample(self, version):
        if version == self._wake_version:
            self.used_at_sample, self.slope_at_sample = self.used, self._slope
        super()._sample(version)

    def _kernel_kills(self):
        """Only where memory went faster than it is looked at, or into what can not be stopped."""
        grown = self.used - self.used_at_sample
        sudden = self._slope > self.slope_at_sample  # somebody has begun to grow since
        fast = sudden or grown >= max(LEAST_SHARE * self.budget.limit, LEAST_BYTES)
        hopeless = self.pauses._hopeless  # nobody had anything to give, and the oldest went on
        assert fast or hopeless or not self.terms.pause, "seen in time, and the kernel had to kill"
        victim = max(self.fleet.children, key=self._has, default=None)
        if victim is not None and victim.run is not None:
            self.lost.add(victim.run)
        super()._kernel_kills()

    def _gone(self, child, *arguments, **options):
        if child.run in self.lost:
            self.since[child.run.work] = self.now
        super()._gone(child, *arguments, **options)

    def give(self, child, work):
        for other in self.waiting:
            self.check_passed(work, other)
        assert set(self.runs.get(work, ())) <= self.lost | self.unbegun, f"{work} runs again without need"
        super().give(child, work)
        self.tried_at = self.now
        self.runs.setdefault(work, []).append(child.run)

    def check_passed(self, work, other):
        """Whether a task may begin while another one waits."""
        if work in self.runs or (other not in self.runs and self.came[other] > self.came[work]):
            return
        if not other.estimate.known and any(
            run.name == other.name and not run.estimate.known for run in self.room.running
        ):
            return  # it waits for its like to tell what they need
        patience = self.terms.others["patience"]
        assert not is_its_turn(self.now - self.since[other], patience), f"{work} has passed {other}"

    def retire(self, child, reason):
        assert child.run is None, "a child was to go that runs a task"
        assert child.state in {"starting", "idle", "busy"}, "a child was to go twice"
        super().retire(child, reason)

    def kill(self, work, reason):
        running = {child.run.work: child.run for child in self.fleet.children if child.state == "busy"}
        assert work in running, "a task was to be ended that does not run"
        assert not any(run.going for run in running.values()), "a task was ended while another could go on"
        left = self._headroom()[0] - self._coming_bytes()
        least = max(LEAST_SHARE * self.budget.ceiling, LEAST_BYTES)
        assert left <= least + SHORTEST * FAST, "a task was ended while one of them could go on"
        grown = next(watched.grown for watched in self._watched.values() if watched.work is work)
        assert grown > LITTLE_BYTES, "a task was ended that had nothing"
        self.lost.add(running[work])
        return super().kill(work, reason)

    def crash(self, child, *, begun=True):
        if child.run is not None:
            if begun:
                self.crashed.add(child.run.work)
            else:
                self.unbegun.add(child.run)
        super().crash(child, begun=begun)

    def check(self):
        """What holds after each event."""
        room, fleet = self.room, self.fleet
        self.used_at_sample = min(self.used_at_sample, self.used)  # what has gone was free to be taken again
        busy = [child for child in fleet.children if child.run is not None]
        running = {child.run.work for child in busy}
        assert room.running.keys() == running, "memory is set aside for others than those that run"
        assert room.pending == sum(room.running.values())
        assert min(room.running.values(), default=0) >= 0
        assert room.grown.keys() <= running
        assert self.pauses._runs.keys() <= running, "a task is remembered that has ended"
        for trial in self.supervisor._trials.values():
            assert trial.running
            assert trial.running <= running
        assert self.supervisor._replaced.keys() | self.supervisor._due.keys() <= fleet.children.keys()
        for child in busy:
            if child.state == "busy":
                assert child.run.going != self.pauses.is_paused(child.run.work)
            else:
                assert child.state == "leaving"
        if len(busy) > 1:
            self.beside.update(child.run for child in busy)
        self.check_rest(busy)
        backs_off = self.now < self.supervisor._not_before
        if running or not self.waiting or fleet.starting or fleet.leaving or backs_off:
            self.active_at = self.now
        assert self.now - self.active_at < NOTHING_RUNS_SECONDS, "nothing runs, and nothing begins"
        if backs_off or not self.can_try():
            self.tried_at = self.now
        waited = self.now - self.tried_at
        assert waited < ENDLESS_SECONDS + NOTHING_RUNS_SECONDS, "it waits for others that never end"

    def check_rest(self, busy):
        """Memory that is really free is used, although it was set aside for those that rest."""
        if not self.rest_holds_up(busy):
            self.held_up_at = self.now
        assert self.now - self.held_up_at < NOTHING_RUNS_SECONDS, "all rest, and hold up others"

    def rest_holds_up(self, busy):
        """Whether all that runs has rested for long, while others are paused, and there is room."""
        for run in set(self.still_since) - {child.run for child in busy}:
            del self.still_since[run]
        resting, paused = [], []
        for child in busy:
            run = child.run
            at_end = run.work.hangs and run.point + 1 == len(run.work.curve)
            if run.going and not run.slope and (run.work.waits or at_end):
                resting.append(self.now - self.still_since.setdefault(run, self.now))
                continue
            self.still_since.pop(run, None)
            if run.going:
                return False
            paused.append(run)
        if not resting or min(resting) < REST_SECONDS or self.fleet.starting or self.fleet.leaving:
            return False
        left = self._headroom()[0]
        return bool(paused) and left > max(LEAST_SHARE * self.budget.ceiling, LEAST_BYTES) + SHORTEST * FAST

    def can_try(self):
        """Whether there is room for the first that waits, of which nothing is known and whose like runs."""
        work, room, fleet = next(iter(self.waiting), None), self.room, self.fleet
        if work is None or work.estimate.known or not (fleet.idle or fleet.size < self.supervisor.bound):
            return False
        like = [
            self._has(child) - child.private_bytes
            for child in fleet.children
            if child.run is not None and child.run.work.name == work.name
        ]
        free = self._headroom()[1] - room.pending - room.budget / 3 - 2 * room.child_bytes
        return like and free > 2 * max(like) and not any(running.alone for running in room.running)

    def check_ended(self, work):
        """It has ended once, and has failed only if its child did, or if it has had all its tries."""
        *before, last = self.runs[work]
        assert set(before) <= self.lost | self.unbegun
        if work.outcome == "done":
            assert last not in self.lost | self.unbegun
        else:
            assert work.outcome == "failed", f"{work} was lost"
            lost = len(self.lost.intersection(self.runs[work]))
            tried = lost > self.terms.tries or last not in self.beside or not work.redeliverable
            assert work in self.crashed or (last in self.lost and tried), f"{work} has failed without need"


class Model(RuleBasedStateMachine):
    """Drives the machine through whatever can happen.

    ``honest``: whether tasks need what is said, and nobody else uses the memory.
    """

    honest: bool

    @initialize(
        machine=machines,
        policy=policies,
        rules=rules,
        pause=one_of([True, True, False]),
        min_children=one_of([0, 0, 1]),
        stream=streams,
    )
    def begin(self, machine, policy, rules, *, pause, min_children, stream):
        if not self.honest:
            policy["min_children"] = min_children
        terms = Terms(**machine, pause=self.honest or pause, others={**policy, "rules": rules})
        self.machine, self.stream = Watched(terms), stream
        self.most = self.machine._headroom()[1] - machine["child"]  # what one task can have
        if self.honest:
            self.machine.room.child_bytes = machine["child"]

    # -- what can happen

    @rule(task=tasks, number=one_of([1, 2, 5, 12]))
    def tasks_arrive(self, task, number):
        peak, kept, declared = task["peak"], task["kept"], task["declared"]
        if self.honest:
            peak, declared = min(peak, self.most), 1.0
            kept = min(kept, KEPT_BYTES / max(peak, 1))
        for _ in range(number):
            self.machine.arrive(
                Work(
                    task["name"],
                    curve(task, peak, kept),
                    declared=None if declared is None else int(declared * peak),
                    redeliverable=task["redeliverable"],
                    hangs=task["hangs"],
                    waits=bool(task["waits"]),
                    unseen=task["unseen"],
                )
            )
        self.run(0.0)

    @rule(stream=streams)
    def small_tasks_keep_coming(self, stream):
        """Each before the last one has ended."""
        for number in range(20):
            self.small_tasks_arrive(stream, self.machine.now + number * stream["seconds"] / 2)
        self.run(0.0)

    @precondition(lambda self: not self.honest)
    @rule(peak=one_of([5, 10, 50, 100]), number=one_of([2, 5]), name=one_of("abc"))
    def endless_tasks_arrive(self, peak, number, name):
        """And nobody says what they need."""
        for _ in range(number):
            self.machine.arrive(Work(name, [(0.0, 0), (0.1, peak * MIB)], hangs=True))
        self.run(ENDLESS_SECONDS + 2 * NOTHING_RUNS_SECONDS)

    @rule(seconds=one_of([0.001, 0.01, 0.1, 1.0, 10.0]))
    def time_passes(self, seconds):
        self.run(seconds)

    @rule(bound=one_of([1, 2, 5, 10]))
    def the_bound_moves(self, bound):
        self.machine.resize(bound)
        self.machine.check()

    @rule()
    def the_pool_is_restarted(self):
        self.machine.renew()
        self.machine.check()

    @precondition(lambda self: self.machine.fleet.starting)
    @rule()
    def a_child_fails_to_start(self):
        """Not so often that the worker stops; the kernel may have ended some that were starting."""
        if not self.machine.supervisor._failed_rounds:
            child = next(child for child in self.machine.fleet.children if child.state == "starting")
            self.crash(child)

    @precondition(lambda self: self.machine.fleet.starting and not self.machine.supervisor._short_rounds)
    @rule()
    def a_child_is_refused(self):
        """The system has no room for one more process."""
        starting = [child for child in self.machine.fleet.children if child.state == "starting"]
        self.machine.refuse(starting[-1])
        self.machine.check()

    @precondition(lambda self: self.machine.fleet.size > self.machine.fleet.starting)
    @rule(data=st.data())
    def a_child_ends_by_itself(self, data):
        """It crashes, or what it runs was terminated; perhaps before it has begun what it was just given."""
        ready = [child for child in self.machine.fleet.children if child.state != "starting"]
        child = ready[data.draw(st.integers(0, len(ready) - 1))]
        given_now = child.state == "busy" and child.run.at == self.machine.now and not child.run.progress
        self.crash(child, begun=not given_now or data.draw(st.booleans()))

    @precondition(lambda self: not self.honest)
    @rule(share=one_of([0.0, 0.1, 0.5, 0.9]))
    def others_take_memory(self, share):
        """Or give it back."""
        machine = self.machine
        left = machine.limit - machine.used + machine.outside
        machine.outside = max(int(share * left) - LEFT_BYTES, 0)

    @precondition(lambda self: not self.honest)
    @rule(limit=one_of([200, 256, 512, 1024]))
    def the_limit_moves(self, limit):
        """To no less than is used, as otherwise the kernel kills at once."""
        if limit * MIB > self.machine.used + LEFT_BYTES:
            self.machine.limit = limit * MIB

    # -- what always holds

    def crash(self, child, *, begun=True):
        self.machine.crash(child, begun=begun)
        self.machine.check()

    def small_tasks_arrive(self, stream, at=None):
        peak, seconds = stream["peak"], stream["seconds"]
        points = [(0.0, 0), (seconds / 2, peak), (seconds, peak), (seconds, 0)]
        for _ in range(stream["number"]):
            self.machine.arrive(Work("small", points, declared=peak), at)

    def run(self, seconds):
        machine = self.machine
        until = machine.now + seconds
        while machine.next_at <= until:
            machine.step()
            machine.check()
            assert machine.ended_by is None
            if self.honest:
                # What children keep of a first run may be what every child has to load: nobody can tell.
                assert machine.most_unloaded <= machine.budget.bytes, "more is used than the budget"
        machine.now = until

    def end_hanging(self):
        for child in list(self.machine.fleet.children):
            if child.state == "busy" and child.run.work.hangs:
                self.crash(child)

    def teardown(self):
        """In the end, everything has ended."""
        if not hasattr(self, "machine"):
            return
        machine = self.machine
        if self.honest:
            self.let_all_begin()
        for _ in range(20 * (len(machine.works) + 10)):
            if machine.idle:
                break
            self.run(HANGING_SECONDS)
            self.end_hanging()
        assert machine.idle, f"these never end: {[work for work in machine.works if not work.outcome]}"
        for work in machine.works:
            machine.check_ended(work)
        if self.honest:
            assert not machine.counts.killed
            assert not machine.counts.kernel_kills

    def let_all_begin(self):
        """Each task that waits gets its turn, although small ones keep coming.

        That is, in the first of its turns in which all can end that runs by then, and all that came before
        it can run, one after the other.
        """
        machine, stream = self.machine, self.stream
        self.end_hanging()

        def seconds(work):
            return work.seconds + HANGING_SECONDS * work.hangs + NOTHING_RUNS_SECONDS

        patience, until = machine.terms.others["patience"], {}
        needed = NOTHING_RUNS_SECONDS + sum(map(seconds, machine.room.running))
        needed += machine.supervisor.bound * (stream["seconds"] + NOTHING_RUNS_SECONDS)
        for work in machine.waiting:
            since = machine.since[work]
            until[work] = since + turn_for(needed, machine.now - since, patience)
            needed += seconds(work)
        passed = 0.0
        while any(work in until for work in machine.waiting):
            self.small_tasks_arrive(stream)
            self.run(stream["seconds"] / 2)
            passed += stream["seconds"] / 2
            if passed >= HANGING_SECONDS:
                passed = 0.0
                self.end_hanging()
            for work, at in until.items():
                assert work not in machine.waiting or machine.now <= at, f"{work} never gets its turn"


class Honest(Model):
    honest = True


class Lying(Model):
    honest = False


TestHonest, TestLying = Honest.TestCase, Lying.TestCase
TestHonest.settings = TestLying.settings = settings(
    max_examples=EXAMPLES // 2, stateful_step_count=8, report_multiple_bugs=False
)
