"""What the memory limit is, how much is used, under what pressure, and how often the kernel has killed.

Covers limits of memory cgroups (v1 and v2, over all ancestors that can be seen), the machine's memory,
pressure, counts of out-of-memory kills, and the memory of a tree of processes. Decides nothing. What was
swapped out is not in use, and what still may be is no room, as it takes so long; but it is a reason to end
nothing.

Where cgroups are is in ``cgroups``, what is used of what a cgroup is charged in ``reclaim``; the memory of
one process by itself is in ``memory``. Imports neither Celery nor billiard.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from memsafe_pool import reclaim
from memsafe_pool.cgroups import NO_LIMIT, Files, Place, field, find, whole_number

__all__ = ["Level", "Pressure", "Probe", "Reading"]

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

Kind = Literal["max", "high", "physical"]


@dataclass(frozen=True, slots=True)
class Pressure:
    """How long processes waited for memory: ``Documentation/accounting/psi.rst``.

    Attributes:
        some_avg10: Percent of the last 10 s in which at least one process waited, 0 to 100.
        full_avg10: The same, for all of them at once.
        some_total_us: Microseconds since the start of the machine or of the cgroup, as ``some_avg10``.
        full_total_us: The same, as ``full_avg10``.
        source: The file it comes from: the cgroup's or the machine's.
    """

    some_avg10: float
    full_avg10: float
    some_total_us: int
    full_total_us: int
    source: str


@dataclass(frozen=True, slots=True)
class Level:
    """One limit that we are under, and the use that counts towards it, in bytes.

    Attributes:
        limit: More than 0.
        kind: As ``limit_kind`` of a reading.
        source: The file it comes from, or ``"physical memory"``.
        used: As ``used_bytes`` of a reading.
        used_source: The file or files that comes from.
        uncertain: As ``uncertain_bytes`` of a reading.
        charged: What the kernel has charged: ``used``, and what it can take back.
        version: Of the cgroup; 0 for the machine.
        charged_file: The file with ``charged``; of a machine ``meminfo``. None where use was found by other
            means.
        stat_file: The file that tells what can be taken back; None where that is not known.
        kernel_file: The file with what is the kernel's own, in version 1; None where there is none.
    """

    limit: int
    kind: Kind
    source: str
    used: int
    used_source: str
    uncertain: int = 0
    charged: int = 0
    version: int = 0
    charged_file: str | None = None
    stat_file: str | None = None
    kernel_file: str | None = None

    @property
    def room(self) -> int:
        """Bytes that are left; negative above a limit, which ``memory.high`` allows."""
        return self.limit - self.used


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at memory, all of it in bytes.

    A process stands under several limits at once: its cgroup's, each ancestor's, the machine's. The one that
    counts is where the least room is left, which need not be the lowest: a container may use 10 % of its own
    limit while its neighbours have filled the pod's. So ``limit_bytes`` and ``used_bytes`` belong together
    and to that one, and no growth beyond ``headroom_bytes`` is safe. ``lowest_limit_bytes`` is the most there
    could ever be, for sizes that must not change whenever a neighbour grows.

    Attributes:
        limit_bytes: The limit with the least room under it; more than 0.
        limit_kind: ``"max"``: the kernel kills above it. ``"high"``: it slows down and reclaims above it.
            ``"physical"``: the machine's memory.
        limit_source: The file the limit comes from, or ``"physical memory"``.
        used_bytes: What is used of it, by us and by all others under it, and cannot be taken back by the
            kernel: in a cgroup what ``reclaim`` says, on a machine all but ``MemAvailable``. Pages of files
            and caches of the kernel are not in it, files in ``/dev/shm`` are.
        used_source: The file or files that comes from.
        uncertain_bytes: Of ``used_bytes``, what the kernel may be able to take back or to swap out all the
            same, in a while, as far as that leaves more room: no reason to end anything.
        lowest_limit_bytes: The lowest of all limits; more than 0.
        lowest_limit_source: Where that comes from, as ``limit_source``.
        high_bytes: The lowest ``memory.high``, None where there is none or it is above the machine's memory.
        high_source: The file it comes from.
        physical_bytes: The machine's memory.
        cgroup: The folder of the cgroup that memory is charged to; None where there is none.
        oom_kills: Processes that the kernel has killed for want of memory. Version 2: in this cgroup and
            below, whatever limit it was for. Version 1: in this cgroup alone. Without a cgroup: on the whole
            machine. It begins anew in another cgroup: compare two readings only if ``cgroup`` is the same.
            None where the kernel does not count.
        oom_group: Whether the kernel kills all of a cgroup when it kills one process of it
            (``memory.oom.group`` here or in an ancestor). False where it cannot. None where there is no
            cgroup.
        pressure: The cgroup's in version 2, else the machine's; None where the kernel does not measure it.
        levels: All limits that hold, from the process's own cgroup up to the machine, which is the last.
        swap_bytes: What may still be swapped out.
    """

    limit_bytes: int
    limit_kind: Kind
    limit_source: str
    used_bytes: int
    used_source: str
    lowest_limit_bytes: int
    lowest_limit_source: str
    high_bytes: int | None
    high_source: str | None
    physical_bytes: int
    cgroup: str | None
    oom_kills: int | None
    oom_group: bool | None
    pressure: Pressure | None
    levels: tuple[Level, ...] = ()
    uncertain_bytes: int = 0
    swap_bytes: int = 0

    @property
    def headroom_bytes(self) -> int:
        """Bytes that are left; negative above a limit, which ``memory.high`` allows."""
        return self.limit_bytes - self.used_bytes


