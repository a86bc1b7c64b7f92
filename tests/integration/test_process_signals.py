"""Celery's signals about processes: each once for each child, and in the right process."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from harness.worker import OURS


def notes(worker, what):
    """What the processes of the worker have noted, of one kind."""
    path = worker.folder / "notes"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [note for note in found if note["what"] == what]


def meet(worker, number):
    """Run a task in each of so many children at once; their pids."""
    folder = worker.folder / "meeting"
    folder.mkdir()
    results = [worker.call("witness.meet", str(folder), number) for _ in range(number)]
    return {worker.get(result)["pid"] for result in results}


WAYS = [
    ("forkserver", {}),
    ("forkserver", {"memsafe_child_env": {"A": "1"}}),
    ("spawn", {}),
    ("fork", {}),
]


def wanted_before(worker, method, children, *, fresh):
    """In which process ``worker_before_create_process`` is to be sent, and how often."""
    if method == "forkserver":
        forkserver = worker.stats()["pool"]["memsafe"]["forkserver"]
        # Once before the forkserver's own fork, or where there is none, when it has imported the app.
        return Counter([forkserver if fresh else worker.pid] + len(children) * [forkserver])
    if method == "spawn":
        return Counter(len(children) * [worker.pid] + list(children))  # no child has anybody to inherit from
    return Counter(len(children) * [worker.pid])


@pytest.mark.parametrize(("method", "config"), WAYS if OURS else [("stock", {})])
def test_signals_of_processes(start_worker, method, config):
    """Before a child: where it is forked. At its start and end: in the child, with its exit status.

    Handlers are connected in the module that ``-A`` names; the forkserver begins in either way.
    """
    worker = start_worker("witness", config=config, start_method=method, concurrency=3)
    children = meet(worker, 3)
    assert len(children) == 3
    before = Counter(note["pid"] for note in notes(worker, "before_create_process"))
    assert before == wanted_before(worker, method, children, fresh=bool(config))
    assert Counter(note["pid"] for note in notes(worker, "process_init")) == Counter(children)
    assert notes(worker, "process_shutdown") == []
    assert worker.stop() == 0
    ended = notes(worker, "process_shutdown")
    assert Counter(note["pid"] for note in ended) == Counter(children)
    assert all(note["of"] == note["pid"] and note["exitcode"] == 0 for note in ended)


@pytest.mark.also_start_method("fork")
def test_signals_of_children_that_are_replaced(start_worker, start_method):
    """With ``--max-tasks-per-child`` each child in turn has its start and its end."""
    worker = start_worker("witness", "--max-tasks-per-child", "1", start_method=start_method, concurrency=1)
    children = [worker.run("witness.place")["pid"] for _ in range(3)]
    assert len(set(children)) == 3
    worker.until(lambda: len(notes(worker, "process_shutdown")) >= 3, "the three to say that they end")
    assert [note["pid"] for note in notes(worker, "process_init")][:3] == children
    assert [note["pid"] for note in notes(worker, "process_shutdown")][:3] == children


@pytest.mark.parametrize(("method", "config"), WAYS if OURS else [("stock", {})])
def test_a_child_begins_with_what_tasks_use(start_worker, method, config):
    """Result backend and transport have been imported, in prefork by the worker."""
    worker = start_worker("witness", config=config, start_method=method, broker="redis", concurrency=1)
    worker.run("witness.place")
    [begun] = notes(worker, "process_init")
    assert {"celery.backends.redis", "kombu.transport.redis"} <= set(begun["modules"])


@pytest.mark.parametrize(
    ("method", "config", "broker"),
    [(*way, "redis") for way in WAYS] + [("forkserver", {}, "filesystem")]
    if OURS
    else [("stock", {}, "redis")],
)
def test_what_is_loaded_before_a_child_is_created(start_worker, method, config, broker):
    """It is in every child; where children are forked, it is loaded once, and they share its memory."""
    worker = start_worker("preloads", config=config, start_method=method, broker=broker, concurrency=2)
    children = meet(worker, 2)
    for _ in range(2 * len(children)):
        loaded_by, pid, content, private_bytes = worker.run("preloads.shared")
        assert content == 4
        assert pid in children
        if method == "spawn":
            assert loaded_by == pid
        else:
            assert loaded_by == (worker.stats()["pool"]["memsafe"]["forkserver"] if config else worker.pid)
            assert private_bytes < 32 << 20
