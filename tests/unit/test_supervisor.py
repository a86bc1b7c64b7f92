"""When children start and leave: the supervisor's rules, one by one and under any sequence of events."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from memsafe_pool.supervisor import (
    BACKOFF_SECONDS,
    MAX_FAILED_ROUNDS,
    Done,
    Gone,
    Resized,
    Retire,
    Start,
    StopWorker,
    Supervisor,
    Tick,
    Up,
    Waiting,
)


@dataclass(eq=False)
class Child:
    """A child that exists in the test only."""

    number: int
    born: float
    tasks: int = 0
    private_bytes: int = 0
    idle_since: float = 0.0


@dataclass
class SimulatedFleet:
    """Children by what they do, as the engine keeps them."""

    starting_children: list[Child] = field(default_factory=list)
    idle: list[Child] = field(default_factory=list)
    busy: list[Child] = field(default_factory=list)
    leaving_children: list[Child] = field(default_factory=list)

    @property
    def size(self):
        return len(self.starting_children) + len(self.idle) + len(self.busy) + len(self.leaving_children)

    @property
    def starting(self):
        return len(self.starting_children)

    @property
    def leaving(self):
        return len(self.leaving_children)


class Pool:
    """What the engine does, without processes: it carries the supervisor's decisions out at once."""

    def __init__(self, **rules):
        self.fleet = SimulatedFleet()
        self.supervisor = Supervisor(self.fleet, **rules)
        self.now = 1000.0
        self.waiting = 0
        self.stopped = False
        self.born = 0

    def decide(self, event):
        actions = self.supervisor.handle(event, self.now)
        for action in actions:
            if isinstance(action, Start):
                self.fleet.starting_children += [Child(self.born + n, self.now) for n in range(action.count)]
                self.born += action.count
            elif isinstance(action, Retire):
                place = self.fleet.idle if action.child in self.fleet.idle else self.fleet.busy
                place.remove(action.child)
                self.fleet.leaving_children.append(action.child)
            else:
                self.stopped = True
        return actions

    def submit(self):
        """A task arrives."""
        if self.fleet.idle:
            self.fleet.busy.append(self.fleet.idle.pop())
            return []
        self.waiting += 1
        return self.decide(Waiting(self.waiting))

    def next(self, child):
        """A child that is in ``busy`` has no task any more."""
        actions = self.decide(Done(child)) if self.supervisor.watches_tasks else []
        if child in self.fleet.leaving_children:
            return actions
        if self.waiting:
            self.waiting -= 1
        else:
            self.fleet.busy.remove(child)
            self.fleet.idle.append(child)
            child.idle_since = self.now
        return actions

    def up(self, child):
        actions = self.decide(Up())
        self.fleet.starting_children.remove(child)
        self.fleet.busy.append(child)
        return actions + self.next(child)

    def done(self, child, private_bytes=0):
        child.tasks += 1
        child.private_bytes = private_bytes
        return self.next(child)

    def gone(self, child):
        failed = child in self.fleet.starting_children
        for place in (
            self.fleet.starting_children,
            self.fleet.idle,
            self.fleet.busy,
            self.fleet.leaving_children,
        ):
            if child in place:
                place.remove(child)
        return self.decide(Gone(failed, child.born, self.waiting))

    def tick(self, seconds=1.0):
        self.now += seconds
        return self.decide(Tick(self.waiting))

    def resize(self, bound):
        return self.decide(Resized(bound, self.waiting))

    def with_children(self, number):
        """Let so many children be idle, the first of them the longest."""
        for _ in range(number):
            self.submit()
        for child in list(self.fleet.starting_children):
            self.up(child)
        for child in list(self.fleet.busy):
            self.now += 1
            self.done(child)
        assert len(self.fleet.idle) == number
        return list(self.fleet.idle)


# Start


def test_nothing_starts_for_nothing():
    """Without tasks and without a minimum no child starts."""
    pool = Pool(bound=4)
    assert pool.tick() == []
    assert pool.fleet.size == 0


