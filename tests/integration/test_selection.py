"""The ways to select the pool, each with the real ``celery`` command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from harness.worker import PROJECTS

pytestmark = pytest.mark.ours_only("how it is selected")


@pytest.mark.parametrize(
    ("arguments", "config", "env"),
    [
        (["--pool", "memsafe_pool:Pool"], {}, {}),
        (["-P", "memsafe"], {}, {}),
        ([], {"worker_pool": "memsafe_pool:Pool"}, {}),
        (["-P", "custom"], {}, {"CELERY_CUSTOM_WORKER_POOL": "memsafe_pool:Pool"}),
    ],
    ids=["--pool", "-P memsafe", "worker_pool", "-P custom"],
)
def test_each_way_selects_this_pool(start_worker, arguments, config, env):
    """Four ways lead to the same pool, and tasks run on it."""
    worker = start_worker("proj", *arguments, pool=None, config=config, env=env)
    assert worker.stats()["pool"]["implementation"] == "memsafe_pool.prefork:Pool"
    assert ".> concurrency: 2 (memsafe_pool)" in worker.log()
    assert worker.run("proj.add", 1, 2) == 3


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        ("solo", "celery.concurrency.solo:TaskPool"),
        ("prefork", "celery.concurrency.prefork:TaskPool"),
        ("threads", "celery.concurrency.thread:TaskPool"),
    ],
)
def test_pools_of_celery_can_still_be_selected(start_worker, name, implementation):
    """With this package installed the names that Celery knows mean what they meant."""
    worker = start_worker(pool=name)
    assert worker.stats()["pool"]["implementation"] == implementation
    assert "(memsafe_pool)" not in worker.log()
    assert worker.run("proj.add", 1, 2) == 3


@pytest.mark.parametrize("name", ["nosuch", "nosuch:Thing", "memsafe_pool:Nosuch", "memsafe_pool:", ":Pool"])
def test_an_unknown_pool_is_refused_in_one_sentence(start_worker, filesystem, name):
    """A pool that does not exist: an error that names it, and no traceback."""
    worker = start_worker(broker=filesystem, pool=name, ready=False)
    assert worker.wait_exit() != 0
    error = worker.log().strip().splitlines()[-1]
    assert error.startswith("Error: ")
    assert repr(name) in error
    assert "--pool" in error
    assert "Traceback" not in worker.log()


def celery(*arguments, code=""):
    """Run the ``celery`` command in an interpreter that then runs ``code``."""
    program = (
        "import sys\n"
        "from celery.__main__ import main\n"
        f"sys.argv = ['celery', *{arguments!r}]\n"
        "status = 0\n"
        "try: main()\n"
        "except SystemExit as exit: status = exit.code\n"
        f"{code}\n"
        "sys.exit(status)"
    )
    env = {**os.environ, "PYTHONPATH": str(PROJECTS)}
    return subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False
    )


def test_the_plug_in_is_light():
    """Commands that have nothing to do with the pool do not load it."""
    done = celery("--version", code="print(*sorted(sys.modules))")
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "memsafe_pool.cli" in loaded
    mine = {name for name in loaded if name.startswith("memsafe_pool")}
    assert mine == {"memsafe_pool", "memsafe_pool.cli"}
    assert not loaded & {
        "celery.concurrency.asynpool",
        "celery.concurrency.prefork",
        "billiard.pool",
        "psutil",
    }


def test_the_command_shows_the_settings():
    """``celery memsafe settings`` shows each setting with its value and where that is from."""
    done = celery("-A", "proj", "memsafe", "settings")
    assert done.returncode == 0, done.stderr
    assert "memsafe_start_method = 'auto'  (default)" in done.stdout
    assert "memsafe_idle_timeout = 60.0  (default)" in done.stdout
