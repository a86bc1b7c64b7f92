"""Without memory for them, tasks are not kept from other workers: prefetch follows admission.

The pool of the project ``held`` is blocked by a control command, in place of want of memory.
"""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone

import pytest
from harness.tally import Tally
from test_broker_loss import lose

pytestmark = pytest.mark.ours_only("prefork fetches whatever it can")

#: Slots of the blocked worker; it fetches four times as many.
CONCURRENCY = 2
PREFETCH = 8

#: What it fetches while its slots are taken and it is blocked, by late acknowledgement.
LOWERED = {False: 1, True: CONCURRENCY + 1}


@pytest.fixture(params=["redis", "rabbitmq"])
def shared(open_broker, request):
    """A broker whose queue several workers serve."""
    return open_broker(request.param)


@pytest.fixture(params=["early", "late"])
def acks(request):
    return {"task_acks_late": request.param == "late"}


@pytest.fixture
def tally(tmp_path):
    return Tally(tmp_path / "runs")


def start(start_worker, broker, config=None, *arguments, **options):
    settings = {"worker_prefetch_multiplier": 4, **(config or {})}
    options = {"concurrency": CONCURRENCY, "pool": "held:Pool", **options}
    return start_worker("held", *arguments, broker=broker, config=settings, **options)


def state(worker):
    return worker.control("prefetch")


def waiting(worker):
    """Ids of the tasks that wait in the worker, the oldest first."""
    now = state(worker)
    return now["in_pool"] + now["in_semaphore"]


def fill(worker):
    """Have a task in each slot, which ends when the gate opens."""
    gate = worker.gate()
    running = [worker.call("proj.hold", gate.path) for _ in range(CONCURRENCY)]
    gate.wait_started(CONCURRENCY)
    return gate, running


def send(worker, tally, count, first=0):
    return [worker.call("proj.note", tally.path, number) for number in range(first, first + count)]


def block(worker, blocked=True):
    worker.control("block", blocked=blocked)


def once(numbers):
    return {str(number): 1 for number in numbers}


def until_told(worker, count):
    worker.until(lambda: state(worker)["told"] == count, f"a prefetch of {count}")


def test_the_other_worker_gets_them(start_worker, shared, acks, tally):
    """The blocked one keeps the oldest; the other runs the rest at once; then all is as it was before."""
    starved = start(start_worker, shared, acks)
    gate, running = fill(starved)
    results = send(starved, tally, 6)
    starved.until(lambda: len(waiting(starved)) == 6, "six tasks to wait")
    block(starved)
    other = start(start_worker, shared, acks)
    for result in results[1:]:
        other.get(result)
    assert tally.runs() == once(range(1, 6))
    assert waiting(starved) == [results[0].id]
    assert state(starved)["told"] == LOWERED[acks["task_acks_late"]]
    block(starved, False)
    until_told(starved, PREFETCH)
    gate.open()
    for result in [results[0], *running]:
        starved.get(result)
    for result in send(starved, tally, 12, first=6):
        starved.get(result)
    assert tally.runs() == once(range(18))
    assert state(starved)["celerys"] == PREFETCH
    assert state(starved)["told"] == PREFETCH
    assert "Traceback" not in starved.log()
    assert shared.waiting() == 0


def test_what_comes_later_goes_elsewhere_too(start_worker, shared, acks, tally):
    """A worker that is blocked with one task fetches no more, also where it had asked for one already."""
    starved = start(start_worker, shared, acks)
    gate, running = fill(starved)
    held = send(starved, tally, 1)
    starved.until(lambda: waiting(starved) == [held[0].id], "the task to wait")
    block(starved)
    until_told(starved, LOWERED[acks["task_acks_late"]])
    at_once = send(starved, tally, 3, first=13)
    starved.until(lambda: shared.waiting() == 3, "the broker to have them all")
    other = start(start_worker, shared, acks)
    for result in at_once:
        other.get(result)
    for first in range(1, 13, 3):
        for result in send(starved, tally, 3, first=first):
            other.get(result)
    assert waiting(starved) == [held[0].id]
    block(starved, False)
    gate.open()
    for result in [*held, *running]:
        starved.get(result)
    assert tally.runs() == once(range(16))


def test_alone_it_goes_on_in_order(start_worker, shared, acks, tally):
    """The broker has the tasks while the only worker is blocked; afterwards they run in their order."""
    alone = start(start_worker, shared, {**acks, "worker_prefetch_multiplier": 8}, concurrency=1)
    gate = alone.gate()
    running = alone.call("proj.hold", gate.path)
    gate.wait_started()
    results = send(alone, tally, 7)
    alone.until(lambda: len(waiting(alone)) == 7, "seven tasks to wait")
    block(alone)
    alone.until(lambda: waiting(alone) == [results[0].id], "the others to go back")
    alone.until(lambda: shared.waiting() == 6, "the broker to have them")
    gate.open()
    for result in [running, *results]:
        alone.get(result)
    assert [line[0] for line in tally.lines()] == [str(number) for number in range(7)]
    assert state(alone)["given_back"] == 6