def test_a_burst_starts_at_once():
    """Each waiting task that no starting child is for gets a child, all in one go."""
    pool = Pool(bound=10)
    pool.waiting = 7
    assert pool.decide(Waiting(7)) == [Start(7)]
    assert pool.decide(Waiting(7)) == []
    pool.waiting = 9
    assert pool.decide(Waiting(9)) == [Start(2)]


def test_one_task_after_the_other_starts_one_child_each():
    """Tasks that come one by one while none is ready are counted against the children that are starting."""
    pool = Pool(bound=10)
    assert [pool.submit() for _ in range(5)] == [[Start(1)]] * 5
    assert pool.fleet.starting == 5


def test_never_more_than_the_bound():
    """Tasks beyond the bound wait; leaving children still count, as their memory does."""
    pool = Pool(bound=3, max_tasks=1)
    pool.waiting = 9
    assert pool.decide(Waiting(9)) == [Start(3)]
    for child in list(pool.fleet.starting_children):
        pool.up(child)
    assert pool.waiting == 6
    first, *_ = pool.fleet.busy
    [retired] = pool.done(first)
    assert retired.child is first
    assert pool.tick() == []
    assert pool.gone(first) == [Start(1)]


def test_the_minimum_starts_by_itself():
    """``min_children`` start without work, and are replaced when they end."""
    pool = Pool(bound=5, min_children=2)
    assert pool.tick() == [Start(2)]
    assert pool.tick() == []
    for child in list(pool.fleet.starting_children):
        pool.up(child)
    assert pool.gone(pool.fleet.idle[0]) == [Start(1)]


def test_the_minimum_is_within_the_bound():
    """A bound lowered below the minimum holds."""
    pool = Pool(bound=3, min_children=3)
    pool.tick()
    for child in list(pool.fleet.starting_children):
        pool.up(child)
    assert len(pool.resize(1)) == 2
    for child in list(pool.fleet.leaving_children):
        assert pool.gone(child) == []
    assert pool.fleet.size == 1


# Retire


def test_idle_children_retire_after_the_timeout():
    """Not before; the longest idle first; the reason says how long."""
    pool = Pool(bound=4, idle_timeout=60)
    first, second, third = pool.with_children(3)
    assert pool.tick(57) == []
    assert pool.tick(1) == [Retire(first, "idle for 60 s")]
    assert {action.child for action in pool.tick(2)} == {second, third}


def test_work_starts_the_clock_again():
    """A child that had a task meanwhile is as good as new; the others are not."""
    pool = Pool(bound=4, idle_timeout=60)
    first, second = pool.with_children(2)
    pool.now += 50
    pool.submit()
    assert pool.fleet.busy == [second]
    pool.done(second)
    assert pool.tick(30) == [Retire(first, "idle for 81 s")]
    assert pool.fleet.idle == [second]


def test_the_minimum_does_not_retire():
    """However long they are idle; the ones used last stay."""
    pool = Pool(bound=4, idle_timeout=60, min_children=1)
    *others, last = pool.with_children(3)
    assert [action.child for action in pool.tick(10_000)] == others
    assert pool.fleet.idle == [last]
    assert pool.tick(10_000) == []


def test_never_is_never():
    """Without an idle timeout no child is retired for being idle."""
    pool = Pool(bound=4, idle_timeout=None)
    pool.with_children(3)
    assert pool.tick(1e9) == []


def test_a_busy_child_is_not_idle():
    """A task may take longer than the idle timeout."""
    pool = Pool(bound=4, idle_timeout=60)
    pool.with_children(1)
    pool.submit()
    assert pool.tick(10_000) == []


def test_a_childs_share_of_tasks():
    """After ``max_tasks`` a child is replaced, with the reason in words."""
    pool = Pool(bound=1, max_tasks=2)
    for _ in range(3):
        pool.submit()
    [child] = pool.fleet.starting_children
    pool.up(child)
    assert pool.done(child) == []
    assert pool.done(child) == [Retire(child, "2 tasks done, at most 2 per child")]
    assert pool.waiting == 1
    assert pool.gone(child) == [Start(1)]


