"""What there is no memory for goes to other workers: admission itself holds the prefetch.

Calls declare what they need; next to nothing of it is taken. What holding means in each case is in
``test_hold``, where a command stands in for admission.
"""

from __future__ import annotations

import signal

import pytest
from harness.growth import Growth, headroom
from harness.tally import Tally
from test_ladder import once, send

pytestmark = pytest.mark.ours_only("prefork fetches whatever it can")

#: Slots of each worker; it fetches four times as many.
CONCURRENCY = 4
PREFETCH = 16


@pytest.fixture(params=["redis", "rabbitmq"])
def shared(open_broker, request):
    """A broker whose queue several workers serve."""
    return open_broker(request.param)


@pytest.fixture
def tally(tmp_path):
    return Tally(tmp_path / "runs")


def declare(mib):
    return {"headers": {"memsafe_memory": f"{mib}MiB"}}


def pool(worker):
    return worker.stats()["pool"]["memsafe"]


def reserved(worker):
    """Ids of the tasks that wait in the worker, in the pool and in front of it."""
    return {task["id"] for task in worker.inspect("reserved")}


@pytest.mark.parametrize(
    "config",
    [{}, {"task_acks_late": True}, {"worker_pool_putlocks": False}],
    ids=["early", "late", "all in the pool"],
)
def test_what_does_not_fit_is_left_to_others(start_contained, start_worker, shared, tally, config):
    """A worker without memory for them keeps one, another does the rest; then it works as before."""
    options = {
        "broker": shared,
        "concurrency": CONCURRENCY,
        "config": {
            "worker_prefetch_multiplier": PREFETCH // CONCURRENCY,
            "memsafe_overtake_time": 1000,  # or, after a minute, some would be fetched to pass the first one
            **config,
        },
    }
    starved = start_contained(500, "hungry", **options)
    room, gate, beside = headroom(starved), starved.gate(), starved.gate()
    holder = Growth(starved, gate, "holder", **declare(room // 2))
    small = [Growth(starved, beside, str(number)) for number in range(CONCURRENCY - 1)]
    large = declare(room * 3 // 4)
    # As long as there is no slot for them, memory does not matter.
    results = send(starved, tally, "need", [1] * 8, **large)
    starved.until(lambda: len(reserved(starved)) == 8, "eight tasks to be fetched")
    assert pool(starved)["given_back"] == 0
    beside.open()
    for growth in small:
        starved.get(growth.result)
    starved.until(lambda: reserved(starved) == {results[0].id}, "the others to go back")
    starved.until(lambda: shared.waiting() == 7, "the broker to have them")
    results += send(starved, tally, "need", [1] * 4, first=8, **large)
    starved.until(lambda: shared.waiting() == 11, "the broker to keep what comes now")
    other = start_worker("hungry", **options)
    for result in results[1:]:
        starved.get(result)
    assert tally.of("began") == {str(number): 1 for number in range(1, 12)}
    assert reserved(starved) == {results[0].id}
    said = pool(starved)
    assert (said["waiting"], said["tasks"]) == (1, CONCURRENCY)
    # Not again and again: with late acknowledgement the end of each small one may bring one more.
    assert 7 <= said["given_back"] <= 7 + CONCURRENCY
    holder.end()
    starved.get(results[0])
    assert tally.of("began") == tally.of("ended") == once(12)
    other.signal(signal.SIGTERM)
    assert other.wait_exit() == 0
    check_slots_and_prefetch(starved, acks_late="task_acks_late" in config)
    assert "Traceback" not in starved.log()


def check_slots_and_prefetch(alone, *, acks_late):
    """Check that it runs a task in each slot, and fetches as many as Celery says, and no more."""
    gate = alone.gate()
    running = [Growth(alone, gate, str(number)) for number in range(CONCURRENCY)]
    results = [alone.call("hungry.pid", **declare(1)) for _ in range(20)]
    fetched = PREFETCH - CONCURRENCY * acks_late
    alone.until(lambda: len(reserved(alone)) == fetched, f"{fetched} tasks to be fetched")
    alone.until(lambda: alone.broker.waiting() == 20 - fetched, "the broker to have the others")
    assert len(reserved(alone)) == fetched
    gate.open()
    for result in [*results, *(growth.result for growth in running)]:
        alone.get(result)
    assert alone.broker.waiting() == 0
