"""The result backend fails for one task, in the middle of what is done for another."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.ours_only("Celery's own pool ends the worker, or has the other task run again")


@pytest.mark.parametrize("error", ["lost", "full"])
def test_for_a_task_that_waited_for_a_slot(start_worker, redis, error):
    """Its slot came from one that has ended: that is acknowledged all the same, and the rest is done."""
    url = redis.config["result_backend"]
    config = {"result_backend": f"backends:Unrevoking+{url}", "worker_prefetch_multiplier": 8}
    worker = start_worker(broker=redis, concurrency=1, config=config)
    gate = worker.gate()
    running = worker.call("proj.hold_late", gate.path)
    child = gate.wait_started()[running.id]
    revoked, *others = [worker.call("proj.add", number, 1) for number in range(4)]
    worker.until(lambda: len(worker.inspect("reserved")) == 4, "all of them to wait for a slot")
    worker.app.control.revoke(revoked.id)
    worker.until(lambda: revoked.id in worker.inspect("revoked"), "the worker to know")
    (worker.folder / "down").write_text(error)
    gate.open()
    assert worker.get(running) == child
    if error == "lost":
        worker.wait_for_log("Connected to", count=2)
    else:
        worker.wait_for_log("A task could not be begun")
    (worker.folder / "down").unlink()
    assert [worker.get(result) for result in others] == [2, 3, 4]
    assert worker.log().count(f"Task proj.hold_late[{running.id}] received") == 1
    assert worker.stop() == 0
