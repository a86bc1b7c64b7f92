"""When the prefetch is bounded, when tasks go back, and what Celery's loop is made to tell the broker.

At the end stands a model of a worker with its broker: whatever comes, in whatever order, some things always
hold. ``make check-model`` tries more of it.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import deque
from heapq import heappop
from types import SimpleNamespace

import pytest
from celery import Celery
from celery.signals import task_received
from celery.worker import state as worker_state
from celery.worker.request import Request
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from kombu.asynchronous.semaphore import LaxBoundedSemaphore
from kombu.asynchronous.timer import Timer
from kombu.common import QoS
from kombu.transport import virtual
from kombu.utils.limits import TokenBucket

from memsafe_pool import prefetch, upstream
from memsafe_pool.job import Job
from memsafe_pool.prefetch import (
    DECODED,
    GIVE_BACK_SECONDS,
    RELEASE_SECONDS,
    WAITING_SHARE,
    Hold,
    Prefetch,
    Window,
    _FollowingQoS,
)

EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "240"))

# Times


def test_nothing_goes_back_after_a_moment():
    """The prefetch is lowered at once; tasks go back when the block has lasted."""
    hold = Hold()
    assert not hold.follow(True, 10.0)
    assert hold.bounded
    assert not hold.follow(True, 10.0 + GIVE_BACK_SECONDS * 0.9)
    assert hold.follow(True, 10.0 + GIVE_BACK_SECONDS)


def test_a_task_that_was_admitted_begins_the_time_anew():
    """What counts is for how long nothing could be admitted."""
    hold = Hold()
    hold.follow(True, 10.0)
    hold.follow(False, 10.4)
    assert not hold.follow(True, 10.6)
    assert hold.follow(True, 10.6 + GIVE_BACK_SECONDS)


def test_it_stays_bounded_for_a_while():
    """Tasks come one by one until there was room for all of them for a second."""
    hold = Hold()
    hold.follow(True, 10.0)
    hold.follow(False, 10.0 + RELEASE_SECONDS * 0.9)
    assert hold.bounded
    hold.follow(False, 10.0 + RELEASE_SECONDS)
    assert not hold.bounded


@given(st.lists(st.tuples(st.booleans(), st.floats(0.001, 3)), min_size=1))
def test_any_course(steps):
    """Tasks go back only while blocked, and bounded; what is over for long is over."""
    hold, now, blocked_last = Hold(), 0.0, None
    for blocked, seconds in steps:
        now += seconds
        back = hold.follow(blocked, now)
        blocked_last = now if blocked else blocked_last
        assert blocked or not back
        assert hold.bounded or not blocked
        assert hold.bounded == (blocked_last is not None and now - blocked_last < RELEASE_SECONDS)


# Sizes

MIB = 1 << 20


def window(mib):
    return Window(lambda: mib * MIB)


def test_few_may_come_before_it_is_known_how_large_they_are():
    """One for each 128 MiB; twice as many each time that so many have come and were small."""
    found = window(700)
    assert found.count == 5
    for _ in range(5):
        found.arrive(200)
    assert found.count == 10
    for _ in range(5):  # the others may wait still, and then no more than these can come
        found.arrive(200)
    assert found.count == 20
    assert window(100).count == 1
    assert window(64 << 10).count == 512


@pytest.mark.parametrize("mib", [1, 300, 450, 700, 3000])
def test_it_opens_although_all_that_came_waits(mib):
    """Where nothing is acknowledged, as many come as it lets wait; that must be enough to open it further."""
    found, waiting = window(mib), 0
    while found.count < 64:
        assert waiting < found.count
        found.arrive(200)
        waiting += 1


def test_large_ones_are_few():
    """Those that wait take no more than their share, by the largest of the last; it is one at least."""
    found = window(700)
    found.arrive(8 * MIB)
    assert found.count == 2
    assert found.count * 8 * DECODED <= 700 * WAITING_SHARE
    found.arrive(80 * MIB)
    assert found.count == 1
    for _ in range(2000):
        found.arrive(200)
    assert found.count >= 1000


def test_it_begins_anew_when_next_to_nothing_comes():
    """Many large ones may come at once then. What comes steadily keeps it open, also if all is soon done."""
    found = window(700)
    for _ in range(1000):
        found.arrive(200)
    opened = found.count
    assert opened >= 320
    found.tick(idle=False)
    found.tick(idle=False)
    assert found.count == opened
    for _ in range(5):
        for _ in range(opened // 4):
            found.arrive(200)
        found.tick(idle=True)
    assert found.count >= 2 * (opened // 4)
    found.arrive(200)
    found.tick(idle=True)
    assert found.count == 5


# Celery's loop


def test_the_loop_updates_when_it_is_due():
    """Celery's loop compares ``prev`` with ``value`` in each round, and updates when they differ."""
    told, due = [], [False]
    celerys = QoS(None, 8)

    def tell(prefetch_count):
        told.append(prefetch_count)

    qos = _FollowingQoS(celerys, tell, lambda: due[0])

    def rounds(count):
        for _ in range(count):
            if qos.prev != qos.value:
                qos.update()

    rounds(3)
    assert told == [8]
    due[0] = True
    rounds(1)
    due[0] = False
    rounds(3)
    assert told == [8, 8]
    qos.increment_eventually(2)
    rounds(3)
    assert told == [8, 8, 10]
    assert getattr(qos, "max_prefetch", None) == getattr(celerys, "max_prefetch", None)


