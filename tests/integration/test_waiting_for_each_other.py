"""Tasks that wait for each other, in a container that is too small for what all of them may need."""

from __future__ import annotations

import pytest
from harness.tally import Tally

pytestmark = pytest.mark.ours_only("other pools do not look at memory")

LIMIT = 400


@pytest.fixture
def tally(tmp_path):
    return Tally(tmp_path / "runs")


def nothing_ended(worker):
    pool = worker.stats()["pool"]["memsafe"]
    assert (pool["kills"], pool["redelivered"]) == (0, 0)


def test_a_lock_that_a_paused_task_has(start_contained, tally, tmp_path):
    """The older one is said to need much, and waits for it before it takes any."""
    worker = start_contained(LIMIT, "hungry", concurrency=4)
    lock = str(tmp_path / "lock")
    first = worker.call("hungry.locked", tally.path, 0, lock, 150, 1.0, headers={"memsafe_memory": "170MiB"})
    worker.until(lambda: tally.of("began") == {"0": 1}, "the first to begin")
    second = worker.call("hungry.locked", tally.path, 1, lock, 190, headers={"memsafe_memory": "60MiB"})
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["pauses"], "the one with the lock to be paused")
    other = worker.call("hungry.need", tally.path, 2, 1)
    for result in (second, first, other):
        worker.get(result)
    assert tally.of("ended") == {"0": 1, "1": 1, "2": 1}
    nothing_ended(worker)


def test_a_task_that_waits_for_the_tasks_it_has_sent(start_contained, tally):
    """One of their like was larger: it would not fit beside the one that waits for them."""
    worker = start_contained(LIMIT, "hungry", concurrency=4)
    worker.run("hungry.need", tally.path, 0, 200)
    worker.run("hungry.whole", tally.path, 150, 4, 10)
    assert tally.of("ended") == {str(number): 1 for number in range(5)}
    nothing_ended(worker)


def test_one_that_sleeps_with_a_promise(start_contained, tally):
    """A task that was paused for it goes on: nobody knows when the other will take what it was promised."""
    worker = start_contained(LIMIT, "hungry", concurrency=4)
    sleeper = worker.call("hungry.need_later", tally.path, 0, 150, 14, headers={"memsafe_memory": "170MiB"})
    worker.until(lambda: tally.of("began") == {"0": 1}, "the first to begin")
    result = worker.call("hungry.need", tally.path, 1, 190, headers={"memsafe_memory": "60MiB"})
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["pauses"], "the second to be paused")
    worker.get(result)
    assert tally.of("ended") == {"1": 1}
    worker.get(sleeper)
    nothing_ended(worker)
