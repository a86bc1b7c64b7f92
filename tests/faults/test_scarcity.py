"""Descriptors, processes or disk run out: the worker says so, goes on, and recovers when there is room."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest
from harness import processes
from harness.worker import POOL

pytestmark = pytest.mark.ours_only("how this pool takes faults")

#: Runs a command as another user, who may read and write everybody's files: RLIMIT_NPROC spares root.
AS_ANOTHER_USER = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)

def checked(result):
    if result:
        sys.exit(f"cannot become another user: {os.strerror(ctypes.get_errno())}")

user, rights = int(sys.argv[1]), (1 << 1) | (1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
checked(libc.prctl(8, 1, 0, 0, 0))  # PR_SET_KEEPCAPS
os.setgroups([])
os.setresgid(user, user, user)
os.setresuid(user, user, user)
header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3
checked(libc.capset(header, struct.pack("=6I", rights, rights, rights, 0, 0, 0)))
for right in 1, 2:
    checked(libc.prctl(47, 2, right, 0, 0))  # PR_CAP_AMBIENT_RAISE: for what is executed as well
os.execv(sys.argv[2], sys.argv[2:])
"""

#: A module that the interpreter imports by itself: no file without a name can be made when the disk is full.
FULL_DISK = """
import errno, os, tempfile
from pathlib import Path

original = tempfile.TemporaryFile

def TemporaryFile(*args, **kwargs):
    if Path("full").exists():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return original(*args, **kwargs)

tempfile.TemporaryFile = TemporaryFile
"""


def limit(pid, what, number, user=None):
    """Set the soft limit of another process, as that process's user; return what it was."""
    code = (
        "import resource, sys; pid, what, number = map(int, sys.argv[1:]); "
        "before, hard = resource.prlimit(pid, what); "
        "resource.prlimit(pid, what, (number, hard)); print(before)"
    )
    command = [sys.executable, "-I", "-c", code, str(pid), str(what), str(number)]
    return int(subprocess.run(as_user(user, command), check=True, capture_output=True, timeout=30).stdout)


def as_user(user, command):
    """The command, to be run by this user; None for the present one."""
    return command if user is None else [sys.executable, "-c", AS_ANOTHER_USER, str(user), *command]


def lines(worker, pattern):
    """How often the log says something, anywhere in a line."""
    return sum(pattern in line for line in worker.log().splitlines())


def test_descriptors(start_worker, start_method, tally):
    """The worker may open nothing more: that is said, and tried again; running tasks go on."""
    worker = start_worker("faulty", start_method=start_method, concurrency=3)
    gate = worker.gate()
    held = worker.call("faulty.hold", gate.path)
    gate.wait_started()
    taken = processes.descriptors(worker.pid)
    lowest_free = next(number for number in range(len(taken) + 1) if number not in taken)
    before = limit(worker.pid, resource.RLIMIT_NOFILE, lowest_free)
    results = [worker.call("faulty.count", tally.path, str(number)) for number in range(2)]
    worker.wait_for_log("Too many open files")
    limit(worker.pid, resource.RLIMIT_NOFILE, before)
    for result in results:
        worker.get(result)
    assert tally.runs() == {"0": 1, "1": 1}
    gate.open()
    assert worker.get(held) == next(iter(gate.started().values()))
    assert lines(worker, "Too many open files") < 20
    assert worker.stop() == 0


@pytest.fixture
def user():
    """Somebody whose number of processes the kernel limits: not root, and nobody else's user."""
    if os.getuid() != 0:
        return None
    candidate = 40000 + os.getpid() % 20000
    trial = subprocess.run(
        as_user(candidate, [sys.executable, "-c", ""]),
        check=False,
        capture_output=True,
        text=True,
        timeout=30,
    )
    if trial.returncode:
        pytest.skip(f"root that RLIMIT_NPROC does not hold for: {trial.stderr.strip()}")
    return candidate