@pytest.mark.parametrize("config", [{"worker_pool_putlocks": False}, {}], ids=["pool", "both"])
def test_wherever_they_wait(start_worker, shared, tally, config):
    """Tasks wait in the pool, and beyond the concurrency in front of it; from both they go back."""
    alone = start(start_worker, shared, config, concurrency=4)
    alone.control("most_children", bound=1)
    gate = alone.gate()
    running = alone.call("proj.hold", gate.path)
    gate.wait_started()
    results = send(alone, tally, 8)
    alone.until(lambda: len(waiting(alone)) == 8, "eight tasks to wait")
    assert len(state(alone)["in_pool"]) == (3 if not config else 8)
    block(alone)
    alone.until(lambda: waiting(alone) == [results[0].id], "the others to go back")
    alone.until(lambda: shared.waiting() == 7, "the broker to have them")
    block(alone, False)
    alone.control("most_children", bound=4)
    gate.open()
    for result in [running, *results]:
        alone.get(result)
    assert tally.runs() == once(range(8))


def test_a_revoked_task_stays(start_worker, shared, tally):
    """It does not come back to life at a worker that has not heard of it."""
    starved = start(start_worker, shared)
    gate, _ = fill(starved)
    results = send(starved, tally, 4)
    starved.until(lambda: len(waiting(starved)) == 4, "four tasks to wait")
    starved.control("revoke", task_id=results[2].id)
    block(starved)
    other = start(start_worker, shared)
    other.get(results[1])
    other.get(results[3])
    assert waiting(starved) == [results[0].id, results[2].id]
    gate.open()
    starved.get(results[0])
    starved.wait_for_log("Discarding revoked task")
    assert tally.runs() == once([0, 1, 3])


def test_tasks_with_an_eta_stay(start_worker, shared, tally):
    """They count for the broker, and not as tasks that wait; Celery's own count goes on with them."""
    starved = start(start_worker, shared)
    eta = datetime.now(timezone.utc) + timedelta(hours=1)
    for number in range(3):
        starved.call("proj.note", tally.path, f"late{number}", eta=eta)
    starved.until(lambda: state(starved)["celerys"] == PREFETCH + 3, "three tasks with an ETA")
    gate, _ = fill(starved)
    results = send(starved, tally, 4)
    starved.until(lambda: len(waiting(starved)) == 4, "four tasks to wait")
    block(starved)
    starved.until(lambda: waiting(starved) == [results[0].id], "the others to go back")
    assert state(starved)["told"] == 4
    assert len(starved.inspect("scheduled")) == 3
    gate.open()
    for result in results:
        starved.get(result)
    # There is room again for one more that waits for its time.
    starved.call("proj.note", tally.path, "late3", eta=eta)
    until_told(starved, 5)
    block(starved, False)
    until_told(starved, PREFETCH + 4)
    assert tally.runs() == once(range(4))


def test_celery_changes_its_mind_meanwhile(start_worker, shared, tally):
    """A pool that grows while it is blocked has the larger prefetch afterwards, and not before."""
    starved = start(start_worker, shared)
    gate, _ = fill(starved)
    held = send(starved, tally, 3)
    starved.until(lambda: len(waiting(starved)) == 3, "three tasks to wait")
    block(starved)
    starved.until(lambda: len(waiting(starved)) == 1, "the others to go back")
    starved.control("pool_grow", n=2)
    starved.until(lambda: state(starved)["celerys"] == PREFETCH + 8, "Celery's count to grow")
    assert state(starved)["told"] == 1
    block(starved, False)
    until_told(starved, PREFETCH + 8)
    gate.open()
    for result in held:
        starved.get(result)


def test_without_a_prefetch_limit(start_worker, shared, tally):
    """Where Celery has none, there is one while the worker is blocked."""
    starved = start(start_worker, shared, {"worker_prefetch_multiplier": 0})
    gate, _ = fill(starved)
    results = send(starved, tally, 20)
    starved.until(lambda: len(waiting(starved)) == 20, "twenty tasks to wait")
    block(starved)
    starved.until(lambda: waiting(starved) == [results[0].id], "the others to go back")
    assert state(starved)["told"] == 1
    block(starved, False)
    until_told(starved, 0)
    gate.open()
    for result in results:
        starved.get(result)
    assert tally.runs() == once(range(20))


