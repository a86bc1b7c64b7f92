"""In a container, without a setting: everything is done, nothing is killed that could be done."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from billiard.exceptions import WorkerLostError
from harness.growth import MIB, Growth, headroom, memory
from harness.tally import Tally

from memsafe_pool import MemoryLimitExceeded

pytestmark = pytest.mark.ours_only("other pools do not look at memory")


@pytest.fixture
def tally(tmp_path):
    return Tally(tmp_path / "runs")


def send(worker, tally, task, sizes, *, first=0, seconds=0.1, **options):
    """Send a task for each size in MiB; they have numbers, from ``first`` on."""
    return [
        worker.call(f"hungry.{task}", tally.path, first + number, mib, seconds, **options)
        for number, mib in enumerate(sizes)
    ]


def all_done(worker, results):
    for result in results:
        worker.get(result)


def counters(worker):
    pool = worker.stats()["pool"]["memsafe"]
    return {name: pool[name] for name in ("kills", "redelivered")} | {
        "by kernel": memory(worker)["oom_kills"]
    }


NOTHING = {"kills": 0, "redelivered": 0, "by kernel": 0}


def once(count):
    return {str(number): 1 for number in range(count)}


def most_at_once(tally):
    """How many tasks ran at the same time, at most."""
    changes = sorted((float(at), 1 if what == "began" else -1) for what, _, _, at in tally.lines())
    running = most = 0
    for _, change in changes:
        running += change
        most = max(most, running)
    return most


# Tasks of one size and of several


def test_more_at_once_than_there_is_room_for(start_contained, tally):
    """60 tasks of 30 MB at ``-c 20`` where a few fit."""
    worker = start_contained(350, "hungry", concurrency=20)
    all_done(worker, send(worker, tally, "need", [30] * 60))
    assert tally.of("began") == tally.of("ended") == once(60)
    assert counters(worker) == NOTHING


def test_one_name_of_two_sizes(start_contained, tally):
    """Big ones after many small ones of the same name, and small ones again."""
    worker = start_contained(600, "hungry", concurrency=12)
    results = send(worker, tally, "need", [5] * 30)
    results += send(worker, tally, "need", [120] * 6, first=30)
    results += send(worker, tally, "need", [5] * 20, first=36)
    all_done(worker, results)
    assert tally.of("began") == tally.of("ended") == once(56)
    assert counters(worker) == NOTHING


def test_nobody_knows_them(start_contained, tally):
    """Tasks that never ran before, all at once, on children that are there and idle."""
    worker = start_contained(400, "hungry", concurrency=8)
    gate = worker.gate()
    before = [Growth(worker, gate, str(number)) for number in range(8)]
    gate.open()
    all_done(worker, [growth.result for growth in before])
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["idle"] == 8, "eight idle children")
    all_done(worker, send(worker, tally, "need", [100] * 8))
    assert tally.of("began") == tally.of("ended") == once(8)
    assert counters(worker) == NOTHING


def test_nobody_knows_them_and_they_do_not_end(start_contained):
    """One more begins each ten seconds, as there is room: the ones that run may never tell."""
    worker = start_contained(500, "hungry", concurrency=4)
    gate = worker.gate()
    growths = [Growth(worker, gate, "first", headers={})]
    for name in ("second", "third"):
        growths[-1].want(12)
        growths[-1].wait_has(12)
        growths.append(Growth(worker, gate, name, headers={}))
    gate.open()
    all_done(worker, [growth.result for growth in growths])
    assert counters(worker) == NOTHING


# Tasks that leak


def test_a_child_that_has_kept_memory_is_not_in_the_way_of_a_large_task(start_contained, tally):
    """It needs more than is free beside the only child, and no more than would be free beside a new one."""
    worker = start_contained(500, "hungry", concurrency=4)
    room = headroom(worker)
    worker.run("hungry.keep", tally.path, 0, room // 2)
    large = room * 3 // 4
    assert headroom(worker) < large - 50
    worker.run("hungry.need", tally.path, 1, large, 0, headers={"memsafe_memory": f"{large} MiB"})
    assert tally.of("began") == tally.of("ended") == once(2)
    assert counters(worker) == NOTHING


@pytest.mark.parametrize(
    ("concurrency", "reason"),
    [
        (1, "memory is short"),  # a single child has grown by all there is before it has reached its limit
        (4, r"grown by \d+ MiB, at most \d+ MiB per child"),
    ],
)
def test_tasks_that_leak(start_contained, tally, concurrency, reason):
    """Each keeps 2 MiB for ever, all of them four times what there is: grown children go in time."""
    worker = start_contained(250, "hungry", concurrency=concurrency, loglevel="DEBUG")
    count = 500
    all_done(worker, [worker.call("hungry.keep", tally.path, number, 2) for number in range(count)])
    assert tally.of("began") == tally.of("ended") == once(count)
    assert counters(worker) == NOTHING
    assert len({pid for _, _, pid, _ in tally.lines()}) > concurrency
    worker.wait_for_log(rf"Retiring .*: {reason}")


# One that can not be done


@pytest.mark.parametrize(
    ("task", "config"),
    [
        ("need_late", {}),
        ("need_late", {"task_reject_on_worker_lost": True}),
        ("need_rejected", {}),
    ],
    ids=["late", "setting", "rejected"],
)
def test_one_that_never_fits(start_contained, tally, task, config):
    """With late acknowledgement it is tried three times, at last alone, and fails; the others are done."""
    worker = start_contained(300, "hungry", concurrency=8, config=config)
    giant, *others = send(worker, tally, task, [1000, *[15] * 16])
    with pytest.raises(MemoryLimitExceeded, match="it can not fit, not even alone") as caught:
        worker.get(giant)
    assert isinstance(caught.value, WorkerLostError)
    all_done(worker, others)
    assert tally.of("ended") == {str(number): 1 for number in range(1, 17)}
    assert 1 <= tally.of("began").pop("0") <= 3
    # It has not gone back to the broker: it would be here before what is sent now.
    runs = len(tally.lines())
    assert worker.run("hungry.pid")
    assert len(tally.lines()) == runs
    worker.until(lambda: worker.broker.waiting() == 0, "the broker to have nothing")
    assert memory(worker)["oom_kills"] == 0


def test_one_that_is_not_to_be_tried_again(start_contained, tally):
    """With ``memsafe_memory_tries`` of 0 it fails the first time, although it is acknowledged late."""
    worker = start_contained(300, "hungry", concurrency=8, config={"memsafe_memory_tries": 0})
    giant, *others = send(worker, tally, "need_late", [1000, *[15] * 16])
    with pytest.raises(MemoryLimitExceeded, match=r"hungry\.need_late had taken"):
        worker.get(giant)
    all_done(worker, others)
    assert tally.of("began") == once(17)
    assert counters(worker) == {"kills": 1, "redelivered": 0, "by kernel": 0}
    worker.until(lambda: worker.broker.waiting() == 0, "the broker to have nothing")


def test_one_that_never_fits_and_is_acknowledged_early(start_contained, tally):
    """It fails the first time: nobody knows what it has done already."""
    worker = start_contained(300, "hungry", concurrency=8)
    giant, *others = send(worker, tally, "need", [1000, *[15] * 16])
    with pytest.raises(MemoryLimitExceeded, match=r"hungry\.need had taken"):
        worker.get(giant)
    all_done(worker, others)
    assert tally.of("began") == once(17)
    assert counters(worker) == {"kills": 1, "redelivered": 0, "by kernel": 0}


# Limits


def test_a_limit_that_is_lowered(start_contained, container, tally):
    """While children run, and with more work to come: nothing is lost."""
    cgroup = container(800)
    worker = start_contained(cgroup, "hungry", concurrency=12)
    gate = worker.gate()
    running = [Growth(worker, gate, str(number)) for number in range(4)]
    for growth in running:
        growth.want(10)
        growth.wait_has(10)
    cgroup.limit(300 * MIB)
    worker.wait_for_log("The memory limit is now 300 MiB")
    assert memory(worker)["budget"] < 300 * MIB
    results = send(worker, tally, "need", [40] * 16)
    gate.open()
    all_done(worker, [growth.result for growth in running])
    all_done(worker, results)
    assert tally.of("began") == once(16)
    assert counters(worker) == NOTHING


def test_workers_that_share_a_container(start_contained, container, redis, tally):
    """Three workers on one queue, in one cgroup, do not spend the same memory twice."""
    cgroup = container(600)
    workers = [start_contained(cgroup, "hungry", broker=redis, concurrency=4) for _ in range(3)]
    all_done(workers[0], send(workers[0], tally, "need", [60] * 24))
    assert tally.of("began") == tally.of("ended") == once(24)
    assert [counters(worker) for worker in workers] == [NOTHING] * 3


def test_budgets_of_their_own(start_worker):
    """What one worker has set aside of its own budget is not taken off another one's."""
    one, other = (
        start_worker("hungry", concurrency=4, config={"memsafe_memory_budget": "400MiB"}) for _ in range(2)
    )
    gate = one.gate()
    first = Growth(one, gate, "first", headers={"memsafe_memory": "250MiB"})
    one.until(lambda: memory(one)["reserved"] > 200 * MIB, "memory to be set aside")
    beside = [Growth(other, gate, name, headers={"memsafe_memory": "80MiB"}) for name in ("second", "third")]
    gate.open()
    all_done(one, [growth.result for growth in (first, *beside)])


def test_a_budget_without_a_container(start_worker, tally):
    """``memsafe_memory_budget`` holds where there is no lower limit: for all that is the pool's own."""
    worker = start_worker("hungry", concurrency=12, config={"memsafe_memory_budget": "200MiB"})
    assert memory(worker)["budget"] == 200 * MIB
    results = send(worker, tally, "need", [25] * 24, seconds=0.2)
    seen = []
    while not all(result.ready() for result in results):
        seen.append(memory(worker)["total"] // MIB)
    all_done(worker, results)
    assert tally.of("began") == once(24)
    assert max(seen) < 200
    assert most_at_once(tally) < 8


# What is known of a task


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("declared", {}),
        ("need", {"headers": {"memsafe_memory": "150MiB"}}),
        ("need", {"headers": {"memsafe_memory": 1.5 * 100 * MIB}}),
    ],
    ids=["task", "call", "computed"],
)
def test_what_is_said_is_set_aside(start_contained, tally, task, options):
    """By the task's declaration or the call's header, from the first task on: one at a time has room."""
    worker = start_contained(320, "hungry", concurrency=6)
    all_done(worker, send(worker, tally, task, [1] * 6, seconds=0.02, **options))
    assert most_at_once(tally) == 1


def test_a_retry_has_the_header_too(start_contained, tally):
    """What is set aside for a call by its header is set aside for its retry."""
    worker = start_contained(320, "hungry", concurrency=6)
    results = send(worker, tally, "need_again", [1] * 4, seconds=0.5, headers={"memsafe_memory": "150MiB"})
    all_done(worker, results)
    assert tally.of("ended") == {str(number + again): 1 for number in range(4) for again in (0, 100)}
    assert most_at_once(tally) == 1


