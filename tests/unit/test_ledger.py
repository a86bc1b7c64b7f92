"""The worker's account of memory, on real processes without a pool."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from memsafe_pool.fleet import Child, Fleet, State
from memsafe_pool.job import Job
from memsafe_pool.ledger import Ledger
from memsafe_pool.memory import anonymous_bytes, private_bytes
from memsafe_pool.wire import Report

MIB = 1 << 20


class NoSocket:
    """Stands for the worker's end of a socket: nothing is sent here."""

    def setblocking(self, flag):
        pass


@pytest.fixture
def fleet():
    return Fleet()


@pytest.fixture
def add(fleet):
    def add(state, pid=0, **report):
        child = Child("child", 0, NoSocket(), born=time.monotonic(), generation=3, start_method="spawn")
        fleet.add(child)
        child.pid, child.report = pid, Report(**report)
        if state is not State.STARTING:
            fleet.move(child, state)
        return child

    return add


@pytest.fixture
def process():
    """A process that takes so many MiB, again and again."""
    code = (
        "import sys; kept = []\n"
        "for line in sys.stdin: kept.append(bytearray(int(line) << 20)); print(flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:

        def grow(mib):
            process.stdin.write(b"%d\n" % mib)
            process.stdin.flush()
            assert process.stdout.readline() == b"\n"
            return process.pid

        yield grow
        process.kill()


def test_an_idle_child_has_what_it_said(fleet, add):
    """Its process is not looked at: there need not even be one."""
    child = add(State.IDLE, pid=2**22 + 1, private=5 * MIB)
    assert Ledger(fleet).private_bytes(child) == 5 * MIB


def test_a_busy_child_has_grown_since(fleet, add, process):
    """What it has taken since its last report counts now."""
    pid = process(10)
    child = add(State.BUSY, pid=pid, private=private_bytes(pid), anonymous=anonymous_bytes(pid))
    before = Ledger(fleet).private_bytes(child)
    process(40)
    assert abs(Ledger(fleet).private_bytes(child) - before - 40 * MIB) < MIB


def test_a_starting_child_is_looked_at(fleet, add, process):
    """It has said nothing yet."""
    assert Ledger(fleet).private_bytes(add(State.STARTING)) == 0
    assert Ledger(fleet).private_bytes(add(State.STARTING, pid=process(30))) > 30 * MIB


@pytest.mark.parametrize("state", [State.BUSY, State.LEAVING])
def test_a_dead_child_counts_until_it_is_reaped(fleet, add, state):
    """A process that is not there any more has what it said last, until the worker has taken leave of it."""
    ledger, child = Ledger(fleet), add(state, pid=2**22 + 1, private=7 * MIB)
    assert ledger.account(None).children == 7 * MIB
    fleet.move(child, State.GONE)
    assert ledger.account(None).children == 0


def test_what_a_task_had_counts_until_its_child_is_reaped(fleet, add, process):
    """Whether the child was made to go in the middle of it, or has ended by itself and is a zombie."""
    ledger, child = Ledger(fleet), add(State.BUSY, pid=process(30), private=7 * MIB, anonymous=8 * MIB)
    child.job = Job(len, ("x",), {})
    child.job.grown = 40 * MIB
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert ledger.private_bytes(child) == 47 * MIB
    fleet.move(child, State.LEAVING)
    assert child.private_bytes == ledger.private_bytes(child) == 47 * MIB


def test_the_forkservers_memory_counts_once(fleet, add, process):
    """All of the forkserver, and of the worker what is its own; without a forkserver all of the worker."""
    add(State.IDLE, private=3 * MIB)
    ledger, pid = Ledger(fleet), process(20)
    alone, with_forkserver = ledger.account(None), ledger.account(pid)
    assert abs(alone.worker - anonymous_bytes()) < 2 * MIB
    assert alone.forkserver == 0
    assert abs(with_forkserver.forkserver - anonymous_bytes(pid)) < MIB
    assert with_forkserver.total == with_forkserver.worker + with_forkserver.forkserver + 3 * MIB


def test_a_forkserver_that_has_just_died(fleet):
    """Its memory is nobody's, and the worker shares with nobody."""
    account = Ledger(fleet).account(2**22 + 1)
    assert account.forkserver == 0
    assert abs(account.worker - anonymous_bytes()) < 2 * MIB


def test_the_table(fleet, add):
    """A row says what a child is, what it has, and what it runs since when."""
    ledger, child = Ledger(fleet), add(State.IDLE, pid=2**22 + 1)
    child.first_private_bytes = MIB
    ledger.ended(child, "task", Report(9, 8, 7 * MIB, 60, 5, 4))
    ledger.ended(child, "task", Report(9, 8, 7 * MIB, 50, 5, 4))
    ledger.trimmed(child, Report(9, 8, 7 * MIB, 0, 0, 4), 11)
    [row] = ledger.table()
    assert row.pop("age") < 10
    assert row == {
        "pid": child.pid,
        "state": "idle",
        "start_method": "spawn",
        "generation": 3,
        "tasks": 0,
        "rss": 9,
        "private": 7 * MIB,
        "private_growth": 6 * MIB,
        "peak": 5,
        "peak_rss": 60,
        "trimmable": 4,
        "trims": 1,
        "trimmed": 11,
        "task": None,
        "task_id": None,
        "running": None,
    }
    child.job = Job(len, ("x",), {}, correlation_id="id")
    assert [ledger.table()[0][key] for key in ("task", "task_id", "running")] == ["len", "id", None]
    child.job.accepted_at = time.monotonic() - 2
    assert 2 <= ledger.table()[0]["running"] < 10


def test_what_is_won_is_added_up(fleet, add):
    """Also of children that are gone since."""
    ledger = Ledger(fleet)
    for won in (5, 6):
        ledger.trimmed(add(State.IDLE), Report(), won)
    assert (ledger.trims, ledger.trimmed_bytes) == (2, 11)
