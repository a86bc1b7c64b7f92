"""What happens while something is being done, and in which order: the loop between deciding and acting."""

from __future__ import annotations

from collections import deque

import pytest

from memsafe_pool.events import Tick, Waiting
from memsafe_pool.machine import Fleet, SimulatedChild, Work
from memsafe_pool.reservations import Estimate
from memsafe_pool.room import Look, Room, Seen
from memsafe_pool.scheduler import STALE_SECONDS, Scheduler
from memsafe_pool.supervisor import Supervisor

MIB = 1 << 20


def task(reserved=10):
    work = Work("add", [(1.0, 0)])
    work.estimate = Estimate(reserved * MIB, reserved * MIB, known=True)
    return work


class Actor:
    """Notes what it is to do; what is in ``then`` happens while it does it."""

    def __init__(self, *, bound=4, budget=1000, shares=False):
        self.fleet, self.queue, self.room = Fleet(), deque(), Room(budget * MIB, 0)
        self.supervisor = Supervisor(self.fleet, self.queue, self.room, bound=bound)
        self.now, self.shares = 1000.0, shares
        self.used = 0
        self.did, self.then = [], {}
        self.scheduler = Scheduler(self, self.supervisor, self.queue, lambda: self.now)

    def do(self, what, *arguments):
        self.did.append((what, *arguments))
        if what in self.then:
            self.then.pop(what)()

    def give(self, child, work):
        self.do("give", child, work)

    def start(self, count):
        for _ in range(count):
            self.fleet.move(SimulatedChild(self.fleet.size, self.now, 0), "starting")
        self.do("start", count)

    def retire(self, child, reason):
        self.fleet.move(child, "leaving")
        self.do("retire", child)

    def dismiss(self, child):
        self.fleet.move(child, "leaving")
        self.do("dismiss", child)

    def kill(self, work, reason):
        self.do("kill", work)
        return next((child for child in self.fleet.children if child.run is work), None)

    def look(self):
        self.do("look")
        self.scheduler.saw(Look(self.now, self.room.budget - self.used * MIB))

    def size_up_waiting(self):
        self.do("size up")

    def say(self, shortage):
        self.do("say", shortage)

    def stop_worker(self, reason):
        self.do("stop worker")

    def decided(self):
        self.do("decided")

    def retry_later(self):
        self.do("retry later")

    # -- for tests

    def with_idle(self, count=1):
        children = [SimulatedChild(number, self.now, 0) for number in range(count)]
        for child in children:
            self.fleet.move(child, "starting")
            self.scheduler.up(child)
        self.did.clear()
        return children

    def of(self, *kinds):
        return [entry for entry in self.did if entry[0] in kinds]


def test_a_task_begins_at_once():
    """Where there is room and an idle child nothing has to be decided; the one used last gets it."""
    actor = Actor()
    _, last = actor.with_idle(2)
    work = task()
    actor.scheduler.submit(work)
    assert actor.did == [("give", last, work)]
    assert work.since == actor.now
    assert last.state == "busy"
    assert actor.room.pending == 10 * MIB


def test_what_comes_while_something_is_done_is_decided_afterwards():
    """Else memory would be spent, or children be started, twice."""
    actor = Actor(bound=8)
    actor.then["start"] = lambda: actor.scheduler.submit(task())
    actor.scheduler.submit(task())
    assert actor.of("start") == [("start", 1), ("start", 1)]
    assert actor.did.count(("decided",)) == 1
    assert actor.did[-1] == ("decided",)


def test_nobody_is_passed_while_something_is_done():
    """An idle child is not given a task that comes just then: it may be somebody else's already."""
    actor = Actor()
    [child] = actor.with_idle()
    first, second = task(), task()
    actor.queue.append(first)
    actor.then["look"] = lambda: actor.scheduler.submit(second)
    actor.scheduler.decide(Tick())
    assert actor.of("give") == [("give", child, first)]
    assert list(actor.queue) == [second]


def test_a_fault_does_not_end_deciding():
    """What comes next is decided on as ever."""
    actor = Actor()

    def fail():
        raise OSError("no socket")

    actor.then["start"] = fail
    with pytest.raises(OSError, match="no socket"):
        actor.scheduler.submit(task())
    actor.scheduler.submit(task())
    assert actor.of("start") == [("start", 1), ("start", 1)]
    assert actor.did[-1] == ("decided",)


