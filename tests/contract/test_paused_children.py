"""Children that are paused for want of memory: what can be done to a task can be done to theirs."""

from __future__ import annotations

import os
import signal

import psutil
import pytest
from billiard.exceptions import WorkerLostError
from celery.exceptions import TaskRevokedError
from harness import processes
from harness.cgroup import limited
from harness.growth import Growth, headroom
from harness.waiting import until

from memsafe_pool import MemoryLimitExceeded

pytestmark = [pytest.mark.ours_only("other pools pause nobody"), pytest.mark.cgroup]

LIMIT_MIB = 240


#: Seconds for each MiB of those who come near the limit: whoever watches may have to wait for a core.
SLOWLY = 0.03


@pytest.fixture(scope="module")
def worker(start_module_worker):
    """One that the tests share. The processes of each test have ended before its cgroup is removed."""
    with limited(LIMIT_MIB << 20) as group:
        shared = start_module_worker("hungry", prepare=group.hold)
        yield shared
        shared.open_all_gates()
        shared.stop()


def make_short(worker, task="steps", **options):
    """Have memory taken by one task, so that the other is paused on its way; both can end alone.

    Returns both, and how many MiB the other one is on its way to.
    """
    gate = worker.gate()
    first, second = Growth(worker, gate, "first"), Growth(worker, gate, "second", task, **options)
    room = headroom(worker)
    first.want(room // 2)
    first.wait_has(room // 2)
    second.want(room * 3 // 4, SLOWLY)
    # Not only because the first one grew a moment ago.
    worker.until(lambda: headroom(worker) < 16 and second.is_paused(), "the other to be paused")
    return first, second, room * 3 // 4


def make_stuck(worker, both):
    """Have both need more than what the other one leaves; return how many MiB each is on its way to."""
    room = headroom(worker)
    share, target = room * 3 // 10, room * 17 // 20
    for growth in both:
        growth.want(share)
        growth.wait_has(share)
    for growth in both:
        growth.want(target, SLOWLY)
    return target


def gone(pid):
    until(lambda: not psutil.pid_exists(pid), f"child {pid} to end")


def test_it_is_shown_and_goes_on(worker):
    """It stands still and is shown as paused; when memory comes back it does what it was about to do."""
    pauses = worker.stats()["pool"]["memsafe"]["pauses"]
    first, second, target = make_short(worker)
    worker.until(
        lambda: psutil.Process(second.pid).status() == psutil.STATUS_STOPPED, "its process to stand still"
    )
    assert first.row["state"] == "busy"
    assert worker.stats()["pool"]["memsafe"]["pauses"] > pauses
    assert {task["id"] for task in worker.inspect("active")} == {first.id, second.id}
    assert {task["worker_pid"] for task in worker.inspect("active")} == {first.pid, second.pid}
    worker.wait_for_log(rf"Paused <Job \d+ '{second.id}'> in .*\(pid {second.pid}, busy")
    assert not second.has(target)
    assert first.end() == first.pid
    second.wait_has(target)
    worker.wait_for_log(rf"<Job \d+ '{second.id}'> goes on in")
    assert second.end() == second.pid


def test_it_can_be_revoked(worker):
    """``revoke(terminate=True)`` ends it as it ends others, and nobody else."""
    first, second, _ = make_short(worker)
    worker.control("revoke", task_id=second.id, terminate=True)
    with pytest.raises(TaskRevokedError):
        worker.get(second.result)
    gone(second.pid)
    assert first.end() == first.pid


def test_it_may_clean_up_when_it_is_revoked(worker):
    """It is not paused again on its way out, although memory is as short as before."""
    first, second, _ = make_short(worker, "steps_slowly_away")
    worker.control("revoke", task_id=second.id, terminate=True)
    with pytest.raises(TaskRevokedError):
        worker.get(second.result)
    gone(second.pid)
    assert first.end() == first.pid


def test_its_child_can_be_killed(worker):
    """Somebody's SIGKILL is what it is, also now: the task is lost, the worker goes on."""
    first, second, _ = make_short(worker)
    os.kill(second.pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError, match="signal 9") as caught:
        worker.get(second.result)
    assert not isinstance(caught.value, MemoryLimitExceeded)
    assert first.end() == first.pid
    assert worker.run("hungry.pid")


def test_time_limits_stand_still(worker):
    """The time for which it is paused does not count; the rest does, afterwards."""
    first, second, target = make_short(worker, "steps_softly", soft_time_limit=25, time_limit=90)
    # By its clock at the wall, the limit is long over.
    worker.until(lambda: second.row["running"] > 26, "time to pass")
    assert second.is_paused()
    assert first.end() == first.pid
    second.wait_has(target)
    # It has what it wanted in spite of the limit, which ends it then.
    assert worker.get(second.result) == "caught"


def test_a_hard_limit_stands_still(worker):
    """As with the soft one: it has not passed when the task could not run."""
    first, second, target = make_short(worker, time_limit=25)
    worker.until(lambda: second.row["running"] > 26, "time to pass")
    first.end()
    second.wait_has(target)
    assert second.end() == second.pid


def test_one_is_ended_when_nobody_can_go_on(worker):
    """Two that each need more than what is left besides the other: one fails, and says why; one ends."""
    gate = worker.gate()
    both = [Growth(worker, gate, name) for name in ("one", "other")]
    target = make_stuck(worker, both)
    worker.until(lambda: any(growth.result.ready() for growth in both), "one to be ended")
    failed, left = sorted(both, key=lambda growth: not growth.result.ready())
    with pytest.raises(
        MemoryLimitExceeded, match=r"signal 9 \(SIGKILL\): hungry.steps had taken \d+ MiB .*"
    ) as caught:
        worker.get(failed.result)
    assert isinstance(caught.value, WorkerLostError)
    assert f"Limit {LIMIT_MIB} MiB" in str(caught.value)
    assert "hungry.steps" in str(caught.value).split("running:")[1]
    left.wait_has(target)
    assert left.end() == left.pid


def test_the_one_that_is_ended_runs_again(worker):
    """As before, with late acknowledgement: both are done, one at the second try, and none fails."""
    before = worker.stats()["pool"]["memsafe"]
    gate = worker.gate()
    both = [Growth(worker, gate, name, "steps_late") for name in ("one", "other")]
    target = make_stuck(worker, both)
    ids = "|".join(growth.id for growth in both)
    worker.wait_for_log(rf"'({ids})'> is run again( alone)?: hungry\.steps_late had taken")
    worker.until(lambda: any(growth.has(target) for growth in both), "one to have what it wants")
    gate.open()
    for growth in both:
        assert worker.get(growth.result) == growth.pid
    after = worker.stats()["pool"]["memsafe"]
    assert [after[name] - before[name] for name in ("kills", "redelivered")] == [1, 1]


# The end of the worker


@pytest.fixture
def own(start_contained, start_method):
    """A worker of the test's own."""
    return start_contained(LIMIT_MIB + 60 * (start_method == "spawn"), "hungry", start_method=start_method)


def test_warm_shutdown_waits_for_them(own):
    """A paused task goes on when there is room, and its result is there before the worker ends."""
    first, second, target = make_short(own)
    own.signal(signal.SIGTERM)
    own.wait_for_log("Warm shutdown")
    first.open()
    second.wait_has(target)
    second.open()
    assert own.wait_exit() == 0
    assert own.get(second.result) == second.pid


def test_warm_shutdown_ends_what_can_not_end(own):
    """A task that never fits is ended during a warm shutdown, too: the worker does not hang."""
    growth = Growth(own, own.gate(), "giant")
    own.signal(signal.SIGTERM)
    own.wait_for_log("Warm shutdown")
    growth.want(10 * LIMIT_MIB, SLOWLY)
    assert own.wait_exit() == 0
    with pytest.raises(MemoryLimitExceeded, match="not even alone"):
        own.get(growth.result)


def test_cold_shutdown_does_not_wait(own):
    """SIGQUIT ends paused children as it ends others."""
    make_short(own)
    own.signal(signal.SIGQUIT)
    own.wait_exit()
    until(lambda: not own.pids(), "all processes to end")


@pytest.mark.also_start_method("fork")
def test_they_end_with_a_killed_worker(own):
    """SIGKILL of the worker: nobody is left to wake them, and nobody is left."""
    _, second, _ = make_short(own)
    assert second.pid in own.pids()
    processes.kill(own.pid)
    own.wait_exit()
    until(lambda: not own.pids(), f"the processes to end: {own.pids()}")


# Where it is otherwise


def test_not_for_ever(start_contained):
    """``memsafe_max_pause``: what runs beside it may run for days; then it fails, and says why."""
    worker = start_contained(LIMIT_MIB, "hungry", config={"memsafe_max_pause": 8})
    first, second, _ = make_short(worker)
    with pytest.raises(MemoryLimitExceeded, match=r"it was paused for \d+ s, at most 8 s"):
        worker.get(second.result)
    assert first.end() == first.pid


def test_without_an_event_loop(start_contained):
    """On a broker without an event loop they are paused and go on as well."""
    worker = start_contained(LIMIT_MIB, "hungry", broker="filesystem")
    first, second, target = make_short(worker)
    first.end()
    second.wait_has(target)
    assert second.end() == second.pid


def test_not_if_that_is_not_wanted(start_contained):
    """``memsafe_pause = False``: the kernel ends one of them, and that is said."""
    worker = start_contained(LIMIT_MIB, "hungry", config={"memsafe_pause": False})
    gate = worker.gate()
    both = [Growth(worker, gate, name) for name in ("one", "other")]
    for growth in both:
        growth.want(LIMIT_MIB)
    worker.until(lambda: any(growth.result.ready() for growth in both), "one to be ended")
    failed = next(growth for growth in both if growth.result.ready())
    with pytest.raises(MemoryLimitExceeded, match="the kernel has ended its child"):
        worker.get(failed.result)
    assert "Paused" not in worker.log()
    assert worker.stats()["pool"]["memsafe"]["pauses"] == 0


WAITS = """
import os, pathlib, time
while pathlib.Path("wait").exists():
    pathlib.Path("waits").write_text(str(os.getpid()))
    time.sleep(0.02)
"""


def test_a_child_that_starts_makes_room(container, start_worker):
    """When it was asked for nobody knew that the one that runs would need so much. That one is not ended."""
    group = container(LIMIT_MIB)

    def prepare(worker):
        group.hold(worker)
        (worker.folder / "slow.py").write_text(WAITS)

    worker = start_worker("hungry", config={"imports": ["slow"]}, start_method="spawn", prepare=prepare)
    gate = worker.gate()
    only = Growth(worker, gate, "only")
    (worker.folder / "wait").touch()
    other = worker.call("hungry.steps", gate.path, "other")
    waits = worker.folder / "waits"
    starting = int(worker.until(lambda: waits.exists() and waits.read_text(), "the other child to start"))
    target = headroom(worker) + 16 + 8  # more than there is, and less than with what that one has
    only.want(target, SLOWLY)
    gone(starting)
    only.wait_has(target)
    (worker.folder / "wait").unlink()
    assert only.end() == only.pid
    gate.open()
    assert worker.get(other)
    assert worker.stats()["pool"]["memsafe"]["kills"] == 0