@pytest.mark.parametrize("block_before", [True, False])
def test_the_connection_is_lost(start_worker, shared, open_proxy, tally, block_before):
    """A worker that was blocked when it lost the broker is told one task at most by the new connection."""
    proxy = open_proxy(shared)
    starved = start(
        start_worker,
        shared,
        prepare=lambda worker: worker.env.update(
            TEST_CONFIG=json.dumps({**worker.config, "broker_url": proxy.url})
        ),
    )
    gate, running = fill(starved)
    if block_before:
        block(starved)
        until_told(starved, 1)
    lose(starved, proxy.cut)
    results = send(starved, tally, 5)
    proxy.restore()
    starved.wait_for_log("Connected to", count=2)
    if block_before:
        starved.until(lambda: waiting(starved), "a task to be fetched")
        starved.until(lambda: shared.waiting() == 4, "the broker to keep the others")
        assert waiting(starved) == [results[0].id]
        assert state(starved)["given_back"] == 0
        block(starved, False)
    gate.open()
    for result in [*running, *results]:
        starved.get(result)
    until_told(starved, PREFETCH)
    assert tally.runs() == once(range(5))


def test_running_tasks_of_a_lost_connection(start_worker, rabbitmq, open_proxy, tally):
    """They are not acknowledged, and yet are none of the new connection's."""
    broker = rabbitmq  # a Redis that refuses connections ends such a worker, in kombu
    proxy = open_proxy(broker)
    starved = start(
        start_worker,
        broker,
        prepare=lambda worker: worker.env.update(
            TEST_CONFIG=json.dumps({**worker.config, "broker_url": proxy.url})
        ),
    )
    gate = starved.gate()
    running = [starved.call("proj.hold_late", gate.path) for _ in range(CONCURRENCY)]
    gate.wait_started(CONCURRENCY)
    block(starved)
    until_told(starved, 3)
    proxy.cut()
    starved.wait_for_log("Connection to broker lost")
    proxy.restore()
    starved.wait_for_log("Connected to", count=2)
    # The broker sends again what it has no acknowledgement for: the oldest comes, and one at a time.
    starved.until(lambda: waiting(starved), "a task to be fetched")
    assert state(starved)["told"] == 1
    assert len(waiting(starved)) == 1
    block(starved, False)
    gate.open()
    for result in running:
        starved.get(result)
    until_told(starved, PREFETCH)


@pytest.mark.needs_celery("5.5")
def test_quorum_queues_are_left_alone(start_worker, rabbitmq, tally):
    """Their prefetch is fixed: nothing goes back, and the worker says so."""
    starved = start(start_worker, rabbitmq, {"task_default_queue_type": "quorum"})
    starved.wait_for_log("keeps them from others: the prefetch of a quorum queue")
    gate, _ = fill(starved)
    results = send(starved, tally, 4)
    starved.until(lambda: len(waiting(starved)) == 4, "four tasks to wait")
    block(starved)
    start(start_worker, rabbitmq, {"task_default_queue_type": "quorum"})
    assert len(waiting(starved)) == 4
    assert state(starved)["given_back"] == 0
    gate.open()
    for result in results:
        starved.get(result)


def test_brokers_without_event_loop_are_left_alone(start_worker, filesystem):
    """They say so, and work."""
    worker = start(start_worker, filesystem)
    worker.wait_for_log("keeps them from others: this broker is polled")
    assert worker.run("proj.add", 1, 2) == 3


def test_blocked_by_turns(start_worker, shared, tally):
    """Two workers give tasks back again and again; each runs once, and none is left over."""
    workers = [start(start_worker, shared, {"task_acks_late": True}) for _ in range(2)]
    results = [workers[0].call("held.linger", tally.path, number) for number in range(120)]
    all_given_back = {}
    for turn in range(100):
        starved, other = workers[turn % 2], workers[(turn + 1) % 2]
        block(other, False)
        block(starved)
        before = state(starved)["given_back"]
        starved.until(
            lambda: state(starved)["given_back"] > before or len(tally.lines()) == len(results),  # noqa: B023
            "tasks to go back, or the end",
        )
        all_given_back[turn % 2] = state(starved)["given_back"]
        if len(tally.lines()) == len(results):
            break
    for worker in workers:
        block(worker, False)
    for result in results:
        workers[0].get(result)
    for worker in workers:
        until_told(worker, PREFETCH)
        assert "Traceback" not in worker.log()
    assert tally.runs() == once(range(120))
    assert shared.waiting() == 0
    assert all(all_given_back.values()), all_given_back