def test_without_a_consumer_nothing_is_done():
    """Before the first connection and while there is none, and where there is an obstacle."""
    prefetch = Prefetch(waiting=[], drop=lambda job: None)
    prefetch.follow(blocked=False)
    prefetch.follow(blocked=True)
    prefetch.detach()
    prefetch.follow(blocked=True)
    assert prefetch.count == 0
    assert prefetch.given_back == 0


def test_only_requests_are_requests():
    """A call that is none of Celery's has callbacks of another kind, or none."""
    assert upstream.request_of(None) is None
    assert upstream.request_of(print) is None
    assert upstream.request_of([].append) is None


# Whatever comes

app = Celery("prefetched", set_as_current=False)


@app.task(name="early", shared=False)
def early():
    pass


@app.task(name="late", shared=False, acks_late=True)
def late():
    pass


numbers = itertools.count()

#: Seconds between two looks while a task waits for memory; every tenth is the engine's tick.
RETRY_SECONDS, TICK_SECONDS = 0.1, 1.0


class Task:
    """One task: how often it has begun, and how often it may."""

    def __init__(self, *, late, waits, size=10):
        self.id = str(next(numbers))
        self.late, self.waits, self.size = late, waits, size
        self.begun, self.may_begin = 0, 1
        self.revoked = self.done = False

    def __repr__(self):
        return f"<Task {self.id}>"


class Message:
    """One delivery of a task, as far as ``Request`` and ``upstream`` read it."""

    content_type = content_encoding = properties = delivery_info = None

    def __init__(self, task, channel):
        self.body = range(task.size)  # only its length is read
        self.task, self.channel, self.delivery_tag = task, channel, next(numbers)
        self.headers = {"id": task.id, "task": "late" if task.late else "early"}
        self.received = self.begun = self.given = False


class Channel:
    """A connection to RabbitMQ, which sends as many as it was told."""

    driver_type = "amqp"

    def __init__(self, worker, told):
        self.worker, self.told = worker, told
        self.sent, self.coming = {}, deque()
        self.closed = False

    def tell(self, prefetch_count):
        self.worker.check_told(prefetch_count)
        self.told = prefetch_count

    @property
    def unacknowledged(self):
        return list(self.sent.values())

    def turn(self, *, answered):
        """What was sent is read, and more is sent."""
        while self.coming:
            self.worker.receive(self.coming.popleft())
        while self.worker.queue and (not self.told or len(self.sent) < self.told):
            message = Message(self.worker.queue.popleft(), self)
            self.sent[message.delivery_tag] = message
            self.coming.append(message)

    def acknowledge(self, message):
        if not self.closed:
            del self.sent[message.delivery_tag]

    def reject(self, message):
        self.worker.check_given_back(message)
        self.worker.queue.appendleft(self.sent.pop(message.delivery_tag).task)


