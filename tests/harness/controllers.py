"""Real cgroups of other controllers than memory, such as ``pids`` and ``cpu``: version 1 or 2.

As ``cgroup``: made at the mount point, by root, and removed again.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .waiting import until
from .worker import Worker

_NUMBERS = itertools.count(1)


class Group:
    """A cgroup with one controller; ``version`` tells how its files are called."""

    def __init__(self, folder: Path, version: int) -> None:
        self.folder, self.version = folder, version

    def write(self, name: str, value: object) -> None:
        with open(self.folder / name, "r+b", buffering=0) as file:
            file.write(str(value).encode())

    def hold(self, worker: Worker) -> None:
        """Have a worker that is not started yet run in it from the beginning."""
        entrance = self.folder / "cgroup.procs"
        worker.command = ["sh", "-c", f'echo $$ > "{entrance}" && exec "$@"', "sh", *worker.command]

    @property
    def pids(self) -> list[int]:
        return [int(pid) for pid in (self.folder / "cgroup.procs").read_text().split()]

    def is_removed(self) -> bool:
        try:
            self.folder.rmdir()
        except OSError:  # busy: a process of it has not quite ended
            return not self.folder.exists()
        return True


def _place(controller: str) -> tuple[Path, int] | str:
    """The folder in which such cgroups can be made, and the version; or why there is none."""
    why = f"no {controller} cgroups are mounted"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        folder = Path(left.split(" ")[4])
        if kind == "cgroup2" and controller in (folder / "cgroup.subtree_control").read_text().split():
            version = 2
        elif kind == "cgroup" and controller in options.split(","):
            version = 1
        else:
            continue
        if os.access(folder, os.W_OK) and not os.statvfs(folder).f_flag & os.ST_RDONLY:
            return folder, version
        why = f"{folder} cannot be written to"
    return why


@contextlib.contextmanager
def controlled(controller: str) -> Iterator[Group]:
    """A cgroup with this controller and nothing in it; the test is skipped where none can be made."""
    place = _place(controller)
    if isinstance(place, str):
        pytest.skip(f"no {controller} cgroup can be made here: {place}")
    top, version = place
    group = Group(top / f"memsafe-test-{controller}-{os.getpid()}-{next(_NUMBERS)}", version)
    group.folder.mkdir()
    try:
        yield group
    finally:
        until(group.is_removed, f"{group.folder} to be empty and removed")
