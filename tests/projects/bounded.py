"""Tasks that take memory step by step, with limits of their own."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import shlex
import subprocess
import sys
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


#: Takes so many MiB.
PROGRAM = "import sys; b = bytearray(int(sys.argv[1]) << 20); b[::4096] = b'x' * len(b[::4096])"


def _take_in_process(mib):
    block = bytearray(b"x") * (mib * MIB)
    os._exit(0 if block[-1] else 1)


def _by_multiprocessing(mib):
    multiprocessing.current_process()._config["daemon"] = False  # as people do who want to in a Celery task
    try:
        process = multiprocessing.get_context("fork").Process(target=_take_in_process, args=(mib,))
        process.start()
        process.join()
        return process.exitcode
    finally:
        multiprocessing.current_process()._config["daemon"] = True


def _by_posix_spawn(*command):
    pid = os.posix_spawn(command[0], command, os.environ)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def start_program(how, mib):
    """Start a process that takes so much; return its exit status."""
    command = sys.executable, "-c", PROGRAM, str(mib)
    # Not multiprocessing's spawn: billiard's key, which a child of Celery's has, can not be pickled.
    match how:
        case "subprocess":
            return subprocess.run(command, check=False).returncode
        case "preexec":  # which makes subprocess fork
            return subprocess.run(command, check=False, preexec_fn=lambda: None).returncode
        case "system":
            return os.waitstatus_to_exitcode(os.system(shlex.join(command)))
        case "posix_spawn":
            return _by_posix_spawn(*command)
        case "fork":
            return _by_multiprocessing(mib)


@app.task(memsafe_hard_limit="60MiB")
def program(how, mib):
    return start_program(how, mib)


@app.task(memsafe_hard_limit="60MiB")
def program_and_take(mib):
    """Start a program that needs little, and then take so much."""
    start_program("subprocess", 1)
    return grow(mib, 0.1)
