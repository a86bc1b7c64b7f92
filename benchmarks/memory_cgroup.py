"""A memory cgroup of its own for a worker, version 1 or 2; needs root and a writable hierarchy."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


_numbers = itertools.count(1)


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
    """A memory cgroup, as a context; its processes have to have ended by then.

    Without `limit_bytes` it has no limit. With one, nothing in it is swapped out.
    """

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.limit_bytes = limit_bytes
        for self.version, top in hierarchies():
            if os.access(top, os.W_OK):
                break
        else:
            message = "no memory cgroups that may be written to"
            raise UnavailableError(message)
        self.folder = top / f"memsafe-bench-{os.getpid()}-{next(_numbers)}"

    def __enter__(self) -> MemoryCgroup:  # noqa: PYI034  (typing.Self is of Python 3.11)
        try:
            self.folder.mkdir()
        except OSError as error:
            raise UnavailableError(str(error)) from error
        if self.limit_bytes is not None:
            with contextlib.suppress(FileNotFoundError):  # a kernel without swap
                self._write({1: "memory.swappiness", 2: "memory.swap.max"}[self.version], 0)
            self.limit(self.limit_bytes)
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

    def limit(self, limit_bytes: int) -> None:
        """Set the limit. Version 1 refuses one below what is in use (OSError), version 2 kills for it."""
        self._write({1: "memory.limit_in_bytes", 2: "memory.max"}[self.version], limit_bytes)
        self.limit_bytes = limit_bytes

    def oom_kills(self) -> int:
        """Count the processes of it that the kernel has killed for want of memory."""
        name = {1: "memory.oom_control", 2: "memory.events"}[self.version]
        events = dict(line.split() for line in (self.folder / name).read_text().splitlines())
        return int(events["oom_kill"])

    def peak_bytes(self) -> int | None:
        """Return the most that was ever charged, file pages included; None where the kernel does not say."""
        try:
            return self._number({1: "memory.max_usage_in_bytes", 2: "memory.peak"}[self.version])
        except FileNotFoundError:
            return None

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

    def _write(self, name: str, number: int) -> None:
        with (self.folder / name).open("r+") as file:  # not made if it is not there
            file.write(str(number))

    def _number(self, name: str) -> int:
        return int((self.folder / name).read_text())
