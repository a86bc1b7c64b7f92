"""The upper bound moves: grow, shrink, autoscale; and the pool restarts with new code."""

from __future__ import annotations

import psutil
import pytest
from harness.worker import OURS


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method):
    return start_module_worker(start_method=start_method, config={"worker_prefetch_multiplier": 2})


def wait_until_idle(worker):
    """Wait for the children to know that their tasks have ended: the results are there before."""
    if OURS:
        worker.until(lambda: not worker.stats()["pool"]["memsafe"]["busy"], "all children to be idle")


def runs_at_once(worker, number):
    """Check that of many tasks exactly so many run at once, and fetch the rest of what may be fetched."""
    gate = worker.gate()
    results = [worker.call("proj.hold_late", gate.path) for _ in range(3 * number)]
    gate.wait_started(number)
    worker.until(
        lambda: len(worker.inspect("reserved")) == number, "as many to wait as run: the multiplier is two"
    )
    assert len(gate.started()) == number
    gate.open()
    assert len({worker.get(result) for result in results}) == number


def test_grow_and_shrink(worker):
    """``pool_grow`` and ``pool_shrink`` move the number of tasks that run at once, and what is prefetched."""
    runs_at_once(worker, 2)
    assert "ok" in worker.control("pool_grow", n=2)
    runs_at_once(worker, 4)
    assert "ok" in worker.control("pool_shrink", n=3)
    worker.until(lambda: len(worker.children()) <= 1, "children above the bound to go")
    runs_at_once(worker, 1)
    assert "ok" in worker.control("pool_grow", n=1)
    runs_at_once(worker, 2)


def test_shrinking_loses_no_task(worker):
    """Shrinking while tasks run and wait: each still runs to its end."""
    assert "ok" in worker.control("pool_grow", n=2)
    results = [worker.call("proj.sleep", 0.05) for _ in range(30)]
    worker.control("pool_shrink", n=2)
    for result in results:
        worker.get(result)
    assert "WorkerLost" not in worker.log()


def test_autoscale(start_worker, start_method):
    """``--autoscale 4,1``: up to four tasks at once when they wait, one again when there is nothing to do."""
    worker = start_worker(
        "proj", "--autoscale", "4,1", start_method=start_method, env={"AUTOSCALE_KEEPALIVE": "1"}
    )
    assert worker.stats()["autoscaler"]["max"] == 4
    assert worker.stats()["autoscaler"]["min"] == 1
    gate = worker.gate()
    results = [worker.call("proj.hold", gate.path) for _ in range(4)]
    gate.wait_started(4)
    assert worker.stats()["autoscaler"]["current"] == 4
    gate.open()
    assert len({worker.get(result) for result in results}) == 4
    worker.until(lambda: worker.stats()["autoscaler"]["current"] == 1, "the pool to scale down")
    worker.until(lambda: len(worker.children()) <= 1, "the children to go")
    gate = worker.gate()
    results = [worker.call("proj.hold", gate.path) for _ in range(3)]
    gate.wait_started(3)
    gate.open()
    for result in results:
        worker.get(result)


CHANGING = """
from proj import app

VERSION = {version}

@app.task(name="changing.version")
def version():
    return VERSION
"""


@pytest.mark.stock_differs("each child runs one more task before it leaves")
def test_pool_restart_with_reload_runs_the_new_code(start_worker, start_method):
    """After ``pool_restart`` with reload no child runs what the module said before."""

    def write(worker, version):
        (worker.folder / "changing.py").write_text(CHANGING.format(version=version))

    worker = start_worker(
        config={"worker_pool_restarts": True, "imports": ["changing"]},
        start_method=start_method,
        env={"PYTHONDONTWRITEBYTECODE": "1"},
        prepare=lambda worker: write(worker, 1),
    )
    gate = worker.gate()
    held = [worker.call("proj.hold", gate.path) for _ in range(2)]
    old = set(gate.wait_started(2).values())
    gate.open()
    for result in held:
        worker.get(result)
    assert {worker.run("changing.version") for _ in range(4)} == {1}
    wait_until_idle(worker)

    write(worker, 22)
    assert "ok" in worker.control("pool_restart", modules=["changing"], reload=True)
    assert {worker.run("changing.version") for _ in range(4)} == {22}
    worker.until(lambda: not any(map(psutil.pid_exists, old)), "the old children to end")


@pytest.mark.stock_differs("each child runs one more task before it leaves")
def test_pool_restart_replaces_the_children(start_worker, start_method):
    """``pool_restart`` without reload: other children, and work goes on."""
    worker = start_worker(config={"worker_pool_restarts": True}, start_method=start_method)
    before = {worker.run("proj.pid") for _ in range(4)}
    wait_until_idle(worker)
    assert "ok" in worker.control("pool_restart")
    assert not before & {worker.run("proj.pid") for _ in range(4)}
    worker.until(lambda: not any(map(psutil.pid_exists, before)), "the old children to end")
    assert worker.exitcode is None
