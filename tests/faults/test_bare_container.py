"""Containers that lack what most have: folders that can be written to, /proc, /sys, much address space."""

from __future__ import annotations

import os
import subprocess

import pytest

pytestmark = pytest.mark.ours_only("how this pool takes faults")

#: Makes every folder read-only, but for those whose names follow; then runs the command behind ``--``.
READ_ONLY = r"""
writable=; while [ "$1" != -- ]; do writable="$writable $1"; shift; done; shift
awk '{print $5}' /proc/self/mountinfo | grep -v '^/proc\|^/sys' | while read -r point; do
    case " $writable " in *" $point "*) ;; *) mount -o remount,bind,ro "$point" ;; esac
done
exec "$@"
"""

#: Puts an empty folder over the first argument.
HIDDEN = 'mount -t tmpfs none "$1"; shift; exec "$@"'


@pytest.fixture(scope="module")
def namespace():
    """The beginning of a command that has its own view of the mounts."""
    line = ["unshare", "--mount", "--propagation", "private", "sh"]
    try:
        trial = subprocess.run(
            [*line, "-ec", HIDDEN, "sh", "/sys", "true"], check=False, capture_output=True, timeout=30
        )
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if trial.returncode:
        pytest.skip(f"no mount namespace can be made: {trial.stderr.decode().strip()}")
    return line


@pytest.fixture
def start_bare(start_worker, namespace):
    """Start a worker after a script: ``start_bare(script, *arguments, ...)``."""

    def start(script, *arguments, **options):
        def confine(worker):
            del worker.env["TMPDIR"]
            worker.env["PYTHONDONTWRITEBYTECODE"] = "1"
            worker.command = [*namespace, "-ec", script, "sh", *arguments, *worker.command]

        return start_worker("faulty", prepare=confine, **options)

    return start


def check(worker):
    """Tasks run, also in a child of a forkserver that is begun again."""
    assert worker.run("proj.add", 1, 2) == 3
    memsafe = worker.stats()["pool"]["memsafe"]
    if memsafe["forkserver"]:
        os.kill(memsafe["forkserver"], 9)
        worker.wait_for_log("The forkserver .* has died")
    for child in worker.children():
        os.kill(child, 9)
    assert worker.run("proj.add", 3, 4) == 7
    assert "Traceback" not in worker.log()
    assert "failed to start" not in worker.log()
    assert worker.stop() == 0


@pytest.mark.parametrize("writable", [[], ["/dev/shm"]], ids=["nowhere", "shared memory"])
def test_no_folder_can_be_written_to(start_bare, start_method, writable):
    """A fresh interpreter starts all the same. Who works alone says so once, with the file's name."""
    worker = start_bare(READ_ONLY, *writable, "--", start_method=start_method)
    check(worker)
    said = worker.log().count("what other workers under the same memory limit have reserved is not known")
    assert said == (0 if writable else 1)


def test_no_sys(start_bare):
    """The machine's memory is the limit."""
    check(start_bare(HIDDEN, "/sys"))


def test_no_proc(start_bare):
    """Children start by spawn or by the forkserver, whatever can be done; memory is not measured."""
    worker = start_bare(HIDDEN, "/proc")
    assert worker.run("proj.add", 1, 2) == 3
    assert "Traceback" not in worker.log()
    assert worker.stop() == 0


def test_little_address_space(start_worker, start_method):
    """With RLIMIT_AS a task that takes more fails, and not its child."""

    def narrow(worker):
        worker.command = ["sh", "-c", 'ulimit -v 700000 && exec "$@"', "sh", *worker.command]

    worker = start_worker("faulty", start_method=start_method, prepare=narrow)
    assert worker.run("proj.add", 1, 2) == 3
    with pytest.raises(MemoryError):
        worker.run("proj.text", 1 << 30)
    assert worker.run("proj.add", 3, 4) == 7
    assert worker.stop() == 0
