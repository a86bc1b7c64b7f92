"""A task's own memory limits: the soft one tells it, the hard one gives it no more."""

from __future__ import annotations

import pytest

from memsafe_pool import MemoryLimitExceeded, SoftMemoryLimitExceeded

pytestmark = pytest.mark.ours_only("memory limits of tasks")

#: Seconds for which a task has what it took that is told, or ended, for it.
LONG = 30


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method):
    return start_module_worker("bounded", start_method=start_method)


def test_a_soft_limit_can_be_caught(worker):
    assert worker.run("bounded.told", 100, LONG) == "told"
    assert worker.run("bounded.told", 20) == 20
    assert "its soft limit is 40 MiB" in worker.log()


def test_a_soft_limit_that_is_not_caught_fails_the_task(worker):
    result = worker.call("bounded.take", 100, LONG, headers={"memsafe_soft_limit": "40MiB"})
    with pytest.raises(SoftMemoryLimitExceeded):
        worker.get(result)
    assert worker.run("bounded.take", 100) == 100


def test_a_hard_limit_is_a_memory_error_in_the_task(worker):
    """The task fails alone; its child goes on, without the limit."""
    pid = worker.run("bounded.pid")
    with pytest.raises(MemoryError):
        worker.run("bounded.bounded", 100)
    assert worker.run("bounded.bounded", 20) == 20
    with pytest.raises(MemoryError):
        worker.run("bounded.take", 100, headers={"memsafe_hard_limit": "60MiB"})
    assert worker.run("bounded.take", 100) == 100
    assert pid in worker.children()


@pytest.mark.parametrize("how", ["subprocess", "preexec", "system", "posix_spawn", "fork"])
def test_programs_are_not_bound(worker, how):
    """What a task with a hard limit starts may take more: the limit is computed from what its child has."""
    assert worker.run("bounded.program", how, 400) == 0


def test_a_hard_limit_holds_after_a_program(worker):
    """A task that has started a program is bound as before."""
    with pytest.raises(MemoryError):
        worker.run("bounded.program_and_take", 100)


def test_shared_memory_counts(worker):
    """The soft limit is told; above the hard one, which the kernel does not hold there, the task is ended."""
    with pytest.raises(SoftMemoryLimitExceeded):
        worker.run("bounded.share", 100, LONG, headers={"memsafe_soft_limit": "40MiB"})
    with pytest.raises(MemoryLimitExceeded, match=r"its own limit is 40 MiB \(memsafe_hard_limit\)"):
        worker.run("bounded.share", 100, LONG, headers={"memsafe_hard_limit": "40MiB"})
    assert worker.run("bounded.share", 20, headers={"memsafe_hard_limit": "40MiB"}) == 20


def test_a_wrong_limit_is_one_warning(worker):
    for _ in range(2):
        assert worker.run("bounded.take", 4, headers={"memsafe_hard_limit": "much"}) == 4
    assert worker.log().count("memsafe_hard_limit='much' of the header of bounded.take is not valid") == 1
