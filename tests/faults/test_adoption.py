"""Who is reaped while children are made: what tasks have left behind, and nobody else's programs."""

from __future__ import annotations

import os
import resource
import signal
import subprocess

import psutil
import pytest
from harness import processes
from harness.waiting import DEADLINE, until

from memsafe_pool import forkserver, native
from memsafe_pool.start_forkserver import _Adoption

#: Neither reaped elsewhere nor still to be heard of.
NOBODY = (), ()


def mark():
    """In a new process: be one that descends from a forkserver of this process."""
    hard = resource.getrlimit(forkserver._MARKED_LIMIT)[1]
    resource.setrlimit(forkserver._MARKED_LIMIT, (forkserver._MARK + os.getppid(), hard))


@pytest.fixture
def start():
    """Function that starts a child of this process, which waits for its end if nobody else does."""
    started = []

    def start_marked(*, marked):
        child = subprocess.Popen(["sleep", "60"], preexec_fn=mark if marked else None)  # noqa: PLW1509
        started.append(child)
        return child

    yield start_marked
    for child in started:
        child.kill()
        child.wait(DEADLINE)


@pytest.fixture
def adoption():
    adoption = _Adoption()
    adoption.open()
    yield adoption
    adoption.close()


def end(child):
    child.terminate()
    until(lambda: child.pid in processes.zombies(os.getpid()), "its end")


def test_an_orphan_of_a_task(adoption):
    """It has inherited the mark of the forkserver, over fork and exec; it is reaped when it has ended."""
    shell = ["sh", "-c", "sleep 60 > /dev/null & echo $!"]
    # The orphan has another parent than the one that marks itself.
    left = subprocess.run(shell, stdout=subprocess.PIPE, preexec_fn=mark, check=True, timeout=DEADLINE)
    orphan = int(left.stdout)
    assert psutil.Process(orphan).ppid() == os.getpid()
    adoption.reap(*NOBODY)
    adoption.reap(*NOBODY)
    assert processes.is_alive(orphan)
    processes.kill(orphan, number=signal.SIGTERM)
    until(lambda: adoption.reap(*NOBODY) or not psutil.pid_exists(orphan), "the orphan to be reaped")


def test_a_program_of_another_thread(adoption, start):
    """It does not descend from the forkserver: whoever started it gets its exit status, however late."""
    child = start(marked=False)
    end(child)
    for _ in range(3):
        adoption.reap(*NOBODY)
    assert child.wait(DEADLINE) == -signal.SIGTERM


def test_a_child_of_the_pool(adoption, start):
    """It is reaped where its end is acted on."""
    child = start(marked=True)
    end(child)
    for _ in range(3):
        adoption.reap([child.pid], ())
    assert child.wait(DEADLINE) == -signal.SIGTERM


def test_a_child_that_ends_before_its_pid_is_known(adoption, start):
    """The forkserver has still to say who it is."""
    child = start(marked=True)
    end(child)
    adoption.reap((), [7])
    adoption.reap((), [7, 8])
    adoption.reap([child.pid], [8])
    adoption.reap([child.pid], ())
    assert child.wait(DEADLINE) == -signal.SIGTERM


def test_a_child_of_which_nobody_will_ever_hear(adoption, start):
    """The forkserver has died over it."""
    child = start(marked=True)
    end(child)
    adoption.reap((), [7])
    assert psutil.pid_exists(child.pid)
    adoption.reap((), ())
    assert not psutil.pid_exists(child.pid)


def test_the_flag_is_as_it_was():
    """A program that adopts orphans itself goes on to do so."""
    adoption = _Adoption()
    for before in (True, False):
        native.set_child_subreaper(before)
        adoption.open()
        assert native.get_child_subreaper()
        adoption.close()
        assert native.get_child_subreaper() is before