def test_the_call_knows_better_than_the_task(start_contained, tally):
    """The header wins over the declaration."""
    worker = start_contained(320, "hungry", concurrency=6)
    all_done(worker, send(worker, tally, "declared", [1] * 6, seconds=1, headers={"memsafe_memory": "2MiB"}))
    assert most_at_once(tally) > 1


def test_what_is_wrong_is_said_once(start_contained, tally):
    """A size that nobody understands is a warning, and the tasks run."""
    worker = start_contained(320, "hungry")
    all_done(worker, send(worker, tally, "declared_wrongly", [1] * 3))
    all_done(worker, send(worker, tally, "need", [1] * 3, headers={"memsafe_memory": "12 apples"}))
    for line in (
        "memsafe_memory='a lot' of the task hungry.declared_wrongly is not valid",
        "memsafe_memory='12 apples' of the header of hungry.need is not valid",
    ):
        assert worker.log().count(line) == 1


def test_sizes_under_one_name(start_contained, tally):
    """``memsafe_key``: once both are known, big ones wait for each other and small ones do not."""
    worker = start_contained(400, "hungry", concurrency=8)
    for _ in range(3):  # each is known for itself then
        for mib in (2, 150):
            worker.run("hungry.keyed", tally.path, mib, mib, 0)
    first = send(worker, tally, "keyed", [2] * 6, first=10, seconds=1)
    all_done(worker, first)
    small, big = Tally(tally_path(tally, "small")), Tally(tally_path(tally, "big"))
    results = send(worker, small, "keyed", [2] * 6, seconds=1) + send(worker, big, "keyed", [150] * 4)
    all_done(worker, results)
    assert most_at_once(small) > 2
    assert most_at_once(big) == 1
    assert counters(worker) == NOTHING


