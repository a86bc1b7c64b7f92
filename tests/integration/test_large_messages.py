"""Messages that are large: what waits in the worker is memory, too."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.ours_only("prefork fetches whatever it can, and is killed")

MIB = 1 << 20


def kills(group):
    """How many processes the kernel has killed in a cgroup."""
    lines = dict(line.split() for line in group.kills_file.read_text().splitlines())
    return int(lines["oom_kill"])


def messages(worker, count, mib):
    """Send so many, each with so much text."""
    text = "x" * (mib * MIB)
    return [worker.call("proj.length", text) for _ in range(count)]


@pytest.mark.parametrize(
    "case",
    [
        ("rabbitmq", "before", False),
        ("rabbitmq", "idle", True),
        ("rabbitmq", "after small ones", False),
        ("redis", "before", True),
        ("redis", "idle", False),
    ],
    ids=str,
)
def test_more_than_the_worker_could_hold(container, start_worker, open_broker, case):
    """All are done, and the kernel kills nobody: 60 of 8 MB, where Celery would fetch 64, in 768 MiB.

    They are there before the worker is, come all at once to one that has nothing to do, or after small ones.
    """
    kind, when, late = case
    group, shared = container(768), open_broker(kind)
    config = {"task_acks_late": late}
    results = []

    def prepare(worker):
        group.hold(worker)
        if when == "before":
            results.extend(messages(worker, 60, 8))

    worker = start_worker(broker=shared, concurrency=16, config=config, prepare=prepare)
    if when == "after small ones":
        for result in [worker.call("proj.add", 1, number) for number in range(300)]:
            worker.get(result)
    if when != "before":
        results = messages(worker, 60, 8)
    assert [worker.get(result, timeout=120) for result in results] == [8 * MIB] * 60
    assert kills(group) == 0
    assert "Messages are large" in worker.log()
    # Small ones come as ever.
    small = [worker.call("proj.add", 1, number) for number in range(400)]
    assert [worker.get(result) for result in small] == [1 + number for number in range(400)]


def test_large_results(start_contained, rabbitmq):
    """They go from the child to the result backend, and do not pass through the worker."""
    worker = start_contained(600, broker=rabbitmq, concurrency=4)
    gate = worker.gate()
    results = [worker.call("proj.hold_and_return", gate.path, 8 * MIB) for _ in range(40)]
    gate.wait_started(4)
    before = own(worker)
    gate.open()
    for result in results:
        worker.get(result)
        result.forget()
    assert own(worker) < before + 20 * MIB


def own(worker):
    """What the worker itself has."""
    return worker.stats()["pool"]["memsafe"]["memory"]["worker"]
