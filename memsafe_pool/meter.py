"""What a child knows of its own memory: measures each task, and gives free memory back.

Runs in the child. For each task there is a report (``wire.Report``); how it is made:

* **Peak.** The kernel's peak counter of the process is reset at the start of the task and read at
  its end; what the process had at the start is taken off, and so is what it mapped of files.
* **Reuse.** A task that fits into heap which an earlier one has left free does not raise the
  peak. Where that can be, the kernel is asked which pages of the heap were touched: their
  referenced bits are cleared before the task and counted after it. This costs some
  milliseconds for a large heap, so it is seldom done for tasks that are known to need little, and
  has an allowance. Unused room in Python's own arenas, for small objects, is added when the task
  has needed another arena besides. Where what was reused is not known, the report says that the
  peak is a lower bound.
* **Private memory.** ``smaps_rollup`` is exact and takes a millisecond or more. It is read
  again when pages were touched for the first time since, for at most a small share of the
  time; in between, what the process has grown is added. Before the first time it is
  estimated from the number of page faults.

See also ``native`` for what is read how, and what it costs.
"""

from __future__ import annotations

import resource
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from memsafe_pool import arenas, memory, native, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Meter"]

_MIB = 1 << 20

#: Heap of this size may be reused unnoticed: the error of a peak that is called exact.
DOUBT_BYTES = _MIB // 2

#: Room of this size in Python's arenas may be reused unnoticed. A Celery worker has 1 MiB or so at its start.
ARENA_DOUBT_BYTES = 2 * _MIB

#: A peak counter that is not further above what is resident need not be reset.
LOW_BYTES = _MIB // 4

#: After so many tasks in a row that changed nothing all is looked at again.
MOST_REPEATS = 64

#: Referenced pages of the heap that are Celery's own doing, and not a task's; less where less was seen.
TOUCHED_BYTES = _MIB

#: At most this share of the process's own CPU time goes into what is exact and dear: the same share of the
#: time of day would be much for a child that has little to do. For looking at reused heap so many seconds
#: can be saved up, and are there at the start: what tasks need is to be known early.
SHARE = 0.005
ALLOWANCE_SECONDS = 2.0

#: The share of the time of day that may be used beside it: tasks that mostly wait use no CPU time.
IDLE_SHARE = 0.0002

#: Seconds between looks at how much CPU time there was: each is a system call.
EARN_SECONDS = 0.05

#: Seconds until the first exact numbers: starting a child is to be fast, and some live no longer.
START_SECONDS = 0.5

#: Seconds after which the statistics of the heap are read again although the process has not grown.
HEAP_STALE_SECONDS = 1.0

#: Of tasks that are known to need little, one in so many is looked at all the same.
LITTLE_LOOKS = 1024

#: Messages and results up to this size do not change what a process has by much.
SMALL_BYTES = 64 << 10

#: A trim threshold that is never reached; the largest number that the allocator takes.
_NEVER = 2**31 - 1

#: Freeing a block of this size makes glibc look at the end of its heap.
_TRIGGER_BYTES = 128 << 10

_PAGE_BYTES = resource.getpagesize()


class _Expense:
    """Keeps something dear to a share of the time.

    Arguments:
        allowance: Seconds that can be saved up, and are there at the start.
        delay: Seconds until it is allowed for the first time.
    """

    def __init__(self, allowance: float = 0.0, delay: float = 0.0) -> None:
        self._allowance = self._left = allowance
        self._cpu, self._now = time.process_time(), time.monotonic()
        self._not_before = self._now + delay

    def allowed(self) -> bool:
        if self._left < 0:
            if time.monotonic() - self._now < EARN_SECONDS:
                return False
            self._earn()
        return self._left >= 0 and time.monotonic() >= self._not_before

    def _earn(self) -> None:
        cpu, now = time.process_time(), time.monotonic()
        earned = SHARE * (cpu - self._cpu) + IDLE_SHARE * (now - self._now)
        self._left = min(self._left + earned, self._allowance)
        self._cpu, self._now = cpu, now

    @contextmanager
    def spend(self) -> Iterator[None]:
        self._earn()
        began = self._cpu
        try:
            yield
        finally:
            self._left -= time.process_time() - began


class Meter:
    """Measures one process, task by task.

    Arguments:
        trim_bytes: Growth in bytes since the last trim that makes another one worth it.
        trim_idle: Seconds without work before a trim, or None for never.
        heap_end_bytes: The allocator's trim threshold, where it was set by us; else None.

    Attributes:
        doubtful: Whether the task that runs may find so much free heap that its peak is not seen.
        patience: Seconds to wait for work before a trim; None if none is worth it.
    """

    def __init__(self, trim_bytes: int, trim_idle: float | None, heap_end_bytes: int | None = None) -> None:
        self._trim_bytes, self._trim_idle = trim_bytes, trim_idle
        self._delay = trim_idle or 0.0
        self._heap_end_bytes = heap_end_bytes
        self._looking = _Expense(allowance=ALLOWANCE_SECONDS)
        self._heap, self._private = _Expense(delay=START_SECONDS), _Expense(delay=START_SECONDS)
        self._on_glibc = native.allocator() == "glibc"
        self._touched_bytes = TOUCHED_BYTES
        self._littles = 0
        self._heap_before: int | None = None  # in a task that is watched
        self._reusable_before = 0
        # What the process had at the end of the last task, and whether it still has that.
        self._before = native.Measures(0, 0, 0, 0)
        self._failed = False  # whether that could not be read last time
        self._before = self._measure()
        self._same = False
        self._high_before: int | None = None  # the peak counter at the start, where it can not be reset
        self._packed, self._repeats = b"", 0
        self._trimmed_at = self._before.anonymous
        self._free_bytes, self._free_at, self._free_read = 0, self._before.anonymous, time.monotonic()
        # Each page that is not shared, or not any more, has been faulted in; some of files have, too.
        self._private_bytes = min(self._before.faults * _PAGE_BYTES, self._before.anonymous)
        self._private_at, self._private_faults = self._before.anonymous, self._before.faults
        self._private_estimated = True
        self._arenas, self._arenas_due = arenas.read(), False
        self._files_at = self._before.resident - self._before.anonymous
        self._shared_memory_bytes = memory.shared_memory_bytes()
        self.doubtful = False
        self.patience: float | None = None

    # -- one task

    def begin(self) -> None:
        """Start to measure a task."""
        if not self._same:
            self._settle(self._measure())
            self._packed = b""
        if self._before.peak - self._before.resident > LOW_BYTES:  # else it is where a reset would put it
            try:
                native.reset_peak()
                self._high_before = None
            except OSError:
                self._high_before = self._before.peak

    def watch(self, *, little: bool) -> None:
        """Find out how much free heap the task that begins now will use, if that may be done.

        Arguments:
            little: Whether tasks of this name are known to need little.
        """
        if not self._on_glibc:
            return  # other allocators have their memory elsewhere than in the heap proper
        if little:
            self._littles += 1
            if self._littles % LITTLE_LOOKS:
                return
        if self._looking.allowed():
            with self._looking.spend():
                heap = _heap_pages()
                if heap is not None and _forget_references():
                    self._heap_before = heap[0]
                    if self._heap_end_bytes is not None:
                        # What the task frees at the end of the heap has to stay until it was counted.
                        native.set_allocator_thresholds(trim_bytes=_NEVER)

    def end(self, size: int = 0) -> bytes:
        """Return the report on the task that began last, packed.

        Arguments:
            size: Bytes of the result, which are still there and will not be.
        """
        before, after = self._before, self._measure()
        # Nothing but faults has changed, as after nearly all tasks that need little: no need to think again.
        if (
            after[:3] == before[:3]
            and self._packed
            and self._heap_before is None
            and self._repeats < MOST_REPEATS
            and (after.faults - before.faults) * _PAGE_BYTES < DOUBT_BYTES
        ):
            self._repeats += 1
            self._same = size <= SMALL_BYTES
            return self._packed
        reused, certain = 0, not self.doubtful
        if self._heap_before is not None:
            reused, certain = self._reused(self._heap_before)
            # The end of the heap has been given back meanwhile.
            after = self._measure()._replace(peak=after.peak)
        grown_files, steady = self._grown_files(before, after)
        if self._failed:
            peak, certain = 0, False
        elif self._high_before is None or after.peak > self._high_before:
            peak, certain = after.peak - before.resident - grown_files, certain and steady
        else:
            peak, certain = 0, False  # below an older peak, which can not be reset here
        peak = max(peak, after.anonymous - before.anonymous, 0) + reused
        moved = max(peak, before.anonymous - after.anonymous) > DOUBT_BYTES
        in_arenas, sure = self._reused_in_arenas(moved=moved)
        peak += in_arenas
        self._settle(after)
        self._same = size <= SMALL_BYTES
        self._repeats = 0
        report = self._pack(after.peak, peak, exact=certain and sure)
        # What may be repeated is what a task that changes nothing would have, not being watched.
        usual = certain is not self.doubtful and not self._failed
        self._packed = report if usual and peak <= LOW_BYTES else b""
        return report

    def report(self) -> bytes:
        """Return a report without a task, packed."""
        self._settle(self._measure())
        return self._pack(self._before.resident, 0, exact=False)

    def _measure(self) -> native.Measures:
        """What the process has; what it had, where that can not be read: a task may take all descriptors."""
        try:
            now = native.measure()
        except OSError:
            self._failed = True
            return self._before
        self._failed = False
        return now

    def _settle(self, now: native.Measures) -> None:
        """Take this for what the process has before the next task."""
        self._before = now
        self._heap_before = None
        self._trimmed_at = min(self._trimmed_at, now.anonymous)
        self._reusable_before = self._reusable(now.anonymous)
        self.doubtful = self._reusable_before > DOUBT_BYTES
        worth_it = self._trim_idle is not None and now.anonymous - self._trimmed_at >= self._trim_bytes
        self.patience = self._delay if worth_it else None

    def _pack(self, high: int, peak: int, *, exact: bool) -> bytes:
        now = self._before
        return wire.REPORT.pack(
            now.resident, now.anonymous, self._private_now(now), high, peak, self._reusable_before, exact
        )

    def _grown_files(self, before: native.Measures, after: native.Measures) -> tuple[int, bool]:
        """What was mapped of files since the task began, and whether that is certain.

        It is memory, but not the task's own. What was unmapped, or taken back by the kernel, may have
        been so before or after the peak.
        """
        files = after.resident - after.anonymous
        grown = files - (before.resident - before.anonymous)
        if abs(files - self._files_at) > DOUBT_BYTES:
            shared_memory = memory.shared_memory_bytes()
            grown -= shared_memory - self._shared_memory_bytes
            self._files_at, self._shared_memory_bytes = files, shared_memory
        return max(grown, 0), grown >= -DOUBT_BYTES

    def _reused(self, heap_before: int) -> tuple[int, bool]:
        """How much heap that had been free was used, and whether that is certain."""
        with self._looking.spend():
            heap = _heap_pages()
        if self._heap_end_bytes is not None:
            native.set_allocator_thresholds(trim_bytes=self._heap_end_bytes)
            bytearray(_TRIGGER_BYTES)
        if heap is None:
            return 0, False
        now, referenced = heap
        touched = max(referenced - max(now - heap_before, 0), 0)
        self._touched_bytes = min(self._touched_bytes, touched)
        # What was used and then given back to the kernel is not seen.
        certain = now > heap_before - DOUBT_BYTES
        return min(touched - self._touched_bytes, self._reusable_before), certain

    def _reused_in_arenas(self, *, moved: bool) -> tuple[int, bool]:
        """How much room that was free in Python's arenas was used, and whether that is certain.

        Arguments:
            moved: Whether memory has grown or shrunk by much, so that the arenas may be others.
        """
        before, stale = self._arenas, self._arenas_due
        self._arenas_due = moved or stale
        if self._arenas_due and self._looking.allowed():
            self._read_arenas()
        if before is None or self._arenas is None:
            return 0, True  # what is not known can not be doubted each time
        if stale or self._arenas_due:
            return 0, False
        # A new arena is made only when all pools of the others are in use.
        used = before.unused if self._arenas.made > before.made else 0
        return used, before.available + before.unused - used <= ARENA_DOUBT_BYTES

    def _read_arenas(self) -> None:
        with self._looking.spend():
            self._arenas, self._arenas_due = arenas.read(), False

    # -- numbers that cost something

    def _reusable(self, anonymous: int) -> int:
        """Resident bytes of the heap that are free: what a task may reuse, or a trim win. 0 when little."""
        changed = abs(anonymous - self._free_at) > DOUBT_BYTES // 4
        if (changed or time.monotonic() - self._free_read > HEAP_STALE_SECONDS) and self._heap.allowed():
            self._read_free(anonymous)
        # What the process has grown since may be free again.
        reusable = self._free_bytes + max(anonymous - self._free_at, 0)
        return reusable if reusable > DOUBT_BYTES else 0

    def _read_free(self, anonymous: int) -> None:
        with self._heap.spend():
            try:
                heap = native.heap_bytes()
                pages = _heap_pages() if self._on_glibc else None
                self._free_bytes = max(pages[0] - heap.in_use, 0) if pages else heap.free
            except OSError:
                self._free_bytes = max(anonymous - self._trimmed_at, 0)  # not known here: it may be all
        self._free_at, self._free_read = anonymous, time.monotonic()

    def _private_now(self, now: native.Measures) -> int:
        touched = (now.faults - self._private_faults) * _PAGE_BYTES
        if (self._private_estimated or touched > DOUBT_BYTES) and self._private.allowed():
            # No descriptor left, for instance: then the next time.
            with self._private.spend(), suppress(OSError):
                self._private_bytes = memory.private_bytes()
                self._private_at, self._private_faults = now.anonymous, now.faults
                self._private_estimated = False
        return max(self._private_bytes + now.anonymous - self._private_at, 0)

    # -- trim

    def trim(self) -> tuple[int, bytes]:
        """Collect garbage and give free heap back; return the bytes won, and a report, packed."""
        try:
            won = memory.trim()
        except OSError:
            won = 0  # it can not be seen what was won
        if won < self._trim_bytes // 2:
            self._delay = min(2 * self._delay, max(60.0, self._delay))
        else:
            self._delay = self._trim_idle or 0.0
        now = self._measure()
        self._trimmed_at = now.anonymous
        self._read_free(now.anonymous)
        self._read_arenas()
        self._settle(now)
        self._same, self._packed = True, b""
        return won, self._pack(now.resident, 0, exact=False)


def _heap_pages() -> tuple[int, int] | None:
    """Resident and referenced bytes of the heap proper; None where the kernel does not say.

    ``/proc/self/smaps``, up to the end of the heap, which comes before the libraries: the kernel walks
    what is asked for, at about 7 us per MB. After a fork the heap is more than one mapping.
    """
    resident = referenced = 0
    found = False
    try:
        with open("/proc/self/smaps", "rb", buffering=4096) as smaps:
            for line in smaps:
                if line.endswith(b"[heap]\n"):
                    found = True
                elif b"-" in line[:18]:  # the first line of another mapping
                    if found:
                        break
                elif found and line.startswith(b"Rss:"):
                    resident += int(line[4:-3])
                elif found and line.startswith(b"Referenced:"):
                    referenced += int(line[11:-3])
    except OSError:
        return None
    return (1024 * resident, 1024 * referenced) if found else None


def _forget_references() -> bool:
    """Clear the referenced bits of anonymous memory; whether that was possible."""
    try:
        with open("/proc/self/clear_refs", "wb", buffering=0) as clear_refs:
            clear_refs.write(b"2")
    except OSError:
        return False
    return True
