"""Older kernels, other platforms, installations without a compiler: what is missing is done without."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from billiard.exceptions import WorkerLostError
from harness import processes
from harness.worker import Worker

pytestmark = pytest.mark.ours_only("how this pool takes faults")

#: Imported by every interpreter at its start.
NO_PIDFD_OPEN = """
import os
del os.pidfd_open
"""


def without_pidfd_open(worker):
    """As before Linux 5.3, for every interpreter of the worker."""
    (worker.folder / "sitecustomize.py").write_text(NO_PIDFD_OPEN)
    worker.env["PYTHONPATH"] = os.pathsep.join([str(worker.folder), worker.env["PYTHONPATH"]])


#: How to start a worker without it.
WITHOUT = {"no pidfd_open": without_pidfd_open, "no extension": Worker.hide_extension}


@pytest.fixture(scope="module", params=WITHOUT)
def missing(request):
    return request.param


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method, missing):
    return start_module_worker(
        "faulty",
        start_method=start_method,
        prepare=WITHOUT[missing],
        concurrency=3,
    )


def test_it_is_really_missing(worker, missing):
    """The children know that it is: otherwise the other tests say nothing."""
    name = {"no pidfd_open": "os.pidfd_open", "no extension": "memsafe_pool.native.HAVE_EXTENSION"}[missing]
    assert worker.run("faulty.value_of", name) in ("AttributeError", False)


def test_tasks_run(worker, tally):
    """As ever, each once."""
    results = [worker.call("faulty.count", tally.path, f"t{number}") for number in range(30)]
    for result in results:
        worker.get(result)
    assert set(tally.runs().values()) == {1}


def test_a_killed_child_is_noticed(worker):
    """With a task and without; how it ended is known."""
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        worker.run("proj.die")
    for _ in range(5):
        child = worker.run("proj.pid")
        os.kill(child, signal.SIGKILL)
        assert worker.run("proj.add", 1, 1) == 2
        worker.until(
            lambda child=child: child not in processes.children(worker.pid), "the child to be reaped"
        )


def test_a_killed_child_whose_socket_lives_on(worker):
    """A grandchild holds the child's end of the socket; the end of the child is noticed all the same."""
    gate = worker.gate()
    with pytest.raises(WorkerLostError, match="exitcode 3"):
        worker.run("faulty.leave_grandchild", gate.path, 3)
    assert worker.run("proj.add", 1, 1) == 2
    gate.open()


def test_children_that_end_at_once(start_worker, start_method, missing):
    """Children that end at their very start are noticed, and count as failed starts."""

    def prepare(worker):
        WITHOUT[missing](worker)
        (worker.folder / "stillborn.py").write_text(
            "import os\n"
            "from celery.signals import worker_process_init\n"
            "from faulty import app\n"
            "worker_process_init.connect(lambda **_: os._exit(5), weak=False)\n"
        )

    worker = start_worker("stillborn", start_method=start_method, prepare=prepare)
    worker.call("proj.add", 1, 1)
    worker.wait_for_log("failed to start: it ended before it was ready: exitcode 5", count=2)
    worker.stop()


def test_the_worker_ends(start_worker, start_method, missing):
    """When the worker is killed nothing is left."""
    worker = start_worker("faulty", start_method=start_method, prepare=WITHOUT[missing])
    gate = worker.gate()
    worker.call("faulty.hold", gate.path)
    gate.wait_started()
    worker.signal(signal.SIGKILL)
    worker.wait_exit()
    worker.until(lambda: not worker.pids(), "everything to end")


#: A /dev with the least, seen by nobody else: the link ``/dev/fd`` is udev's or a container engine's work.
BARE_DEV = (
    "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    ' && mkdir -m 1777 /dev/shm && exec "$@"'
)


def test_a_bare_dev(start_worker, start_method):
    """As in a plain chroot: nothing but devices has to be there."""
    within = ["unshare", "--mount", "sh", "-c", BARE_DEV, "sh"]
    try:
        trial = subprocess.run([*within, "true"], capture_output=True, check=False, timeout=30)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if trial.returncode:
        pytest.skip(f"no /dev can be made here: {trial.stderr.decode()}")

    def prepare(worker):
        worker.command = [*within, *worker.command]

    worker = start_worker("faulty", start_method=start_method, prepare=prepare)
    assert worker.run("proj.add", 1, 1) == 2
    assert not os.path.exists(f"/proc/{worker.pid}/root/dev/fd")
