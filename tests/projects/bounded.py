"""Tasks that take memory step by step, with limits of their own."""

from __future__ import annotations

import mmap
import os
import time

from witness import app

from memsafe_pool import SoftMemoryLimitExceeded

MIB = 1 << 20


def grow(mib):
    """Take so much, in steps of 4 MiB, for long enough to be looked at."""
    taken = []
    for _ in range(mib // 4):
        taken.append(bytearray(b"x") * (4 * MIB))
        time.sleep(0.002)
    time.sleep(0.5)
    return len(taken) * 4


@app.task
def take(mib):
    return grow(mib)


@app.task(memsafe_soft_limit="40MiB")
def told(mib):
    """What it is told by is its result."""
    try:
        return grow(mib)
    except SoftMemoryLimitExceeded:
        return "told"


@app.task(memsafe_hard_limit="60MiB")
def bounded(mib):
    return grow(mib)


@app.task
def share(mib):
    """Take so much of shared memory, in steps of 4 MiB."""
    shared = mmap.mmap(-1, mib * MIB)
    for _ in range(mib // 4):
        shared.write(b"x" * (4 * MIB))
        time.sleep(0.002)
    time.sleep(0.5)
    return mib


@app.task
def pid():
    return os.getpid()
