"""The connection to the broker is lost and comes back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time

import psutil
import pytest
from billiard.exceptions import TimeLimitExceeded, WorkerLostError
from harness import processes
from harness.brokers import NO_BROKER
from harness.growth import Growth, headroom
from harness.waiting import until


@pytest.fixture(params=["redis", "rabbitmq"])
def lossy(open_broker, open_proxy, request):
    """A broker, and a proxy between it and the worker."""
    broker = open_broker(request.param)
    return broker, open_proxy(broker)


def start_behind(start_worker, proxy, broker, *arguments, **options):
    """A worker that reaches its broker through the proxy alone; the test's client does not."""
    config = {**broker.config, **options.pop("config", {}), "broker_url": proxy.url}
    prepare_too = options.pop("prepare", lambda worker: None)

    def prepare(worker):
        worker.env.update(TEST_CONFIG=json.dumps({**worker.config, **config}))
        prepare_too(worker)

    worker = start_worker(*arguments, broker=broker, prepare=prepare, **options)
    assert worker.stats()["broker"]["port"] == proxy.port
    return worker


def lose(worker, cut):
    """Cut the connection while tasks run that are acknowledged.

    With messages that are not, a Redis that refuses connections ends the worker: an AttributeError in kombu.
    And a worker that is still sending the answer to what it was asked here would try to send it until there
    is a broker, and do nothing else, also on Celery's own pools.
    """
    worker.until(lambda: all(task["acknowledged"] for task in worker.inspect("active")), "acknowledgements")
    processes.wait_for_event_loop(worker.pid)
    cut()
    worker.wait_for_log("Connection to broker lost")


def test_what_runs_goes_on(start_worker, start_method, lossy):
    """A running task does not notice; afterwards the worker takes new tasks, with the same children."""
    broker, proxy = lossy
    worker = start_behind(start_worker, proxy, broker, start_method=start_method)
    gate = worker.gate()
    running = worker.call("proj.hold", gate.path)
    child = gate.wait_started()[running.id]
    assert worker.run("proj.add", 1, 2) == 3
    before = set(worker.children())
    lose(worker, proxy.cut)
    proxy.restore()
    worker.wait_for_log("Connected to", count=2)
    assert worker.run("proj.add", 3, 4) == 7
    assert set(worker.children()) == before
    gate.open()
    assert worker.get(running) == child
    assert "WorkerLost" not in worker.log()


def test_a_task_ends_while_there_is_no_broker(start_worker, start_method, lossy):
    """The result of a task that ends before the connection is back is stored all the same."""
    broker, proxy = lossy
    worker = start_behind(start_worker, proxy, broker, start_method=start_method)
    gate = worker.gate()
    running = worker.call("proj.hold", gate.path)
    child = gate.wait_started()[running.id]
    lose(worker, proxy.cut)
    gate.open()
    assert worker.get(running) == child
    proxy.restore()
    assert worker.run("proj.add", 3, 4) == 7


@pytest.mark.stock_differs("time limits are acted on before the ends of tasks that came earlier")
@pytest.mark.parametrize("size", [1, 4 << 20], ids=["small", "more than a socket holds"])
def test_a_task_that_ends_in_time(start_worker, start_method, lossy, size):
    """Its limit passes before the worker gets to hear of its end: it has kept it all the same."""
    broker, proxy = lossy
    worker = start_behind(start_worker, proxy, broker, start_method=start_method)
    gate = worker.gate()
    running = worker.call("proj.hold_and_return", gate.path, size, soft_time_limit=15, time_limit=16)
    gate.wait_started()
    began = time.monotonic()
    lose(worker, proxy.cut)
    gate.open()
    worker.until(lambda: time.monotonic() > began + 17, "the limits to pass")
    proxy.restore()
    worker.wait_for_log("Connected to", count=2)
    assert worker.run("proj.add", 3, 4) == 7
    assert len(worker.get(running)) == size
    assert "time limit" not in worker.log()


@pytest.mark.stock_differs("time limits are acted on before the ends of children that came earlier")
def test_a_child_that_is_killed_in_time(start_worker, start_method, lossy):
    """That is why its task has failed, also when a limit has passed before the worker gets to hear of it."""
    broker, proxy = lossy
    worker = start_behind(start_worker, proxy, broker, start_method=start_method)
    gate = worker.gate()
    running = worker.call("proj.hold", gate.path, time_limit=16)
    child = gate.wait_started()[running.id]
    began = time.monotonic()
    lose(worker, proxy.cut)
    processes.kill(child)
    worker.until(lambda: time.monotonic() > began + 17, "the limit to pass")
    proxy.restore()
    with pytest.raises(WorkerLostError, match="signal 9"):
        worker.get(running)


def test_time_limits_hold_across_it(start_worker, start_method, lossy):
    """A limit that began before the loss holds, whether it passes during the loss or after it."""
    broker, proxy = lossy
    worker = start_behind(start_worker, proxy, broker, start_method=start_method)
    gate = worker.gate()
    limited = [worker.call("proj.hold", gate.path, time_limit=seconds) for seconds in (3, 6)]
    gate.wait_started(2)
    lose(worker, proxy.cut)
    proxy.restore()
    for result in limited:
        with pytest.raises(TimeLimitExceeded):
            worker.get(result)
    with pytest.raises(TimeLimitExceeded):
        worker.run("proj.hold", gate.path, time_limit=3)
    assert worker.run("proj.hold_through_soft_limit", gate.path, soft_time_limit=3) == "caught"


