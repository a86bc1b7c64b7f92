"""Where memory may be swapped out, a task that does not fit is done all the same, as with prefork: slowly."""

from __future__ import annotations

import os
import subprocess

import pytest
from harness.growth import MIB
from harness.tally import Tally

#: MiB: of the container, and of what it may swap out.
LIMIT, SWAP = 200, 400


@pytest.fixture
def group(container, tmp_path):
    """A container on a machine that has swap for it."""
    path = tmp_path / "swap"
    with open(path, "wb") as file:
        file.writelines(bytes(MIB) for _ in range(SWAP))
        os.fchmod(file.fileno(), 0o600)
    group = container(LIMIT)
    try:
        subprocess.run(["mkswap", path], check=True, capture_output=True)
        subprocess.run(["swapon", path], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as exc:
        pytest.skip(f"no swap can be had here: {getattr(exc, 'stderr', exc)!r}")
    try:
        name, value = {1: ("memory.swappiness", 60), 2: ("memory.swap.max", "max")}[group.version]
        group.write(name, value)
        yield group
    finally:
        group.write(name, 0)
        subprocess.run(["swapoff", path], check=True)


def test_tasks_that_are_swapped_out(start_contained, group, tmp_path):
    """One that is larger than the container, others with it: each is run once, nobody is killed."""
    tally = Tally(tmp_path / "runs")
    sizes = [20, 20, 20, 260, 20, 20, 20, 150, 150]
    worker = start_contained(group, "hungry", concurrency=4)
    results = [worker.call("hungry.need", tally.path, number, mib, 0.1) for number, mib in enumerate(sizes)]
    for result in results:
        worker.get(result)
    assert tally.of("began") == tally.of("ended") == {str(number): 1 for number in range(len(sizes))}
    assert "oom_kill 0" in group.kills_file.read_text().splitlines()
