"""How children begin: what they are forked from, what they inherit, and whose children they are."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
from harness import processes
from harness.worker import POOL, PROJECTS

pytestmark = pytest.mark.ours_only("start methods")

needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CC", "cc")), reason="no C compiler")


def meet(worker, number, module="witness"):
    """Run a task in each of so many children at once: what each knows of its place."""
    folder = worker.folder / f"meeting{len(list(worker.folder.iterdir()))}"
    folder.mkdir()
    results = [worker.call("witness.meet", str(folder), number) for _ in range(number)]
    return [worker.get(result) for result in results]


def importers(worker):
    """Pids of the processes that imported the project, in order."""
    notes = [json.loads(line) for line in (worker.folder / "notes").read_text().splitlines()]
    return [note["pid"] for note in notes if note["what"] == "import"]


def pool(worker):
    return worker.stats()["pool"]["memsafe"]


@pytest.mark.also_start_method("fork")
def test_children_are_the_worker_s_own(start_worker, start_method):
    """Whoever forked it, the worker is a child's parent and reports its real end."""
    worker = start_worker("witness", start_method=start_method, concurrency=3)
    places = meet(worker, 3)
    assert [place["ppid"] for place in places] == 3 * [worker.pid]
    victim = places[0]["pid"]
    os.kill(victim, signal.SIGABRT)
    worker.wait_for_log(rf"Process '\w+-\d+' pid:{victim} exited with 'signal 6 \(SIGABRT\)'")
    assert len(meet(worker, 3)) == 3


@pytest.mark.also_start_method("fork")
def test_what_tasks_start_has_none_of_our_descriptors(start_worker, start_method):
    """It may outlive its child, and would hold the child's socket open."""
    worker = start_worker("witness", start_method=start_method)
    assert worker.run("witness.inherited") == [0, 1, 2]


@pytest.mark.also_start_method("fork")
@pytest.mark.parametrize("kind", ["redis", "filesystem"])
def test_nobody_survives_the_worker(start_worker, start_method, kind):
    """SIGKILL for the worker: children at work, idle children and the forkserver are gone, too."""
    worker = start_worker(start_method=start_method, concurrency=2, broker=kind)
    gate, other = worker.gate(), worker.gate()
    worker.call("proj.hold", gate.path)
    idle = worker.call("proj.hold", other.path)
    children = {*gate.wait_started().values(), *other.wait_started().values()}
    other.open()
    worker.get(idle)
    everybody = worker.pids()
    assert children < everybody
    worker.signal(signal.SIGKILL)
    assert worker.wait_exit() == -signal.SIGKILL
    worker.until(lambda: not any(map(psutil.pid_exists, everybody)), "all processes to be gone")


@pytest.mark.parametrize(
    ("method", "step"), [("spawn", "import"), ("spawn", "init"), ("forkserver", "init"), ("fork", "init")]
)
def test_a_child_that_is_starting_does_not_survive_the_worker(start_worker, method, step):
    """SIGKILL for the worker while a child is in the middle of its start: it is gone, too."""
    worker = start_worker("obstacle", start_method=method)
    (worker.folder / step).write_text("wait")
    worker.call("obstacle.pid")
    waits = worker.folder / f"{step}.waits"
    worker.until(waits.exists, "the start to hang")
    worker.signal(signal.SIGKILL)
    assert worker.wait_exit() == -signal.SIGKILL
    worker.until(lambda: not psutil.pid_exists(int(waits.read_text())), "the child to be gone")


def test_early_fork(start_worker):
    """By default the forkserver is a fork of the worker: nobody else imports the app."""
    worker = start_worker("witness")
    places = meet(worker, 2)
    assert pool(worker)["start_method"] == "forkserver"
    assert importers(worker) == [worker.pid]
    assert {place["imported_by"] for place in places} == {worker.pid}


@pytest.mark.parametrize("module", ["traced", "threaded"])
def test_threads_of_the_worker(start_worker, module):
    """A tracing agent's, or that of an import: as in prefork, each child has a fork of the worker's own.

    Nobody else imports the app, and the forkserver of one child is not that of the next.
    """
    worker = start_worker(module, concurrency=2)
    before = pool(worker)["forkserver"]
    places = meet(worker, 2)
    assert importers(worker) == [worker.pid]
    assert {place["imported_by"] for place in places} == {worker.pid}
    worker.until(lambda: pool(worker)["forkserver"] not in (None, before), "another forkserver")
    assert "fresh interpreter" not in worker.log()


def test_forkservers_that_have_ended_are_reaped(start_worker):
    """Where each child has one of its own they do not pile up: they count against ``pids.max``."""
    worker = start_worker("threaded", concurrency=2, config={"worker_max_tasks_per_child": 1})
    results = [worker.call("witness.place") for _ in range(80)]
    most = 0
    for result in results:
        most = max(most, len(processes.zombies(worker.pid)))
        worker.get(result)
    assert most < 10


