"""When a child has had its time."""

from __future__ import annotations

from dataclasses import dataclass, field

from memsafe_pool.recycle import (
    JITTER,
    KEPT_NAMES,
    KEPT_RUNS,
    LEAST_GROWTH_BYTES,
    FirstRuns,
    Rules,
    default_growth_bytes,
)

MIB = 1 << 20


@dataclass
class Child:
    """A child that is only numbers."""

    index: int = 0
    born: float = 0.0
    tasks: int = 0
    private_bytes: int = 0
    growth_bytes: int = 0
    outdated: bool = False
    loaded_bytes: int = 0
    ran: dict = field(default_factory=dict)
    loads: bool = False


def test_without_rules_a_child_stays():
    """However old and large it is, except that the pool was restarted."""
    old = Child(tasks=10**6, private_bytes=1 << 40, growth_bytes=1 << 40)
    rules = Rules()
    assert not rules.hard
    assert rules.must_go(old) is None
    assert rules.should_go(old, 1e9, pressed=True) is None
    assert rules.should_go(Child(outdated=True), 0.0, pressed=False) == "the pool was restarted"


def test_hard_reasons_are_those_of_celery():
    """The number of tasks and private memory, each with its number in words."""
    assert Rules(max_tasks=2).hard
    assert Rules(max_tasks=2).must_go(Child(tasks=1)) is None
    assert Rules(max_tasks=2).must_go(Child(tasks=2)) == "2 tasks done, at most 2 per child"
    rules = Rules(max_private_bytes=100 * 1024)
    assert rules.hard
    assert rules.must_go(Child(private_bytes=100 * 1024)) is None
    assert (
        rules.must_go(Child(private_bytes=101 * 1024)) == "101 KiB private memory, at most 100 KiB per child"
    )


def test_age():
    """From the limit on, which is less for some slots than for others."""
    rules = Rules(max_age=100)
    assert not rules.hard
    assert rules.should_go(Child(born=5.0), 104.9, pressed=False) is None
    assert rules.should_go(Child(born=5.0), 105.0, pressed=False) == "100 s old, at most 100 s"
    ages = {
        next(age for age in range(200) if rules.should_go(Child(index=index), age, pressed=False))
        for index in range(8)
    }
    assert len(ages) == 8
    assert min(ages) >= 100 * (1 - JITTER)


def test_growth():
    """Above the limit, with the numbers in words; sooner while memory is short."""
    rules = Rules(max_growth_bytes=100 * MIB)
    assert rules.should_go(Child(growth_bytes=100 * MIB), 0.0, pressed=False) is None
    assert rules.should_go(Child(growth_bytes=101 * MIB), 0.0, pressed=False) == (
        "grown by 101 MiB, at most 100 MiB per child"
    )
    assert rules.should_go(Child(growth_bytes=81 * MIB), 0.0, pressed=True) == (
        "grown by 81 MiB, at most 80 MiB per child while memory is short"
    )
    assert rules.should_go(Child(growth_bytes=80 * MIB), 0.0, pressed=True) is None


def test_pressure_does_not_make_a_small_limit_absurd():
    """A child that has grown by less than it costs to start one is not worth it."""
    rules = Rules(max_growth_bytes=9 * MIB)
    assert rules.should_go(Child(growth_bytes=8 * MIB), 0.0, pressed=True) is None
    assert rules.should_go(Child(growth_bytes=9 * MIB), 0.0, pressed=True)
    rules = Rules(max_growth_bytes=4 * MIB)
    assert rules.should_go(Child(growth_bytes=5 * MIB), 0.0, pressed=True)


def test_the_default_is_a_childs_share_of_the_budget():
    """But no less than what a start costs; a bound of 0 is no error."""
    assert default_growth_bytes(1000 * MIB, 10) == 100 * MIB
    assert default_growth_bytes(100 * MIB, 100) == LEAST_GROWTH_BYTES
    assert default_growth_bytes(1000 * MIB, 0) == 1000 * MIB


def loaded(runs, *tasks):
    """What of it is thought to be loaded when a child has run these tasks, each with what it has left."""
    child = Child()
    for name, left in tasks:
        runs.note(child, name, left)
    return child.loaded_bytes


def test_what_a_task_loads_in_every_child():
    """The least that was left lately, task by task; one child's leak is not what every child needs."""
    runs = FirstRuns()
    assert loaded(runs, ("load", 60)) == 60
    assert loaded(runs, ("load", 400)) == 60
    assert loaded(runs, ("add", 0)) == 0
    assert loaded(runs, ("load", 50), ("add", 3)) == 50
    assert loaded(runs, ("shrink", -5)) == 0
    for _ in range(KEPT_RUNS - 1):
        assert loaded(runs, ("load", 200)) == 50
    assert loaded(runs, ("load", 200), ("load", 1), ("load", 200)) == 200


def test_what_a_task_leaves_each_time_is_a_leak():
    """Also if all children leave the same: the second run tells."""
    runs = FirstRuns()
    assert loaded(runs, ("leak", 20), ("load", 70), ("leak", 20), ("load", 5)) == 70
    assert loaded(runs, ("leak", 20), ("leak", 9), ("leak", 20)) == 20


def test_a_trim_tells_what_was_loaded_and_what_was_free():
    """Free heap is no load, a load may have been put into free heap, and what leaks is neither."""
    runs, child = FirstRuns(), Child()
    runs.note(child, "load", 300)
    runs.settle(child, 40)
    assert child.loaded_bytes == 40
    runs.note(child, "load", 5)
    runs.settle(child, 90)
    assert child.loaded_bytes == 40
    runs.note(child, "load more", 0)
    runs.settle(child, 120)
    assert child.loaded_bytes == 120
    leaking = Child()
    runs.note(leaking, "leak", 20)
    runs.note(leaking, "leak", 20)
    runs.settle(leaking, 40)
    assert leaking.loaded_bytes == 0


def test_only_so_many_tasks_are_remembered():
    """An app that makes up names for its tasks does not fill the worker."""
    runs = FirstRuns()
    loaded(runs, ("first", 10))
    for number in range(KEPT_NAMES):
        loaded(runs, (str(number), 10))
    assert loaded(runs, ("first", 500)) == 500
    assert loaded(runs, (str(KEPT_NAMES - 1), 500)) == 10
