"""Watches running children, and stops them for a while when memory is about to run out.

A thread of the worker, as its event loop may be busy for longer than it takes to fill a
container. The policy is in ``pauses``, how headroom is read in ``gauge``; this takes the samples, sends
SIGSTOP and SIGCONT, and tells the engine. The engine tells it which tasks run, and asks it for a look at
memory when a decision hangs on fresh numbers.

A process is only signalled while it is not reaped: reaping goes through :meth:`Watch.reap`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from memsafe_pool import memory
from memsafe_pool.pauses import Pauses, Sample
from memsafe_pool.reservations import LITTLE_BYTES
from memsafe_pool.rest import Rest
from memsafe_pool.room import Look, Seen

if TYPE_CHECKING:
    from memsafe_pool.budget import Budget
    from memsafe_pool.fleet import Child
    from memsafe_pool.gauge import Gauge
    from memsafe_pool.job import Job
    from memsafe_pool.probe import Reading

__all__ = ["Watch"]

logger = logging.getLogger(__name__)

#: A task that may need much ends a longer sleep than this (seconds).
DOZE_SECONDS = 0.01

#: Seconds between samples while a task runs that has a memory limit of its own.
LIMITED_SECONDS = 0.02

#: A task that has taken so much of its hard limit, and so many bytes more, is ended: the kernel has not kept
#: it from that, or not where it counts.
OVERRUN_SHARE, OVERRUN_BYTES = 1.1, 16 << 20

#: A child may grow by so much of files and shared memory before the kernel is asked which of the two it is.
SHARED_BYTES = 4 << 20

#: Seconds for which a child that was sent a signal is not stopped: it has to get to act on it.
SPARED_SECONDS = 5.0

#: Of the CPU time of a process, in ``/proc/<pid>/stat``.
_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")

#: Seconds between two reports that we are stuck.
STUCK_AGAIN_SECONDS = 0.5


class _Run:
    """One running task."""

    __slots__ = ("child", "growing", "in_shared", "job", "rest", "spared_until", "told")

    def __init__(self, child: Child, job: Job) -> None:
        self.child, self.job = child, job
        self.growing = False
        self.rest = Rest(time.monotonic())
        self.in_shared = 0  # of what it has taken, in shared memory: others may have the same
        self.spared_until = float("-inf")
        self.told: set[bool] = set()

    def passed(self) -> bool | None:
        """Return which of its own limits the task has passed, once each: True for the soft one; else None."""
        job = self.job
        hard = job.hard_limit
        if hard is not None and job.grown > OVERRUN_SHARE * hard + OVERRUN_BYTES and False not in self.told:
            self.told.add(False)
            return False
        soft = job.soft_limit if job.accepted_at is not None else None  # before that it is not heard
        if soft is not None and job.grown > soft and True not in self.told:
            self.told.add(True)
            return True
        return None


class Watch:
    """The thread, and what it shares with the engine.

    Arguments:
        gauge: Tells the headroom under the limit.
        budget: What the pool may use.
        own_bytes: Returns what the pool has beside what its children have grown in running tasks; asked only
            when the budget is the user's own number, which the pool has to keep whatever the container has.
        starting_bytes: Returns what children that are starting will take, who can not be stopped; if asked
            with False, without those that are forked.
        known_bytes: Returns what the pool has beside what its children have grown in running tasks, up to a
            constant; None where others may take memory under the same limit.
        on_pause: Called with a child, its job, whether it was paused, else it goes on, and when (monotonic
            seconds). In the thread.
        on_stuck: Called with a look when all tasks are paused and none can go on. In the thread.
        on_limit: Called with a child, its job that has passed its own memory limit, whether that is the soft
            one, and the bytes it has taken. In the thread.
        pauses: The policy.
    """

    def __init__(
        self,
        gauge: Gauge,
        budget: Budget,
        *,
        own_bytes: Callable[[], int],
        starting_bytes: Callable[[bool], int],
        known_bytes: Callable[[], int | None],
        on_pause: Callable[[Child, Job, bool, float], None],
        on_stuck: Callable[[Look], None],
        on_limit: Callable[[Child, Job, bool, int], None],
        pauses: Pauses,
    ) -> None:
        self.budget = budget
        self._gauge, self._pauses = gauge, pauses
        self._own_bytes, self._starting_bytes, self._known_bytes = own_bytes, starting_bytes, known_bytes
        self._on_pause, self._on_stuck, self._on_limit = on_pause, on_stuck, on_limit
        # A signal handler that shuts down may interrupt the loop's thread while it has the lock.
        self._lock = threading.RLock()
        # In the order in which they began.
        self._runs: dict[Child, _Run] = {}
        self._statm: dict[Child, int] = {}
        self._wake = threading.Event()
        self._wakes_at = float("inf")
        self._stuck_at = float("-inf")
        self._stopping = self._unwatched = False
        self._thread: threading.Thread | None = None

    # -- life

    def start(self) -> None:
        """Start the thread, if there is none; where the system has no room for it, that is said once."""
        if self._thread is not None or self._stopping:
            return
        thread = threading.Thread(target=self._run, name="memsafe-watch", daemon=True)
        try:
            thread.start()
        except RuntimeError as exc:
            if not self._unwatched:
                logger.warning("Running tasks are not paused while no thread watches memory: %s", exc)
            self._unwatched = True
        else:
            self._thread = thread

    def stop(self) -> None:
        """End the thread, let everybody go on, and release the descriptors."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=5.0)
        with self._lock:
            for run in list(self._runs.values()):
                self._forget(run)
            self._runs.clear()
            for descriptor in self._statm.values():
                os.close(descriptor)
            self._statm.clear()
            self._gauge.close()

    # -- what the engine says and asks

    def begin(self, child: Child, job: Job) -> None:
        """Say that a child was given a task."""
        with self._lock:
            self._runs[child] = _Run(child, job)
        if job.estimate.reserved > LITTLE_BYTES or not job.estimate.known or job.soft_limit or job.hard_limit:
            self._hurry()
        elif self._wakes_at - time.monotonic() > self._pauses.soon:
            self._wake.set()  # little is expected of it, but it may surprise

    def end(self, child: Child) -> None:
        """Say that a child has no task any more; it goes on if it was paused."""
        with self._lock:
            run = self._runs.pop(child, None)
            if run is not None:
                self._forget(run)

    def let_go_on(self, child: Child) -> None:
        """Let a child go on that was sent a signal, and not stop it soon; it is watched all the same."""
        with self._lock:
            run = self._runs.get(child)
            if run is not None:
                run.spared_until = time.monotonic() + SPARED_SECONDS
                self._forget(run)

    def reap(self, child: Child) -> tuple[int, int]:
        """Call ``waitpid`` for a child without waiting; once it is reaped, nobody signals it any more.

        Raises:
            ChildProcessError: Somebody else has reaped it.
        """
        with self._lock:
            pid, status = os.waitpid(child.pid, os.WNOHANG)
            if pid:
                self._gone(child)
        return pid, status

    def gone(self, child: Child) -> None:
        """Say that a child has ended."""
        with self._lock:
            self._gone(child)

    def _gone(self, child: Child) -> None:
        run = self._runs.pop(child, None)
        if run is not None:
            self._pauses.forget(run.job)
        descriptor = self._statm.pop(child, None)
        if descriptor is not None:
            os.close(descriptor)

    def look(self, others: int = 0) -> Look:
        """Look at memory now, of which other workers have set so many bytes aside."""
        with self._lock:
            now = time.monotonic()
            self._sample()
            headroom = self._headroom()
            (_, within), _ = self._left(headroom)
            # Of a budget that is our own nothing is theirs.
            theirs = within - self._left(headroom - others)[0][1] if others else 0
            return self._look(now, within, theirs)

    def refresh(self) -> Reading:
        """Read all there is to know about the limit again."""
        with self._lock:
            return self._gauge.refresh()

    # -- samples

    def _run(self) -> None:
        wait = 0.0
        while not self._stopping:
            self._wakes_at = time.monotonic() + wait
            self._wake.wait(wait)
            self._wakes_at = float("-inf")
            self._wake.clear()
            if self._stopping:
                return
            try:
                wait = self._once()
            except Exception:
                logger.exception("A look at memory has failed; the next one is in a second")
                self._let_all_go_on()
                wait = 1.0

    def _let_all_go_on(self) -> None:
        now = time.monotonic()
        with self._lock:
            runs = [run for run in self._runs.values() if self._pauses.is_paused(run.job)]
            for run in runs:
                self._forget(run)
        for run in runs:
            self._on_pause(run.child, run.job, False, now)

    def _once(self) -> float:
        """Take a sample and act on it; return the seconds until the next one."""
        look: Look | None = None
        with self._lock:
            if not self._runs:
                return 1.0
            now = time.monotonic()
            self._sample()
            headroom = self._headroom(exact=self._pauses.exact)
            (left, _), (most, most_within) = self._left(headroom)
            decision = self._pauses.decide(
                now,
                left,
                self.budget.ceiling,
                [
                    Sample(
                        run.job,
                        run.job.estimate,
                        run.job.grown,
                        now < run.spared_until,
                        run.child.report.trimmable,
                        run.rest.resting,
                    )
                    for run in list(self._runs.values())
                ],
                uncertain=most - left,
                starting=self._starting_bytes(True),
                unknown=self._unknown(headroom),
            )
            changed = []
            for run in list(self._runs.values()):
                run.growing = run.job in decision.growing
                if run.job in decision.stop and run.child.signal(signal.SIGSTOP):
                    changed.append((run, True))
                elif run.job in decision.go_on and run.child.signal(signal.SIGCONT):
                    changed.append((run, False))
            passed = [(run, soft) for run in list(self._runs.values()) if (soft := run.passed()) is not None]
            wait = min(decision.wait, LIMITED_SECONDS) if self._any_limited() else decision.wait
            if decision.stuck and now - self._stuck_at > STUCK_AGAIN_SECONDS:
                self._stuck_at = now
                look = self._look(now, most_within, 0)
        for run, paused in changed:
            self._on_pause(run.child, run.job, paused, now)
        for run, soft in passed:
            self._on_limit(run.child, run.job, soft, run.job.grown)
        if look is not None:
            self._on_stuck(look)
        return wait

    def _any_limited(self) -> bool:
        return any(run.job.soft_limit or run.job.hard_limit for run in list(self._runs.values()))

    def _look(self, now: float, within: int, theirs: int) -> Look:
        running = [
            Seen(
                run.job,
                run.job.grown,
                growing=run.growing,
                paused=self._pauses.is_paused(run.job),
                free=run.child.report.trimmable,
                resting=run.rest.resting,
            )
            for run in list(self._runs.values())
        ]
        return Look(now, within, running, theirs, self._starting_bytes(False))

    def _headroom(self, *, exact: bool = False) -> int:
        """Return the bytes that are left under the limit; ``exact`` is as for the gauge."""
        return self._gauge.headroom(sum(run.job.grown for run in list(self._runs.values())), exact=exact)

    def _left(self, headroom: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Return what is left until the budget's ceiling and what is left of the budget; and both at most."""
        own_bytes = 0
        if not self.budget.auto:
            runs = list(self._runs.values())
            own_bytes = self._own_bytes() + sum(run.job.grown - run.in_shared for run in runs)
        left = self.budget.left(headroom, lambda: own_bytes)
        return left, self.budget.left(headroom + self._gauge.uncertain, lambda: own_bytes)

    def _unknown(self, headroom: int) -> int | None:
        """Return what is used, at least, less what the pool and its tasks have; None where it is others'."""
        known = self._known_bytes()
        if known is None:
            return None
        used = self.budget.limit - headroom - self._gauge.uncertain
        return used - known - sum(run.job.grown for run in list(self._runs.values()))

    def _sample(self) -> None:
        now = time.monotonic()
        for child, run in list(self._runs.items()):
            # It may have just ended; there may be no descriptor left.
            with contextlib.suppress(OSError, IndexError, ValueError):
                grown, run.in_shared = self._grown(child)
                run.job.grown = max(grown, 0)
            paused = self._pauses.is_paused(run.job)
            run.rest.look(now, run.job.grown, partial(_cpu_seconds, child.pid), paused=paused)

    def _grown(self, child: Child) -> tuple[int, int]:
        """Return what a child has beyond what it said last, which was before its task began.

        The second number is what of it is shared memory.

        Raises:
            OSError, IndexError, ValueError: It has ended.
        """
        report = child.report
        if sys.platform != "linux":
            return memory.resident_bytes(child.pid) - report.resident, 0
        descriptor = self._statm.get(child)
        if descriptor is None:
            descriptor = self._statm[child] = os.open(f"/proc/{child.pid}/statm", os.O_RDONLY)
        resident, shared = memory.parse_statm(os.pread(descriptor, memory.STATM_BYTES, 0))
        if not resident:
            raise ProcessLookupError
        # Shared memory is in one number with files, which are not the task's doing.
        in_shared = shared - (report.resident - report.anonymous)
        in_shared = min(in_shared, memory.shared_memory_bytes(child.pid)) if in_shared > SHARED_BYTES else 0
        return resident - shared - report.anonymous + in_shared, in_shared

    def _hurry(self) -> None:
        if not 0 <= self._wakes_at - time.monotonic() <= DOZE_SECONDS:
            self._wake.set()

    # -- signals

    def _forget(self, run: _Run) -> None:
        if self._pauses.forget(run.job):
            run.child.signal(signal.SIGCONT)


def _cpu_seconds(pid: int) -> float | None:
    """Return the CPU time a child has used, on Linux; None if it has started programs: they may use more."""
    try:
        for thread in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{thread}/children", "rb", buffering=0) as file:
                if file.read(1):
                    return None
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            fields = file.read(1024).rpartition(b")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SECOND
    except (OSError, IndexError, ValueError):
        return None