class RedisQoS(virtual.QoS):
    """What kombu knows of the messages it has fetched from Redis."""

    restore_at_shutdown = False

    def restore_by_tag(self, tag):
        message = self.get(tag)
        message.channel.worker.check_given_back(message)
        message.channel.worker.queue.appendleft(message.task)


class RedisChannel(Channel):
    """A connection to Redis, which is asked for one after the other, as long as there may be more."""

    driver_type = "redis"

    def __init__(self, worker, told):
        self.qos, self._in_poll = RedisQoS(self), False
        super().__init__(worker, told)

    @property
    def told(self):
        return self.qos.prefetch_count

    @told.setter
    def told(self, count):
        self.qos.prefetch_count = count

    @property
    def unacknowledged(self):
        self.qos._flush()
        return list(self.qos._delivered.values())

    def turn(self, *, answered):
        """An answer comes when there is a task, or with nothing when the time is over."""
        self._in_poll = self._in_poll or self.qos.can_consume()
        if self._in_poll and (self.worker.queue or answered):
            self._in_poll = False
            if self.worker.queue:
                message = Message(self.worker.queue.popleft(), self)
                self.qos.append(message, message.delivery_tag)
                self.worker.receive(message)

    def acknowledge(self, message):
        if not self.closed:
            self.qos.ack(message.delivery_tag)

    def reject(self, message):
        raise AssertionError("kombu's own way puts it to the end of the queue")


