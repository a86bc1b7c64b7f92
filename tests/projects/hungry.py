"""Tasks that need memory, as much and when the test says."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import shutil
import time
from pathlib import Path

import folders  # noqa: F401  # makes the broker url folders:// known
from celery import Celery
from celery.exceptions import SoftTimeLimitExceeded

app = Celery("hungry")
app.conf.update(json.loads(os.environ.get("TEST_CONFIG", "{}")))

MIB = 1 << 20

#: Seconds for each MiB: slow enough for a worker that waits for its turn on a machine with much to do.
PACE = 0.02

#: What tasks keep for ever.
kept = []


def grow(blocks, mib, pace=PACE):
    """Have so much memory; in steps, as one that works on what it reads."""
    while len(blocks) < mib:
        blocks.append(bytearray(b"x") * MIB)
        time.sleep(pace)


def write(path, *words):
    """Append a line, in one write."""
    with open(path, "ab", buffering=0) as lines:
        lines.write((" ".join(map(str, words)) + "\n").encode())


def have(path, value, mib, seconds):
    write(path, "began", value, os.getpid(), time.monotonic())
    blocks = []
    grow(blocks, mib)
    time.sleep(seconds)
    write(path, "ended", value, os.getpid(), time.monotonic())
    return value


@app.task
def need(path, value, mib, seconds=0.1):
    """Have so much memory for so long, and write when that begins and ends."""
    return have(path, value, mib, seconds)


@app.task
def read(path, times):
    """Read a file, so often."""
    for _ in range(times):
        with open(path, "rb", buffering=0) as file:
            while file.read(MIB):
                pass


@app.task
def use_model(path):
    """Map a file for good, and look at all of it twice."""
    with open(path, "rb") as file:
        kept.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
    for _ in range(2):
        sum(kept[-1][::4096])


@app.task
def miss(count):
    """Look for files that are not there; the kernel remembers each, in half a KB."""
    for number in range(count):
        os.path.exists(f"/sys/kernel/{os.getpid()}-{number:0>200}")


@app.task
def write_on(path, mib, end):
    """Write a file of so many MiB again and again, until there is a file ``end``."""
    while not os.path.exists(end):
        with open(path, "wb", buffering=0) as file:
            file.writelines(bytes(MIB) for _ in range(mib))


@app.task
def have_file(path, mib, end):
    """Have a file of so many MiB, until there is a file ``end``."""
    try:
        with open(path, "wb", buffering=0) as file:
            file.writelines(bytes(MIB) for _ in range(mib))
        while not os.path.exists(end):
            time.sleep(0.01)
    finally:
        os.unlink(path)


@app.task
def spool(path, value, file, mib, pace=PACE):
    """Have a file of so many MiB, and then only a copy of it elsewhere, for a moment."""
    write(path, "began", value, os.getpid(), time.monotonic())
    copy = f"{path}-{value}"
    try:
        with open(file, "wb", buffering=0) as written:
            for _ in range(mib):
                written.write(bytes(MIB))
                time.sleep(pace)
        shutil.copyfile(file, copy)
    finally:
        for made in (file, copy):
            Path(made).unlink(missing_ok=True)
    write(path, "ended", value, os.getpid(), time.monotonic())


@app.task
def locked(path, value, lock, mib, before=0.0):
    """Need so much memory while it has a lock, for which it asks after so many seconds."""
    write(path, "began", value, os.getpid(), time.monotonic())
    time.sleep(before)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        grow([], mib)
    write(path, "ended", value, os.getpid(), time.monotonic())


@app.task
def whole(path, mib, parts, part_mib):
    """Have so much memory, and wait for tasks that need some, too; they are numbered from 1."""
    blocks = []
    grow(blocks, mib)
    results = [need.delay(path, number + 1, part_mib) for number in range(parts)]
    for result in results:
        result.get(timeout=60, disable_sync_subtasks=False)


@app.task
def need_later(path, value, mib, seconds):
    """Need so much memory after so many seconds."""
    write(path, "began", value, os.getpid(), time.monotonic())
    time.sleep(seconds)
    grow([], mib)
    write(path, "ended", value, os.getpid(), time.monotonic())


@app.task(bind=True, max_retries=1)
def need_again(self, path, value, mib, seconds=0.1):
    """As ``need``, and it fails the first time; the retry writes another number."""
    have(path, value + 100 * self.request.retries, mib, seconds)
    if not self.request.retries:
        raise self.retry(countdown=0)
    return value


@app.task(acks_late=True)
def need_late(path, value, mib, seconds=0.1):
    return have(path, value, mib, seconds)


@app.task(acks_late=True, reject_on_worker_lost=True)
def need_rejected(path, value, mib, seconds=0.1):
    return have(path, value, mib, seconds)


@app.task(memsafe_memory="150MiB")
def declared(path, value, mib, seconds=0.1):
    return have(path, value, mib, seconds)


@app.task(memsafe_memory="a lot")
def declared_wrongly(path, value, mib, seconds=0.1):
    return have(path, value, mib, seconds)


@app.task(memsafe_key=lambda path, value, mib, seconds=0.1: mib)
def keyed(path, value, mib, seconds=0.1):
    """Of one name, and of as many sizes as there are numbers."""
    return have(path, value, mib, seconds)


@app.task
def keep(path, value, mib):
    """Grow by this much for good, and write when that begins and ends."""
    write(path, "began", value, os.getpid(), time.monotonic())
    grow(kept, len(kept) + mib)
    write(path, "ended", value, os.getpid(), time.monotonic())
    return value


class Steps:
    """A task that grows when the test says so.

    In the folder: ``NAME.started`` when it runs, ``NAME.want`` for how much it is to have (MiB, and seconds
    for each), ``NAME.has`` for what it has, ``NAME.open`` or ``open`` for it to end.
    """

    def __init__(self, folder, name):
        self.folder, self.name = Path(folder), name
        self.blocks = []

    def run(self):
        self.write("started", os.getpid())
        while not (self.file("open").exists() or (self.folder / "open").exists()):
            want = self.file("want")
            if want.exists():
                mib, pace = map(float, want.read_text().split())
                if mib > len(self.blocks):
                    grow(self.blocks, mib, pace)
                    self.write("has", len(self.blocks))
            time.sleep(0.01)

    def file(self, kind):
        return self.folder / f"{self.name}.{kind}"

    def write(self, kind, text):
        self.file("new").write_text(str(text))
        self.file("new").replace(self.file(kind))


@app.task
def steps(folder, name):
    """Grow as the test says; the pid is the result."""
    Steps(folder, name).run()
    return os.getpid()


@app.task(acks_late=True)
def steps_late(folder, name):
    Steps(folder, name).run()
    return os.getpid()


@app.task
def steps_softly(folder, name):
    """As ``steps``; a soft time limit is its result."""
    try:
        Steps(folder, name).run()
    except SoftTimeLimitExceeded:
        return "caught"
    return os.getpid()


@app.task
def steps_slowly_away(folder, name):
    """As ``steps``; when it is terminated it needs a moment, and some memory, to clean up."""
    steps_of = Steps(folder, name)
    try:
        steps_of.run()
    except SystemExit:
        grow(steps_of.blocks, len(steps_of.blocks) + 4, 0.1)
        raise


@app.task
def scatter(mib):
    """Leave so much free memory in the heap, with one block at its end that is in use."""
    blocks = [b"x" * 100_000 for _ in range(mib * 10)]
    kept[:] = blocks[-1:]
    return os.getpid()


@app.task
def pid():
    return os.getpid()
