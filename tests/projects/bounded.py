"""Tasks that take memory step by step, with limits of their own."""

from __future__ import annotations

import mmap
import os
import time

from witness import app

from memsafe_pool import SoftMemoryLimitExceeded

MIB = 1 << 20


def grow(mib, seconds):
    """Take so much, in steps of 4 MiB, and have it for so long: to be looked at it takes a moment."""
    taken = []
    for _ in range(mib // 4):
        taken.append(bytearray(b"x") * (4 * MIB))
        time.sleep(0.002)
    time.sleep(seconds)
    return len(taken) * 4


@app.task
def take(mib, seconds=0.1):
    return grow(mib, seconds)


@app.task(memsafe_soft_limit="40MiB")
def told(mib, seconds=0.1):
    """What it is told by is its result."""
    try:
        return grow(mib, seconds)
    except SoftMemoryLimitExceeded:
        return "told"


@app.task(memsafe_hard_limit="60MiB")
def bounded(mib):
    return grow(mib, 0.1)


@app.task
def share(mib, seconds=0.1):
    """Take so much of shared memory, in steps of 4 MiB, and have it for so long."""
    shared = mmap.mmap(-1, mib * MIB)
    for _ in range(mib // 4):
        shared.write(b"x" * (4 * MIB))
        time.sleep(0.002)
    time.sleep(seconds)
    return mib


@app.task
def pid():
    return os.getpid()
