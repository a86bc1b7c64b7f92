"""Tasks that do what no task should, for the tests of faults."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import types
from importlib import import_module
from pathlib import Path

from celery import Celery
from errors import Big
from proj import stop_at

app = Celery("faulty")
app.conf.update(json.loads(os.environ.get("TEST_CONFIG", "{}")))


if "FAULTY_THREAD" in os.environ:
    threading.Thread(target=threading.Event().wait, daemon=True).start()


@app.task
def count(path, value):
    """Write a line to a file that all children share, in one write; the pid is the result."""
    with open(path, "ab", buffering=0) as lines:
        lines.write(f"{value} {os.getpid()}\n".encode())
    return os.getpid()


@app.task
def count_length(path, value):
    """As ``count``, with the length of a large argument."""
    count(path, len(value))
    return len(value)


@app.task(bind=True)
def hold(self, gate):
    stop_at(self, gate)
    return os.getpid()


@app.task(bind=True, acks_late=True, reject_on_worker_lost=True)
def hold_rejected(self, gate):
    stop_at(self, gate)
    return os.getpid()


@app.task
def work(path, value, seconds):
    """Say that it runs, take a while, say that it has ended."""
    with open(path, "ab", buffering=0) as lines:
        lines.write(f"began {value} {os.getpid()}\n".encode())
        time.sleep(seconds)
        lines.write(f"ended {value} {os.getpid()}\n".encode())
    return value


@app.task
def status_of(command):
    """Exit status of a program."""
    return subprocess.run(command, check=False).returncode


# Ways to end


@app.task
def close_descriptors():
    """Close everything but the standard streams."""
    os.closerange(3, 4096)
    return "went on"


@app.task
def close_descriptors_and_hold(gate):
    """Close everything but the standard streams and take no notice of SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.closerange(3, 4096)
    while not (Path(gate) / "open").exists():
        time.sleep(0.01)


@app.task(bind=True)
def hold_through_sigterm(self, gate):
    """Wait at a gate and take no notice of SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stop_at(self, gate)


# Processes that tasks leave behind


@app.task
def leave_grandchild(gate, code=None):
    """Leave a process that has all of the child's descriptors until the gate opens; its pid is the result.

    With ``code`` the child ends with that instead.
    """
    pid = os.fork()
    if pid == 0:
        for name in ("SIGTERM", "SIGHUP", "SIGINT"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        while not (Path(gate) / "open").exists():
            time.sleep(0.01)
        os._exit(0)
    if code is not None:
        os._exit(code)
    return pid


@app.task
def leave_orphans(number, seconds):
    """Leave processes whose parent has ended; their pids are the result."""
    pids = []
    for _ in range(number):
        reader, writer = os.pipe()
        middle = os.fork()
        if middle == 0:
            orphan = os.fork()
            if orphan == 0:
                os.closerange(3, 4096)
                time.sleep(seconds)
                os._exit(0)
            os.write(writer, str(orphan).encode())
            os._exit(0)
        os.waitpid(middle, 0)
        pids.append(int(os.read(reader, 20)))
        os.close(reader)
        os.close(writer)
    return pids


@app.task
def run_program(code, *arguments):
    """Run a Python program; its exit status is the result."""
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], check=False).returncode


@app.task
def return_twice(path):
    """Fork and let both processes return."""
    os.fork()
    with open(path, "ab", buffering=0) as lines:
        lines.write(f"{os.getpid()}\n".encode())
    return os.getpid()


# Results


@app.task(bind=True)
def fail_big(self, gate, size):
    """Wait at a gate, then fail with much to say."""
    stop_at(self, gate)
    raise Big("x" * size)


@app.task
def raise_what_only_this_process_knows():
    """Raise an exception of a module that exists in this child alone."""
    module = types.ModuleType("made_here")
    exec("class Strange(Exception): pass", vars(module))
    module.Strange.__module__ = "made_here"
    sys.modules["made_here"] = module
    raise module.Strange("who knows me?")


@app.task
def value_of(name):
    """What ``module.name`` is in this child; the name of the error where there is none."""
    module, _, attribute = name.rpartition(".")
    try:
        return getattr(import_module(module), attribute)
    except AttributeError as error:
        return type(error).__name__