@dataclass(frozen=True, slots=True)
class _Group:
    """What cgroups say. ``high`` is the lowest ``memory.high`` and its file."""

    levels: list[Level]
    high: tuple[int, str] | None = None
    folder: str | None = None
    oom_kills: int | None = None
    oom_group: bool | None = None


class Probe:
    """Reads memory limits and use; runs in any process.

    Little is remembered between two readings, as limits change (Kubernetes resizes in place), processes move,
    cgroups go: what was warned about, and the last reading. A file that is missing, unreadable or makes no
    sense is warned about once per file and kind of failure, and what is used instead is in the warning. What
    not every kernel has is None without a warning: pressure, counts of kills, ``memory.oom.group``.

    Use is compared with physical memory as total less ``MemAvailable``: that takes microseconds, and counts
    what others use, who take from the same room. What our own processes have of it (``tree_bytes``) is PSS,
    which takes 60 ms for 6 GB and holds up the process that is looked at: it is read only when asked for.

    Args:
        root: What stands in front of ``/proc`` and ``/sys``.
        pid: The process whose cgroup it is about, and whose tree; None for the one that calls.
        pids: Returns the processes of ``tree_bytes``; None for the process and all its descendants.
        on_warning: Gets each warning, one sentence; None for this module's logger.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] = "/",
        *,
        pid: int | None = None,
        pids: Callable[[], Iterable[int]] | None = None,
        on_warning: Callable[[str], object] | None = None,
    ) -> None:
        warn = logging.getLogger(__name__).warning
        # A warning is no format: a path may have a % in it.
        self._files = Files(os.fspath(root), on_warning or (lambda text: warn("%s", text)))
        self._pid = pid
        self._pids = pids
        self._last: Reading | None = None

    def read(self) -> Reading:
        """Return how things are now. About 0.2 ms with one ancestor, 0.03 ms more for each further one.

        While files cannot be read for want of descriptors or memory, the last reading: that a limit could
        not be looked at does not mean that there is none.
        """
        self._files.unread.clear()
        reading = self._read()
        if not self._files.unread:
            self._last = reading
        elif self._last is not None:
            return self._last
        else:
            for warning in self._files.unread:
                self._files.warn(*warning)
        return reading

    def _read(self) -> Reading:
        if sys.platform != "linux":
            return self._reading(self._machine_elsewhere(), _Group([]), None)
        machine, swap = self._machine()
        place = find(self._files, "self" if self._pid is None else self._pid)
        if place is None:
            return self._reading(machine, self._no_group(), self._pressure(None), swap)
        if place.version == 1:
            group, pressure = self._version_1(place, machine.limit), self._pressure(None)
        else:
            group, pressure = self._version_2(place, machine.limit), self._pressure(place.own)
        return self._reading(machine, group, pressure, self._swap(place, swap) if swap else 0)

    def tree_bytes(self) -> int:
        """Return the memory of our processes, in which what they share is counted once. Slow, see the class.

        It is the sum of PSS (``smaps_rollup``), of RSS for those whose PSS cannot be read, with a warning:
        then what they share is counted more than once. Not on Linux, it is the sum of USS, where shared
        memory is not counted. Processes that end meanwhile have none.
        """
        if sys.platform != "linux":
            return sum(map(self._unique_bytes, self._tree_elsewhere()))
        return sum(map(self._proportional_bytes, self._tree()))

    # The machine

    def _machine(self) -> tuple[Level, int]:
        """Return the machine's memory, and how much swap is free, in bytes."""
        files, path = self._files, "/proc/meminfo"
        fallback = "the C library is asked instead"
        text = files.get(path, fallback)
        total = files.number_on_line(path, text, b"MemTotal:", fallback)
        if not total:
            if total == 0:
                files.odd(path, text or b"", "memory", fallback)
            total = max(1, os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES // 1024)
        available = files.number_on_line(
            path, text, b"MemAvailable:", "only free memory is taken as available"
        )
        if available is None:
            available = None if text is None else field(text, b"MemFree:")
        if available is None:
            available = os.sysconf("SC_AVPHYS_PAGES") * _PAGE_BYTES // 1024
        used = max(0, total - available) * 1024
        source = files.prefix + path
        swap = 0 if text is None else field(text, b"SwapFree:") or 0
        level = Level(total * 1024, "physical", "physical memory", used, source, charged_file=source)
        return level, swap * 1024

    def _machine_elsewhere(self) -> Level:
        import psutil

        source = "psutil.virtual_memory()"
        try:
            memory = psutil.virtual_memory()
            total, used = int(memory.total), int(memory.total - memory.available)
        except (OSError, RuntimeError, psutil.Error) as exc:
            self._files.warn(source, "failed", f"failed ({exc})", "nothing is known about what is used")
            total, used = os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES, 0
        return Level(max(1, total), "physical", "physical memory", max(0, used), source)

    # cgroups

    def _version_1(self, place: Place, physical: int) -> _Group:
        files, prefix, own = self._files, self._files.prefix, place.folders[0]
        levels: list[Level] = []
        stat = None
        hierarchy = NO_LIMIT
        stat_path = f"{own}/memory.stat"
        for folder in place.folders:
            limit = files.limit(f"{folder}/memory.limit_in_bytes") or NO_LIMIT
            if folder is own:
                stat = files.get(stat_path, "limits of ancestors that cannot be seen are not looked at")
                # The minimum over all ancestors, also those outside of a container.
                hierarchy = (
                    files.number_on_line(
                        stat_path,
                        stat,
                        b"hierarchical_memory_limit ",
                        "limits that cannot be seen are unknown",
                    )
                    or NO_LIMIT
                )
            if limit < physical:
                source = f"{prefix}{folder}/memory.limit_in_bytes"
                levels.append(self._level_1(limit, source, folder, stat if folder is own else None))
        if hierarchy < min([physical, *(level.limit for level in levels)]):
            # Use under a limit that cannot be seen is at least that of the highest cgroup that can.
            levels.append(self._level_1(hierarchy, prefix + stat_path, place.folders[-1], None))
        path = f"{own}/memory.oom_control"
        text = files.get(path, "out-of-memory kills are not counted", optional=True)
        kills = files.number_on_line(path, text, b"oom_kill ", "out-of-memory kills are not counted")
        return _Group(levels, None, prefix + own, kills, oom_group=False)

    def _level_1(self, limit: int, source: str, folder: str, stat: bytes | None) -> Level:
        return self._level((limit, "max", source), 1, folder, stat)

    def _version_2(self, place: Place, physical: int) -> _Group:
        files, prefix = self._files, self._files.prefix
        levels: list[Level] = []
        highs, charged, group = [], None, False
        for folder in place.folders:
            kind: Kind = "max"
            limit = files.limit(f"{folder}/memory.max", optional=True)
            if limit is None:
                # Neither the root of all cgroups nor one without the controller has memory files.
                if not files.exists(f"{folder}/memory.current"):
                    if not files.exists(folder):
                        files.warn(folder, "gone", "is not there", "the limits of its ancestors are used")
                    continue
                files.warn(f"{folder}/memory.max", "missing", "is not there", "taken as no limit")
                limit = NO_LIMIT
            charged = charged or folder
            high = files.limit(f"{folder}/memory.high", optional=True) or NO_LIMIT
            if high < physical:
                highs.append((high, f"{prefix}{folder}/memory.high"))
            if high < limit:
                limit, kind = high, "high"
            if limit < physical:
                found = limit, kind, f"{prefix}{folder}/memory.{kind}"
                levels.append(self._level(found, 2, folder, None))
            group = group or self._is_group(f"{folder}/memory.oom.group")
        if charged is None:
            return self._no_group()
        path = f"{charged}/memory.events"
        text = files.get(path, "out-of-memory kills are not counted", optional=True)
        kills = files.number_on_line(path, text, b"oom_kill ", "out-of-memory kills are not counted")
        return _Group(levels, min(highs, default=None), prefix + charged, kills, group)

    def _swap(self, place: Place, free: int) -> int:
        """Return what of the machine's free swap processes of a cgroup may take."""
        files = self._files

        def number(folder: str, name: str) -> int:  # unlike a limit of memory, one of 0 makes sense
            text = files.get(f"{folder}/memory.{name}", "taken as no limit", optional=True)
            return NO_LIMIT if text is None or text.strip() == b"max" else whole_number(text) or 0

        if place.version == 2:  # noqa: PLR2004 - of cgroups
            for folder in place.folders:
                if (limit := number(folder, "swap.max")) < NO_LIMIT:
                    free = min(free, max(limit - number(folder, "swap.current"), 0))
            return free
        if number(place.folders[0], "swappiness") == 0:
            return 0
        for folder in place.folders:
            # Of memory and swap together.
            if (limit := number(folder, "memsw.limit_in_bytes")) < NO_LIMIT:
                swapped = max(number(folder, "memsw.usage_in_bytes") - number(folder, "usage_in_bytes"), 0)
                free = min(free, max(limit - number(folder, "limit_in_bytes") - swapped, 0))
        return free

    def _no_group(self) -> _Group:
        """What holds where memory is charged to no cgroup."""
        path, fallback = "/proc/vmstat", "out-of-memory kills are not counted"
        text = self._files.get(path, fallback, optional=True)
        # Linux 4.13 and later count them.
        return _Group([], oom_kills=None if text is None else field(text, b"oom_kill "))

    def _is_group(self, path: str) -> bool:
        fallback = "taken as 0"
        text = self._files.get(path, fallback, optional=True)
        if text is None:
            return False
        if text.strip() not in (b"0", b"1"):
            self._files.odd(path, text, "0 or 1", fallback)
        return text.strip() == b"1"

    def _level(self, found: tuple[int, Kind, str], version: int, folder: str, stat: bytes | None) -> Level:
        """Return a limit, its kind and its file with the use of its cgroup."""
        files = self._files
        path = f"{folder}/{'memory.usage_in_bytes' if version == 1 else 'memory.current'}"
        charged = files.number(
            path, "the resident memory of our own processes is taken, which is too much of them"
        )
        if charged is None:
            return Level(*found, sum(map(self._resident_bytes, self._tree())), "/proc/<pid>/statm")
        stat_path = f"{folder}/memory.stat"
        fallback = "pages of files are counted as used"
        if stat is None:
            stat = files.get(stat_path, fallback)
        kernel, kernel_path = None, f"{folder}/memory.kmem.usage_in_bytes"
        if version == 1:
            kernel = files.number(kernel_path, "memory of the kernel is counted as used", optional=True)
        use = None if stat is None else reclaim.find(version, found[0], charged, stat, kernel or 0)
        charged_path = files.prefix + path
        if use is None:
            if stat is not None:
                files.odd(stat_path, stat, "number of pages of files", fallback)
            return Level(*found, charged, charged_path, charged=charged, charged_file=charged_path)
        return Level(
            *found,
            used=use.used,
            used_source=f"{charged_path} - memory.stat",
            uncertain=use.uncertain,
            charged=charged,
            version=version,
            charged_file=charged_path,
            stat_file=files.prefix + stat_path,
            kernel_file=None if kernel is None else files.prefix + kernel_path,
        )

    def _reading(self, machine: Level, group: _Group, pressure: Pressure | None, swap: int = 0) -> Reading:
        # The cgroup before the machine where they are equal: the order of the list.
        levels = [*group.levels, machine]
        least = min(levels, key=lambda level: level.room)
        lowest = min(levels, key=lambda level: level.limit)
        high, high_source = group.high or (None, None)
        return Reading(
            limit_bytes=least.limit,
            limit_kind=least.kind,
            limit_source=least.source,
            used_bytes=least.used,
            used_source=least.used_source,
            lowest_limit_bytes=lowest.limit,
            lowest_limit_source=lowest.source,
            high_bytes=high,
            high_source=high_source,
            physical_bytes=machine.limit,
            cgroup=group.folder,
            oom_kills=group.oom_kills,
            oom_group=group.oom_group,
            pressure=pressure,
            levels=tuple(levels),
            uncertain_bytes=min(level.room + level.uncertain for level in levels) - least.room + swap,
            swap_bytes=swap,
        )

    # Pressure

    def _pressure(self, folder: str | None) -> Pressure | None:
        if folder is not None:
            path, fallback = f"{folder}/memory.pressure", "the machine's pressure is used"
            text = self._files.get(path, fallback, optional=True)
            if text is not None:
                found = self._parsed_pressure(path, text, fallback)
                if found is not None:
                    return found
        path, fallback = "/proc/pressure/memory", "pressure is not known"
        text = self._files.get(path, fallback, optional=True)
        return None if text is None else self._parsed_pressure(path, text, fallback)

    def _parsed_pressure(self, path: str, text: bytes, fallback: str) -> Pressure | None:
        found = {}
        try:
            for line in text.splitlines():
                name, *words = line.split()
                values = dict(word.split(b"=") for word in words)
                found[name] = float(values[b"avg10"]), int(values[b"total"])
            (some, some_total), (full, full_total) = found[b"some"], found[b"full"]
        except (ValueError, KeyError):
            self._files.odd(path, text, "pressure", fallback)
            return None
        return Pressure(some, full, some_total, full_total, self._files.prefix + path)

    # Our own processes

    def _tree(self) -> list[int]:
        """Return the pids of ``pids``, or of the process and all its descendants."""
        if self._pids is not None:
            return list(self._pids())
        files = self._files
        top = os.getpid() if self._pid is None else self._pid
        below: dict[int, list[int]] = {}
        try:
            names = os.listdir(f"{files.prefix}/proc")
        except OSError as exc:
            files.warn("/proc", "list", f"cannot be listed ({exc.strerror})", "descendants are not counted")
            names = []
        for name in names:
            if name.isdigit() and name.isascii():
                parent = self._parent(name)
                if parent is not None:
                    below.setdefault(parent, []).append(int(name))
        found = {top: None}
        todo = [top]
        while todo:
            for child in below.get(todo.pop(), ()):
                if child not in found:  # a reused pid may look like a circle
                    found[child] = None
                    todo.append(child)
        return list(found)

    def _parent(self, pid: str) -> int | None:
        path = f"/proc/{pid}/stat"
        try:
            text = self._files.read(path)
        except OSError:
            return None  # it has ended
        # The name, in parentheses, may have anything in it: proc(5).
        words = text.rpartition(b")")[2].split()
        if len(words) > 1 and words[1].isdigit():
            return int(words[1])
        self._files.odd("/proc/<pid>/stat", text, "parent", "the process is not counted")
        return None

    def _proportional_bytes(self, pid: int) -> int:
        """Return the PSS of a process in bytes, its RSS where that cannot be read, 0 where it has ended."""
        problem = "has no line 'Pss:'"
        try:
            kilobytes = field(self._files.read(f"/proc/{pid}/smaps_rollup"), b"Pss:")
        except OSError as exc:
            kilobytes, problem = None, f"cannot be read ({exc.strerror})"
        if kilobytes is not None:
            return 1024 * kilobytes
        resident = self._resident_bytes(pid)
        if resident:
            # Once, not for each of the processes.
            fallback = "resident memory is taken, which counts what processes share more than once"
            self._files.warn("/proc/<pid>/smaps_rollup", "unreadable", problem, fallback)
        return resident

    def _resident_bytes(self, pid: int) -> int:
        try:
            text = self._files.read(f"/proc/{pid}/statm")
        except OSError:
            return 0  # it has ended
        words = text.split()
        if len(words) > 1 and words[1].isdigit():
            return int(words[1]) * _PAGE_BYTES
        self._files.odd("/proc/<pid>/statm", text, "resident memory", "the process is not counted")
        return 0

    def _tree_elsewhere(self) -> list[int]:
        if self._pids is not None:
            return list(self._pids())
        import psutil

        try:
            top = psutil.Process(self._pid)
            return [top.pid, *(child.pid for child in top.children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def _unique_bytes(self, pid: int) -> int:
        """Return the USS of a process in bytes, its RSS where that may not be read, 0 where it has ended."""
        import psutil

        try:
            process = psutil.Process(pid)
            try:
                return int(process.memory_full_info().uss)
            except (psutil.AccessDenied, AttributeError) as exc:
                fallback = "resident memory is taken, which counts what processes share more than once"
                self._files.warn("psutil", "uss", f"cannot read the USS of a process ({exc})", fallback)
                return int(process.memory_info().rss)
        except psutil.NoSuchProcess:
            return 0
        except (OSError, RuntimeError, psutil.Error) as exc:
            self._files.warn("psutil", "rss", f"cannot read a process ({exc})", "the process is not counted")
            return 0
