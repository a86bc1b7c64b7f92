"""Apps of all kinds, found in all kinds of places."""

from __future__ import annotations

import json
import os
import sys

import pytest
from harness.worker import POOL, PROJECTS

FRESH = {"MEMSAFE_CHILD_ENV": "A=1"}  # the forkserver, too, has to find the app


@pytest.mark.parametrize(
    ("argument", "env"),
    [
        ("shop", {}),
        ("shop", FRESH),
        ("shop.celery", FRESH),
        ("shop.celery:app", FRESH),
        ("shop.celery.app", FRESH),
    ],
)
def test_each_form_of_the_argument(start_worker, start_method, argument, env):
    """``-A`` with package, module and name; an app and tasks of other classes; a lock in the config."""
    worker = start_worker(argument, start_method=start_method, env=env)
    *description, child = worker.run("shop.celery.describe")
    assert description == ["Shop", "Paris", 6, True, "open"]
    assert child in worker.children()


def test_another_app_of_the_module(start_worker, start_method):
    """``-A module:name`` for an app that is not the module's first: children run that one."""
    worker = start_worker("shop.celery:till", start_method=start_method)
    assert worker.run("shop.till.describe")[:2] == ["Shop", "Lyon"]


@pytest.mark.parametrize("env", [{}, FRESH], ids=["", "fresh"])
def test_modules_included_from_the_command_line(start_worker, start_method, env):
    """``-I``: modules with tasks that the app does not know itself are in the children too."""
    worker = start_worker("shop", "-I", "shop.more", start_method=start_method, env=env)
    assert worker.run("shop.more.weigh", ["tea", "rice"]) == 2


def test_changes_of_the_configuration_reach_children(start_worker, start_method):
    """What a ``celeryd_init`` handler sets in the worker holds in children where that was never sent."""
    worker = start_worker("tuned", start_method=start_method)
    assert worker.run("tuned.town") == "Rome"


def test_options_of_the_command_reach_children(start_worker, start_method, redis):
    """``--result-backend`` before ``worker``: children store their results there."""

    def hide_backend(worker):
        worker.command[3:3] = ["--result-backend", redis.config["result_backend"]]
        worker.env["TEST_CONFIG"] = json.dumps({**worker.config, "result_backend": None})

    worker = start_worker(broker=redis, start_method=start_method, prepare=hide_backend)
    assert worker.run("proj.add", 1, 2) == 3


@pytest.mark.parametrize("pool", [POOL, "class"])
def test_an_app_that_only_a_function_knows(start_worker, pool):
    """A worker in a thread of a program, by ``celery.contrib.testing``, for an app that nobody can import."""
    command = [sys.executable, str(PROJECTS / "script_embedded.py"), pool]
    worker = start_worker(command=command, ready=False)
    assert worker.wait_exit() == 0
    program, *results = json.loads((worker.folder / "results").read_text())
    assert [result for result, _ in results] == [0, 2, 4]
    assert program not in {pid for _, pid in results}


@pytest.mark.ours_only("start methods")
@pytest.mark.parametrize(("name", "value"), [("start_method", "spawn"), ("child_env", {"A": "1"})])
def test_such_an_app_needs_to_be_forked(start_worker, name, value):
    """What needs an app that can be imported says so in one sentence, to the program that asks for it."""
    command = [sys.executable, str(PROJECTS / "script_embedded.py"), "memsafe_pool:Pool"]
    worker = start_worker(command=command, config={f"memsafe_{name}": value}, ready=False)
    assert worker.wait_exit() == 1
    error = worker.log().strip().splitlines()[-1]
    assert error.startswith("memsafe_pool.prefork.PoolConfigurationError: ")
    assert f"memsafe_{name}={value!r} is not valid" in error
    assert "fresh interpreter" in error


@pytest.mark.ours_only("start methods")
def test_such_an_app_that_must_not_be_forked(start_worker):
    """The worker finds out when tasks wait already: it says so and ends, although it cannot run them."""

    def name_it(worker):
        worker.command = [
            sys.executable, str(PROJECTS / "script_embedded.py"), "memsafe_pool:Pool", worker.hostname
        ]  # fmt: skip
        worker.env["TEST_HOG"] = "1"

    worker = start_worker(prepare=name_it, config={"memsafe_preload": ["starts_thread"]}, ready=False)
    worker.call("embedded.double", 1)
    assert worker.wait_exit() == os.EX_SOFTWARE
    worker.wait_for_log(r"CRITICAL/MainProcess\] Stopping the worker: .* can not import the app\.")


@pytest.mark.parametrize("way", ["worker_main", "Worker"])
def test_an_app_of_a_script(start_worker, start_method, way):
    """The app is in the ``__main__`` of a script that runs its own worker."""
    arguments = ["worker", "--pool", POOL, "-c", "2", "-l", "INFO", "-n"] if way == "worker_main" else []
    script = str(PROJECTS / "script_main.py")

    def name_it(worker):
        worker.command = [sys.executable, script, way, *arguments, worker.hostname]
        worker.env["TEST_POOL"] = POOL

    worker = start_worker(prepare=name_it, start_method=start_method)
    double, child, parent = worker.run("main_script.double", 4)
    assert double == 8
    assert parent == worker.pid
    assert child in worker.children()
    assert worker.stop() == 0


def test_a_module_run_by_its_name(start_worker, start_method):
    """``python -m script_main``: children find the app of ``__main__`` by the module's name."""

    def name_it(worker):
        worker.command = [
            sys.executable, "-m", "script_main", "worker_main", "worker", "--pool", POOL, "-c", "2",
            "-l", "INFO", "-n", worker.hostname,
        ]  # fmt: skip

    worker = start_worker(prepare=name_it, start_method=start_method)
    assert worker.run("main_script.double", 4)[0] == 8


LOCAL_APP = """
import os
from witness import app

HERE = os.getcwd()

@app.task
def here():
    return HERE
"""


def test_an_app_found_in_the_current_folder(start_worker, start_method):
    """The ``celery`` command puts its folder on the path; so do children. ``--workdir`` names one."""

    def write(worker):
        site = worker.folder / "elsewhere"
        site.mkdir()
        (site / "local_app.py").write_text(LOCAL_APP)
        worker.command[3:3] = ["--workdir", "elsewhere"]

    worker = start_worker("local_app", start_method=start_method, prepare=write)
    assert worker.run("local_app.here") == os.path.realpath(worker.folder / "elsewhere")
