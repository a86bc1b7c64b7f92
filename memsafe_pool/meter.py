"""What a child knows of its own memory: measures each task, and gives free memory back.

Runs in the child. For each task there is a report (``wire.Report``); how it is made:

* **Peak.** The kernel's peak counter of the process is reset at the start of the task and read at its end;
  what the process had at the start is taken off, and so is what it mapped of files. So much the task needed
  at least.
* **Reuse.** A task that fits into memory which an earlier one has left free does not raise the peak. At most
  that is what the process has beyond its *floor*: what it had when it was fresh, or right after its last
  trim. Where that matters, the report says that the peak is a lower bound, and by how much; a trim before the
  task makes it exact.
* **Private memory.** ``smaps_rollup`` is exact and takes a millisecond or more. It is read again when pages
  were touched for the first time since, for a small share of the time; in between, what the process has grown
  is added. Before the first time it is estimated from the number of page faults.
* **Nothing new.** After most tasks the process has what it had: then the report is that of the one before.

See also ``native`` for what is read how, and what it costs.
"""

from __future__ import annotations

import resource
import time
from contextlib import suppress

from memsafe_pool import memory, native, wire

__all__ = ["Meter"]

_MIB = 1 << 20

#: A peak is called exact where it can not be too low by more than these bytes, or this share.
DOUBT_BYTES, DOUBT_SHARE = 4 * _MIB, 0.05

#: Less is no change: what the interpreter and Celery do between tasks.
CHANGE_BYTES = _MIB // 2

#: A peak counter that is not further above what is resident need not be reset.
LOW_BYTES = _MIB // 4

#: After so many tasks in a row that changed nothing all is looked at again.
MOST_REPEATS = 64

#: Messages and results up to this size do not change what a process has by much.
SMALL_BYTES = 64 << 10

#: Private memory is read for 1 % of the CPU time used at most: a reading takes 0.65 ms at 50 MB and 60 ms at
#: 6 GB. Of elapsed time, 20 children that share two cores would take 10 % of these. Not in the first so many
#: seconds: starting a child is to be fast, and some live no longer.
PRIVATE_PRICE, START_SECONDS = 100.0, 0.5

#: A trim that only makes a number exact is paid by so many times its CPU time: it takes 0.1 ms per MB, and
#: getting that back from the kernel twice as long. Together 1 %.
TRIM_PRICE = 300.0

#: Seconds without work before another trim at least, when the last one has won little.
LEAST_DELAY_SECONDS = 1.0

#: After a second trim that won much within so many seconds the next one waits twice as long, up to the second
#: number: what was given back was needed again.
SOON_SECONDS, LONGEST_DELAY_SECONDS = 10.0, 2.0

_PAGE_BYTES = resource.getpagesize()