@pytest.mark.parametrize("lossy", ["rabbitmq"], indirect=True)  # Redis keeps them back for an hour
def test_waiting_tasks_run_once(start_worker, lossy):
    """Tasks that were fetched but had no child come again from the broker, and run once."""
    broker, proxy = lossy
    worker = start_behind(start_worker, proxy, broker, concurrency=1)
    gate, runs = worker.gate(), worker.folder / "runs"
    running = worker.call("proj.hold", gate.path)
    gate.wait_started()
    waiting = [worker.call("proj.note", str(runs), number) for number in range(6)]
    worker.until(lambda: worker.inspect("reserved"), "tasks to wait in the worker")
    lose(worker, proxy.cut)
    proxy.restore()
    worker.wait_for_log("Connected to", count=2)
    gate.open()
    worker.get(running)
    assert [worker.get(result) for result in waiting] == list(range(6))
    assert sorted(map(int, runs.read_text().split())) == list(range(6))


def answers(port):
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def private_redis(outlasting, tmp_path):
    """A Redis server of the test's own, which can be ended and begun again: url, start, stop."""
    program = shutil.which("redis-server")
    if program is None:
        pytest.skip(f"{NO_BROKER}: no redis-server to start")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    running = []

    def start():
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path), "--save", ""]
        running.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))
        until(lambda: answers(port), "Redis to answer")

    def stop():
        for process in running:
            process.kill()
            process.wait(30)
        running.clear()

    outlasting.callback(stop)
    start()
    return f"redis://127.0.0.1:{port}/0", start, stop


def test_the_server_is_killed_and_comes_back(start_worker, start_method, redis, private_redis):
    """A Redis that dies and begins anew: the running task goes on, and new tasks run."""
    url, start, stop = private_redis
    worker = start_worker(config={"broker_url": url}, broker=redis, start_method=start_method)
    gate = worker.gate()
    running = worker.call("proj.hold", gate.path)
    child = gate.wait_started()[running.id]
    lose(worker, stop)
    start()
    worker.wait_for_log("Connected to", count=2)
    gate.open()
    assert worker.get(running) == child
    assert worker.run("proj.add", 3, 4) == 7
    assert worker.stop() == 0


@pytest.mark.ours_only("other pools pause nobody")
def test_a_shortage_that_passes_meanwhile(container, start_worker, lossy):
    """Two were paused, and one of them had to end, when the worker could not listen: that is no reason."""
    broker, proxy = lossy
    group = container(240)
    worker = start_behind(start_worker, proxy, broker, "hungry", concurrency=2, prepare=group.hold)
    gate = worker.gate()
    both = [Growth(worker, gate, name) for name in ("one", "other")]
    room = headroom(worker)
    for growth in both:
        growth.want(room * 3 // 10)
        growth.wait_has(room * 3 // 10)
    lose(worker, proxy.cut)
    for growth in both:
        growth.want(room * 17 // 20, 0.03)
    pids = [growth.pid for growth in both]
    stand_still = [psutil.STATUS_STOPPED] * 2
    worker.until(lambda: [psutil.Process(pid).status() for pid in pids] == stand_still, "both to be paused")
    since = time.monotonic()
    worker.until(lambda: time.monotonic() > since + 2, "it to be said several times")
    group.limit(600 << 20)
    for growth in both:
        growth.wait_has(room * 17 // 20)
    since = time.monotonic()
    worker.until(lambda: time.monotonic() > since + 2, "that to be long ago")
    proxy.restore()
    assert [growth.end() for growth in both] == pids
    assert worker.stats()["pool"]["memsafe"]["kills"] == 0


@pytest.mark.ours_only("other pools do not run tasks again themselves")
@pytest.mark.parametrize("lossy", ["rabbitmq"], indirect=True)  # with Redis an error in kombu ends the worker
def test_what_comes_again_is_not_run_again_here(container, start_worker, lossy):
    """One that is ended for want of memory when the broker has delivered it again: one more run is enough."""
    broker, proxy = lossy
    group = container(240)
    worker = start_behind(start_worker, proxy, broker, "hungry", concurrency=2, prepare=group.hold)
    gate = worker.gate()
    both = [Growth(worker, gate, name, "steps_late") for name in ("one", "other")]
    processes.wait_for_event_loop(worker.pid)
    proxy.cut()
    worker.wait_for_log("Connection to broker lost")
    proxy.restore()
    worker.wait_for_log("Connected to", count=2)
    share = headroom(worker) * 3 // 10
    for growth in both:
        growth.want(share)
        growth.wait_has(share)
    for growth in both:
        growth.want(3 * share, 0.03)
    ids = "|".join(growth.id for growth in both)
    worker.wait_for_log(rf"'({ids})'> is not run again here, as the broker has delivered it again: hungry")
    gate.open()
    for growth in both:
        assert worker.get(growth.result) == growth.pid
    assert "is run again" not in worker.log()


@pytest.mark.ours_only("other pools do not give it to another child")
@pytest.mark.parametrize("lossy", ["rabbitmq"], indirect=True)  # Redis keeps it back for an hour
def test_what_had_not_begun_and_comes_again(start_worker, lossy):
    """Its child is killed before it begins, and the broker has delivered it again: one run."""
    broker, proxy = lossy
    worker = start_behind(start_worker, proxy, broker, concurrency=1)
    runs, child = worker.folder / "runs", worker.run("proj.pid")
    os.kill(child, signal.SIGSTOP)
    result = worker.call("proj.note", str(runs), 1)
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["busy"] == 1, "the child to be given the task")
    processes.wait_for_event_loop(worker.pid)
    proxy.cut()
    worker.wait_for_log("Connection to broker lost")
    proxy.restore()
    worker.wait_for_log("Connected to", count=2)
    worker.wait_for_log(rf"Task proj\.note\[{result.id}\] received", count=2)
    processes.kill(child)
    assert worker.get(result) == 1
    assert worker.run("proj.add", 3, 4) == 7
    assert runs.read_text().split() == ["1"]