@pytest.mark.parametrize("module", ["traced", "threaded"])
def test_preloaded_modules_beside_threads(start_worker, module):
    """They are to be imported once: so one forkserver, which imports the app as well, has all children."""
    worker = start_worker(module, config={"memsafe_preload": ["preloaded"]})
    places = meet(worker, 2)
    forkserver = pool(worker)["forkserver"]
    assert importers(worker) == [worker.pid, forkserver]
    assert {place["imported_by"] for place in places} == {forkserver}
    assert {place["preloaded_by"] for place in places} == {forkserver}


@pytest.mark.parametrize("module", ["threaded", "threaded:app"])
def test_a_thread_that_must_not_be_forked_beside(start_worker, module):
    """A process forked for trial is stuck: the line names the module; children start by spawn, tasks run."""
    worker = start_worker(module, env={"TEST_HOG": "1"})
    places = meet(worker, 2)
    assert pool(worker)["start_method"] == "spawn"
    assert pool(worker)["forkserver"] is None
    assert all(place["imported_by"] == place["pid"] for place in places)
    line = worker.wait_for_log(r"\[.*: WARNING/MainProcess\] The forkserver must not fork: .*").group()
    assert (
        "a process forked beside other threads (background) was stuck, started by the import of starts_thread"
        in line
    )
    assert "children start by spawn" in line.lower()
    assert worker.log().count("must not fork") == 1
    worker.until(lambda: not processes.zombies(worker.pid), "the forkserver to be reaped")


def test_what_fits_is_said_anew_when_children_cost_more(start_worker):
    """After the fall back to spawn a child takes as much as the worker, not what a fork of it takes."""
    worker = start_worker("threaded", env={"TEST_HOG": "1"})
    said = r"Memory: .* a child about (\d+) MiB before its first task: room for (\d+) children"
    first, then = (worker.wait_for_log(said, count=number).groups() for number in (1, 2))
    assert int(then[0]) > 2 * int(first[0])
    assert int(then[1]) < int(first[1]) / 2
    assert int(then[0]) == pytest.approx(pool(worker)["memory"]["child"] / 2**20, abs=1)
    meet(worker, 2)
    assert worker.log().count(" a child about ") == 2


@pytest.fixture
def library(tmp_path):
    """Build a library that starts a thread when it is loaded, and have ``native_thread`` load it."""

    def build(*flags):
        file = tmp_path / "library.so"
        source = PROJECTS / "native_thread.c"
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-shared", "-fPIC", "-pthread", *flags, source, "-o", file], check=True)
        return {"TEST_LIBRARY": str(file)}

    return build


def threads(pid):
    """Kernel names of the threads of a process."""
    return [(task / "comm").read_text().strip() for task in Path(f"/proc/{pid}/task").iterdir()]


@needs_compiler
@pytest.mark.parametrize("env", [{}, {"MEMSAFE_CHILD_ENV": "A=1"}], ids=["early", "fresh"])
def test_a_library_s_own_thread_does_not_keep_from_forking(start_worker, library, env):
    """Prefork forks beside it: so does the worker, and so does a forkserver that has imported the app."""
    worker = start_worker("native_thread", concurrency=3, env={**library(), **env})
    places = meet(worker, 3)
    forkserver = pool(worker)["forkserver"]
    assert "library_thd" in threads(worker.pid)
    assert importers(worker) == ([worker.pid, forkserver] if env else [worker.pid])
    assert {place["imported_by"] for place in places} == {forkserver if env else worker.pid}
    assert ("library_thd" in threads(forkserver)) == bool(env)
    results = [worker.call("native_thread.answer") for _ in range(6)]
    assert [worker.get(result) for result in results] == 6 * [42]


@needs_compiler
@pytest.mark.parametrize("flag", ["-DHOG", "-fopenmp"], ids=["lock", "openmp"])
def test_a_library_that_must_not_be_forked_beside(start_worker, library, flag):
    """A lock that each fork needs is held, or OpenMP was used: a process forked for trial is stuck."""
    worker = start_worker("native_thread", env=library(flag))
    places = meet(worker, 2)
    assert all(place["imported_by"] == place["pid"] for place in places)
    assert pool(worker)["start_method"] == "spawn"
    if flag == "-fopenmp":
        assert worker.run("native_thread.answer") == 42
    name = "library_thd" if flag == "-DHOG" else r"\w+"
    worker.wait_for_log(
        r"WARNING/MainProcess\] The forkserver begins as a fresh interpreter: a process forked from the "
        rf"worker, beside other threads \({name}\), was stuck\."
    )
    worker.wait_for_log(
        r"WARNING/MainProcess\] The forkserver must not fork: a process forked beside other threads "
        rf"\({name}\) was stuck, started by the import of native_thread\. Children start by spawn"
    )


