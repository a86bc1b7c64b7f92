"""Descriptors, processes or disk run out: the worker says so, goes on, and recovers when there is room."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys

import pytest
from harness import processes
from harness.controllers import controlled
from harness.worker import POOL

#: Rounds of starts after which a worker stops when something is wrong.
MAX_FAILED_ROUNDS = 5

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

#: A module that the interpreter imports by itself: no file without a name can be made when the disk is full,
#: and none in memory.
FULL_DISK = """
import errno, os, tempfile
from pathlib import Path

if hasattr(os, "memfd_create"):
    del os.memfd_create

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


#: What is said once when there is room for no more children.
NO_ROOM = "The system has no room for more children"


def test_few_descriptors_from_the_beginning(start_worker, start_method):
    """With 64 of them and ``-c 20`` as many children run as there are descriptors for; some are left over."""

    def narrow(worker):
        worker.command = ["sh", "-c", 'ulimit -n 64 && exec "$@"', "sh", *worker.command]

    worker = start_worker("faulty", start_method=start_method, concurrency=20, prepare=narrow)
    gate = worker.gate()
    results = [worker.call("faulty.hold", gate.path) for _ in range(20)]
    worker.wait_for_log(NO_ROOM)
    worker.until(lambda: len(gate.started()) >= 4, "some tasks to run")
    assert len(processes.descriptors(worker.pid)) <= 64 - 8
    assert worker.inspect("ping") == {"ok": "pong"}
    gate.open()
    for result in results:
        worker.get(result)
    assert lines(worker, NO_ROOM) == 1
    assert worker.stop() == 0


def test_descriptors_of_the_forkserver(start_worker):
    """It has no number for the socket of a child: that is said, and tried again."""
    worker = start_worker("faulty", start_method="forkserver")
    worker.run("proj.add", 1, 2)
    forkserver = worker.stats()["pool"]["memsafe"]["forkserver"]
    taken = processes.descriptors(forkserver)
    lowest_free = next(number for number in range(len(taken) + 1) if number not in taken)
    before = limit(forkserver, resource.RLIMIT_NOFILE, lowest_free)
    processes.kill(*worker.children())
    result = worker.call("proj.add", 3, 4)
    worker.wait_for_log(NO_ROOM + ".*Too many open files")
    limit(forkserver, resource.RLIMIT_NOFILE, before)
    assert worker.get(result) == 7
    assert worker.stop() == 0


@pytest.fixture
def few_processes(outlasting):
    """A cgroup that limits how many processes and threads there are in it."""
    return outlasting.enter_context(controlled("pids"))


@pytest.mark.also_start_method("fork")
def test_room_for_few_children(start_worker, start_method, few_processes):
    """They run all tasks, however often more are refused, which is said once; with room there are more."""
    worker = start_worker(
        "faulty", start_method=start_method, concurrency=8, prepare=few_processes.hold, loglevel="DEBUG"
    )
    few_processes.write("pids.max", int((few_processes.folder / "pids.current").read_text()) + 4)
    gate = worker.gate()
    held = [worker.call("faulty.hold", gate.path) for _ in range(9)]
    worker.wait_for_log(NO_ROOM)
    worker.until(lambda: len(gate.started()) >= 3, "three tasks to run")
    # Of the first round there may be one or five, then there is one in each.
    worker.wait_for_log("failed to start: .*Resource temporarily unavailable", count=MAX_FAILED_ROUNDS + 1)
    assert 3 <= len(gate.started()) <= 4
    children = set(worker.children())
    few_processes.write("pids.max", "max")
    worker.wait_for_log("There is room for more children again")
    worker.until(lambda: len(gate.started()) == 8, "the others to run")
    assert children < set(worker.children())
    gate.open()
    for result in held:
        worker.get(result)
    assert lines(worker, NO_ROOM) == 1
    assert worker.stop() == 0


def test_no_room_from_the_beginning(start_worker, few_processes):
    """Not even for a thread or the forkserver: the worker is there, and runs tasks when there is room."""
    few_processes.write("pids.max", 1)
    worker = start_worker("faulty", prepare=few_processes.hold)
    assert lines(worker, "Running tasks are not paused while no thread watches memory") == 1
    result = worker.call("proj.add", 1, 2)
    worker.wait_for_log(NO_ROOM)
    few_processes.write("pids.max", "max")
    assert worker.get(result) == 3
    assert worker.stop() == 0


def test_no_room_for_a_single_child(start_worker, start_method, few_processes):
    """It is tried again for longer than when something is wrong, and then goes on as if nothing had been."""
    worker = start_worker("faulty", start_method=start_method, prepare=few_processes.hold, loglevel="DEBUG")
    few_processes.write("pids.max", 1)
    result = worker.call("proj.add", 1, 2)
    worker.wait_for_log("failed to start: .*Resource temporarily unavailable", count=MAX_FAILED_ROUNDS)
    few_processes.write("pids.max", "max")
    assert worker.get(result) == 3
    assert lines(worker, NO_ROOM) == 1
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

    # With an environment of its own the forkserver is a fresh interpreter each time.
    config = {"memsafe_child_env": {"A": "1"}}
    worker = start_worker("faulty", start_method=kind, config=config, prepare=prepare)
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