def test_a_child_that_has_grown():
    """Above ``max_private_bytes``, not at it, a child is replaced; what it was before does not matter."""
    pool = Pool(bound=1, max_private_bytes=100 * 1024)
    [child] = pool.with_children(1)
    pool.submit()
    assert pool.done(child, private_bytes=100 * 1024) == []
    pool.submit()
    assert pool.done(child, private_bytes=100 * 1024 + 1024) == [
        Retire(child, "101 KiB private memory, at most 100 KiB per child")
    ]


def test_tasks_are_watched_only_where_it_matters():
    """Without any limit the engine need not tell of each task's end."""
    assert not Pool(bound=3).supervisor.watches_tasks
    assert Pool(bound=3, max_tasks=5).supervisor.watches_tasks
    assert Pool(bound=3, max_private_bytes=5).supervisor.watches_tasks


# Resize


def test_shrink_retires_idle_children_at_once_and_busy_ones_after_their_task():
    """No task is disturbed; the longest idle goes first."""
    pool = Pool(bound=4)
    first, second, third, fourth = pool.with_children(4)
    pool.submit()
    pool.submit()
    assert pool.fleet.busy == [fourth, third]
    assert pool.resize(1) == [
        Retire(first, "at most 1 children"), Retire(second, "at most 1 children"),
    ]  # fmt: skip
    assert pool.supervisor.watches_tasks
    assert pool.done(third) == [Retire(third, "at most 1 children")]
    assert pool.done(fourth) == []
    assert pool.fleet.idle == [fourth]


def test_grow_starts_what_waits():
    """Tasks that waited for the bound get children as soon as it rises."""
    pool = Pool(bound=1)
    for _ in range(4):
        pool.submit()
    assert pool.fleet.starting == 1
    assert pool.resize(3) == [Start(2)]


def test_a_bound_of_nothing():
    """With a bound of 0 nothing runs until it is raised."""
    pool = Pool(bound=0)
    assert pool.submit() == []
    assert pool.tick() == []
    assert pool.resize(1) == [Start(1)]


# Failed starts


def test_a_failed_start_is_tried_again_after_a_while():
    """Not at once, but after 1 s, 2 s, 4 s..., with the clock's help."""
    pool = Pool(bound=1)
    pool.submit()
    for seconds in (1, 2, 4):
        [child] = pool.fleet.starting_children
        pool.now += 0.1
        assert pool.gone(child) == []
        assert pool.tick(seconds - 0.01) == []
        assert pool.tick(0.02) == [Start(1)]


def test_children_started_together_fail_together():
    """Eight failures of one burst are one round, not eight."""
    pool = Pool(bound=8)
    for _ in range(8):
        pool.submit()
    for child in list(pool.fleet.starting_children):
        pool.now += 0.1
        assert pool.gone(child) == []
    assert not pool.stopped
    assert pool.tick(0.1) == []
    assert pool.tick(1) == [Start(8)]


def test_the_worker_stops_when_no_child_ever_starts():
    """After so many rounds without a single child, with the number in words."""
    pool = Pool(bound=2)
    pool.submit()
    pool.submit()
    for round_number in range(1, MAX_FAILED_ROUNDS + 1):
        assert not pool.stopped
        pool.now += 0.1
        actions = [action for child in list(pool.fleet.starting_children) for action in pool.gone(child)]
        if round_number < MAX_FAILED_ROUNDS:
            assert actions == []
            pool.tick(BACKOFF_SECONDS[1])
    assert actions == [StopWorker(f"children failed to start {MAX_FAILED_ROUNDS} times in a row")]


def test_a_child_that_comes_up_clears_the_record():
    """Failures with successes in between do not add up."""
    pool = Pool(bound=2)
    for _ in range(3 * MAX_FAILED_ROUNDS):
        pool.waiting = 2
        pool.tick(BACKOFF_SECONDS[1])
        good, bad = pool.fleet.starting_children
        pool.now += 0.1
        pool.up(good)
        pool.gone(bad)
        pool.gone(good)
    assert not pool.stopped


