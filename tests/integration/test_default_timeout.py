"""Sockets of the pool's own do not care for socket.setdefaulttimeout()."""

import time

import pytest


@pytest.mark.parametrize("broker_kind", ["redis", "sqlite"])
def test_idle_children_outlive_the_default_timeout(start_worker, start_method, broker_kind):
    """A child waits for its next task for longer than any socket of the app may wait."""
    worker = start_worker("impatient", broker=broker_kind, start_method=start_method)
    child = worker.run("impatient.pid")
    idle_until = time.monotonic() + 2  # the app's timeout, four times
    worker.until(lambda: time.monotonic() > idle_until, "the time to pass")
    assert worker.run("impatient.pid") == child
