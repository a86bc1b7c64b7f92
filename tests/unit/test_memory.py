"""Memory numbers of a process."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
from harness.waiting import until

from memsafe_pool import memory
from memsafe_pool.memory import anonymous_bytes, private_bytes, resident_bytes

MB = 1_000_000


def test_this_process_has_memory():
    """Resident memory has private memory in it, both in bytes."""
    assert 5 * MB < private_bytes() <= resident_bytes() * 1.05
    assert resident_bytes() < 100_000 * MB


@pytest.fixture(autouse=True)
def no_garbage():
    """What other tests have left in this process is not collected in the middle of a measurement."""
    gc.collect()


@contextmanager
def block(size):
    """So much memory that is not taken from a heap, where other tests may have left as much."""
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mapped:
        for at in range(0, size, 4096):
            mapped[at] = 1
        yield


def test_growth_shows():
    """What was written to is there, in both numbers, and goes again."""
    resident, private = resident_bytes(), private_bytes()
    with block(50 * MB):
        assert resident_bytes() - resident > 45 * MB
        assert private_bytes() - private > 45 * MB
    assert private_bytes() - private < 25 * MB


def test_what_is_of_files_is_not_anonymous(tmp_path):
    """A file that is mapped and read is resident, and neither anonymous nor private."""
    path = tmp_path / "file"
    path.write_bytes(bytes(30 * MB))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    before = memory.process()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        after = memory.process()
    assert after.resident - before.resident > 25 * MB
    assert after.anonymous - before.anonymous < 5 * MB
    assert after.private - before.private < 5 * MB


def test_shared_memory_is_told_apart():
    """Memory made to be shared is neither of files nor anonymous."""
    before = memory.shared_memory_bytes()
    with mmap.mmap(-1, 20 * MB) as shared:
        shared[:] = b"x" * (20 * MB)
        assert memory.shared_memory_bytes() - before >= 19 * MB
    assert memory.shared_memory_bytes() - before < MB


def test_a_process_in_one():
    """The four numbers fit together, for this process and for another."""
    for pid in ("self", os.getpid()):
        facts = memory.process(pid)
        assert 0 < facts.anonymous < facts.resident <= facts.peak
        assert facts.private > 0


def test_limit_and_usage():
    """There is a limit, and something is used of it."""
    assert 0 < memory.usage() < memory.limit()
    assert 0 < memory.headroom() < memory.limit()


def test_what_this_process_takes_is_used():
    """Several tries: in a container other processes may give memory back meanwhile."""

    def shows():
        before = memory.usage()
        with block(200 * MB):
            return memory.usage() - before > 100 * MB

    until(shows, "what this process takes to be used")


def test_trim_collects_and_releases():
    """Garbage in circles, and heap that something at its end keeps: both are given back."""
    code = """
import gc
from memsafe_pool import memory
gc.disable()
blocks = [bytes(700) for _ in range(100_000)]
kept = blocks[::100]
del blocks
for _ in range(30):
    ring = [bytearray(1_000_000)]
    ring.append(ring)
del ring
won = memory.trim()
assert won > 80_000_000, won
assert memory.trim() < 5_000_000
import sys
assert not {"celery", "billiard", "kombu"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=60)


def test_another_process():
    """Any process can be asked about by its pid."""
    assert abs(resident_bytes(os.getpid()) - resident_bytes()) < 5 * MB


@pytest.mark.parametrize("function", [resident_bytes, anonymous_bytes, private_bytes, memory.process])
def test_a_process_that_is_not_there(function):
    """It raises OSError, so that no number is made up."""
    with pytest.raises(OSError, match="No such"):
        function(2**22 + 1)
