"""Sockets that an app answers on: metrics, health checks."""

from __future__ import annotations

import os
import signal
import socket

import pytest


def answers(worker, name):
    """Whether somebody answers on the socket of this name."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        try:
            sock.connect(os.path.relpath(worker.folder / name))  # an absolute path may be too long
            return sock.recv(10) == b"well"
        except (FileNotFoundError, ConnectionRefusedError):
            return False


@pytest.mark.ours_only("children start when tasks wait")
def test_a_child_answers_when_there_is_one(start_worker, start_method):
    """Its socket is there from its start on, and not with the worker, which answers all the time."""
    worker = start_worker("serving", start_method=start_method)
    worker.until(lambda: answers(worker, "worker"), "the worker to answer")
    assert not answers(worker, "child-0")
    worker.run("witness.place")
    assert answers(worker, "child-0")
    assert answers(worker, "worker")


def test_all_children_answer_all_the_time(start_worker, start_method):
    """With ``memsafe_min_children`` as high as the concurrency, as under prefork; and if one was killed."""
    worker = start_worker("serving", start_method=start_method, config={"memsafe_min_children": 2})
    for name in ("child-0", "child-1"):
        worker.until(lambda name=name: answers(worker, name), f"{name} to answer, without a task")
    os.kill(worker.run("witness.place")["pid"], signal.SIGKILL)
    worker.wait_for_log(r"exited with 'signal 9 \(SIGKILL\)'")
    for name in ("child-0", "child-1"):
        worker.until(lambda name=name: answers(worker, name), f"{name} to answer again")
