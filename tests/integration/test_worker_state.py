"""What handlers make when the worker starts is in the children, as with prefork; else it is said."""

from __future__ import annotations

import pytest
from harness import processes
from harness.worker import OURS

STARTS = ("celeryd_init", "celeryd_after_setup", "worker_init")

FORKS = [("forkserver", "redis"), ("forkserver", "filesystem"), ("fork", "redis")]


def states(worker, number=2):
    """What so many children know, each once."""
    folder = worker.folder / f"meeting{len(list(worker.folder.iterdir()))}"
    folder.mkdir()
    results = [worker.call("stateful.state", str(folder), number) for _ in range(number)]
    found = [worker.get(result) for result in results]
    assert len({state.pop("pid") for state in found}) == number
    return found


def forkserver(worker):
    return worker.stats()["pool"]["memsafe"]["forkserver"]


@pytest.mark.parametrize("thread", [{}, {"STATEFUL_THREAD": "1"}], ids=["alone", "beside a thread"])
@pytest.mark.parametrize(
    ("method", "broker"), FORKS if OURS else [("stock", "redis"), ("stock", "filesystem")]
)
def test_state_of_the_worker(start_worker, method, broker, thread):
    """It is in all children, also in those that start after a restart of the pool."""
    worker = start_worker(
        "stateful", start_method=method, broker=broker, env=thread, config={"worker_pool_restarts": True}
    )
    wanted = 2 * [dict.fromkeys(STARTS, worker.pid)]
    assert states(worker) == wanted
    assert "ok" in worker.control("pool_restart")
    assert states(worker) == wanted
    assert "worker_process_init" not in worker.log()


@pytest.mark.parametrize("handler", [{}, {"BUSY_HANDLER": "1"}], ids=["import", "handler"])
@pytest.mark.parametrize("broker", ["redis", "filesystem"])
def test_a_lock_that_a_thread_holds_half_of_the_time(start_worker, handler, broker):
    """A child may have it held for ever, wherever it was forked; but that is drawn for each child anew."""
    worker = start_worker("busy", broker=broker, env=handler, config={"worker_max_tasks_per_child": 1})
    results = [worker.call("busy.can_lock") for _ in range(24)]
    assert {worker.get(result) for result in results} == {True, False}


@pytest.mark.ours_only("a forkserver")
@pytest.mark.parametrize("broker", ["redis", "filesystem"])
def test_state_after_the_forkserver_was_killed(start_worker, broker):
    """The next one is a fork of the worker as well, again and again; tasks run in its children."""
    worker = start_worker(
        "stateful", start_method="forkserver", broker=broker, config={"worker_max_tasks_per_child": 1}
    )
    for _ in range(3):
        before = worker.until(lambda: forkserver(worker), "a forkserver")
        assert states(worker) == 2 * [dict.fromkeys(STARTS, worker.pid)]
        processes.kill(before)
        worker.until(lambda before=before: forkserver(worker) not in (None, before), "a new forkserver")
    assert "worker_process_init" not in worker.log()


@pytest.mark.ours_only("fresh interpreters")
@pytest.mark.parametrize(
    ("method", "config"), [("spawn", {}), ("forkserver", {"memsafe_child_env": {"A": "1"}})]
)
def test_state_that_children_lack(start_worker, method, config):
    """A fresh interpreter does not have it: one line says whose handlers are meant, and what to do."""
    worker = start_worker("stateful", start_method=method, config=config)
    assert states(worker) == [{}, {}]
    line = worker.wait_for_log(r"WARNING/MainProcess\] Children are fresh interpreters.*").group()
    for handler in ("configure (celeryd_init)", "adjust (celeryd_after_setup)", "connect (worker_init)"):
        assert f"stateful:{handler}" in line
    assert "worker_process_init" in line
    assert worker.log().count("Children are fresh interpreters") == 1


@pytest.mark.ours_only("a forkserver")
def test_the_log_was_rotated_before_the_forkserver_was_killed(start_worker):
    """Children of the next one write to the new log."""
    worker = start_worker("witness", "--logfile", "worker.log", start_method="forkserver", ready=False)
    log = worker.folder / "worker.log"
    worker.until(lambda: log.exists() and " ready." in log.read_text(), "the worker to be ready")
    first = worker.run("witness.say", "one")
    log.rename(worker.folder / "worker.log.1")
    before = forkserver(worker)
    processes.kill(before)
    worker.until(lambda: forkserver(worker) not in (None, before), "a new forkserver")
    processes.kill(first)
    assert worker.run("witness.say", "two") != first
    worker.until(lambda: "two" in log.read_text(), "the child's line in the new log")
