"""The rules against a simulated machine: whatever comes, in whatever order, some things always hold.

The machine is ``memsafe_pool.machine``: children that start with a delay and cost memory, tasks that grow,
free, keep memory for ever, lie about what they need or hang, limits that move, others that use the same
memory. An *honest* machine has none of the latter four. ``make check-model`` runs 10,000 examples.
"""

from __future__ import annotations

import os
from itertools import takewhile

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from memsafe_pool.machine import Machine, Terms, Work
from memsafe_pool.pauses import MARGIN_BYTES, MARGIN_SHARE
from memsafe_pool.recycle import Rules

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "400"))
MIB = 1 << 20

#: No task takes memory faster than this, in bytes per second: what one core can touch.
FASTEST = 4e9

#: What others leave, and what a lower limit leaves, beside what is used (bytes).
LEFT_BYTES = 40 * MIB

one_of = st.sampled_from

machines = st.fixed_dictionaries(
    {
        "limit": one_of([256, 512, 1024]).map(lambda size: size * MIB),
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
        "kept": one_of([0.0, 0.0, 0.0, 0.02, 1.0]),  # the share of its peak that its child keeps
        "declared": one_of([None, None, 1.0, 0.5, 0.1, 2.0]),  # of its peak
        "hangs": one_of([False] * 9 + [True]),
        "redeliverable": st.booleans(),
        "name": one_of("ab"),
    }
)


class Watched(Machine):
    """The machine, with a second look at each step that is taken."""

    def __init__(self, terms):
        self.used_at_sample = self.active_at = 0.0
        self.crashed = set()
        super().__init__(terms)

    def _sample(self, version):
        if version == self._wake_version:
            self.used_at_sample = self.used
        super()._sample(version)

    def _kernel_kills(self):
        """Only where memory went faster than it is looked at, or into what can not be stopped."""
        grown = self.used - self.used_at_sample
        fast = grown >= max(MARGIN_SHARE * self.budget.limit, MARGIN_BYTES)
        assert fast or not self.terms.pause, "seen in time, and the kernel had to kill"
        super()._kernel_kills()

    def _give(self, work):
        assert work in self.waiting
        assert self.fleet.idle
        for other in takewhile(lambda other: other is not work, self.waiting):
            for_memory = self.room.excludes(other) or self.room.lacks(other) > 0
            its_turn = self.supervisor._holds_up(other, self.now)
            assert not (for_memory and its_turn), f"{work} has passed {other}"
        super()._give(work)

    def _retire(self, child):
        assert child.run is None, "a child was to go that runs a task"
        assert child.state in {"starting", "idle", "busy"}, "a child was to go twice"
        super()._retire(child)

    def _kill(self, work):
        running = [child.run for child in self.fleet.children if child.state == "busy"]
        assert work in [run.work for run in running], "a task was to be ended that does not run"
        assert not any(run.going for run in running), "a task was ended while another one could go on"
        super()._kill(work)

    def check(self):
        """What holds after each event."""
        room, fleet = self.room, self.fleet
        self.used_at_sample = min(self.used_at_sample, self.used)  # what has gone was free to be taken again
        busy = [child for child in fleet.children if child.run is not None]
        running = {child.run.work for child in busy}
        assert set(room.running) == running, "memory is set aside for others than those that run"
        assert room.pending == sum(room.running.values())
        assert all(left >= 0 for left in room.running.values())
        assert set(room.grown) <= running
        for trial in self.supervisor._trials.values():
            assert trial.running
            assert trial.running <= running
        assert {*self.supervisor._replaced, *self.supervisor._due} <= set(fleet.children)
        for child in busy:
            assert child.state in {"busy", "leaving"}
            if child.state == "busy":
                assert child.run.going != self.pauses.is_paused(child.run.work)
        assert set(self.pauses._runs) <= running, "a task is remembered that has ended"
        backs_off = self.now < self.supervisor._not_before
        if running or not self.waiting or fleet.starting or fleet.leaving or backs_off:
            self.active_at = self.now
        # The time until the next look at memory, and some more.
        assert self.now - self.active_at < 2.5, "nothing runs, and nothing begins"


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
    )
    def begin(self, machine, policy, rules, *, pause, min_children):
        if not self.honest:
            policy["min_children"] = min_children
        terms = Terms(**machine, pause=self.honest or pause, others={**policy, "rules": rules})
        self.machine = Watched(terms)
        if self.honest:
            self.machine.room.child_bytes = machine["child"]

    # -- what can happen

    @rule(task=tasks, number=one_of([1, 2, 5, 12]))
    def tasks_arrive(self, task, number):
        peak, kept, declared = task["peak"], task["kept"], task["declared"]
        if self.honest:
            budget, terms = self.machine.budget.bytes, self.machine.terms
            peak, kept, declared = min(peak, budget - terms.base - terms.child), 0, 1.0
        first = int(task["first"] * peak)
        rise = max(task["rise"] * task["seconds"], peak / FASTEST)
        end = max(task["seconds"], rise)
        for _ in range(number):
            self.machine.arrive(
                Work(
                    task["name"],
                    [(0.0, 0), (first / FASTEST, first), (rise, peak), (end, peak), (end, int(kept * peak))],
                    declared=None if declared is None else int(declared * peak),
                    redeliverable=task["redeliverable"],
                    hangs=task["hangs"],
                )
            )
        self.run(0.0)

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

    @precondition(lambda self: self.machine.fleet.size > self.machine.fleet.starting)
    @rule(data=st.data())
    def a_child_ends_by_itself(self, data):
        """It crashes, or what it runs was terminated."""
        ready = [child for child in self.machine.fleet.children if child.state != "starting"]
        self.crash(ready[data.draw(st.integers(0, len(ready) - 1))])

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

    def crash(self, child):
        if child.run is not None:
            self.machine.crashed.add(child.run.work)
        self.machine.crash(child)
        self.machine.check()

    def run(self, seconds):
        machine = self.machine
        until = machine.now + seconds
        while machine.next_at <= until:
            machine.step()
            machine.check()
            assert machine.ended_by is None
            if self.honest:
                assert machine.used <= machine.budget.bytes, "more is used than the budget"
        machine.now = until

    def teardown(self):
        """In the end, everything has ended."""
        if not hasattr(self, "machine"):
            return
        machine = self.machine
        for _ in range(20 * (len(machine.works) + 10)):
            if machine.idle:
                break
            self.run(5.0)
            for child in list(machine.fleet.children):
                if child.state == "busy" and child.run.work.hangs:
                    self.crash(child)
        assert machine.idle, f"these never end: {[work for work in machine.works if not work.outcome]}"
        for work in machine.works:
            assert work.runs == 1 + work.tries, "run again without need"
            tried = work.alone or work.tries >= machine.terms.tries or not work.redeliverable
            assert work.outcome == "done" or work in machine.crashed or tried
        if self.honest:
            assert not machine.counts.killed
            assert not machine.counts.kernel_kills


class Honest(Model):
    honest = True


class Lying(Model):
    honest = False


TestHonest, TestLying = Honest.TestCase, Lying.TestCase
TestHonest.settings = TestLying.settings = settings(
    max_examples=EXAMPLES // 2, stateful_step_count=8, report_multiple_bugs=False
)
