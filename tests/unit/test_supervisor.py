"""When tasks begin, and when children start and leave: the supervisor's rules, one by one.

Under any sequence of events they are tested in ``test_model``.
"""

from __future__ import annotations

from collections import deque

import pytest

from memsafe_pool.events import (
    Give,
    Gone,
    Kill,
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
from memsafe_pool.machine import Fleet, SimulatedChild, Work
from memsafe_pool.recycle import Rules
from memsafe_pool.reservations import Estimate
from memsafe_pool.room import Look, Room, Seen
from memsafe_pool.scheduler import Scheduler
from memsafe_pool.supervisor import (
    AMPLE_BYTES,
    BACKOFF_SECONDS,
    ENDLESS_SECONDS,
    MAX_FAILED_ROUNDS,
    MAX_SHORTAGE_SECONDS,
    SAY_SECONDS,
    TRIAL_BYTES,
    TRIAL_SECONDS,
    Supervisor,
)

MIB = 1 << 20
GIB = 1 << 30

RULES = {"max_tasks", "max_private_bytes", "max_growth_bytes", "max_age"}


def task(reserved=1, most=None, *, name="add", alone=False, redeliverable=True):
    """A task that needs so many MiB; None is unknown."""
    work = Work(name, [(1.0, 0)], redeliverable=redeliverable)
    if reserved is not None:
        work.estimate = Estimate(reserved * MIB, (most or reserved) * MIB, known=True)
    work.alone = alone
    return work


class Recorded(Scheduler):
    """Keeps what was decided, but for looks at memory."""

    def _act(self, action):
        if not isinstance(action, Measure):
            self.actions.append(action)
        super()._act(action)


class Pool:
    """The scheduler's actor, without processes: what is decided is done at once, in lists.

    Unless it is ``cold`` a child was ready before, so that what one costs is known.
    ``used`` is what memory is found to be used, in MiB, when it is looked at; ``grown`` of that by each task.
    """

    shares = False

    def __init__(self, *, budget=1000 * GIB, child=0, cold=False, **options):
        self.fleet = Fleet()
        self.waiting = deque()
        self.room = Room(budget, child)
        rules = Rules(**{name: options.pop(name) for name in RULES & set(options)})
        self.supervisor = Supervisor(self.fleet, self.waiting, self.room, rules=rules, **options)
        self.now = 1000.0
        self.used = 0
        self.grown = {}
        self.running = {}
        self.stopped = False
        self.scheduler = Recorded(self, self.supervisor, self.waiting, lambda: self.now)
        if not cold:
            self.supervisor.handle(Up(), self.now)

    @property
    def starting(self):
        return [child for child in self.fleet.children if child.state == "starting"]

    @property
    def leaving(self):
        return [child for child in self.fleet.children if child.state == "leaving"]

    @property
    def busy(self):
        return [child for child in self.fleet.children if child.state == "busy"]

    # -- what is decided

    def look(self):
        seen = [Seen(work, self.grown.get(work, 0) * MIB) for work in self.running.values()]
        self.scheduler.saw(Look(self.now, self.room.budget - self.used * MIB, seen))

    def start(self, count):
        for _ in range(count):
            self.fleet.move(SimulatedChild(self.fleet.size, self.now, 0), "starting")

    def give(self, child, work):
        self.running[child] = work

    def retire(self, child, reason):
        assert child not in self.running
        self.fleet.move(child, "leaving")

    def kill(self, work, reason):
        """It is told; nothing ends by itself here."""

    def stop_worker(self, reason):
        self.stopped = True

    def nothing(self, *_):
        pass

    dismiss = say = size_up_waiting = decided = retry_later = nothing

    # -- what happens

    def told(self, happens, *arguments):
        """Return what was decided when this happens."""
        self.scheduler.actions = []
        happens(*arguments)
        return self.scheduler.actions

    def decide(self, event):
        return self.told(self.scheduler.decide, event)

    def submit(self, work=None):
        """A task arrives."""
        return self.told(self.scheduler.submit, work or task())

    def burst(self, number):
        """So many tasks arrive at once."""
        self.waiting.extend(task() for _ in range(number))
        return self.decide(Waiting())

    def up(self, child):
        return self.told(self.scheduler.up, child)

    def done(self, child, private_bytes=0):
        child.tasks += 1
        child.kept = private_bytes
        self.supervisor.ended(self.running.pop(child))
        return self.told(self.scheduler.free, child)

    def gone(self, child, shortage=None):
        failed = child.state == "starting"
        self.fleet.move(child, "gone")
        if child in self.running:
            self.supervisor.ended(self.running.pop(child))
        return self.decide(Gone(failed, child.born, child, shortage=shortage))

    def tick(self, seconds=1.0):
        self.now += seconds
        return self.decide(Tick())

    def resize(self, bound):
        return self.decide(Resized(bound))

    def with_children(self, number):
        """Let so many children be idle, the first of them the longest."""
        bound, self.supervisor.bound = self.supervisor.bound, number
        self.burst(number)
        for child in self.starting:
            self.up(child)
        for child in self.busy:
            self.now += 1
            self.done(child)
        self.supervisor.bound = bound
        assert len(self.fleet.idle) == number
        return list(self.fleet.idle)


def reasons(actions):
    return {action.child: action.reason for action in actions if isinstance(action, Retire)}


# Start


def test_nothing_starts_for_nothing():
    """Without tasks and without a minimum no child starts."""
    pool = Pool(bound=4)
    assert pool.tick() == []
    assert pool.fleet.size == 0


def beside_one_that_rests(used, *, sent=True, ended=260, child=0):
    """A task runs that has its 200 MB of 500 and rests; one waits of which 260 are thought to be needed."""
    pool = Pool(budget=500 * MIB, bound=4, child=child * MIB)
    pool.with_children(1)
    parent = task(200)
    parent.task_id = "parent"
    pool.submit(parent)
    pool.used = used
    pool.tick()
    work = task()
    work.estimate = Estimate(260 * MIB, 260 * MIB, known=True, ended=ended * MIB)
    work.parent_id = "parent" if sent else None
    assert pool.submit(work) == []

    def look():
        seen = [Seen(work, 200 * MIB, resting=work is parent) for work in pool.running.values()]
        pool.scheduler.saw(Look(pool.now, pool.room.budget - pool.used * MIB, seen))

    pool.look = look
    return pool


def test_a_task_that_is_waited_for_begins():
    """Whatever its like needed: it may be smaller. One at a time."""
    pool = beside_one_that_rests(360)
    pool.waiting.append(other := task(260))
    other.parent_id, other.estimate = "parent", pool.waiting[0].estimate
    assert pool.tick() == [Start(1)]
    pool.up(pool.starting[0])
    assert len(pool.running) == 2
    assert pool.tick() == []
    assert list(pool.waiting) == [other]


@pytest.mark.parametrize(
    "options", [{"sent": False}, {"ended": 0}, {"used": 490, "child": 12}], ids=["others", "said", "full"]
)
def test_who_is_not_waited_for_does_not_begin(options):
    """One of somebody else's; one that is said to need so much; nor where nothing at all is left."""
    pool = beside_one_that_rests(**{"used": 360, **options})
    assert pool.tick() == []
    pool.used = 200
    assert pool.tick() == [Start(1)]


def test_a_burst_starts_at_once():
    """Each waiting task that no starting child is for gets a child, all in one go."""
    pool = Pool(bound=10)
    assert pool.burst(7) == [Start(7)]
    assert pool.decide(Waiting()) == []
    assert pool.burst(2) == [Start(2)]


def test_one_task_after_the_other_starts_one_child_each():
    """Tasks that come one by one while none is ready are counted against the children that are starting."""
    pool = Pool(bound=10)
    assert [pool.submit() for _ in range(5)] == [[Start(1)]] * 5
    assert pool.fleet.starting == 5


def test_never_more_than_the_bound():
    """Tasks beyond the bound wait; leaving children still count, as their memory does."""
    pool = Pool(bound=3, max_tasks=1)
    assert pool.burst(9) == [Start(3)]
    for child in pool.starting:
        pool.up(child)
    assert len(pool.waiting) == 6
    first, *_ = pool.busy
    [retired] = pool.done(first)
    assert retired.child is first
    assert pool.tick() == []
    assert pool.gone(first) == [Start(1)]


def test_the_minimum_starts_by_itself():
    """``min_children`` start without work, and are replaced when they end."""
    pool = Pool(bound=5, min_children=2)
    assert pool.tick() == [Start(2)]
    assert pool.tick() == []
    for child in pool.starting:
        pool.up(child)
    assert pool.gone(pool.fleet.idle[0]) == [Start(1)]


def test_the_minimum_is_within_the_bound():
    """A bound lowered below the minimum holds."""
    pool = Pool(bound=3, min_children=3)
    pool.tick()
    for child in pool.starting:
        pool.up(child)
    assert len(pool.resize(1)) == 2
    for child in pool.leaving:
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
    assert pool.busy == [second]
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
    [child] = pool.starting
    pool.up(child)
    assert pool.done(child) == []
    assert pool.done(child) == [Retire(child, "2 tasks done, at most 2 per child")]
    assert len(pool.waiting) == 1
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
    assert set(pool.busy) == {fourth, third}
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
        [child] = pool.starting
        pool.now += 0.1
        assert pool.gone(child) == []
        assert pool.tick(seconds - 0.01) == []
        assert pool.tick(0.02) == [Start(1)]


def test_children_started_together_fail_together():
    """Eight failures of one burst are one round, not eight."""
    pool = Pool(bound=8)
    for _ in range(8):
        pool.submit()
    for child in pool.starting:
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
        actions = [action for child in pool.starting for action in pool.gone(child)]
        if round_number < MAX_FAILED_ROUNDS:
            assert actions == []
            pool.tick(BACKOFF_SECONDS[1])
    assert actions == [StopWorker(f"children failed to start {MAX_FAILED_ROUNDS} times in a row")]


def test_a_child_that_comes_up_clears_the_record():
    """Failures with successes in between do not add up."""
    pool = Pool(bound=2)
    for _ in range(3 * MAX_FAILED_ROUNDS):
        pool.waiting.extend([task(), task()])
        pool.tick(BACKOFF_SECONDS[1])
        good, bad = pool.starting
        pool.now += 0.1
        pool.up(good)
        pool.gone(bad)
        pool.waiting.clear()
        pool.gone(good)
    assert not pool.stopped


def test_the_longest_wait_is_bounded():
    """The back-off doubles up to its maximum and no further, should the worker not stop."""
    pool = Pool(bound=1)
    pool.submit()
    for _ in range(40):
        [child] = pool.starting
        pool.now += 0.1
        pool.gone(child)
        assert pool.tick(BACKOFF_SECONDS[1]) == [Start(1)]


def test_failures_do_not_stop_a_worker_that_has_a_child():
    """Not as long as it lives; then they count from the first one on."""
    pool = Pool(bound=2)
    pool.burst(2)
    living, bad = pool.starting
    pool.up(living)
    for _ in range(3 * MAX_FAILED_ROUNDS):
        pool.now += 0.1
        assert pool.gone(bad) == []
        assert pool.tick(BACKOFF_SECONDS[1]) == [Start(1)]
        [bad] = pool.starting
    pool.gone(living)
    for _ in range(MAX_FAILED_ROUNDS):
        assert not pool.stopped
        for child in pool.starting:
            pool.now += 0.1
            pool.gone(child)
        pool.tick(BACKOFF_SECONDS[1])
    assert pool.stopped


# No room for more children


SHORT = "could not fork: no more"


def refuse_beyond(pool, number):
    """The system refuses starting children until so many are there; what was decided meanwhile."""
    actions = []
    while pool.starting and len(pool.fleet.children) > number:
        pool.now += 0.001
        actions += pool.gone(pool.starting[-1], shortage=SHORT)
    return actions


def short_of_room(number, **options):
    """A pool with many tasks, and room for so many children only, which are busy."""
    pool = Pool(**options)
    pool.burst(20)
    assert refuse_beyond(pool, number) == [Say(SHORT)]
    for child in pool.starting:
        pool.up(child)
    assert len(pool.busy) == number
    return pool


def test_a_shortage_is_said_once_and_the_rest_goes_on():
    """Five of eight children are refused: one line, and the three that came up run what waits."""
    pool = short_of_room(3, bound=8)
    for seconds in (1, 2, 4, 8, 16, 30, 30, 30):
        assert pool.tick(seconds - 0.1) == []
        assert pool.tick(0.1) == [Start(1)]
        assert refuse_beyond(pool, 3) == []
        for child in pool.busy:
            pool.done(child)
        assert len(pool.busy) == 3
        pool.waiting.extend(task() for _ in range(3))
    assert not pool.stopped


def test_a_child_that_goes_in_a_shortage_is_replaced_at_once():
    """There is room for as many as there were, however long the pause is until more are tried."""
    pool = short_of_room(3, bound=8)
    for _ in range(5):
        assert pool.tick(BACKOFF_SECONDS[1]) == [Start(1)]
        refuse_beyond(pool, 3)
    assert pool.gone(pool.busy[0]) == [Start(1)]


def test_a_child_that_should_be_replaced_in_a_shortage_goes_first():
    """Its replacement has room when it is gone."""
    pool = short_of_room(2, bound=3, max_age=100.0)
    pool.now += 200.0
    pool.tick(0)
    refuse_beyond(pool, 2)
    old = pool.busy[0]
    [retire] = pool.done(old)
    assert isinstance(retire, Retire)
    assert pool.gone(old) == [Start(1)]


def test_the_end_of_a_shortage():
    """One more that is ready shows it, not one that has taken another's place; then all may start."""
    pool = short_of_room(3, bound=8)
    pool.gone(pool.busy[0])
    assert Say(None) not in pool.up(pool.starting[0])
    pool.tick(BACKOFF_SECONDS[1])
    [more] = pool.starting
    actions = pool.up(more)
    assert Say(None) in actions
    assert Start(4) in actions


def test_shortages_that_come_and_go_are_not_said_each_time():
    """Once in a while only, and an end of what was not said is not said."""
    pool = short_of_room(1, bound=2)
    said = []
    for _ in range(int(SAY_SECONDS) // 2):
        pool.waiting.append(task())
        pool.tick(1)
        for child in pool.starting:
            said += [action for action in pool.up(child) if isinstance(action, Say)]
            pool.gone(child)
        said += refuse_beyond(pool, 1)
    assert said == [Say(None)]
    pool.tick(SAY_SECONDS)
    assert refuse_beyond(pool, 1) == [Say(SHORT)]


def test_with_no_child_at_all_a_shortage_ends_the_worker_after_a_while():
    """Far later than when something is wrong, and with the system's own words."""
    pool = Pool(bound=2)
    pool.burst(2)
    begin, actions = pool.now, []
    while not pool.stopped and pool.now < begin + 3 * MAX_SHORTAGE_SECONDS:
        pool.tick(1)
        actions = refuse_beyond(pool, 0)
    assert actions == [StopWorker(f"for {MAX_SHORTAGE_SECONDS:g} s no child could be started: {SHORT}")]
    assert MAX_SHORTAGE_SECONDS <= pool.now - begin <= MAX_SHORTAGE_SECONDS + BACKOFF_SECONDS[1] + 2


def test_a_shortage_does_not_hide_that_something_is_wrong():
    """Of each round some are refused, the rest fails: that counts."""
    pool = Pool(bound=4)
    pool.burst(4)
    for _ in range(MAX_FAILED_ROUNDS):
        assert not pool.stopped
        refuse_beyond(pool, 1)
        for child in pool.starting:
            pool.now += 0.1
            pool.gone(child)
        pool.tick(BACKOFF_SECONDS[1])
    assert pool.stopped


def test_other_deaths_are_no_failures():
    """A child that ends after it was ready is replaced at once, as often as it happens."""
    pool = Pool(bound=1)
    for _ in range(10):
        pool.burst(2)
        [child] = pool.starting
        pool.up(child)
        assert pool.gone(child) == [Start(1)]
        [child] = pool.starting
        pool.up(child)
        pool.gone(child)
    assert not pool.stopped


# Begin


def test_a_task_begins_where_there_is_room():
    """On an idle child, without asking twice; what it needs is set aside."""
    pool = Pool(bound=4, budget=100 * MIB)
    pool.with_children(2)
    first, second = task(60), task(60)
    assert pool.submit(first) == []
    assert list(pool.running.values()) == [first]
    pool.submit(second)
    assert list(pool.waiting) == [second]
    assert pool.supervisor.blocked is second


def test_alone_a_task_begins_whatever_it_needs():
    """Nothing would ever change that."""
    pool = Pool(bound=4, budget=100 * MIB)
    pool.with_children(1)
    pool.submit(task(500))
    assert len(pool.running) == 1


def test_before_that_idle_children_go():
    """Where their memory is what it needs, and all but one are in the way."""
    pool = Pool(bound=4, budget=100 * MIB)
    children = pool.with_children(3)
    for child in children:
        child.kept = 20 * MIB
    pool.used = 60
    pool.tick()
    big = task(75)
    assert reasons(pool.submit(big)) == dict.fromkeys(children[:2], "memory is short")
    assert not pool.running
    pool.used = 40
    assert pool.gone(children[0]) == []
    pool.used = 20
    assert pool.gone(children[1]) == [Give(big)]


@pytest.mark.parametrize("ended_now", [True, False])
@pytest.mark.parametrize(("others", "needs"), [(0, 700), (1, 700), (0, 1100)])
def test_alone_it_begins_in_a_new_child_if_the_only_one_has_kept_what_it_needs(others, needs, ended_now):
    """Whether the last task has just ended there or not; smaller ones do not take the child first."""
    pool = Pool(bound=1, budget=1000 * MIB, child=10 * MIB)
    [child] = pool.with_children(1)
    child.kept, pool.used = 300 * MIB, 400
    pool.tick(0)
    if ended_now:
        pool.submit()
    large, actions = task(needs), []
    child.loaded_bytes = child.kept if others else 0  # perhaps another one would have it, too
    for work in [large, *(task(10) for _ in range(others))]:
        actions += pool.submit(work)
    if ended_now:
        actions += pool.done(child, private_bytes=300 * MIB)
    assert reasons(actions) == {child: "memory is short"}
    pool.used = 110
    pool.gone(child)
    [fresh] = pool.starting
    pool.up(fresh)
    assert large in pool.running.values()


def test_what_the_last_task_had_is_looked_at_before_the_next_begins_alone():
    """Else it would seem that a new child would not help either."""
    pool = Pool(bound=1, budget=1000 * MIB, child=10 * MIB)
    [child] = pool.with_children(1)
    child.kept, pool.used = 20 * MIB, 60
    pool.tick(0)
    pool.submit(task(900))
    pool.submit(task(950))
    pool.grown, pool.used = dict.fromkeys(pool.running.values(), 800), 900
    pool.tick(0)
    pool.used = 60
    assert reasons(pool.done(child, private_bytes=20 * MIB)) == {child: "memory is short"}


@pytest.mark.parametrize(("kept", "used"), [(200, 900), (20, 400), (300, 200)])
def test_alone_it_begins_in_the_only_child_where_a_new_one_would_not_help(kept, used):
    """It does not fit there either, or fits as it is."""
    pool = Pool(bound=4, budget=1000 * MIB, child=10 * MIB)
    [child] = pool.with_children(1)
    child.kept, child.loaded_bytes, pool.used = kept * MIB, kept * MIB, used
    pool.tick(0)
    assert pool.submit(task(700)) in ([], [Give(pool.running[child])])


def test_a_child_that_is_given_a_task_is_not_in_the_way():
    """Though the next task does not fit, and memory of idle children is what it lacks."""
    pool = Pool(bound=2, budget=100 * MIB)
    pool.with_children(2)
    pool.tick()
    small, mid, big = task(30), task(30), task(90)
    pool.waiting.extend([small, mid, big])
    assert pool.decide(Waiting()) == [Give(small), Give(mid)]


def test_a_child_is_started_only_where_it_fits_with_its_task():
    """Each new child costs memory, too, also those that are still starting."""
    pool = Pool(bound=10, budget=100 * MIB, child=10 * MIB)
    pool.waiting.extend(task(10) for _ in range(10))
    assert pool.decide(Waiting()) == [Start(5)]
    assert pool.decide(Waiting()) == []


def test_memory_is_looked_at_when_a_child_is_up():
    """What it costs is used only now."""
    pool = Pool(bound=2, budget=100 * MIB, child=10 * MIB)
    pool.waiting.extend([task(40), task(40)])
    assert pool.decide(Waiting()) == [Start(2)]
    first, second = pool.starting
    pool.used = 50  # more than thought
    assert len(pool.up(first)) == 1
    assert pool.up(second) == []
    assert len(pool.running) == 1


def test_a_task_begins_when_others_give_their_memory_back():
    """It is looked at now and then, as nobody tells."""
    pool = Pool(bound=8, budget=100 * MIB)
    pool.with_children(2)
    pool.used = 50
    pool.tick()
    pool.submit(task(40))
    pool.submit(second := task(40))
    assert pool.supervisor.blocked is second
    pool.used = 10
    pool.tick()
    assert pool.supervisor.blocked is None


def test_tasks_that_end_right_after_each_other_make_room_for_as_many():
    """What the second one had is looked at, too: the next one need not wait until somebody looks again."""
    pool = Pool(bound=3, budget=100 * MIB)
    pool.with_children(3)
    pool.tick()
    for _ in range(3):
        pool.submit(task(30))
    first, second, _ = pool.running
    pool.submit(task(30))
    pool.submit(task(30))
    pool.grown, pool.used = dict.fromkeys(pool.running.values(), 30), 90
    pool.tick()
    for child, pool.used in ((first, 60), (second, 30)):  # those that begin have not taken anything yet
        pool.now += 0.001
        pool.done(child)
    assert not pool.waiting
    assert len(pool.running) == 3


def test_smaller_tasks_pass_for_a_while():
    """Then nothing begins before the one that has waited for so long."""
    pool = Pool(bound=8, budget=100 * MIB, patience=10)
    pool.with_children(4)
    pool.submit(task(60))
    pool.submit(big := task(90))
    small, late = task(10), task(10)
    assert pool.submit(small) == [Give(small)]
    pool.now += 11
    assert pool.submit(late) == []
    assert pool.supervisor.blocked is big
    for child in pool.busy:
        pool.done(child)
    assert big in pool.running.values()


def test_one_that_waits_for_what_never_ends_does_not_stop_everything():
    """It holds others up for a while, and lets them pass for a while, in turn; each time twice as long."""
    pool = Pool(bound=8, budget=100 * MIB, patience=10)
    pool.with_children(6)
    pool.submit(task(60))
    pool.submit(task(90))
    held = []
    for _ in range(26):
        pool.now += 10
        held.append(not pool.submit(small := task(1)))
        if not held[-1]:
            pool.done(next(child for child, work in pool.running.items() if work is small))
        else:
            pool.waiting.remove(small)
    assert held == [False, *[True] * 5, *[False] * 6, *[True] * 12, False, False]


def test_a_task_that_is_to_run_alone_waits_for_all_and_all_for_it():
    """Even where there is room for both."""
    pool = Pool(bound=4, budget=100 * MIB)
    pool.with_children(3)
    pool.submit(first := task(10))
    pool.submit(single := task(10, alone=True))
    assert pool.supervisor.blocked is single
    pool.waiting.append(last := task(10))
    pool.now += 100
    [child] = pool.busy
    pool.done(child)
    assert list(pool.running.values()) == [single]
    assert list(pool.waiting) == [last]
    assert first not in pool.running.values()


def test_unknown_tasks_begin_slowly_where_memory_is_scarce():
    """As many as there are cores; twice as many each so many seconds; no more once one needs much."""
    pool = Pool(bound=16, budget=AMPLE_BYTES, cores=2)
    pool.with_children(16)
    for _ in range(16):
        pool.submit(task(None))
    assert len(pool.running) == 2
    pool.tick(TRIAL_SECONDS)
    assert len(pool.running) == 4
    pool.grown[next(iter(pool.running.values()))] = 2 * TRIAL_BYTES // MIB
    pool.used = 50
    pool.tick(TRIAL_SECONDS)
    assert len(pool.running) == 4


@pytest.mark.parametrize("grown", [0, 2 * TRIAL_BYTES // MIB])
def test_unknown_tasks_are_looked_at_before_more_of_them_begin(grown):
    """What they have taken since the last look counts, also where nobody has looked of late."""
    pool = Pool(bound=16, budget=AMPLE_BYTES, cores=2)
    pool.with_children(16)
    for _ in range(16):
        pool.submit(task(None))
    pool.grown = dict.fromkeys(pool.running.values(), grown)
    pool.now += TRIAL_SECONDS
    pool.decide(Waiting())
    assert len(pool.running) == (2 if grown else 4)


def test_unknown_tasks_do_not_wait_for_others_that_never_end():
    """One more begins each so many seconds, if twice what one of them has taken is free."""
    pool = Pool(bound=16, budget=AMPLE_BYTES, cores=2)
    pool.with_children(16)
    for _ in range(16):
        pool.submit(task(None))
    pool.grown = dict.fromkeys(pool.running.values(), 100)
    pool.used = 200
    pool.tick(ENDLESS_SECONDS * 0.9)
    assert len(pool.running) == 2
    pool.tick(ENDLESS_SECONDS * 0.1)
    assert len(pool.running) == 3
    pool.used = 300
    pool.tick(ENDLESS_SECONDS * 0.9)
    assert len(pool.running) == 3
    pool.tick(ENDLESS_SECONDS * 0.1)
    assert len(pool.running) == 4
    pool.used = 400
    for _ in range(5):
        pool.tick(ENDLESS_SECONDS)
    assert len(pool.running) == 4
    for child in pool.leaving:
        assert pool.gone(child) == []
    pool.used = 300
    assert pool.tick() == [Start(1)]


def test_unknown_tasks_that_do_not_fit_have_their_turn_as_others():
    """Small ones do not pass them for ever, when others of their like never end."""
    pool = Pool(bound=16, budget=AMPLE_BYTES, cores=1, patience=20)
    pool.with_children(16)
    pool.submit(task(None, name="endless"))
    pool.submit(task(None, name="endless"))
    pool.grown = dict.fromkeys(pool.running.values(), 200)
    pool.used = 200
    small = task(10)
    pool.tick(ENDLESS_SECONDS)
    pool.submit(small)
    assert small in pool.running.values()
    pool.tick(ENDLESS_SECONDS + 1)
    pool.submit(task(10))
    assert len(pool.waiting) == 2


def test_unknown_tasks_begin_at_once_where_there_is_plenty():
    """Enough for whatever most tasks need."""
    pool = Pool(bound=16, budget=100 * AMPLE_BYTES, cores=2)
    pool.with_children(16)
    for _ in range(16):
        pool.submit(task(None))
    assert len(pool.running) == 16


# Replace


def test_a_grown_child_stays_until_its_replacement_is_ready():
    """And goes when it is idle."""
    pool = Pool(bound=1, max_growth_bytes=10 * MIB)
    [child] = pool.with_children(1)
    pool.supervisor.rules.max_age = 1e9  # so that ends of tasks are told
    pool.submit()
    assert pool.done(child, private_bytes=20 * MIB) == [Start(1)]
    [fresh] = pool.starting
    assert reasons(pool.up(fresh)) == {child: "grown by 20 MiB, at most 10 MiB per child"}


def test_a_grown_child_that_works_goes_after_its_task():
    """When its replacement is ready; it is never disturbed."""
    pool = Pool(bound=1, max_growth_bytes=10 * MIB, max_age=1e9)
    [child] = pool.with_children(1)
    pool.submit()
    pool.done(child, private_bytes=20 * MIB)
    pool.submit()
    [fresh] = pool.starting
    assert pool.up(fresh) == []
    assert reasons(pool.done(child, private_bytes=20 * MIB)) == {
        child: "grown by 20 MiB, at most 10 MiB per child"
    }


def test_where_there_is_no_room_for_two_the_old_one_goes_first():
    """The next one comes when there is work for it."""
    pool = Pool(bound=1, budget=100 * MIB, child=50 * MIB, max_growth_bytes=10 * MIB, max_age=1e9)
    [child] = pool.with_children(1)
    pool.used = 80
    pool.tick()
    pool.submit()
    assert list(reasons(pool.done(child, private_bytes=20 * MIB))) == [child]


def test_children_of_one_task():
    """At most 0 s old: that is a rule, too."""
    pool = Pool(bound=1)
    [child] = pool.with_children(1)
    pool.supervisor.rules.max_age = 0.0
    pool.submit()
    assert pool.done(child) == [Start(1)]


def test_a_replacement_that_ends_before_it_is_ready():
    """And not by a failure: the next one is started when the old child has ended its next task."""
    pool = Pool(bound=1, max_growth_bytes=10 * MIB)
    [child] = pool.with_children(1)
    pool.supervisor.rules.max_age = 1e9  # so that ends of tasks are told
    pool.submit()
    assert pool.done(child, private_bytes=20 * MIB) == [Start(1)]
    [fresh] = pool.starting
    pool.fleet.move(fresh, "leaving")
    pool.gone(fresh)
    pool.submit()
    assert pool.done(child, private_bytes=20 * MIB) == [Start(1)]


def test_children_are_replaced_one_after_the_other():
    """Not all at once, though all have grown alike."""
    pool = Pool(bound=4, max_growth_bytes=10 * MIB, max_age=1e9)
    pool.with_children(4)
    for _ in range(4):
        pool.submit()
    actions = [action for child in pool.busy for action in pool.done(child, private_bytes=20 * MIB)]
    assert actions == [Start(1)]


def test_outdated_children_go_at_once_when_nothing_runs():
    """Else those that are idle may still be needed."""
    pool = Pool(bound=2)
    children = pool.with_children(2)
    for child in children:
        child.outdated = True
    assert list(reasons(pool.decide(Outdated()))) == children


# End a task


def stuck(pool, running, headroom, coming=0):
    seen = [Seen(work, grown * MIB, paused=True) for work, grown in running]
    look = Look(pool.now, headroom * MIB, seen, coming=coming * MIB)
    for work, _ in running:
        pool.room.begin(work)
    return pool.decide(Stuck(look))


def test_the_newest_that_may_be_run_again_is_ended():
    """Where that is enough for the oldest to go on."""
    pool = Pool(bound=4, budget=1000 * MIB)
    old, mid, new = task(400), task(400), task(400, redeliverable=False)
    actions = stuck(pool, [(old, 300), (mid, 300), (new, 300)], 0)
    assert actions == [Kill(mid, "nothing that runs can go on")]


@pytest.mark.parametrize(
    ("headroom", "left"), [(-10, 0), (0, 0), (20, 0), (30, 1), (59, 1), (60, 2), (90, 3)]
)
def test_children_that_start_go_before_a_task_does(headroom, left):
    """The newest of them, as many as do not fit any more: nothing is lost with them."""
    pool = Pool(bound=4, budget=1000 * MIB)
    for born in (1, 3, 2):
        child = SimulatedChild(pool.fleet.size, born, 0)
        pool.fleet.move(child, "starting")
    actions = stuck(pool, [(task(400), 900)], headroom, coming=90)
    assert [action.child.born for action in actions] == [3, 2, 1][: 3 - left]
    assert all(isinstance(action, Retire) for action in actions)


def test_starts_are_given_up_once_for_each_look():
    """Not by a look from before; and none is made for a second, in which memory comes back."""
    pool = Pool(bound=4, budget=1000 * MIB)
    pool.burst(3)
    assert len(pool.starting) == 3
    before = Look(pool.now, 0, coming=90 * MIB)
    pool.now += 0.1
    look = Look(pool.now, 60 * MIB, coming=90 * MIB)
    assert [type(action) for action in pool.decide(Stuck(look))] == [Retire]
    assert pool.decide(Stuck(before)) == []
    pool.fleet.move(pool.leaving[0], "gone")
    assert pool.tick(0.5) == []
    assert pool.tick(0.6) == [Start(1)]


def test_one_that_can_never_fit_is_ended_first():
    """The others need not pay for it."""
    pool = Pool(bound=4, budget=1000 * MIB)
    giant, small = task(100), task(100)
    assert stuck(pool, [(giant, 990), (small, 50)], -60) == [Kill(giant, "it can not fit, not even alone")]


def test_the_largest_is_ended_where_no_one_is_enough():
    """Then at least much comes back."""
    pool = Pool(bound=4, budget=1000 * MIB)
    old, big, new = task(900), task(100), task(100)
    assert stuck(pool, [(old, 100), (big, 400), (new, 200)], 0) == [Kill(big, "nothing that runs can go on")]


def test_one_that_is_paused_for_too_long_is_ended():
    """The one that waits the longest; what runs beside it may never end."""
    pool = Pool(bound=4, budget=1000 * MIB, max_pause=60)
    running, first, second = task(100), task(100), task(100)
    for work in (running, first, second):
        pool.room.begin(work)
    first.paused_at, second.paused_at = pool.now, pool.now + 1
    assert not [action for action in pool.tick(59) if isinstance(action, Kill)]
    [kill] = [action for action in pool.tick(2) if isinstance(action, Kill)]
    assert kill == Kill(first, "it was paused for 61 s, at most 60 s (memsafe_max_pause)")
    pool.supervisor.max_pause = None
    assert not [action for action in pool.tick(1e6) if isinstance(action, Kill)]


def test_nothing_is_ended_where_nothing_runs():
    """It has ended meanwhile."""
    pool = Pool(bound=4)
    assert stuck(pool, [], 0) == []


@pytest.mark.parametrize("reserved", [None, 5])
def test_what_was_set_aside_is_free_when_a_task_has_ended(reserved):
    """Nothing is left of it."""
    pool = Pool(bound=2, budget=100 * MIB)
    [child] = pool.with_children(1)
    pool.submit(task(reserved))
    pool.done(child)
    assert pool.room.pending == 0
    assert not pool.supervisor._trials


def test_an_outdated_child_that_is_idle_for_long_goes_once():
    """For one of the two reasons; the others do not go below the minimum for it."""
    pool = Pool(bound=3, idle_timeout=10, min_children=1)
    outdated, other, last = pool.with_children(3)
    outdated.outdated = True
    assert reasons(actions := pool.tick(100)) == {outdated: "the pool was restarted", other: "idle for 101 s"}
    assert len(actions) == 2
    assert pool.fleet.idle == [last]


def test_what_a_child_costs_is_found_out_with_the_first_ones():
    """Before that as many are started as there are cores, unless there is ample memory."""
    pool = Pool(budget=GIB, child=12 * MIB, cold=True, bound=20, cores=2)
    pool.waiting.extend(task() for _ in range(20))
    assert pool.decide(Waiting()) == [Start(2)]
    pool = Pool(budget=20 * GIB, child=12 * MIB, cold=True, bound=20, cores=2)
    pool.waiting.extend(task() for _ in range(20))
    assert pool.decide(Waiting()) == [Start(20)]
