"""A memory cgroup of its own for a worker, version 1 or 2; needs root and a writable hierarchy."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


class UnavailableError(Exception):
    """Why there is no cgroup to be had."""


@dataclass(frozen=True)
class Charged:
    """What the kernel has charged to the cgroup, in bytes.

    `used` is what the limit is held against, less inactive file pages, which the kernel gives back at once.
    `others` is what of that is no memory of processes: of the kernel, and pages of files that are in use.
    """

    used: int
    others: int
    anonymous: int


def hierarchies() -> Iterator[tuple[int, Path]]:
    """Find the mounts of memory cgroups, with their version."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        folder = Path(left.split(" ")[4])
        if kind == "cgroup" and "memory" in options.split(","):
            yield 1, folder
        elif kind == "cgroup2" and "memory" in (folder / "cgroup.subtree_control").read_text().split():
            yield 2, folder


class MemoryCgroup:
    """A memory cgroup without a limit, as a context; its processes have to have ended by then."""

    def __init__(self) -> None:
        for self.version, top in hierarchies():
            if os.access(top, os.W_OK):
                break
        else:
            message = "no memory cgroups that may be written to"
            raise UnavailableError(message)
        self.folder = top / f"memsafe-bench-{os.getpid()}"

    def __enter__(self) -> MemoryCgroup:  # noqa: PYI034  (typing.Self is of Python 3.11)
        try:
            self.folder.mkdir()
        except OSError as error:
            raise UnavailableError(str(error)) from error
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + 10
        while True:
            try:
                self.folder.rmdir()
            except OSError:  # a process of it has not quite ended
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def inside(self, command: list[str]) -> list[str]:
        """Return the command that runs `command` in this cgroup, with the same pid."""
        script = 'echo $$ > "$0" && exec "$@"'
        return ["/bin/sh", "-c", script, str(self.folder / "cgroup.procs"), *command]

    def charged(self) -> Charged:
        """Read what is charged now."""
        stat = dict(line.split() for line in (self.folder / "memory.stat").read_text().splitlines())
        number = {name: int(value) for name, value in stat.items()}
        if self.version == 1:
            used = self._number("memory.usage_in_bytes") - number["total_inactive_file"]
            others = number["total_cache"] - number["total_inactive_file"]
            others += self._number("memory.kmem.usage_in_bytes")
            return Charged(used, others, number["total_rss"])
        used = self._number("memory.current") - number["inactive_file"]
        others = number["file"] - number["inactive_file"] + number["kernel"]
        return Charged(used, others, number["anon"])

    def _number(self, name: str) -> int:
        return int((self.folder / name).read_text())
