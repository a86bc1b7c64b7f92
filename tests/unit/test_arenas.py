"""What is free in Python's own arenas."""

from __future__ import annotations

import subprocess
import sys

import pytest

from memsafe_pool import arenas

pytestmark = pytest.mark.skipif(arenas.read() is None, reason="this Python does not say what its arenas hold")

MIB = 1 << 20


def test_objects_that_go_leave_room():
    """Room of the kept ones' size in pools that are in use, and pools that are unused where none was kept."""
    before = arenas.read()
    objects = [bytes(100) for _ in range(200_000)]  # 28 MB
    with_them = arenas.read()
    assert with_them.made >= before.made + 15 - (before.unused + before.available) // MIB
    kept = objects[::50]
    del objects
    after = arenas.read()
    assert after.available > with_them.available + 20 * MIB
    assert after.made == with_them.made
    del kept


def test_what_is_known_is_what_was_read_last():
    """A child that was forked need not read what the process before it has read."""
    last = arenas.read()
    objects = [bytes(100) for _ in range(50_000)]
    assert arenas.known() == last
    assert arenas.read() != last
    assert arenas.known() != last
    del objects


def test_reading_leaves_nothing_behind():
    """Neither memory nor descriptors, however often."""
    code = """
import os
from memsafe_pool import arenas
from memsafe_pool.memory import resident_bytes
for _ in range(100):
    arenas.read()
descriptors, before = os.listdir("/dev/fd"), resident_bytes()
for _ in range(5000):
    arenas.read()
assert resident_bytes() - before < 500_000
assert os.listdir("/dev/fd") == descriptors
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=100)


def test_another_allocator():
    """With ``PYTHONMALLOC=malloc`` there are no arenas, and None says so."""
    code = "from memsafe_pool import arenas; print(arenas.read())"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"PYTHONMALLOC": "malloc"},
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "None\n"