def test_where_others_spend_the_same_memory_it_is_looked_at_first():
    """Before each round of tasks that wait; what needs next to nothing begins all the same."""
    actor = Actor(shares=True)
    [child] = actor.with_idle()
    actor.used = 995
    work = task(10)
    actor.scheduler.submit(task(1))
    assert actor.of("look") == []
    actor.supervisor.ended(actor.did[-1][2])
    actor.scheduler.free(child)
    actor.did.clear()
    actor.used = 0
    actor.scheduler.submit(work)
    assert actor.of("look", "give") == [("look",), ("give", child, work)]


def test_a_declined_task_gives_back_what_was_set_aside():
    """The child has the next one, or rests."""
    actor = Actor()
    [child] = actor.with_idle()
    first, second = task(), task()
    actor.scheduler.submit(first)
    actor.queue.append(second)
    actor.scheduler.declined(child, first)
    assert actor.of("give")[1:] == [("give", child, second)]
    assert actor.room.pending == 10 * MIB


def test_what_is_to_be_given_may_be_gone():
    """It was revoked, or has gone back to the broker, since that was decided: nothing stays set aside."""
    actor = Actor()
    actor.with_idle(2)
    first, second = task(), task()
    actor.queue.extend([first, second])
    actor.then["give"] = lambda: actor.queue.remove(second)
    actor.scheduler.decide(Waiting())
    assert [work for _, _, work in actor.of("give")] == [first]
    assert list(actor.room.running) == [first]


def test_nothing_is_decided_once_it_is_stopped():
    """Children leave as they get free; what waits stays for whoever stops it to settle."""
    actor = Actor()
    [child] = actor.with_idle()
    work = task()
    actor.scheduler.submit(work)
    actor.queue.append(task())
    actor.scheduler.stopped = True
    actor.supervisor.ended(work)
    actor.scheduler.free(child)
    actor.scheduler.decide(Tick())
    assert actor.of("dismiss", "give", "start") == [("give", child, work), ("dismiss", child)]


def test_stopping_ends_the_round():
    """What was decided before is not done after that."""
    actor = Actor(bound=8)
    actor.then["look"] = lambda: setattr(actor.scheduler, "stopped", True)
    actor.queue.append(task())
    actor.scheduler.decide(Tick())
    assert actor.of("start") == []


class Stuck(Actor):
    """Two children run tasks that are paused; nothing is left."""

    def __init__(self):
        super().__init__()
        self.running = [task(), task()]
        for child, work in zip(self.with_idle(2), self.running, strict=True):
            self.room.begin(work)
            child.run = work
            self.fleet.move(child, "busy")
        self.did.clear()

    def see(self, at=None):
        seen = [Seen(work, 400 * MIB, growing=True, paused=True) for work in self.running]
        return Look(self.now if at is None else at, 0, seen)

    def victim(self):
        [(_, work)] = self.of("kill")
        return next(child for child in self.fleet.children if child.run is work)


def test_one_is_ended_at_a_time():
    """Nobody else is, as long as the first has not gone, nor for what was seen before it had."""
    actor = Stuck()
    actor.scheduler.stuck(actor.see())
    assert len(actor.of("kill")) == 1
    seen_at = actor.now
    actor.now += 0.6
    actor.scheduler.stuck(actor.see())
    assert len(actor.of("kill")) == 1
    actor.scheduler.gone(actor.victim())
    actor.scheduler.stuck(actor.see(seen_at))
    assert len(actor.of("kill")) == 1
    actor.now += 0.1
    actor.scheduler.stuck(actor.see())
    assert len(actor.of("kill")) == 2


def test_nobody_is_ended_for_what_was_long_ago():
    """If it is still so, that is said again."""
    actor = Stuck()
    look = actor.see()
    actor.now += STALE_SECONDS + 0.1
    actor.scheduler.stuck(look)
    assert actor.of("kill") == []


def test_who_is_stuck_is_helped_while_all_leave():
    """Else a worker would not stop."""
    actor = Stuck()
    actor.scheduler.stopped = True
    actor.scheduler.stuck(actor.see())
    assert len(actor.of("kill")) == 1


def test_a_task_that_has_gone_is_no_victim():
    """It ended before it could be ended: the next one may be."""
    actor = Stuck()
    for child in actor.fleet.children:
        child.run = None
    actor.scheduler.kill(actor.running[0], "")
    actor.scheduler.stuck(actor.see())
    assert len(actor.of("kill")) == 2


def test_what_is_coming():
    """Children that start, and those that are about to: what they will take is promised to others."""
    actor = Actor(bound=8)
    actor.queue.extend([task(), task()])
    actor.scheduler.saw(Look(actor.now, actor.room.budget))
    assert actor.of("start") == []
    assert actor.scheduler.coming == 2
    actor.scheduler.decide(Tick())
    assert actor.of("start") == [("start", 2)]
    assert actor.scheduler.coming == 2