def test_the_longest_wait_is_bounded():
    """The back-off doubles up to its maximum and no further, should the worker not stop."""
    pool = Pool(bound=1)
    pool.submit()
    for _ in range(40):
        [child] = pool.fleet.starting_children
        pool.now += 0.1
        pool.gone(child)
        assert pool.tick(BACKOFF_SECONDS[1]) == [Start(1)]


def test_other_deaths_are_no_failures():
    """A child that ends after it was ready is replaced at once, as often as it happens."""
    pool = Pool(bound=1)
    for _ in range(10):
        pool.submit()
        pool.submit()
        [child] = pool.fleet.starting_children or pool.fleet.busy
        if child in pool.fleet.starting_children:
            pool.up(child)
        assert pool.gone(child) == [Start(1)]
        pool.waiting = 0
        [child] = pool.fleet.starting_children
        pool.up(child)
        pool.gone(child)
    assert not pool.stopped


# Any sequence of events


class AnySequence(RuleBasedStateMachine):
    """Drives the supervisor through whatever can happen, and keeps the account of failures a second time."""

    @initialize(
        bound=st.integers(1, 6),
        minimum=st.integers(0, 3),
        idle_timeout=st.sampled_from([None, 0.0, 5.0, 60.0]),
        max_tasks=st.sampled_from([None, 1, 3]),
        max_private_bytes=st.sampled_from([None, 100]),
    )
    def begin(self, bound, minimum, idle_timeout, max_tasks, max_private_bytes):
        self.pool = Pool(
            bound=bound,
            min_children=min(minimum, bound),
            idle_timeout=idle_timeout,
            max_tasks=max_tasks,
            max_private_bytes=max_private_bytes,
        )
        self.rules = self.pool.supervisor
        self.rounds = 0
        self.last_failure = self.blocked_until = float("-inf")
        self.looked_at = float("-inf")

    @property
    def fleet(self):
        return self.pool.fleet

    def step(self):
        """No two things happen at exactly the same time."""
        self.pool.now += 0.001

    def check(self, before, actions, *, looked=True):
        """What holds for the actions that follow any event."""
        for action in actions:
            if isinstance(action, Start):
                assert action.count > 0
                assert self.pool.now >= self.blocked_until, "started during the back-off"
                assert self.fleet.size <= self.rules.bound, "more children than the bound"
                needed = max(self.pool.waiting, self.rules.min_children)
                assert self.fleet.starting <= needed, "more children than there is work for"
            elif isinstance(action, Retire):
                assert action.child in before, "retired a child that is neither idle nor just done"
        assert len({id(action.child) for action in actions if isinstance(action, Retire)}) == sum(
            isinstance(action, Retire) for action in actions
        )
        assert sum(isinstance(action, Start) for action in actions) <= 1, "not all at once"
        if looked:
            self.looked_at = self.pool.now

    @rule(number=st.integers(1, 8))
    def tasks_arrive(self, number):
        for _ in range(number):
            self.step()
            self.check([], self.pool.submit())

    @rule(number=st.integers(1, 8))
    def tasks_arrive_at_once(self, number):
        if self.fleet.idle:
            return
        self.step()
        self.pool.waiting += number
        self.check([], self.pool.decide(Waiting(self.pool.waiting)))

    @rule()
    def waiting_tasks_are_withdrawn(self):
        """The connection to the broker was lost."""
        self.pool.waiting = 0

    @precondition(lambda self: self.fleet.starting_children)
    @rule(data=st.data())
    def a_child_comes_up(self, data):
        child = data.draw(st.sampled_from(self.fleet.starting_children))
        self.step()
        self.rounds = 0
        self.check([child], self.pool.up(child), looked=False)

    @precondition(lambda self: self.fleet.size > self.fleet.leaving)
    @rule()
    def all_work_gets_done(self):
        """Every child comes up and ends its task, until nothing waits."""
        for _ in range(100):
            if not self.fleet.starting_children and not self.fleet.busy:
                break
            for child in list(self.fleet.starting_children):
                self.step()
                self.rounds = 0
                self.check([child], self.pool.up(child), looked=False)
            for child in list(self.fleet.busy):
                self.step()
                self.check([child], self.pool.done(child), looked=False)

    @precondition(lambda self: self.fleet.starting_children)
    @rule(data=st.data())
    def a_child_fails_to_start(self, data):
        child = data.draw(st.sampled_from(self.fleet.starting_children))
        self.step()
        new_round = child.born >= self.last_failure
        if new_round:
            self.last_failure = self.pool.now
            self.rounds += 1
            first, longest = BACKOFF_SECONDS
            self.blocked_until = self.pool.now + min(first * 2 ** (self.rounds - 1), longest)
        actions = self.pool.gone(child)
        assert any(isinstance(action, StopWorker) for action in actions) == (
            new_round and self.rounds >= MAX_FAILED_ROUNDS
        )
        self.check([], actions)

    @precondition(lambda self: self.fleet.busy)
    @rule(data=st.data(), private_bytes=st.sampled_from([0, 100, 101]))
    def a_task_ends(self, data, private_bytes):
        child = data.draw(st.sampled_from(self.fleet.busy))
        self.step()
        surplus = self.fleet.size - self.fleet.leaving > self.rules.bound
        actions = self.pool.done(child, private_bytes)
        self.check([child], actions, looked=False)
        due = (
            surplus
            or bool(self.rules.max_tasks and child.tasks >= self.rules.max_tasks)
            or bool(self.rules.max_private_bytes and private_bytes > self.rules.max_private_bytes)
        )
        assert any(isinstance(action, Retire) for action in actions) == due

    @precondition(lambda self: self.fleet.busy or self.fleet.idle or self.fleet.leaving_children)
    @rule(data=st.data())
    def a_child_ends(self, data):
        """It is killed, or leaves as it was told to."""
        child = data.draw(st.sampled_from([*self.fleet.busy, *self.fleet.idle, *self.fleet.leaving_children]))
        self.step()
        actions = self.pool.gone(child)
        assert not any(isinstance(action, StopWorker) for action in actions)
        self.check([], actions)

    @rule(seconds=st.sampled_from([0.5, 1.0, 4.9, 5.1, 31.0, 61.0]))
    def time_passes(self, seconds):
        idle, staying = list(self.fleet.idle), self.fleet.size - self.fleet.leaving
        self.step()
        actions = self.pool.tick(seconds)
        self.check(idle, actions)
        retired = [action.child for action in actions if isinstance(action, Retire)]
        timeout, now = self.rules.idle_timeout, self.pool.now
        assert timeout is not None or not retired
        assert all(now - child.idle_since >= timeout for child in retired), "retired before the timeout"
        assert not retired or staying - len(retired) >= self.rules.min_children, "retired below the minimum"
        assert retired == idle[: len(retired)], "retired a child that was used later than one that stays"
        if timeout is not None and staying - len(retired) > self.rules.min_children:
            overdue = [child for child in self.fleet.idle if now - child.idle_since >= timeout]
            assert not overdue, "an idle child that should have gone"

    @rule(bound=st.integers(0, 8))
    def the_bound_moves(self, bound):
        idle = list(self.fleet.idle)
        self.step()
        actions = self.pool.resize(bound)
        self.check(idle, actions)
        assert self.rules.bound == bound
        retired = [action.child for action in actions if isinstance(action, Retire)]
        assert retired == idle[: len(retired)], "retired a child that was used later than one that stays"

    @invariant()
    def nobody_idle_beyond_the_bound(self):
        assert not self.fleet.idle or self.fleet.size - self.fleet.leaving <= self.rules.bound

    @invariant()
    def tasks_that_wait_get_children(self):
        if self.looked_at < self.blocked_until:
            return
        assert self.fleet.starting >= self.pool.waiting or self.fleet.size >= self.rules.bound

    @invariant()
    def the_minimum_is_there(self):
        if self.looked_at < self.blocked_until or self.looked_at == float("-inf"):
            return
        wanted = min(self.rules.min_children, self.rules.bound)
        # A child that has done its share leaves before the next one starts.
        assert self.fleet.size >= wanted

    @invariant()
    def the_longest_idle_is_first(self):
        times = [child.idle_since for child in self.fleet.idle]
        assert times == sorted(times)


AnySequence.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestAnySequence = AnySequence.TestCase
