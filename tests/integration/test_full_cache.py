"""In a container that is full of what the kernel can take back, as much is done as in an empty one."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import pytest
from harness.growth import MIB, memory
from harness.tally import Tally

pytestmark = pytest.mark.ours_only("other pools do not look at memory")

#: Of the container and of what is in its cache (MiB). Of half a KB for each name that is not there.
LIMIT, CACHED = 300, 180
NAMES = 380_000


@pytest.fixture
def tally(tmp_path):
    return Tally(tmp_path / "runs")


@pytest.fixture
def path(tmp_path):
    """A file that is in nobody's cache, so that the container is charged for it."""
    path = tmp_path / "file"
    with open(path, "wb") as file:
        file.writelines(bytes(MIB) for _ in range(CACHED))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def fill(worker, group, kind, path):
    """Have tasks fill the container's cache."""
    before = group.usage()
    if kind == "files":
        worker.run("hungry.read", str(path), 3)
    elif kind == "model":
        for result in [worker.call("hungry.use_model", str(path)) for _ in range(2)]:
            worker.get(result)
    else:
        worker.run("hungry.miss", NAMES)
    if kind != "dentries" and group.usage() - before < CACHED * MIB // 2:
        pytest.skip(f"the file system of {path} has no page cache of its own")
    assert group.usage() - before > CACHED * MIB // 2


def nothing_ended(worker):
    pool = worker.stats()["pool"]["memsafe"]
    assert (pool["kills"], pool["redelivered"], memory(worker)["oom_kills"]) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["files", "model", "dentries"])
def test_one_that_fits(start_contained, container, tally, path, kind):
    """A task that grows into what files and dentries have is done, and is not even paused."""
    group = container(LIMIT)
    worker = start_contained(group, "hungry", concurrency=2)
    fill(worker, group, kind, path)
    worker.run("hungry.need", tally.path, 0, 130)
    assert tally.of("ended") == {"0": 1}
    assert worker.stats()["pool"]["memsafe"]["pauses"] == 0
    nothing_ended(worker)


@pytest.mark.parametrize("kind", ["files", "dentries"])
def test_as_many_at_once(start_contained, container, tally, path, kind):
    """Cache alone does not make tasks wait for each other."""
    group = container(LIMIT)
    worker = start_contained(group, "hungry", concurrency=3)
    fill(worker, group, kind, path)
    worker.run("hungry.need", tally.path, 0, 30)
    gate = worker.gate()
    # They end when all three have begun.
    results = [
        worker.call("hungry.steps", gate.path, str(number), headers={"memsafe_memory": "40MiB"})
        for number in range(3)
    ]
    begun = [Path(gate.path) / f"{number}.started" for number in range(3)]
    worker.until(lambda: all(file.exists() for file in begun), "three tasks to run at the same time")
    gate.open()
    for result in results:
        worker.get(result)
    nothing_ended(worker)


def test_a_file_that_is_being_written(start_contained, tally, path, tmp_path):
    """Its pages have to be written before they are room: nobody is ended for them."""
    worker = start_contained(LIMIT, "hungry", concurrency=4)
    end = tmp_path / "end"
    writer = worker.call("hungry.write_on", str(path), 400, str(end))
    results = [worker.call("hungry.need", tally.path, number, 50) for number in range(6)]
    for result in results:
        worker.get(result)
    end.touch()
    worker.get(writer)
    assert tally.of("ended") == {str(number): 1 for number in range(6)}
    nothing_ended(worker)


@pytest.fixture
def in_memory():
    """A folder for files in memory."""
    with tempfile.TemporaryDirectory(prefix="memsafe-test-", dir="/dev/shm") as folder:
        yield Path(folder)


def test_files_in_memory_are_waited_for(start_contained, tally, tmp_path, in_memory):
    """Nobody can take them back: a task that does not fit beside them waits until they are deleted."""
    worker = start_contained(LIMIT, "hungry", concurrency=2)
    end, file = tmp_path / "end", in_memory / "file"
    holder = worker.call("hungry.have_file", str(file), 110, str(end))
    worker.until(lambda: file.exists() and file.stat().st_size >= 110 * MIB, "the file to be there")
    result = worker.call("hungry.need", tally.path, 0, 130, headers={"memsafe_memory": "140MiB"})
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["waiting"], "the task to wait for memory")
    deleted_at = time.monotonic()
    end.touch()
    worker.get(holder)
    worker.get(result)
    assert float(tally.lines()[0][3]) > deleted_at
    nothing_ended(worker)


def test_many_that_write_files_in_memory(start_contained, tally, in_memory):
    """Nobody is seen to have them, and all of them at once would fill the container."""
    worker = start_contained(LIMIT, "hungry", concurrency=20)
    results = []
    for number in range(12):
        results.append(worker.call("hungry.need", tally.path, 100 + number, 10))
        results.append(
            worker.call("hungry.spool", tally.path, number, str(in_memory / str(number)), 70, 0.005)
        )
    for result in results:
        worker.get(result)
    assert tally.of("ended") == {str(first + number): 1 for first in (0, 100) for number in range(12)}
    assert worker.stats()["pool"]["memsafe"]["pauses"]
    nothing_ended(worker)