@pytest.mark.also_start_method("fork")
def test_processes(start_worker, start_method, tally, user):
    """No process may be started: that is said, and tried again; what runs goes on."""
    name = f"scarcity-{os.getpid()}-{start_method}@localhost"
    command = [
        sys.executable, "-m", "celery", "-A", "faulty", "worker", "--pool", POOL, "-c", "3", "-n", name,
        "-l", "INFO", "--without-mingle",
    ]  # fmt: skip

    def prepare(worker):
        worker.hostname = name

    worker = start_worker(
        "faulty", start_method=start_method, command=as_user(user, command), prepare=prepare
    )
    gate = worker.gate()
    held = worker.call("faulty.hold", gate.path)
    child = gate.wait_started()[held.id]
    starters = sorted(worker.pids() - {child})
    before = [limit(pid, resource.RLIMIT_NPROC, 1, user) for pid in starters]
    results = [worker.call("faulty.count", tally.path, str(number)) for number in range(2)]
    worker.wait_for_log("Resource temporarily unavailable")
    for pid, number in zip(starters, before, strict=True):
        if processes.is_alive(pid):
            limit(pid, resource.RLIMIT_NPROC, number, user)
    for result in results:
        worker.get(result)
    assert tally.runs() == {"0": 1, "1": 1}
    gate.open()
    assert worker.get(held) == child
    assert lines(worker, "Resource temporarily unavailable") < 20
    assert worker.stop() == 0


@pytest.mark.parametrize("kind", ["spawn", "forkserver"])
def test_disk(start_worker, kind, tally):
    """A fresh interpreter is told by a file: where none can be made, that is said, and tried again."""

    def prepare(worker):
        (worker.folder / "sitecustomize.py").write_text(FULL_DISK)
        worker.env["PYTHONPATH"] = os.pathsep.join([str(worker.folder), worker.env["PYTHONPATH"]])

    worker = start_worker("faulty", start_method=kind, prepare=prepare)
    worker.run("faulty.count", tally.path, "before")
    (worker.folder / "full").touch()
    if kind == "forkserver":
        processes.kill(worker.stats()["pool"]["memsafe"]["forkserver"])
        worker.wait_for_log("has died")
    processes.kill(*worker.children())
    result = worker.call("faulty.count", tally.path, "after")
    worker.wait_for_log("No space left on device")
    (worker.folder / "full").unlink()
    worker.get(result)
    assert tally.runs() == {"before": 1, "after": 1}
    assert worker.stop() == 0


def test_a_disk_that_stays_full(start_worker):
    """Without end in sight the worker stops, with a line that says why and a status that is not 0."""

    def prepare(worker):
        (worker.folder / "sitecustomize.py").write_text(FULL_DISK)
        (worker.folder / "full").touch()
        worker.env["PYTHONPATH"] = os.pathsep.join([str(worker.folder), worker.env["PYTHONPATH"]])

    worker = start_worker("faulty", start_method="spawn", prepare=prepare)
    worker.call("proj.add", 1, 1)
    worker.wait_for_log("children failed to start 5 times in a row")
    assert worker.wait_exit() not in (0, None)
    assert lines(worker, "No space left on device") >= 5


def test_many_descriptors(start_worker, start_method):
    """With more than 1024 of them open everything goes on, also with a forkserver that is begun again."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if max(soft, hard) < 2000:
        pytest.skip(f"no more than {hard} descriptors may be open here")

    def widen(worker):
        worker.command = ["sh", "-c", 'ulimit -n "$(ulimit -Hn)" && exec "$@"', "sh", *worker.command]

    worker = start_worker("crowded", start_method=start_method, prepare=widen)
    assert worker.run("proj.add", 1, 2) == 3
    if start_method == "forkserver":
        os.kill(worker.stats()["pool"]["memsafe"]["forkserver"], signal.SIGKILL)
    for child in worker.children():
        os.kill(child, signal.SIGKILL)
    assert worker.run("proj.add", 3, 4) == 7
