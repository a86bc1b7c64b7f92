"""Signals to real processes: they reach the child, or its group, and never who has its pid after it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess

import pytest
from harness import processes
from harness.waiting import DEADLINE, until

from memsafe_pool import signals

SYSTEMS = ["by pidfd", "before Linux 6.9", "refused", "without pidfds"]


@pytest.fixture(params=SYSTEMS)
def system(monkeypatch, request):
    """What the system lets us do."""
    send = signal.pidfd_send_signal

    def send_to_one(pidfd, signum, siginfo=None, flags=0):
        if flags:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        send(pidfd, signum)

    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if request.param == "before Linux 6.9":
        monkeypatch.setattr(signal, "pidfd_send_signal", send_to_one)
    elif request.param == "refused":
        monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    elif request.param == "without pidfds":
        monkeypatch.setattr(os, "pidfd_open", refuse)
    return request.param


@pytest.fixture
def start():
    """Function that starts a program; it is ended after the test."""
    started, pidfds = [], []

    def started_with_pidfd(*command, **options):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
        started.append(process)
        pidfds.append(signals.open_pidfd(process.pid))
        return process, pidfds[-1]

    yield started_with_pidfd
    for process in started:
        process.kill()
        process.communicate(timeout=DEADLINE)
    for pidfd in pidfds:
        if pidfd >= 0:
            os.close(pidfd)


#: Starts another program, says its pid, and waits for it.
PARENT = ("sh", "-c", "sleep 60 >/dev/null & echo $!; wait")


def ends(pid):
    until(lambda: not processes.is_alive(pid), f"the end of {pid}")


def test_a_child_gets_it(system, start):
    """And nobody else."""
    (one, pidfd), (other, _) = start("sleep", "60"), start("sleep", "60")
    assert signals.send(one.pid, pidfd, signal.SIGTERM)
    assert one.wait(DEADLINE) == -signal.SIGTERM
    assert processes.is_alive(other.pid)


def test_all_of_its_group_get_it(system, start):
    """Where it leads one."""
    parent, pidfd = start(*PARENT, start_new_session=True)
    below = int(parent.stdout.readline())
    assert signals.send_to_group(parent.pid, pidfd, signal.SIGTERM)
    assert parent.wait(DEADLINE) == -signal.SIGTERM
    ends(below)


def test_who_leads_no_group_gets_it_alone(system, start):
    """The group it is in is ours."""
    parent, pidfd = start(*PARENT)
    below = int(parent.stdout.readline())
    try:
        assert signals.send_to_group(parent.pid, pidfd, signal.SIGTERM)
        assert parent.wait(DEADLINE) == -signal.SIGTERM
        assert processes.is_alive(below)
    finally:
        processes.kill(below)


@pytest.mark.parametrize("system", SYSTEMS[:-1], indirect=True)
@pytest.mark.parametrize("send", [signals.send, signals.send_to_group])
def test_who_has_its_pid_later_does_not_get_it(monkeypatch, system, start, send):
    """Somebody else has reaped it: with a pidfd nothing is sent to the number that it had."""
    process, pidfd = start("true")
    process.wait(DEADLINE)
    used = []
    for name in ("kill", "killpg"):
        monkeypatch.setattr(os, name, lambda *arguments: used.append(arguments))
    assert not send(process.pid, pidfd, signal.SIGTERM)
    assert not used
