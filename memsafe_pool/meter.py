"""What a child knows of its own memory: measures each task, and gives free memory back.

Runs in the child. For each task there is a report (``wire.Report``); how it is made:

* **Peak.** The kernel's peak counter of the process is reset at the start of the task and read at
  its end; what the process had at the start is taken off, and so is what it mapped of files.
* **Reuse.** A task that fits into heap which an earlier one has left free does not raise the
  peak. Where that can be, the kernel is asked which pages of the heap were touched: their
  referenced bits are cleared before the task and counted after it. This costs some
  milliseconds for a large heap, so it is not done again soon for a task that reuses nothing, and
  has an allowance. Where it was not done, or can not be, the report says that the peak is a lower bound.
* **Private memory.** ``smaps_rollup`` is exact and takes a millisecond or more. It is read
  again when pages were touched for the first time since, for at most a small share of the
  time; in between, what the process has grown is added.

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
DOUBT_BYTES = _MIB

#: Referenced pages of the heap that are Celery's own doing, and not a task's; less where less was seen.
TOUCHED_BYTES = _MIB

#: At most this share of the time goes into what is exact and dear. For looking at reused heap so many
#: seconds can be saved up, and are there at the start: what tasks need is to be known early.
SHARE = 0.005
ALLOWANCE_SECONDS = 2.0

#: Seconds after which the statistics of the heap are read again although the process has not grown.
HEAP_STALE_SECONDS = 1.0

#: A task that was found to reuse nothing so often in a row is let off once, then twice, four times and so on.
LOOKS, MOST_LET_OFF = 4, 1024

#: A trim threshold that is never reached; the largest number that the allocator takes.
_NEVER = 2**31 - 1

#: Freeing a block of this size makes glibc look at the end of its heap.
_TRIGGER_BYTES = 128 << 10

_PAGE_BYTES = resource.getpagesize()


class _Expense:
    """Keeps something dear to ``SHARE`` of the time; so many seconds of that can be saved up."""

    def __init__(self, allowance: float = 0.0) -> None:
        self._saved = allowance / SHARE
        self._not_before = float("-inf")

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
        self._private, self._looking, self._heap = _Expense(), _Expense(ALLOWANCE_SECONDS), _Expense()
        # Other allocators have their memory elsewhere than in the heap proper.
        self._can_look = native.allocator() == "glibc"
        self._touched_bytes = TOUCHED_BYTES
        self._let_off: dict[str, tuple[int, int]] = {}  # looks in vain, times to let off
        self._watched: tuple[str, int] | None = None
        self._shared_memory_bytes = 0
        self._free_bytes, self._free_at, self._free_read = 0, 0, float("-inf")
        self._private_bytes = self._private_at = self._faults = 0
        self._resident, self._anonymous = native.own_memory()
        self._anonymous_after = self._anonymous
        self._reusable_before = 0
        self._high_before: int | None = None
        self._set_base(self._anonymous)
        self._read_private(self._anonymous)

    def _set_base(self, anonymous: int) -> None:
        """Take what the process has now, just trimmed, for what it needs."""
        self._base = anonymous
        # Holes that are smaller than a page, or share one with what is in use.
        heap = _heap_bytes()
        try:
            in_use = native.heap_bytes().in_use
        except OSError:
            in_use = 0  # not known on this platform
        self._holes = max(heap[0] - in_use, 0) if heap and in_use else 0

    # -- one task

    def begin(self) -> None:
        """Start to measure a task."""
        self._resident, self._anonymous = self._memory()
        self._reusable_before = self._reusable(self._anonymous)
        self._watched = None
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
        looks, left = self._let_off.get(name, (0, 0))
        if not self._can_look:
            pass
        elif left:
            self._let_off[name] = looks, left - 1
        elif self._looking.allowed():
            with self._looking.spend():
                heap = _heap_bytes()
                if heap is not None and _forget_references():
                    self._watched = name, heap[0]
                    # What the task frees at the end of the heap has to stay until it was counted.
                    self._keep_heap_end(_NEVER)

    def end(self) -> bytes:
        """Return the report on the task that began last, packed."""
        resident, anonymous = self._memory()
        high = self._high(resident)
        if self._high_before is None or high > self._high_before:
            peak, exact = high - self._resident - self._grown_files(resident, anonymous), not self.doubtful
        else:
            peak, exact = 0, False  # below an older peak, which can not be reset here
        peak = max(peak, anonymous - self._anonymous, 0)
        if self._watched is not None:
            reused, exact = self._reused(*self._watched)
            peak += reused
        return self._pack(resident, anonymous, high, peak, exact)

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

    def _reused(self, name: str, heap_before: int) -> tuple[int, bool]:
        """How much heap that had been free was used, and whether that is certain."""
        with self._looking.spend():
            heap = _heap_bytes()
        self._keep_heap_end(self._heap_end_bytes)
        if heap is None:
            return 0, False
        now, referenced = heap
        new = max(now - heap_before, 0)
        touched = max(referenced - new, 0)
        self._touched_bytes = min(self._touched_bytes, touched)
        reused = min(touched - self._touched_bytes, self._reusable_before)
        if reused > DOUBT_BYTES:
            self._let_off.pop(name, None)
        else:
            looks = self._let_off.get(name, (0, 0))[0] + 1
            self._let_off[name] = looks, min(2 ** (looks - LOOKS) if looks >= LOOKS else 0, MOST_LET_OFF)
        # What was used and then given back to the kernel is not seen.
        return reused, now > heap_before - DOUBT_BYTES

    def _keep_heap_end(self, trim_bytes: int | None) -> None:
        if self._heap_end_bytes is not None:
            native.set_allocator_thresholds(trim_bytes=trim_bytes)
            bytearray(_TRIGGER_BYTES)

    # -- numbers that cost something

    def _reusable(self, anonymous: int) -> int:
        """Resident bytes of the heap that are free: what a task may reuse, or a trim win. 0 when little."""
        grown = anonymous - self._base + self._holes
        if grown <= DOUBT_BYTES:
            return 0
        now = time.monotonic()
        changed = abs(anonymous - self._free_at) > DOUBT_BYTES // 4
        if (changed or now - self._free_read > HEAP_STALE_SECONDS) and self._heap.allowed():
            with self._heap.spend():
                try:
                    self._free_bytes = native.heap_bytes().free
                except OSError:
                    self._free_bytes = grown  # not known on this platform: it may be all of it
            self._free_at, self._free_read = anonymous, now
            changed = False
        # Free bytes that were given back are still free, but not resident any more.
        return grown if changed else min(self._free_bytes, grown)

    def _private_now(self, anonymous: int) -> int:
        touched = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - self._faults
        if touched * _PAGE_BYTES > DOUBT_BYTES and self._private.allowed():
            self._read_private(anonymous)
        return max(self._private_bytes + anonymous - self._private_at, 0)

    def _read_private(self, anonymous: int) -> None:
        with self._private.spend(), suppress(OSError):  # such as no descriptor left: until the next time
            self._private_bytes = memory.private_bytes()
            self._private_at = anonymous
            self._faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    # -- trim

    @property
    def patience(self) -> float | None:
        """Seconds to wait for work before a trim; None if none is worth it."""
        if self._trim_idle is None or self._anonymous_after - self._base < self._trim_bytes:
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
        self._set_base(anonymous)
        return won, self._pack(resident, anonymous, resident, 0, exact=False)


def _heap_bytes() -> tuple[int, int] | None:
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
