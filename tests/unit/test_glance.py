"""Whether nothing has changed, in a process of its own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from memsafe_pool.expense import Expense

PRELUDE = """
import mmap, os, resource, sys
from memsafe_pool import native
from memsafe_pool.glance import Glance

MIB = 1 << 20
glance = Glance(MIB // 2)

def settle():
    # Lets the first calls have what they need for themselves.
    for _ in range(10):
        glance.remember(native.measure())
        if glance.unchanged():
            return
    raise AssertionError("there is no rest")
"""

#: A forked copy has a peak counter of its own; that of what was executed is not shown below its parent's.
IN_A_FORK = """
pid = os.fork()
if pid:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.fixture(params=["forked", "executed"])
def run(request):
    """Run a script with a peak counter that getrusage shows, and one that may be below what it shows."""

    def call(code):
        prelude = PRELUDE + (IN_A_FORK if request.param == "forked" else "")
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", prelude + textwrap.dedent(code)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return call


def test_nothing_has_changed(run):
    """As long as nothing is done; before anything was remembered that is not known."""
    run("""
        assert not glance.unchanged()
        settle()
        assert all([glance.unchanged() for _ in range(20)])
    """)


def test_growth_is_a_change(run):
    """Also when it has gone again, and so shows in the peak only."""
    run("""
        settle()
        kept = bytearray(b"x") * (4 * MIB)
        assert not glance.unchanged()
        settle()
        bytearray(b"x") * (40 * MIB)
        assert not glance.unchanged()
    """)


def test_what_is_given_back_is_a_change(run):
    """There is no page fault in that."""
    run("""
        kept = mmap.mmap(-1, 4 * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        kept.write(b"x" * len(kept))
        settle()
        kept.close()
        assert not glance.unchanged()
    """)


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are seen on Linux")
def test_many_page_faults_are_a_change(run):
    """Writing to pages that a fork shares leaves resident memory as it was."""
    run("""
        model = bytearray(b"x") * (4 * MIB)
        pid = os.fork()
        if pid:
            sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        settle()
        for at in range(0, 3 * MIB, 4096):
            model[at] = 1
        assert not glance.unchanged()
    """)


@pytest.mark.skipif(sys.platform != "linux", reason="keeps a descriptor on Linux only")
def test_whoever_takes_the_descriptor_is_noticed(run):
    """Closed, or another file by now: that is a change, and the next time there is a new descriptor."""
    run("""
        settle()
        first = glance._descriptor
        if first >= 0:  # else statm is not used here
            os.close(first)
            assert not glance.unchanged()
            settle()
            with open("/proc/self/cmdline") as other:
                taken = glance._descriptor
                os.dup2(other.fileno(), taken)
                assert not glance.unchanged()
                settle()
                assert os.path.sameopenfile(other.fileno(), taken)  # what is not ours is not closed
            os.close(taken)
            before = os.listdir("/proc/self/fd")
            for _ in range(50):
                settle()
            assert os.listdir("/proc/self/fd") == before
    """)


@pytest.mark.skipif(sys.platform != "linux", reason="needs a descriptor on Linux only")
def test_without_a_descriptor_left(run):
    """Nothing is known, and nothing is raised."""
    run("""
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
        taken = []
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        glance.remember(native.Measures(0, 0, 0, 0))
        assert not glance.unchanged()
    """)


def test_what_is_dear_is_kept_to_a_share(monkeypatch):
    """What was spent is earned again, at 0.5 % of the CPU time and 0.02 % of the time of day."""
    from memsafe_pool import expense

    clock = {"cpu": 0.0, "now": 0.0}
    monkeypatch.setattr(expense.time, "process_time", lambda: clock["cpu"])
    monkeypatch.setattr(expense.time, "monotonic", lambda: clock["now"])
    kept = Expense(allowance=0.01, delay=1.0)
    assert not kept.allowed()
    clock["now"] = 1.0
    assert kept.allowed()
    with kept.spend():
        clock["cpu"] += 0.02
    assert not kept.allowed()
    clock.update(cpu=1.0, now=2.0)
    assert not kept.allowed()  # 0.0002 + 0.0049 + 0.0002 s of the 0.01 that are to be earned
    clock.update(cpu=3.0, now=4.0)
    assert kept.allowed()
    clock.update(cpu=1000.0, now=4000.0)
    with kept.spend():
        clock["cpu"] += 0.015
    assert not kept.allowed()  # no more than the allowance had been saved up
