"""Real memory cgroups, version 1 or 2, whichever the machine has; made at the mount point and removed again.

It needs root, and a mount of the memory hierarchy that may be written to: ``Unavailable`` says what is
missing. Nothing of the package is used here: the kernel's files are the truth that it is compared with.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .waiting import DEADLINE, until
from .worker import Worker

_NUMBERS = itertools.count(1)


class Unavailable(Exception):
    """Why no memory cgroup can be made here."""


def _place() -> tuple[int, Path]:
    """The version, and the folder in which cgroups can be made that have a memory controller."""
    reasons = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        folder = Path(left.split(" ")[4])
        if kind == "cgroup" and "memory" in options.split(","):
            version = 1
        elif kind == "cgroup2":
            version = 2
            control = folder / "cgroup.subtree_control"
            if "memory" not in control.read_text().split():
                reasons.append(f"memory is not in {control}")
                continue
        else:
            continue
        if os.access(folder, os.W_OK) and not os.statvfs(folder).f_flag & os.ST_RDONLY:
            return version, folder
        reasons.append(f"{folder} cannot be written to")
    raise Unavailable("; ".join(reasons) or "no memory cgroups are mounted")


class Cgroup:
    """A memory cgroup; as a context, it and those in it are removed at the end.

    Its processes have to have ended, or to be about to.
    """

    def __init__(self, folder: Path | None = None, version: int = 0) -> None:
        if folder is None:
            version, top = _place()
            folder = top / f"memsafe-test-{os.getpid()}-{next(_NUMBERS)}"
        self.folder, self.version = folder, version
        self.children: list[Cgroup] = []
        try:
            folder.mkdir()
        except OSError as exc:
            raise Unavailable(f"{folder} cannot be made: {exc.strerror}") from exc
        # Nothing is swapped out, so that a limit is one. Not every kernel has these.
        with contextlib.suppress(OSError):
            self.write({1: "memory.swappiness", 2: "memory.swap.max"}[version], 0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.remove()

    def write(self, name: str, value: object) -> None:
        # Not created if it is not there, so that the message is about the right thing.
        with open(self.folder / name, "r+b", buffering=0) as file:
            file.write(str(value).encode())

    def limit(self, number: int) -> None:
        """Set the limit in bytes."""
        self.write({1: "memory.limit_in_bytes", 2: "memory.max"}[self.version], number)

    def usage(self) -> int:
        """What is charged, in bytes, file pages included."""
        name = {1: "memory.usage_in_bytes", 2: "memory.current"}[self.version]
        return int((self.folder / name).read_text())

    @property
    def kills_file(self) -> Path:
        """Where the kernel counts the processes it has killed for want of memory: a line ``oom_kill``."""
        return self.folder / {1: "memory.oom_control", 2: "memory.events"}[self.version]

    def add(self, pid: int) -> None:
        """Move a process into it."""
        self.write("cgroup.procs", pid)

    def hold(self, worker: Worker) -> None:
        """Have a worker that is not started yet run in it from the beginning, as in a container."""
        entrance = self.folder / "cgroup.procs"
        worker.command = ["sh", "-c", f'echo $$ > "{entrance}" && exec "$@"', "sh", *worker.command]

    @contextlib.contextmanager
    def running(self, script: str, *arguments: object, says: str) -> Iterator[None]:
        """Have Python code run that moves itself here until the end of the block; from where it says so.

        Arguments:
            script: Gets the path of ``cgroup.procs`` and these arguments; ends when its input does.
            says: The line it prints when all is as it should be.
        """
        words = [sys.executable, "-c", script, str(self.folder / "cgroup.procs"), *map(str, arguments)]
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout.readline() == f"{says}\n"
                yield
            finally:
                process.stdin.close()
                process.wait(DEADLINE)

    def child(self, name: str) -> Cgroup:
        """Make a cgroup in it. In version 2, processes can then be in the child only."""
        if self.version == 2:
            self.write("cgroup.subtree_control", "+memory")
        self.children.append(Cgroup(self.folder / name, self.version))
        return self.children[-1]

    def remove(self) -> None:
        for child in self.children:
            child.remove()
        self.children.clear()
        until(self._is_removed, f"{self.folder} to be empty and removed")

    def _is_removed(self) -> bool:
        try:
            self.folder.rmdir()
        except FileNotFoundError:
            return True
        except OSError:  # busy: a process of it has not quite ended
            return False
        return True


@contextlib.contextmanager
def limited(number: int) -> Iterator[Cgroup]:
    """A cgroup with this limit in bytes and nothing in it; the test is skipped where none can be made."""
    try:
        group = Cgroup()
    except Unavailable as exc:
        pytest.skip(f"no memory cgroup can be made here: {exc}")
    with group:
        group.limit(number)
        yield group
