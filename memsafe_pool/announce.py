"""What the worker says of memory when it starts: one line of numbers, and what would defeat the pool.

:func:`lines` is pure. :class:`Surroundings` is what it has to know beyond a reading of ``probe``: overcommit
and systemd. What is not there to be read is not warned about here. Imports neither Celery nor billiard.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memsafe_pool.cgroups import Files
from memsafe_pool.settings import mib

if TYPE_CHECKING:
    from memsafe_pool.budget import Budget
    from memsafe_pool.probe import Reading

__all__ = ["Surroundings", "lines", "say"]

logger = logging.getLogger(__name__)

_MIB = 1 << 20

#: Where systemd looks for units; the first that has one wins.
_UNIT_FOLDERS = (
    "/etc/systemd/system",
    "/run/systemd/system",
    "/usr/local/lib/systemd/system",
    "/usr/lib/systemd/system",
    "/lib/systemd/system",
)

#: As much swap does not hide anything.
_LITTLE_SWAP_BYTES = 16 * _MIB


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a reading does not have.

    Attributes:
        strict_overcommit: Whether ``vm.overcommit_memory`` is 2.
        unit: The systemd service that we run in, where it does not say ``OOMPolicy=continue``; else None.
    """

    strict_overcommit: bool = False
    unit: str | None = None

    @classmethod
    def read(
        cls, root: str | os.PathLike[str] = "/", *, environ: Mapping[str, str] | None = None
    ) -> Surroundings:
        """Look around. About 0.1 ms.

        Arguments:
            root: What stands in front of ``/proc``, ``/sys`` and ``/etc``.
            environ: The environment; None for that of this process.
        """
        files = Files(os.fspath(root), lambda _: None)
        environ = os.environ if environ is None else environ
        overcommit = files.get("/proc/sys/vm/overcommit_memory", "", optional=True) or b""
        return cls(
            strict_overcommit=overcommit.strip() == b"2",
            unit=_unit(files) if environ.get("INVOCATION_ID") else None,
        )


def lines(
    reading: Reading,
    budget: Budget,
    surroundings: Surroundings,
    *,
    worker_bytes: int,
    child_bytes: int,
    bound: int,
) -> tuple[str, list[str]]:
    """Return the line for the log, and the warnings.

    Arguments:
        reading: The limit and what is used.
        budget: What may be used.
        surroundings: What else there is.
        worker_bytes: What the worker has, with its forkserver.
        child_bytes: What a child costs before its first task.
        bound: The upper bound of the number of children, ``-c``.
    """
    _, room = budget.left(reading.headroom_bytes, lambda: worker_bytes)
    count = max(room // max(child_bytes, 1), 0)
    line = (
        f"Memory: limit {mib(budget.limit)} ({reading.lowest_limit_source}), budget {mib(budget.bytes)}; "
        f"the worker has {mib(worker_bytes)}, a child about {mib(child_bytes)} before "
        f"its first task: room for {count} {'child' if count == 1 else 'children'} at once, -c is {bound}."
    )
    warnings = [budget.warning] if budget.warning else []
    if not count:
        warnings.append(
            f"There is no room for a child: {mib(max(room, 0))} are left of the memory budget of "
            f"{mib(budget.bytes)}, and a child takes about {mib(child_bytes)} before its first task. "
            "Tasks will run one at a time, as long as that goes well: raise the memory limit."
        )
    warnings += _defeats(reading, surroundings)
    return line, warnings


def say(line: str, warnings: list[str]) -> None:
    """Write what :func:`lines` has returned to the log."""
    logger.info("%s", line)
    for text in warnings:
        logger.warning("%s", text)


def _defeats(reading: Reading, surroundings: Surroundings) -> Iterator[str]:
    if reading.oom_group:
        yield (
            f"The kernel ends all processes of {reading.cgroup or 'the cgroup'} when it ends one for want of "
            "memory (memory.oom.group is 1 there or above): a task that goes over the limit would take the "
            "worker with it. In Kubernetes, singleProcessOOMKill of the kubelet changes that; in systemd, "
            "OOMPolicy=continue."
        )
    elif surroundings.unit:
        yield (
            f"This is the systemd unit {surroundings.unit}. Unless it has OOMPolicy=continue, systemd stops "
            "all of it when the kernel ends one process of it for want of memory."
        )
    if len(reading.levels) > 1 and reading.swap_bytes > _LITTLE_SWAP_BYTES:
        yield (
            f"Memory may be swapped out under the limit ({mib(reading.swap_bytes)}): a task that does not "
            "fit goes on slowly, while others wait. To have it ended, give the container no swap."
        )
    if surroundings.strict_overcommit:
        yield (
            "vm.overcommit_memory is 2: the system refuses memory by what processes have asked for, not by "
            "what they use. Tasks may get a MemoryError, and children may not start, while there is room."
        )


# systemd


def _unit(files: Files) -> str | None:
    """Return the service that this process is in, unless it is set to go on after an OOM kill."""
    text = files.get("/proc/self/cgroup", "", optional=True) or b""
    # systemd's own hierarchy, which need not be that of memory.
    paths = re.findall(rb"^\d+:(?:name=systemd)?:(.*)$", text, re.MULTILINE)
    units = re.findall(r"[^/]+\.(?:service|scope)(?=/|$)", os.fsdecode(b"".join(paths)))
    if not units or units[-1].endswith(".scope"):
        return None  # a terminal's scope may be within a service
    unit = units[-1]
    policy = b""
    for path in _unit_files(files, unit):
        found = re.findall(
            rb"^\s*OOMPolicy\s*=\s*(\w+)", files.get(path, "", optional=True) or b"", re.MULTILINE
        )
        policy = found[-1] if found else policy
    return None if policy == b"continue" else unit


def _unit_files(files: Files, unit: str) -> Iterator[str]:
    """The unit's file and what adds to it, in the order in which they count."""
    template = re.sub(r"@.*(?=\.service$)", "@", unit)
    names = [unit] if template == unit else [unit, template]
    found = [f"{folder}/{name}" for name in names for folder in _UNIT_FOLDERS]
    yield from [path for path in found if files.exists(path)][:1]
    added = []
    for name in names:
        for folder in _UNIT_FOLDERS:
            try:
                added += [
                    (file, f"{folder}/{name}.d/{file}")
                    for file in os.listdir(f"{files.prefix}{folder}/{name}.d")
                    if file.endswith(".conf")
                ]
            except OSError:
                continue  # nothing is added there
    yield from (path for _, path in sorted(added))