class Worker:
    """Celery's consumer, and the engine, as far as they have to do with the prefetch.

    Requests, semaphore, timer and counts are Celery's own; so it is the real ``upstream`` that reads them.

    Attributes:
        queue: The tasks that the broker has, the next one first.
        waiting: Jobs in the pool that no child has.
        given: Jobs that a child has.
        children: How many there can be, at most as many as the concurrency.
        short: Whether there is no memory for the first one that waits.
        blocked: Whether the prefetch was told so last.
        blocked_since, blocked_last: Since when it is told so, and when it was told so last.
        followed: When it was told anything last.
        kept: What was kept here at that time.
        gave: Messages that went back.
        quiet_since: Since when nothing happens but that time passes.
    """

    hub = object()
    app = app
    task_buckets = {}  # noqa: RUF012 - nobody writes into it

    def __init__(self, make_channel, concurrency, multiplier, *, semaphore, budget=1 << 60):
        self.make_channel, self.concurrency, self.multiplier = make_channel, concurrency, multiplier
        self.children = concurrency
        self.now = 1000.0
        self.tasks, self.queue = [], deque()
        self.waiting, self.given = deque(), []
        self.short = self.blocked = False
        self.blocked_since, self.blocked_last, self.followed = math.inf, -math.inf, self.now
        self.kept = []
        self.gave = []
        self.quiet_since = math.inf
        self.controller = SimpleNamespace(semaphore=LaxBoundedSemaphore(concurrency) if semaphore else None)
        self.prefetch = Prefetch(self.waiting, self.drop, lambda: budget)
        self.connect(concurrency * multiplier)

    # -- the consumer

    @property
    def max_prefetch_count(self):
        return self.concurrency * self.multiplier

    def connect(self, count):
        self.channel = self.make_channel(self, count)
        self.task_consumer = SimpleNamespace(channel=self.channel)
        self.connection = SimpleNamespace(transport=self.channel)
        self.timer = Timer()
        self.qos = QoS(self.channel.tell, count)
        self.prefetch.attach(self)
        assert not self.prefetch.obstacle
        if self.blocked:
            assert 1 <= self.channel.told <= len(self.find_kept()) + 1
        self.channel.turn(answered=False)  # before the loop begins

    def lose_connection(self):
        """What was not acknowledged is in the queue again, and Celery forgets what has not begun."""
        self.prefetch.detach()
        lost = [message.task for message in self.channel.unacknowledged]
        self.channel.closed = True
        self.queue.extendleft(reversed(lost))
        for task in lost:
            task.may_begin += 1
        if self.controller.semaphore is not None:
            self.controller.semaphore.clear()
        worker_state.reserved_requests.clear()
        worker_state.reserved_requests.update(tuple(worker_state.active_requests))
        getattr(worker_state, "scheduled_requests", set()).clear()

    def flush(self):
        """Jobs go that wait, and came by a connection that is lost."""
        for job in list(self.waiting):
            if job.request is not None and job.request.message.channel.closed:
                self.waiting.remove(job)
        self.follow()

    def turn(self, *, answered=True):
        """One round of Celery's loop."""
        if self.qos.prev != self.qos.value:
            self.qos.update()
        self.check_told_enough()
        self.channel.turn(answered=answered)

    def receive(self, message):
        channel, task = message.channel, message.task
        message.received = True
        request = Request(
            message,
            on_ack=lambda *_: channel.acknowledge(message),
            on_reject=lambda *_: channel.reject(message),
            app=app,
            hostname="worker",
            body=((), {}, {}),
            decoded=True,
        )
        task_received.send(sender=self, request=request)
        if not task.waits:
            self.reserve(request)
            return
        self.qos.increment_eventually()
        self.timer.call_at(next(numbers), self.apply_eta_task, (request,))  # one after the other
        if hasattr(worker_state, "task_scheduled"):  # Celery 5.7
            worker_state.task_scheduled(request)

    def apply_eta_task(self, request):
        request.message.task.waits = False
        self.reserve(request)
        self.qos.decrement_eventually()

    def reserve(self, request):
        worker_state.task_reserved(request)
        if self.controller.semaphore is None:
            self.apply(request)
        else:
            self.controller.semaphore.acquire(self.apply, request)

    def apply(self, request):
        if upstream.is_revoked(request):
            self.release()
            self.settle(request)
            return
        job = Job(print, (), {}, on_error=request.on_failure, on_accept=request.on_accepted)
        assert job.request is request
        self.waiting.append(job)
        self.follow()

    def release(self):
        if self.controller.semaphore is not None:
            self.controller.semaphore.release()

    def settle(self, request):
        """A task has ended."""
        request.message.task.done = True
        worker_state.task_ready(request)
        request.acknowledge()

    # -- the engine

    def follow(self):
        """Give children what there is room for, and tell whether there is none."""
        while self.waiting and not self.short and len(self.given) < min(self.children, self.concurrency):
            self.give(self.waiting[0])
        self.blocked = self.short and bool(self.waiting)
        self.followed = self.now
        if self.blocked:
            self.blocked_since, self.blocked_last = min(self.blocked_since, self.now), self.now
        else:
            self.blocked_since = math.inf
        before, count, slots = self.sent_requests(), len(self.gave), self.free_slots
        self.prefetch.follow(blocked=self.blocked)
        self.kept = self.find_kept()
        if len(self.gave) > count:
            self.check_order(before, self.gave[count:])
            # Where the semaphore has grown it may have some that nobody has taken, although tasks wait.
            assert self.free_slots <= slots or not self.controller.semaphore._waiting, (
                "a slot was not passed on"
            )

    @property
    def free_slots(self):
        return 0 if self.controller.semaphore is None else self.controller.semaphore.value

    def requests(self):
        """The requests that wait, the one to run next first; None for what is no task of Celery's."""
        semaphore = self.controller.semaphore
        queued = [] if semaphore is None else [args[0] for _, args, _ in semaphore._waiting]
        return [job.request for job in self.waiting] + queued

    def sent_requests(self):
        """Those that this connection has brought: the broker counts them."""
        return [request for request in self.requests() if request and not request.message.channel.closed]

    def drop(self, job):
        self.waiting.remove(job)
        self.release()

    def give(self, job):
        self.waiting.remove(job)
        if job.request is not None and upstream.is_revoked(job.request):
            self.release()
            self.settle(job.request)
            return
        self.given.append(job)
        if job.request is not None:
            job.request.message.given = True
        self.prefetch.refresh()

    def accept(self, job):
        """A child says that it begins."""
        if job.accepted_at is not None:
            return
        job.accept(1, self.now)
        if job.request is not None:
            message = job.request.message
            message.begun = True
            message.task.begun += 1
            assert message.task.begun <= message.task.may_begin, "it runs again without need"

    def end(self, job):
        """First the next one begins, and then this one is settled."""
        self.accept(job)
        self.given.remove(job)
        self.follow()
        self.release()
        if job.request is not None:
            self.settle(job.request)

    def give_again(self, job):
        """The child has ended, and the task is to be run by another one."""
        self.given.remove(job)
        request = job.request
        if request is not None:
            request.message.given = False
        if job.accepted_at is not None:
            if request.message.channel.closed:
                self.release()
                upstream.leave_to_broker(request)
                return
            request.message.task.may_begin += 1
            job.memory_tries += 1
            job.withdraw()
        self.waiting.appendleft(job)
        self.follow()

    def get_short(self, tasks):
        """Fetch all these, which no child takes, and then there is no memory for them."""
        self.children = 0
        self.tasks = list(tasks)
        self.queue.extend(self.tasks)
        while self.queue:
            self.turn()
        self.short = True

    # -- what always holds

    def find_kept(self):
        """What the broker has sent that neither waits here nor will be acknowledged in a moment."""
        return [
            message
            for message in self.channel.unacknowledged
            if message.received and (message.task.waits or (message.task.late and message.given))
        ]

    @property
    def held(self):
        """Whether the number is not Celery's own: as long as it is blocked, and for a while after that."""
        return self.followed - self.blocked_last < RELEASE_SECONDS

    @property
    def settled(self):
        """Whether it is blocked, and nothing has happened, for longer than it takes to give all back."""
        return self.now - max(self.blocked_since, self.quiet_since) >= GIVE_BACK_SECONDS + 4 * TICK_SECONDS

    def check_told(self, count):
        """When the broker is told."""
        own = self.qos.value
        if count:
            assert count >= 1
            assert count <= (own or math.inf), "more than Celery's own"
        else:
            assert not own, "no limit, and Celery has one"
        if self.blocked:
            assert 1 <= count <= len(self.find_kept()) + 1, "more than are kept here, and one"
        if upstream.is_fetching(self):
            assert not count or len(self.channel.unacknowledged) < count, "the answer will stay in the socket"

    def check_told_enough(self):
        """In each round of the loop, when it has had its time."""
        told, own = self.channel.told or math.inf, self.qos.value or math.inf
        assert self.prefetch.count == self.channel.told
        if upstream.is_fetching(self):
            return
        assert told <= own
        late = self.now - self.blocked_last >= RELEASE_SECONDS + 2 * TICK_SECONDS
        if (late or not self.held) and self.prefetch._window.count >= (self.max_prefetch_count or math.inf):
            assert told == own, "Celery's own number does not hold again"
        kept, sent = self.find_kept(), self.channel.unacknowledged
        if self.blocked:
            assert told <= max(len(self.kept), len(kept)) + 1
        moments = any(not message.received or not message.task.late for message in sent)
        if told < own and kept == self.kept and not moments and not self.requests():
            assert len(sent) < told, "there is nothing to try, and nothing will come"

    def check_given_back(self, message):
        """When a task goes back."""
        assert not message.begun, "a task went back that had begun"
        assert not message.task.revoked, "a task went back that was revoked"
        assert message.channel is self.channel
        assert not self.channel.closed
        assert 1 <= self.channel.told <= len(self.find_kept()) + 1, "it will come again at once"
        assert self.now - self.blocked_since >= GIVE_BACK_SECONDS, "a task went back after a moment"
        assert not self.settled, "tasks come and go back"
        self.gave.append(message)

    def check_order(self, before, gave):
        """The oldest stays; the others are in their order in front of all."""
        messages = [request.message for request in before]
        assert messages[0] not in gave, "another one comes in its place"
        assert [message.task for message in messages if message in gave] == list(
            itertools.islice(self.queue, len(gave))
        )
        assert not any(request.message in gave for request in worker_state.reserved_requests)

    def can_go(self):
        """Requests that wait, and have no reason to stay; one of them stays all the same if it is first."""
        withdrawn = {id(job.request) for job in self.waiting if job.memory_tries}
        return [
            request
            for request in self.sent_requests()[1:]
            if id(request) not in withdrawn and not request.message.task.revoked
        ]


