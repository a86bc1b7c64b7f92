"""Orphans that the worker adopts while its forkserver makes children: real processes, reaped without fail."""

from __future__ import annotations

import os
import signal
import subprocess

import psutil
import pytest
from harness import processes
from harness.waiting import until

from memsafe_pool import native
from memsafe_pool.start_forkserver import _Adoption


@pytest.fixture
def orphans():
    """Function that leaves a process without a parent, and the pids of those that it has left."""
    pids = []

    def leave():
        shell = subprocess.run(
            ["sh", "-c", "sleep 60 > /dev/null & echo $!"], stdout=subprocess.PIPE, check=True, timeout=10
        )
        pids.append(int(shell.stdout))

    yield leave, pids
    processes.kill(*(pid for pid in pids if psutil.pid_exists(pid)))


@pytest.mark.parametrize("as_it", ["begins", "ends"])
def test_an_orphan_that_comes_at_the_last_moment(monkeypatch, orphans, as_it):
    """It is one of those that are reaped, however close to the switch it comes."""
    leave, pids = orphans
    switch = native.set_child_subreaper

    def switch_and_leave(on):
        if not on and as_it == "ends":
            leave()
        switch(on)
        if on and as_it == "begins":
            leave()

    monkeypatch.setattr(native, "set_child_subreaper", switch_and_leave)
    adoption = _Adoption()
    adoption.open()
    adoption.close(known=[])
    [pid] = pids
    assert psutil.Process(pid).ppid() == os.getpid()
    processes.kill(pid, number=signal.SIGTERM)
    until(lambda: adoption.reap() or not psutil.pid_exists(pid), "the orphan to be reaped")


def test_who_waits_for_a_child_gets_its_status():
    """A child that another thread has started meanwhile looks like an orphan; it is not taken from that."""
    adoption = _Adoption()
    adoption.open()
    with subprocess.Popen(["sleep", "60"]) as child:
        adoption.close(known=[])
        child.terminate()
        until(lambda: child.pid in processes.zombies(os.getpid()), "its end")
        adoption.reap()
        assert child.wait(10) == -signal.SIGTERM
    adoption.reap()
    assert not adoption._orphans


def test_those_that_are_known_are_left_to_others():
    """Children from before, and children of the pool, are waited for by those that started them."""
    adoption = _Adoption()
    with subprocess.Popen(["sleep", "60"]) as before:
        adoption.open()
        with subprocess.Popen(["sleep", "60"]) as during:
            adoption.close(known=[during.pid])
            for child in (before, during):
                child.terminate()
                until(lambda child=child: child.pid in processes.zombies(os.getpid()), "its end")
                adoption.reap()
                assert child.wait(10) == -signal.SIGTERM