class Meter:
    """Measures one process, task by task.

    Arguments:
        trim_bytes: Growth in bytes since the last trim that makes another one worth it.
        trim_idle: Seconds without work before a trim, or None for never.

    Attributes:
        patience: Seconds to wait for work before a trim; None if none is worth it.
        repeated: Whether the last report is that of the task before, word for word.
        worth_trimming: Whether it has grown by enough since the last trim.
    """

    def __init__(self, trim_bytes: int, trim_idle: float | None) -> None:
        self._trim_bytes, self._trim_idle = trim_bytes, trim_idle
        self._delay = trim_idle or 0.0
        self._trimmed_at, self._next_trim = float("-inf"), 0.0
        # What the process had at the end of the last task, and whether it still has that.
        self._before = native.Measures(0, 0, 0, 0)
        self._failed = False  # whether that could not be read last time
        self._before = now = self._measure()
        self._same = self._low = False
        self._floor = now.anonymous
        self._high_before: int | None = None  # the peak counter at the start, where it can not be reset
        self._packed, self._repeats = b"", 0  # what is repeated, if that is what was said last
        # Each page that is not shared, or not any more, has been faulted in; some of files have, too.
        self._private_bytes = min(now.faults * _PAGE_BYTES, now.anonymous)
        self._private_at, self._private_faults = now.anonymous, now.faults
        self._private_known, self._next_private = False, 0.0
        self._first_private = time.monotonic() + START_SECONDS
        self._files_at = now.resident - now.anonymous
        self._shared_memory_bytes = memory.shared_memory_bytes()
        self.repeated = self.worth_trimming = False
        self.patience: float | None = None

    # -- one task

    def begin(self) -> None:
        """Start to measure a task."""
        if self._same and self._low:
            return
        if not self._same:
            self._settle(self._measure())
            self._packed = b""
        if not self._low:
            try:
                native.reset_peak()
                self._high_before = None
            except OSError:
                self._high_before = self._before.peak

    def end(self, size: int = 0) -> bytes:
        """Return the report on the task that began last, packed.

        Arguments:
            size: Bytes of the result, which are still there and will not be.
        """
        before, after = self._before, self._measure()
        if self._packed and self._repeats < MOST_REPEATS and self._unchanged(after):
            self._repeats += 1
            self._same = size <= SMALL_BYTES
            self.repeated = True
            return self._packed
        kept = before.anonymous - self._floor
        grown_files, gone_files = self._grown_files(before, after)
        if self._failed:
            peak, unseen = 0, max(before.anonymous, DOUBT_BYTES + 1)
        elif self._high_before is None or after.peak > self._high_before:
            peak, unseen = after.peak - before.resident - grown_files, kept + gone_files
        else:  # below an older peak, which can not be reset here
            peak, unseen = 0, kept + gone_files + self._high_before - before.resident
        peak = max(peak, after.anonymous - before.anonymous, 0)
        exact = unseen <= max(DOUBT_BYTES, DOUBT_SHARE * (peak + unseen))
        self._settle(after)
        self._same, self._repeats = size <= SMALL_BYTES, 0
        report = self._pack(after.peak, peak, 0 if exact else unseen)
        self.repeated = False
        # What may be repeated is what a task that changes nothing would have.
        usual = peak <= LOW_BYTES and before.anonymous - after.anonymous <= LOW_BYTES
        self._packed = report if usual and not gone_files and not self._failed else b""
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

    def _unchanged(self, now: native.Measures) -> bool:
        """Whether nothing but some page faults has happened since the last task was measured."""
        before = self._before
        return now[:3] == before[:3] and (now.faults - before.faults) * _PAGE_BYTES <= CHANGE_BYTES

    def _settle(self, now: native.Measures) -> None:
        """Take this for what the process has before the next task."""
        self._before = now
        self._low = now.peak - now.resident <= LOW_BYTES  # then the counter is where a reset would put it
        self._floor = min(self._floor, now.anonymous)
        self.worth_trimming = now.anonymous - self._floor >= self._trim_bytes
        self.patience = self._delay if self.worth_trimming and self._trim_idle is not None else None

    def _pack(self, high: int, peak: int, hidden: int = 0) -> bytes:
        now = self._before
        kept = now.anonymous - self._floor
        return wire.REPORT.pack(
            now.resident,
            now.anonymous,
            self._private_now(now),
            high,
            peak,
            kept if kept > CHANGE_BYTES else 0,
            hidden,
        )

    def _grown_files(self, before: native.Measures, after: native.Measures) -> tuple[int, int]:
        """What was mapped of files since the task began, or unmapped, if that is much.

        It is memory, but not the task's own. What was unmapped, or taken back by the kernel, may have
        been so before or after the peak.
        """
        files = after.resident - after.anonymous
        grown = files - (before.resident - before.anonymous)
        if abs(files - self._files_at) > CHANGE_BYTES:
            shared_memory = memory.shared_memory_bytes()
            grown -= shared_memory - self._shared_memory_bytes
            self._files_at, self._shared_memory_bytes = files, shared_memory
        return max(grown, 0), -grown if grown < -CHANGE_BYTES else 0

    def _private_now(self, now: native.Measures) -> int:
        touched = (now.faults - self._private_faults) * _PAGE_BYTES
        if (
            (touched > CHANGE_BYTES or not self._private_known)
            and time.monotonic() >= self._first_private
            and (began := time.process_time()) >= self._next_private
        ):
            with suppress(OSError):  # no descriptor left, for instance: then the next time
                self._private_bytes, self._private_known = memory.private_bytes(), True
                self._private_at, self._private_faults = now.anonymous, now.faults
            ended = time.process_time()
            self._next_private = ended + PRIVATE_PRICE * (ended - began)
        return max(self._private_bytes + now.anonymous - self._private_at, 0)

    # -- trim

    @property
    def affords_trim(self) -> bool:
        """Whether a trim that only makes the next peak exact is paid by what was done since the last one."""
        return time.process_time() >= self._next_trim

    def trim(self, *, collect: bool = True) -> tuple[int, bytes]:
        """Give free heap back; return the bytes won, and a report, packed.

        Arguments:
            collect: Whether to collect garbage first.
        """
        began = time.process_time()
        try:
            won = memory.trim(collect=collect)
        except OSError:
            won = 0  # it can not be seen what was won
        ended, now = time.process_time(), time.monotonic()
        self._next_trim = ended + TRIM_PRICE * (ended - began)
        shortest = self._trim_idle or 0.0
        if won < self._trim_bytes // 2:
            self._delay = min(max(2 * self._delay, LEAST_DELAY_SECONDS), max(60.0, self._delay))
        else:
            soon = now - self._trimmed_at < SOON_SECONDS
            self._delay = max(min(2 * self._delay, LONGEST_DELAY_SECONDS), shortest) if soon else shortest
            self._trimmed_at = now
        left = self._measure()
        self._floor = left.anonymous
        self._settle(left)
        self._same, self._packed = True, b""
        return won, self._pack(left.resident, 0)
