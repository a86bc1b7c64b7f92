"""What a child knows of its own memory: measures each task, and gives free memory back.

Runs in the child. For each task there is a report (``wire.Report``); how it is made:

* **Peak.** The kernel's peak counter of the process is reset at the start of the task and read at
  its end; what the process had at the start is taken off, and so is what it mapped of files.
* **Reuse.** A task that fits into heap which an earlier one has left free does not raise the
  peak. Where that can be, the kernel is asked which pages of the heap were touched: their
  referenced bits are cleared before the task and counted after it. This costs some
  milliseconds for a large heap, so it is not done again soon for a task that needs little, and has
  an allowance. Where it was not done, or can not be, the report says that the peak is a lower bound.
* **Private memory.** ``smaps_rollup`` is exact and takes a millisecond or more. It is read
  again when pages were touched for the first time since, for at most a small share of the
  time; in between, what the process has grown is added. Before the first time it is
  estimated from the number of page faults.

See also ``native`` for what is read how, and what it costs.
"""

from __future__ import annotations

import os
import resource
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from memsafe_pool import memory, native, wire

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Meter"]

_MIB = 1 << 20

#: Heap of this size may be reused unnoticed: the error of a peak that is called exact.
DOUBT_BYTES = _MIB // 2

#: Referenced pages of the heap that are Celery's own doing, and not a task's; less where less was seen.
TOUCHED_BYTES = _MIB

#: At most this share of the time goes into what is exact and dear. For looking at reused heap so many
#: seconds can be saved up, and are there at the start: what tasks need is to be known early.
SHARE = 0.005
ALLOWANCE_SECONDS = 2.0

#: Seconds until the first exact numbers: starting a child is to be fast, and some live no longer.
START_SECONDS = 0.5

#: Seconds after which the statistics of the heap are read again although the process has not grown.
HEAP_STALE_SECONDS = 1.0

#: A task that was found to need little so often in a row is let off once, then twice, four times and so on.
LOOKS, MOST_LET_OFF = 4, 1024

#: A trim threshold that is never reached; the largest number that the allocator takes.
_NEVER = 2**31 - 1

#: Freeing a block of this size makes glibc look at the end of its heap.
_TRIGGER_BYTES = 128 << 10

_PAGE_BYTES = resource.getpagesize()