@pytest.mark.parametrize("channel", [Channel, RedisChannel])
def test_what_the_broker_does_not_count_is_not_the_one_that_stays(channel, monkeypatch):
    """Else, behind a call that is no task, the broker sends another one for each that goes back, for ever."""
    worker = Worker(channel, 1, 4, semaphore=False)
    monkeypatch.setattr(prefetch, "time", SimpleNamespace(monotonic=lambda: worker.now))
    worker.short = True
    worker.waiting.append(Job(print, (), {}))
    first, *others = worker.tasks = [Task(late=True, waits=False) for _ in range(4)]
    worker.queue.extend(worker.tasks)
    try:
        for _ in range(100):
            worker.now += RETRY_SECONDS
            worker.turn()
            worker.follow()
        assert [request.message.task for request in worker.requests() if request] == [first]
        assert list(worker.queue) == others
        assert len(worker.gave) <= len(others)
    finally:
        worker_state.reset_state()


def test_tasks_with_a_rate_limit_stay(monkeypatch):
    """Others of their name wait in Celery for their turn: they would be run before those that went back."""
    worker = Worker(RedisChannel, 4, 4, semaphore=True)
    monkeypatch.setattr(prefetch, "time", SimpleNamespace(monotonic=lambda: worker.now))
    monkeypatch.setattr(Worker, "task_buckets", {"early": TokenBucket(20), "late": None})
    try:
        worker.get_short(Task(late=number % 2 == 0, waits=False) for number in range(8))
        first, *others = worker.tasks
        for _ in range(20):
            worker.now += RETRY_SECONDS
            worker.turn()
            worker.follow()
        assert [request.message.task for request in worker.requests()] == [first, *others[::2]]
        assert list(worker.queue) == others[1::2]
    finally:
        worker_state.reset_state()