def tally_path(tally, name):
    return Path(tally.path).with_name(name)


def test_it_is_known_after_a_restart(start_contained, tally, tmp_path):
    """``memsafe_state``: what one worker has learned, the next one knows."""
    config = {"memsafe_state": str(tmp_path / "state")}
    first = start_contained(400, "hungry", config=config)
    for number in range(3):
        first.run("hungry.need", tally.path, number, 150)
    assert first.stop() == 0
    rows = {(row["name"], row["label"]): row for row in json.loads((tmp_path / "state").read_text())}
    assert abs(rows["hungry.need", None]["most"] - 150 * MIB) < 8 * MIB
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("state")] == ["state"]
    next_one, again = Tally(tmp_path / "again"), start_contained(400, "hungry", config=config)
    all_done(again, send(again, next_one, "need", [1] * 4))
    assert most_at_once(next_one) == 1


def test_a_state_that_is_none(start_contained, tmp_path):
    """A file of somebody else's is a warning, and is written over."""
    state = tmp_path / "state"
    state.write_text('{"hello": "world"}')
    worker = start_contained(300, "hungry", config={"memsafe_state": str(state)})
    worker.run("hungry.pid")
    assert f"What tasks needed is not known from {state}" in worker.log()
    assert worker.stop() == 0
    assert "hungry.pid" in state.read_text()


# Order


def test_a_big_one_is_not_passed_for_ever(start_contained, tally):
    """Small ones pass it for ``memsafe_overtake_time``; then they wait until it has begun.

    Without an event loop, so that they are not left to other workers: they wait here.
    """
    worker = start_contained(
        300, "hungry", broker="filesystem", concurrency=4, config={"memsafe_overtake_time": 15}
    )
    gate = worker.gate()
    room = headroom(worker)
    holder = Growth(worker, gate, "holder", headers={"memsafe_memory": f"{room * 3 // 10} MiB"})
    small = {"seconds": 0.5, "headers": {"memsafe_memory": "2MiB"}}
    big = send(worker, tally, "need", [1], headers={"memsafe_memory": f"{room * 3 // 4} MiB"})
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["waiting"] == 1, "the big one to wait")
    waits_since = time.monotonic()
    passing = send(worker, tally, "need", [1] * 2, first=1, **small)
    all_done(worker, passing)
    worker.until(lambda: time.monotonic() > waits_since + 15.5, "its patience to end")
    # Both fit beside the holder, and none beside the big one.
    small["headers"] = {"memsafe_memory": f"{room // 4} MiB"}
    held = send(worker, tally, "need", [1] * 2, first=3, **small)
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["waiting"] == 3, "all of them to wait")
    assert tally.of("began") == {"1": 1, "2": 1}
    holder.end()
    all_done(worker, big + held)
    order = [line[1] for line in tally.lines() if line[0] == "began"]
    assert order[2] == "0"
    assert sorted(order) == ["0", "1", "2", "3", "4"]


# Free heap of children


def test_busy_children_give_free_heap_back_when_memory_is_short(start_contained):
    """Before the next task, however soon that comes; while there is enough they keep it for that task."""
    worker = start_contained(400, "hungry", concurrency=1, config={"memsafe_trim_idle": 1000})

    def trimmed():
        pool = worker.stats()["pool"]["memsafe"]
        return pool["trims"], pool["trimmed"] // MIB

    for _ in range(3):  # else it would trim to see what they need
        worker.run("hungry.pid")
        worker.run("hungry.scatter", 1)
    child = worker.run("hungry.scatter", 40)
    assert worker.run("hungry.pid") == child
    assert trimmed() == (0, 0)
    room = headroom(worker) - 20
    assert worker.run("hungry.scatter", room) == child
    assert worker.run("hungry.pid") == child
    trims, mib = trimmed()
    assert trims == 1
    assert room - 20 < mib < room + 60


def test_nobody_is_in_the_way_of_children_that_start(start_contained, tally):
    """Several fresh interpreters, each with much to import: the first tasks go on meanwhile."""
    worker = start_contained(360, "hungry", start_method="spawn", concurrency=8)
    all_done(worker, send(worker, tally, "need", [6] * 8, seconds=2))
    assert tally.of("began") == tally.of("ended") == once(8)
    assert counters(worker) == NOTHING