class _Expense:
    """Keeps something dear to ``SHARE`` of the time.

    Arguments:
        allowance: Seconds of that which can be saved up, and are there at the start.
        delay: Seconds until it is allowed for the first time.
    """

    def __init__(self, allowance: float = 0.0, delay: float = 0.0) -> None:
        self._saved = allowance / SHARE
        self._not_before = time.monotonic() + delay if delay else float("-inf")

    def allowed(self) -> bool:
        return time.monotonic() >= self._not_before

    @contextmanager
    def spend(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            now = time.monotonic()
            self._not_before = max(self._not_before, now - self._saved) + (now - began) / SHARE


class Meter:
    """Measures one process, task by task.

    Arguments:
        trim_bytes: Growth in bytes since the last trim that makes another one worth it.
        trim_idle: Seconds without work before a trim, or None for never.
        heap_end_bytes: The allocator's trim threshold, where it was set by us; else None.
    """

    def __init__(self, trim_bytes: int, trim_idle: float | None, heap_end_bytes: int | None = None) -> None:
        self._trim_bytes, self._trim_idle = trim_bytes, trim_idle
        self._delay = trim_idle or 0.0
        self._heap_end_bytes = heap_end_bytes
        self._looking = _Expense(allowance=ALLOWANCE_SECONDS)
        self._heap, self._private = _Expense(delay=START_SECONDS), _Expense(delay=START_SECONDS)
        self._on_glibc = native.allocator() == "glibc"
        self._touched_bytes = TOUCHED_BYTES
        self._let_off: dict[str, tuple[int, int]] = {}  # looks in vain, times to let off
        self._name = ""
        self._heap_before: int | None = None  # in a task that is watched
        self._shared_memory_bytes = 0
        self._resident, self._anonymous = native.own_memory()
        self._anonymous_after = self._trimmed_at = self._anonymous
        self._high_before: int | None = None
        self._reusable_before = 0
        self._free_bytes, self._free_at, self._free_read = 0, self._anonymous, time.monotonic()
        # Each page that is not shared, or not any more, has been faulted in; some of files have, too.
        self._faults = _faults()
        self._private_bytes = min(self._faults * _PAGE_BYTES, self._anonymous)
        self._private_at = self._anonymous
        self._private_estimated = True

    # -- one task

    def begin(self) -> None:
        """Start to measure a task."""
        self._resident, self._anonymous = self._memory()
        self._reusable_before = self._reusable(self._anonymous)
        self._heap_before = None
        try:
            native.reset_peak()
            self._high_before = None
        except OSError:
            self._high_before = self._high(self._resident)

    @property
    def doubtful(self) -> bool:
        """Whether the task that begins may find so much free heap that its peak is not seen."""
        return self._reusable_before > DOUBT_BYTES

    def watch(self, name: str) -> None:
        """Find out how much free heap the task that begins now will use, if that may be done.

        Arguments:
            name: The task's name.
        """
        self._name = name
        looks, left = self._let_off.get(name, (0, 0))
        if not self._on_glibc:
            pass  # other allocators have their memory elsewhere than in the heap proper
        elif left:
            self._let_off[name] = looks, left - 1
        elif self._looking.allowed():
            with self._looking.spend():
                heap = _heap_pages()
                if heap is not None and _forget_references():
                    self._heap_before = heap[0]
                    if self._heap_end_bytes is not None:
                        # What the task frees at the end of the heap has to stay until it was counted.
                        native.set_allocator_thresholds(trim_bytes=_NEVER)

    def end(self) -> bytes:
        """Return the report on the task that began last, packed."""
        high = self._high(self._resident)
        reused, certain = (
            (0, not self.doubtful) if self._heap_before is None else self._reused(self._heap_before)
        )
        resident, anonymous = self._memory()
        if self._high_before is None or high > self._high_before:
            peak = high - self._resident - self._grown_files(resident, anonymous)
        else:
            peak, certain = 0, False  # below an older peak, which can not be reset here
        peak = max(peak, anonymous - self._anonymous, 0) + reused
        if self.doubtful:
            self._learn(little=peak <= DOUBT_BYTES)
        return self._pack(resident, anonymous, high, peak, certain)

    def _learn(self, *, little: bool) -> None:
        """Look less often at a task that needs little, and always at one that does not."""
        if not little:
            self._let_off.pop(self._name, None)
        elif self._heap_before is not None:
            looks = self._let_off.get(self._name, (0, 0))[0] + 1
            self._let_off[self._name] = (
                looks,
                min(2 ** (looks - LOOKS) if looks >= LOOKS else 0, MOST_LET_OFF),
            )

    def report(self) -> bytes:
        """Return a report without a task, packed."""
        resident, anonymous = self._memory()
        return self._pack(resident, anonymous, resident, 0, exact=False)

    def _memory(self) -> tuple[int, int]:
        """Resident and anonymous bytes; as they were, where they can not be read."""
        try:
            return native.own_memory()
        except OSError:
            return self._resident, self._anonymous_after

    def _high(self, resident: int) -> int:
        try:
            return native.peak()
        except OSError:
            return resident

    def _pack(self, resident: int, anonymous: int, high: int, peak: int, exact: bool) -> bytes:
        self._anonymous_after = anonymous
        return wire.REPORT.pack(
            resident,
            anonymous,
            self._private_now(anonymous),
            high,
            peak,
            self._reusable(anonymous),
            exact,
        )

    def _grown_files(self, resident: int, anonymous: int) -> int:
        """What was mapped of files since the task began: memory, but not the task's own."""
        grown = (resident - anonymous) - (self._resident - self._anonymous)
        if grown <= DOUBT_BYTES:
            return grown
        shared_memory = memory.shared_memory_bytes()
        grown -= shared_memory - self._shared_memory_bytes
        self._shared_memory_bytes = shared_memory
        return grown

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

    def _private_now(self, anonymous: int) -> int:
        touched = (_faults() - self._faults) * _PAGE_BYTES
        if (self._private_estimated or touched > DOUBT_BYTES) and self._private.allowed():
            # No descriptor left, for instance: then the next time.
            with self._private.spend(), suppress(OSError):
                self._private_bytes = memory.private_bytes()
                self._private_at, self._faults = anonymous, _faults()
                self._private_estimated = False
        return max(self._private_bytes + anonymous - self._private_at, 0)

    # -- trim

    @property
    def patience(self) -> float | None:
        """Seconds to wait for work before a trim; None if none is worth it."""
        if self._trim_idle is None or self._anonymous_after - self._trimmed_at < self._trim_bytes:
            return None
        return self._delay

    def trim(self) -> tuple[int, bytes]:
        """Collect garbage and give free heap back; return the bytes won, and a report, packed."""
        try:
            won = memory.trim()
        except OSError:
            won = 0  # it can not be seen what was won
        resident, anonymous = self._memory()
        if won < self._trim_bytes // 2:
            self._delay = min(2 * self._delay, max(60.0, self._delay))
        else:
            self._delay = self._trim_idle or 0.0
        self._trimmed_at = anonymous
        self._read_free(anonymous)
        return won, self._pack(resident, anonymous, resident, 0, exact=False)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


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
        fd = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, b"2")
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