def test_giving_back_leaves_time_for_what_ends_meanwhile(monkeypatch, caplog):
    """In pieces where each takes its time, and said once."""
    caplog.set_level("INFO")
    worker, passed, pieces = Worker(RedisChannel, 20, 4, semaphore=True), [0.0], 0
    monkeypatch.setattr(prefetch, "time", SimpleNamespace(monotonic=lambda: worker.now + passed[0]))
    check = worker.check_given_back

    def check_given_back(message):
        check(message)
        passed[0] += 0.004

    worker.check_given_back = check_given_back
    try:
        worker.get_short(Task(late=False, waits=False) for _ in range(60))
        for _ in range(40):
            worker.now += RETRY_SECONDS
            worker.turn()
            before = passed[0]
            worker.follow()
            assert passed[0] - before < 0.025
            pieces += passed[0] > before
        assert len(worker.gave) == 59
        assert list(worker.queue) == worker.tasks[1:]
        assert pieces > 10
        assert [record.getMessage().split()[:2] for record in caplog.records] == [["Gave", "59"]]
    finally:
        worker_state.reset_state()


@pytest.mark.parametrize("channel", [Channel, RedisChannel])
def test_no_number_is_higher_than_a_broker_takes(channel):
    """Where Celery has no limit, there is none when so many have come that the next would be too high."""
    worker = Worker(channel, 1, 0, semaphore=False, budget=300 * MIB)
    try:
        assert worker.channel.told == 2
        for _ in range(2 * prefetch.MOST_MESSAGES):
            worker.prefetch._window.arrive(0)
        worker.prefetch.tick()
        worker.turn()
        assert worker.channel.told == 0
    finally:
        worker_state.reset_state()


