"""The tasks most tests use.  Settings come from the JSON in ``TEST_CONFIG``."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import errors
import folders  # noqa: F401  # makes the broker url folders:// known
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

from memsafe_pool.memory import resident_bytes

app = Celery("proj")
app.conf.update(json.loads(os.environ.get("TEST_CONFIG", "{}")))

kept: list[object] = []

MIB = 1024 * 1024


# Results


@app.task
def add(x, y):
    return x + y


@app.task
def total(numbers):
    return sum(numbers)


@app.task
def echo(value):
    return value


@app.task
def length(value):
    return len(value)


@app.task
def text(size):
    return "x" * size


@app.task
def pid():
    return os.getpid()


@app.task
def sleep(seconds):
    time.sleep(seconds)
    return os.getpid()


@app.task
def now():
    return time.time()


@app.task
def note(path, value):
    """Write a line to a file that all children share."""
    with open(path, "a") as lines:
        lines.write(f"{value}\n")
    return value


@app.task
def lock():
    """Return what cannot leave the process."""
    return threading.Lock()


@app.task(ignore_result=True)
def lock_ignored(mark):
    """Return what cannot leave the process and need not."""
    Path(mark).touch()
    return threading.Lock()


# Waiting


def stop_at(task, gate):
    """Say that the task has started, and wait until the gate is open."""
    folder = Path(gate)
    mark = folder / f"{task.request.id}.started"
    mark.with_suffix(".new").write_text(str(os.getpid()))
    mark.with_suffix(".new").replace(mark)
    while not (folder / "open").exists():
        time.sleep(0.01)


@app.task(bind=True)
def hold(self, gate):
    """Wait at a gate; the pid of the child is the result."""
    stop_at(self, gate)
    return os.getpid()


@app.task(bind=True)
def hold_and_return(self, gate, size):
    """Wait at a gate; the result has so many characters."""
    stop_at(self, gate)
    return size * "x"


@app.task(bind=True, acks_late=True)
def hold_late(self, gate):
    """Wait at a gate, with the message not acknowledged."""
    stop_at(self, gate)
    return os.getpid()


@app.task(bind=True, rate_limit="2/s")
def rare(self):
    return time.time()


# Time limits


@app.task(bind=True)
def hold_through_soft_limit(self, gate):
    """Wait at a gate; a soft time limit ends the wait and is the result."""
    try:
        stop_at(self, gate)
    except SoftTimeLimitExceeded:
        return "caught"
    return "not limited"


@app.task(bind=True)
def ignore_soft_limit(self, gate):
    """Wait at a gate, whatever the soft limit says."""
    while True:
        try:
            return stop_at(self, gate)
        except SoftTimeLimitExceeded:
            continue


@app.task(bind=True, time_limit=1)
def hold_limited(self, gate):
    """Wait at a gate, one second at most."""
    stop_at(self, gate)


@app.task(bind=True, soft_time_limit=1)
def hold_softly_limited(self, gate):
    """Wait at a gate, one second at most."""
    stop_at(self, gate)


# Failures


@app.task
def fail(name, *args, **kwargs):
    """Raise an exception of the module ``errors``, or a built-in one."""
    kind = getattr(errors, name, None) or getattr(__import__("builtins"), name)
    raise kind(*args, **kwargs)


@app.task
def fail_big(size):
    raise errors.Big("x" * size)


@app.task(acks_late=True)
def out_of_memory_late(text):
    raise MemoryError(text)


@app.task
def allocate(size):
    """Fail at a real allocation."""
    return len(bytearray(size))


@app.task
def leave(code):
    sys.exit(code)


@app.task
def die(number=signal.SIGKILL):
    os.kill(os.getpid(), number)
    time.sleep(60)


@app.task
def vanish(code):
    os._exit(code)


def die_once(mark):
    """End the child at the first run, return at the second."""
    path = Path(mark)
    runs = int(path.read_text()) + 1 if path.exists() else 1
    path.write_text(str(runs))
    if runs == 1:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)
    return runs


@app.task(acks_late=True, reject_on_worker_lost=True)
def die_once_rejected(mark):
    return die_once(mark)


@app.task(retry_on_worker_lost=True, max_retries=3, default_retry_delay=0)
def die_once_retried(mark):
    return die_once(mark)


@app.task(retry_on_worker_lost=True, max_retries=1, default_retry_delay=0)
def die_always_retried(mark):
    """Count the runs and end the child, each time."""
    with open(mark, "a") as runs:
        runs.write("x")
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


# Retries


@app.task(bind=True, max_retries=3)
def third_time(self):
    """Succeed at the third try, asking for the others itself."""
    if self.request.retries < 2:
        raise self.retry(countdown=0)
    return self.request.retries


@app.task(bind=True, autoretry_for=(ValueError,), retry_backoff=False, default_retry_delay=0, max_retries=3)
def third_time_by_itself(self):
    if self.request.retries < 2:
        raise ValueError("not yet")
    return self.request.retries


@app.task(bind=True, autoretry_for=(ValueError,), default_retry_delay=0, max_retries=2)
def never(self):
    raise ValueError(f"run {self.request.retries}")


# Memory


@app.task
def keep(mib):
    """Grow by this much, for good; the pid is the result."""
    kept.append(bytearray(b"x") * (mib * MIB))
    return os.getpid()


@app.task
def load(mib):
    """Have this much from the first time on, as of a model that is loaded once; the pid is the result."""
    if not kept:
        keep(mib)
    return os.getpid()


@app.task
def peak(mib):
    """Grow by this much, and give it back before the end."""
    block = bytearray(b"x") * (mib * MIB)
    del block
    return os.getpid()


@app.task
def small_blocks(mib, keep=0):
    """Take this much in blocks of 752 bytes of the C heap; keep one of so many for good."""
    blocks = [None] * (mib * MIB // 760)
    for at in range(len(blocks)):
        blocks[at] = bytes(700)
    if keep:
        kept.append(blocks[::keep])
    return os.getpid()


@app.task
def buffers(count, mib):
    """Take so many blocks of this size at once, and free them, twice; resident memory before and after.

    What is taken after the blocks and stays keeps them from being at the end of the heap.
    """
    before = resident_bytes()
    for _ in range(2):
        blocks = [bytearray(b"x") * (mib * MIB) for _ in range(count)]
        kept.append([bytes(100_000) for _ in range(20)])
        del blocks
    return before, resident_bytes()


@app.task
def faults(mib, rounds):
    """Take three blocks of this size and free them, again and again; page faults of all rounds."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        blocks = [bytearray(b"x") * (mib * MIB) for _ in range(3)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@app.task(bind=True)
def hold_grown(self, gate, mib):
    """Grow by this much, and wait for the gate."""
    block = bytearray(b"x") * (mib * MIB)
    stop_at(self, gate)
    return len(block)


# Processes


@app.task
def run(*command):
    """Run a program from the task."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout
