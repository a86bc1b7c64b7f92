"""What a child knows of its own memory: measures each task, and gives free memory back.

Runs in the child. For each task there is a report (``wire.Report``); how it is made:

* **Nothing new.** After most tasks the process has what it had: then the report is that of the task before it
  (``glance``).
* **Peak.** The kernel's peak counter of the process is reset at the start of the task and read at
  its end; what the process had at the start is taken off, and so is what it mapped of files.
* **Reuse.** A task that fits into heap which an earlier one has left free does not raise the
  peak. Where that can be, the kernel is asked which pages of the heap were touched: their
  referenced bits are cleared before the task and counted after it. This costs some
  milliseconds for a large heap, so it is seldom done for tasks of which it is known what they need, and
  has an allowance. Unused room in Python's own arenas, for small objects, is added when the task
  has needed another arena besides, else half of it. Where what was reused is not known, the report
  says that the peak is a lower bound.
* **Private memory.** ``smaps_rollup`` is exact and takes a millisecond or more. It is read
  again when pages were touched for the first time since, for at most a small share of the
  time; in between, what the process has grown is added. Before the first time it is
  estimated from the number of page faults.

See also ``native`` for what is read how, and what it costs, ``heap`` and ``arenas``, and ``expense``, which
keeps what is dear to a share of the time.
"""

from __future__ import annotations

import math
import resource
import time
from contextlib import suppress

from memsafe_pool import arenas, heap, memory, native, wire
from memsafe_pool.expense import Expense
from memsafe_pool.glance import Glance

__all__ = ["Meter"]

_MIB = 1 << 20

#: Heap of this size may be reused unnoticed: part of the error of a peak that is called exact.
DOUBT_BYTES = _MIB // 2

#: How much of the room in Python's arenas a task has used is not known. Half of it is counted, unless there
#: is more than this. That is wrong by 1 MiB at most, and by half an arena more where all of it, or none, was
#: used before. A Celery worker has 1 MiB or so at its start.
ARENA_DOUBT_BYTES = 2 * _MIB

#: A peak counter that is not further above what is resident need not be reset.
LOW_BYTES = _MIB // 4

#: After so many tasks in a row that changed nothing all is looked at again.
MOST_REPEATS = 64

#: Referenced pages of the heap that are Celery's own doing, and not a task's; less where less was seen.
TOUCHED_BYTES = _MIB

#: Seconds that can be saved up for looking at reused heap, and are there at the start; and those that may be
#: spent sooner than later, as what tasks need is to be known early. A look takes 1 to 4 ms, and more where a
#: process has hundreds of MB.
ALLOWANCE_SECONDS, EARLY_SECONDS = 1.0, 2.0

#: Seconds until the first exact numbers: starting a child is to be fast, and some live no longer.
START_SECONDS = 0.5

#: When the process has grown by so many bytes and such a share since they were read, they are read at once.
AT_ONCE_BYTES, AT_ONCE_SHARE = 8 * _MIB, 0.125

#: Seconds after which the statistics of the heap are read again although the process has not grown.
HEAP_STALE_SECONDS = 1.0

#: Of tasks of which it is known what they need, one in so many is looked at all the same.
KNOWN_LOOKS = 1024

#: Messages and results up to this size do not change what a process has by much.
SMALL_BYTES = 64 << 10

#: Seconds without work before another trim at least, when the last one has won little.
LEAST_DELAY_SECONDS = 1.0

_PAGE_BYTES = resource.getpagesize()


class Meter:
    """Measures one process, task by task.

    Arguments:
        trim_bytes: Growth in bytes since the last trim that makes another one worth it.
        trim_idle: Seconds without work before a trim, or None for never.

    Attributes:
        doubtful: Whether the task that runs may find so much free heap that its peak is not seen.
        patience: Seconds to wait for work before a trim; None if none is worth it.
        repeated: Whether the last report is that of the task before, word for word.
        worth_trimming: Whether it has grown by enough since the last trim.
    """

    def __init__(self, trim_bytes: int, trim_idle: float | None) -> None:
        self._trim_bytes, self._trim_idle = trim_bytes, trim_idle
        self._delay = trim_idle or 0.0
        self._looking = Expense(allowance=ALLOWANCE_SECONDS, early=EARLY_SECONDS)
        self._heap, self._private = Expense(delay=START_SECONDS), Expense(delay=START_SECONDS)
        self._on_glibc = native.allocator() == "glibc"
        if self._on_glibc and heap.most_grown() is None:
            heap.look()
        self._touched_bytes = TOUCHED_BYTES
        self._known = 0
        self._heap_before: int | None = None  # in a task that is watched
        self._reusable_before = self._result_bytes = 0
        self._left_free = 0  # by the last trim
        # What may have become free since it was read out of turn; with it, all that a task may reuse.
        self._unsure = self._hideable = 0
        # What the process had at the end of the last task, and whether it still has that.
        self._before = native.Measures(0, 0, 0, 0)
        self._failed = False  # whether that could not be read last time
        self._before = self._measure()
        self._same = self._low = False
        self._glance = Glance(DOUBT_BYTES)
        self._high_before: int | None = None  # the peak counter at the start, where it can not be reset
        # What is repeated; whether that is what was said last.
        self._packed, self._told, self._repeats = b"", False, 0
        self._trimmed_at = self._before.anonymous
        self._free_bytes, self._free_at, self._free_read = 0, self._before.anonymous, time.monotonic()
        # Each page that is not shared, or not any more, has been faulted in; some of files have, too.
        self._private_bytes = min(self._before.faults * _PAGE_BYTES, self._before.anonymous)
        self._private_at, self._private_faults = self._before.anonymous, self._before.faults
        self._private_estimated = True
        self._arenas, self._arenas_due, self._arenas_at = arenas.known(), False, self._before.anonymous
        self._files_at = self._before.resident - self._before.anonymous
        self._shared_memory_bytes = memory.shared_memory_bytes()
        self.doubtful = self.repeated = self.worth_trimming = False
        self.patience: float | None = None

    # -- one task

    def begin(self) -> None:
        """Start to measure a task."""
        if self._same and self._low:
            return
        if not self._same:
            now = self._measure()
            # What was mapped by itself is gone, and is not free heap.
            gone = max(self._before.anonymous - now.anonymous, 0)
            self._settle(now, freed=max(self._result_bytes - gone, 0))
            self._packed = b""
        if not self._low:
            try:
                native.reset_peak()
                self._high_before = None
            except OSError:
                self._high_before = self._before.peak

    def watch(self, *, known: bool) -> None:
        """Find out how much free heap the task that begins now will use, if that may be done.

        Arguments:
            known: Whether it is known what tasks of this name need.
        """
        if not self._on_glibc:
            return  # other allocators have their memory elsewhere than in the heap proper
        if known:
            self._known += 1
            if self._known % KNOWN_LOOKS:
                return
        if self._looking.allowed():
            with self._looking.spend():
                pages = heap.pages()
                if pages is not None and heap.forget_references():
                    self._heap_before, self._packed = pages.resident, b""

    def end(self, size: int = 0) -> bytes:
        """Return the report on the task that began last, packed.

        Arguments:
            size: Bytes of the result, which are still there and will not be.
        """
        # As after nearly all tasks that need little: no need to think again.
        quiet = self._packed and self._glance.unchanged()
        if quiet and self._repeats < MOST_REPEATS:
            self._repeats += 1
            self._same = size <= SMALL_BYTES
            self.repeated, self._told = self._told, True
            return self._packed
        self.repeated = False
        before, after = self._before, self._measure()
        reused, hidden = 0, self._hideable if self.doubtful else 0
        if self._heap_before is not None:
            reused, hidden = self._reused(self._heap_before, after.anonymous)
        grown_files, gone_files = self._grown_files(before, after)
        if self._failed:
            peak, hidden = 0, max(before.anonymous, 1)
        elif self._high_before is None or after.peak > self._high_before:
            peak, hidden = after.peak - before.resident - grown_files, hidden + gone_files
        else:  # below an older peak, which can not be reset here
            peak, hidden = 0, max(hidden + gone_files + self._high_before - before.resident, 1)
        peak = max(peak, after.anonymous - before.anonymous, 0) + reused
        moved = max(peak, before.anonymous - after.anonymous) > DOUBT_BYTES
        in_arenas, perhaps_in_arenas, hidden_in_arenas = self._reused_in_arenas(moved=moved)
        self._settle(after)
        self._same, self._result_bytes = size <= SMALL_BYTES, size
        self._repeats = 0
        peak += in_arenas
        # What may be repeated is what a task that changes nothing would have, not being watched.
        usual = bool(hidden) is self.doubtful and not self._failed
        hidden += hidden_in_arenas
        self._packed = self._pack(after.peak, peak, hidden) if usual and peak <= LOW_BYTES else b""
        if self._packed:
            self._glance.remember(after)
        if self._packed and quiet:
            report = self._packed
        elif hidden:
            report = self._pack(after.peak, peak, hidden + perhaps_in_arenas)  # it stays a lower bound
        else:
            report = self._pack(after.peak, peak + perhaps_in_arenas // 2)
        self._told = report == self._packed
        return report

    def report(self) -> bytes:
        """Return a report without a task, packed."""
        self._settle(self._measure())
        self._same = True
        return self._pack(self._before.resident, 0)

    def _measure(self) -> native.Measures:
        """What the process has; what it had, where that can not be read: a task may take all descriptors."""
        try:
            now = native.measure()
        except OSError:
            self._failed = True
            return self._before
        self._failed = False
        return now

    def _settle(self, now: native.Measures, freed: int = 0) -> None:
        """Take this for what the process has before the next task.

        Arguments:
            freed: Bytes that were still used at the end of the last one.
        """
        self._before = now
        self._low = now.peak - now.resident <= LOW_BYTES  # then the counter is where a reset would put it
        self._heap_before = None
        self._trimmed_at = min(self._trimmed_at, now.anonymous)
        self._reusable_before = self._reusable(now.anonymous, freed)
        self._hideable = self._reusable_before + self._unsure
        self.doubtful = self._hideable > DOUBT_BYTES
        grown = max(now.anonymous - self._trimmed_at, self._reusable_before - self._left_free)
        self.worth_trimming = grown >= self._trim_bytes
        self.patience = self._delay if self.worth_trimming and self._trim_idle is not None else None

    def _pack(self, high: int, peak: int, hidden: int = 0) -> bytes:
        now = self._before
        return wire.REPORT.pack(
            now.resident, now.anonymous, self._private_now(now), high, peak, self._reusable_before, hidden
        )

    def _grown_files(self, before: native.Measures, after: native.Measures) -> tuple[int, int]:
        """What was mapped of files since the task began, or unmapped, if that is much.

        It is memory, but not the task's own. What was unmapped, or taken back by the kernel, may have
        been so before or after the peak.
        """
        files = after.resident - after.anonymous
        grown = files - (before.resident - before.anonymous)
        if abs(files - self._files_at) > DOUBT_BYTES:
            shared_memory = memory.shared_memory_bytes()
            grown -= shared_memory - self._shared_memory_bytes
            self._files_at, self._shared_memory_bytes = files, shared_memory
        return max(grown, 0), -grown if grown < -DOUBT_BYTES else 0

    def _reused(self, heap_before: int, anonymous: int) -> tuple[int, int]:
        """How much heap that had been free was used, and how much may have been besides.

        Arguments:
            heap_before: Its resident bytes before the task.
            anonymous: What the process has now.
        """
        with self._looking.spend():
            pages = heap.pages()
        if pages is None:
            return 0, self._hideable
        now = pages.resident
        touched = max(pages.referenced - max(now - heap_before, 0), 0)
        self._touched_bytes = min(self._touched_bytes, touched)
        touched -= self._touched_bytes
        # What was used and then given back to the kernel is not seen.
        hidden = gone if (gone := heap_before - now) >= DOUBT_BYTES else 0
        free = self._hideable
        if touched - free > DOUBT_BYTES:
            # The task has only read the rest; or more was free than was known, and is so again.
            if self._heap.allowed():
                self._read_free(anonymous)
                free = max(free, self._free_bytes)
            else:
                hidden += touched - free
                self._free_read = -math.inf
        return min(touched, free), hidden

    def _reused_in_arenas(self, *, moved: bool) -> tuple[int, int, int]:
        """How much room that was free in Python's arenas was used.

        Then how much more may have been, of which half can be counted; and where that would be wrong by too
        much, how much may be hidden there.

        Arguments:
            moved: Whether memory has grown or shrunk by much, so that the arenas may be others.
        """
        before, stale = self._arenas, self._arenas_due
        self._arenas_due = moved or stale
        if self._arenas_due and self._looking.allowed():
            self._read_arenas()
        if before is None or self._arenas is None:
            return 0, 0, 0  # what is not known can not be doubted each time
        if stale or self._arenas_due:
            made_since = max(self._before.anonymous - self._arenas_at, 0)
            return 0, 0, max(before.unused + before.available + made_since, 1)
        # Pools that were never used are no memory yet. Only the arena that was made last can have such.
        unused = before.unused - min(before.unused, arenas.ARENA_BYTES) // 2
        # A new one is made only when all pools of the others are in use.
        used = unused if self._arenas.made > before.made else 0
        rest = before.available + unused - used
        return (used, rest, 0) if rest <= ARENA_DOUBT_BYTES else (used, 0, rest)

    def _read_arenas(self) -> None:
        with self._looking.spend():
            self._arenas, self._arenas_due = arenas.read(), False
        self._arenas_at = self._before.anonymous

    # -- numbers that cost something

    def _reusable(self, anonymous: int, freed: int = 0) -> int:
        """Resident bytes of the heap that are free: what a task may reuse, or a trim win. 0 when little."""
        grown = anonymous - self._free_at
        due = max(abs(grown), freed) > DOUBT_BYTES // 4 or (
            time.monotonic() - self._free_read > HEAP_STALE_SECONDS
        )
        most = heap.most_grown() if self._on_glibc else None
        if due and self._heap.allowed():
            self._read_free(anonymous)
            self._unsure = grown = 0
        elif grown > AT_ONCE_BYTES + AT_ONCE_SHARE * self._free_at:
            # Sooner than it may be read again: what is in use now may be free by then.
            self._unsure += grown if most is None else min(grown, most)
            self._read_free(anonymous)
            grown = 0
        elif freed > DOUBT_BYTES:
            self._free_bytes = min(self._free_bytes + freed, anonymous)
        if grown < 0:
            self._free_at, grown = anonymous, 0  # what it grows by from now on may be free heap
        if most is not None:
            grown = min(grown, most)  # the rest is in mappings of its own, which go back when they are free
        # What the heap has grown since may be free again.
        reusable = self._free_bytes + grown
        return reusable if reusable > DOUBT_BYTES else 0

    def _read_free(self, anonymous: int) -> None:
        with self._heap.spend():
            try:
                held = native.heap_bytes()
                resident = heap.look() if self._on_glibc else None
                self._free_bytes = held.free if resident is None else max(resident - held.in_use, 0)
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

    def trim(self, *, collect: bool = True) -> tuple[int, bytes]:
        """Give free heap back; return the bytes won, and a report, packed.

        Arguments:
            collect: Whether to collect garbage first.
        """
        try:
            won = memory.trim(collect=collect)
        except OSError:
            won = 0  # it can not be seen what was won
        if won < self._trim_bytes // 2:
            self._delay = min(max(2 * self._delay, LEAST_DELAY_SECONDS), max(60.0, self._delay))
        else:
            self._delay = self._trim_idle or 0.0
        now = self._measure()
        self._trimmed_at = now.anonymous
        self._read_free(now.anonymous)
        self._read_arenas()
        self._settle(now)
        self._left_free, self.worth_trimming, self.patience = self._reusable_before, False, None
        self._same, self._packed = True, b""
        return won, self._pack(now.resident, 0)