class Model(RuleBasedStateMachine):
    """Drives the worker through whatever can happen."""

    @initialize(
        channel=st.sampled_from([Channel, RedisChannel]),
        concurrency=st.sampled_from([1, 2, 4]),
        multiplier=st.sampled_from([4, 1, 2, 0]),
        semaphore=st.booleans(),
        at_once=st.sampled_from([0.01, 0.0]),
        budget=st.sampled_from([1 << 60, 300 * MIB]),
    )
    def begin(self, channel, concurrency, multiplier, *, semaphore, at_once, budget):
        worker = self.worker = Worker(channel, concurrency, multiplier, semaphore=semaphore, budget=budget)
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(prefetch, "time", SimpleNamespace(monotonic=lambda: worker.now))
        self.patch.setattr(prefetch, "GIVE_BACK_AT_ONCE_SECONDS", at_once)
        self.pass_time(RETRY_SECONDS)

    # -- what can happen

    @rule(
        late=st.booleans(),
        waits=st.sampled_from([False] * 4 + [True]),
        number=st.integers(1, 8),
        size=st.sampled_from([10, 8 * MIB]),
    )
    def tasks_are_sent(self, late, waits, number, size):
        for _ in range(number):
            task = Task(late=late, waits=waits, size=size)
            self.worker.tasks.append(task)
            self.worker.queue.append(task)
        self.worker.turn()

    @rule(short=st.booleans())
    def memory_is_short(self, short):
        """Or is not any more."""
        self.worker.short = short
        self.worker.follow()

    @rule(children=st.sampled_from([0, 1, 10]))
    def there_can_be(self, children):
        """Tasks wait in the pool then, although there is memory."""
        self.worker.children = children
        self.worker.follow()

    @rule(seconds=st.sampled_from([0.1, 0.3, 0.5, 1.0, 10.0]))
    def time_passes(self, seconds):
        self.pass_time(seconds)

    @rule(times=st.integers(1, 10), answered=st.booleans())
    def the_loop_turns(self, times, answered):
        for _ in range(times):
            self.worker.turn(answered=answered)

    @precondition(lambda self: self.worker.given)
    @rule(data=st.data(), what=st.sampled_from(["begins", "ends", "was not begun"]))
    def a_task_that_was_given(self, data, what):
        """It begins, ends, or its child has ended before it began."""
        worker = self.worker
        job = data.draw(st.sampled_from(worker.given))
        if what == "begins":
            worker.accept(job)
        elif what == "ends":
            worker.end(job)
        elif job.accepted_at is None:
            worker.give_again(job)

    @precondition(lambda self: len(self.worker.waiting) > 1)
    @rule(data=st.data())
    def a_task_passes_the_first(self, data):
        """There is no room for the first one, but for this one."""
        worker = self.worker
        job = data.draw(st.sampled_from(list(worker.waiting)[1:]))
        worker.give(job)
        worker.follow()

    @precondition(lambda self: len(self.worker.timer))
    @rule()
    def the_time_of_a_task_comes(self):
        heappop(self.worker.timer._queue).entry()

    @precondition(lambda self: any(self.worker.requests()))
    @rule(data=st.data())
    def a_task_is_revoked(self, data):
        request = data.draw(st.sampled_from([request for request in self.worker.requests() if request]))
        if not request.message.begun:
            request.message.task.revoked = True
            worker_state.revoked.add(request.id)

    @rule()
    def another_call_waits(self):
        """One that is none of Celery's tasks."""
        self.worker.waiting.append(Job(print, (), {}))
        self.worker.follow()

    @rule(by=st.sampled_from([1, 2, -1]))
    def the_pool_is_resized(self, by):
        worker = self.worker
        if worker.concurrency + by < 1:
            return
        worker.concurrency += by
        semaphore, change = worker.controller.semaphore, abs(by) * worker.multiplier
        if by > 0:
            if semaphore is not None:
                semaphore.grow(by)
            worker.qos.increment_eventually(change)
        else:
            if semaphore is not None:
                semaphore.shrink(-by)
            worker.qos.decrement_eventually(change)
        worker.follow()

    @rule(flushed=st.booleans(), seconds=st.sampled_from([0.1, 2.0]), lower=st.booleans())
    def the_connection_is_lost(self, flushed, seconds, lower):
        """Celery may begin with a lower number then, and raise it when tasks end."""
        worker = self.worker
        worker.lose_connection()
        if flushed:
            worker.flush()
        for _ in range(round(seconds / RETRY_SECONDS)):
            worker.now += RETRY_SECONDS
            worker.follow()
        worker.connect(worker.multiplier if lower else worker.concurrency * worker.multiplier)

    @rule()
    def the_pool_is_flushed(self):
        """Which it is told when the connection is lost, and does in its own time."""
        self.worker.flush()

    @precondition(lambda self: self.worker.given)
    @rule()
    def memory_runs_out(self):
        """Of what children have, all that may be run again is, when there is memory again."""
        self.worker.short = True
        for job in list(self.worker.given):
            if job.redeliverable:
                self.worker.accept(job)
                self.worker.give_again(job)

    @precondition(lambda self: 0 < self.worker.qos.value < self.worker.concurrency * self.worker.multiplier)
    @rule()
    def celery_raises_its_number(self):
        """At once, not in the next round of its loop."""
        worker = self.worker
        worker.qos.value += worker.multiplier
        worker.qos.set(worker.qos.value)

    # -- what always holds

    def pass_time(self, seconds):
        worker = self.worker
        worker.quiet_since = worker.now
        for _ in range(round(seconds / RETRY_SECONDS)):
            worker.now += RETRY_SECONDS
            ticks = worker.now % TICK_SECONDS < RETRY_SECONDS
            if worker.blocked or ticks:
                worker.follow()
            if ticks:
                worker.prefetch.tick()
            worker.turn(answered=ticks)
            worker.turn(answered=False)
            assert not (worker.settled and worker.can_go()), "tasks are kept from others"
        worker.quiet_since = math.inf

    def teardown(self):
        """In the end, all have run, and Celery's own number holds."""
        if not hasattr(self, "worker"):
            return
        worker = self.worker
        try:
            worker.flush()
            worker.short, worker.children = False, worker.concurrency
            for _ in range(2000):
                while len(worker.timer):
                    self.the_time_of_a_task_comes()
                self.pass_time(RETRY_SECONDS)
                for job in list(worker.given):
                    worker.end(job)
                if not (worker.queue or worker.channel.unacknowledged or worker.given or worker.waiting):
                    break
            assert all(task.done for task in worker.tasks), "a task was lost"
            assert not worker.queue
            assert not worker.channel.unacknowledged
            self.pass_time(RELEASE_SECONDS + 3 * TICK_SECONDS)
            assert worker.channel.told == min(worker.qos.value, worker.prefetch._window.count) or not (
                worker.qos.value
            )
            assert worker.prefetch.given_back == len(worker.gave)
        finally:
            self.patch.undo()
            for task in worker.tasks:
                worker_state.revoked.discard(task.id)
            worker_state.reset_state()


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=EXAMPLES, stateful_step_count=30, report_multiple_bugs=False)


def test_large_tasks_with_an_eta_let_others_come():
    """They count at the broker and do not wait in the pool, which is known a moment after they have come."""
    state = Model()
    try:
        state.begin(
            channel=RedisChannel, concurrency=1, multiplier=0, semaphore=False, at_once=0.01, budget=300 * MIB
        )
        state.tasks_are_sent(late=True, waits=True, number=2, size=8 * MIB)
        state.tasks_are_sent(late=False, waits=False, number=1, size=10)
        state.the_pool_is_flushed()
        state.tasks_are_sent(late=False, waits=False, number=1, size=10)
    finally:
        state.teardown()