@pytest.mark.parametrize("env", [{}, {"MEMSAFE_CHILD_ENV": "A=1"}], ids=["early", "fresh"])
def test_pandas_with_pyarrow_is_forked(start_worker, env):
    """Its allocator has a thread, and stops it for a fork; the pool is named in the configuration alone."""
    worker = start_worker(
        "columns", "--max-tasks-per-child", "1", pool=None, config={"worker_pool": POOL}, env=env
    )
    assert "jemalloc_bg_thd" in threads(worker.pid)
    results = [worker.call("columns.total", 20_000) for _ in range(12)]
    assert len({worker.get(result) for result in results}) == 12
    assert pool(worker)["start_method"] == "forkserver"
    assert len(importers(worker)) == (2 if env else 1)


def test_numpy_does_not_keep_from_forking(start_worker):
    """OpenBLAS has threads of its own, which it ends before a fork and starts again when they are needed."""
    worker = start_worker("numeric", concurrency=3)
    assert len(meet(worker, 3)) == 3
    assert pool(worker)["start_method"] == "forkserver"
    assert importers(worker) == [worker.pid]
    results = [worker.call("numeric.product") for _ in range(6)]
    assert [worker.get(result) for result in results] == 6 * [300.0**3]


@pytest.mark.parametrize("where", ["configuration", "environment"])
def test_environment_of_the_children(start_worker, start_method, where):
    """``memsafe_child_env`` is set before the app is imported in forkserver and children, only there."""
    config = {"memsafe_child_env": {"OMP_NUM_THREADS": 3, "EXTRA": "a b"}} if where == "configuration" else {}
    env = {"MEMSAFE_CHILD_ENV": "OMP_NUM_THREADS=3,EXTRA=a b"} if where == "environment" else {}
    env["OMP_NUM_THREADS"] = "2"
    worker = start_worker("witness", config=config, env=env, start_method=start_method)
    assert [place["omp"] for place in meet(worker, 2)] == ["3", "3"]
    assert worker.run("witness.variables", "OMP_NUM_THREADS", "EXTRA") == ["3", "a b"]
    notes = [json.loads(line) for line in (worker.folder / "notes").read_text().splitlines()]
    imports = {note["pid"]: note["omp"] for note in notes if note["what"] == "import"}
    assert imports.pop(worker.pid) == "2"
    assert set(imports.values()) == {"3"}


@pytest.mark.parametrize(
    "env", [{"MEMSAFE_PRELOAD": "preloaded"}, {"MEMSAFE_CHILD_ENV": "A=1"}], ids=["early", "fresh"]
)
def test_preloaded_modules(start_worker, env):
    """``memsafe_preload``: imported once, in the forkserver, and there for all children."""
    worker = start_worker("witness", config={"memsafe_preload": ["preloaded"]}, env=env)
    places = meet(worker, 2)
    assert {place["preloaded_by"] for place in places} == {pool(worker)["forkserver"]}


@pytest.mark.parametrize("env", [{}, {"MEMSAFE_CHILD_ENV": "A=1"}], ids=["early", "fresh"])
def test_a_preloaded_module_of_a_package(start_worker, env):
    """The forkserver alone imports it and its package; the worker has neither."""
    worker = start_worker("witness", config={"memsafe_preload": ["shelf.model"]}, env=env)
    meet(worker, 2)
    notes = [json.loads(line) for line in (worker.folder / "notes").read_text().splitlines()]
    forkserver = pool(worker)["forkserver"]
    for what in ("import package", "import module"):
        assert [note["pid"] for note in notes if note["what"] == what] == [forkserver]


def test_a_module_that_its_package_does_not_have(start_worker):
    """The worker imports no package to look for it: the forkserver says that it is missing, and its name."""
    worker = start_worker(config={"memsafe_preload": ["json.no_such_module"]})
    worker.call("proj.pid")
    worker.wait_for_log(
        r"PoolWorker-\d+ \(pid none\) failed to start: the forkserver could not begin:\nTraceback"
    )
    worker.wait_for_log(r"\nModuleNotFoundError: No module named 'json\.no_such_module'\n", count=2)
    assert worker.stop() == 0


def test_the_forkserver_is_replaced(start_worker):
    """Killed, it is replaced; a running task does not notice, and new children come from the new one."""
    worker = start_worker(concurrency=2)
    gate = worker.gate()
    running = worker.call("proj.hold", gate.path)
    child = gate.wait_started()[running.id]
    first = pool(worker)["forkserver"]
    os.kill(first, signal.SIGKILL)
    worker.wait_for_log(rf"The forkserver \(pid {first}\) has died")
    assert worker.run("proj.pid") != child
    assert pool(worker)["forkserver"] not in {first, None}
    gate.open()
    assert worker.get(running) == child
    assert "WorkerLost" not in worker.log()


def test_the_forkserver_is_killed_again_and_again(start_worker):
    """However often it dies, all tasks run, each in a child of its own here."""
    worker = start_worker("proj", "--max-tasks-per-child", "1", concurrency=2)
    for number in range(5):
        forkserver = worker.until(lambda: pool(worker)["forkserver"], "a forkserver")
        results = [worker.call("proj.add", number, other) for other in range(4)]
        os.kill(forkserver, signal.SIGKILL)
        assert [worker.get(result) for result in results] == [number + other for other in range(4)]
