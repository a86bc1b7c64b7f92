"""The engine: gives jobs to children and settles their outcome.

It takes the place of billiard's pool under ``TaskPool``. The supervisor decides, the
engine and its crew act and tell it what happened.

One task at a time is with a child. A task that a child had not begun when it ended goes
to another; one that it had begun is lost, unless it was terminated. Waiting tasks are in
one queue, idle children in a stack, so that nothing a task costs depends on how many
children there are.

All of it runs in one thread: the one of Celery's event loop or, on brokers without one,
the one of ``loop.LoopThread``. Public methods may be called from any thread.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from celery.utils.log import get_logger
from kombu.asynchronous import Hub

from memsafe_pool import supervisor, upstream, wire
from memsafe_pool.crew import Crew
from memsafe_pool.fleet import Child, State
from memsafe_pool.job import Job, lost
from memsafe_pool.ledger import Ledger
from memsafe_pool.loop import LoopThread, Mailbox, run_until
from memsafe_pool.probe import Probe
from memsafe_pool.time_limits import TimeLimits

if TYPE_CHECKING:
    from memsafe_pool.start import Origin, Owner, StartMethod

__all__ = ["Engine"]

logger = get_logger(__name__)

#: Seconds between looks at the clock for idle children, late starts and late exits.
TICK_SECONDS = 1.0

#: Seconds after SIGTERM until SIGKILL for a child whose hard time limit has passed, as in billiard.
HARD_LIMIT_SECONDS = 0.1

#: A job that was with so many children that ended before they began it counts as lost.
MAX_TRIES = 3


class Engine:
    """A pool of children.

    Arguments:
        origin: What children come from.
        make_start_method: Makes the way children are started, given their owner.
        bound: Upper bound of the number of children.
        threaded: Whether to run on a loop of its own, in a thread.
        semaphore: Released once for each job that has ended, or None.
        limits: Soft and hard time limit of jobs that have none of their own (seconds).
        start_timeout: Seconds a child may take until it is ready.
        rules: Further arguments of :class:`supervisor.Supervisor`.
    """

    def __init__(
        self,
        origin: Origin,
        make_start_method: Callable[[Owner, Origin], StartMethod],
        *,
        bound: int,
        threaded: bool = False,
        semaphore: Any = None,
        limits: tuple[float | None, float | None] = (None, None),
        start_timeout: float = 60.0,
        **rules: Any,
    ) -> None:
        self.limits = limits
        self.jobs: dict[int, Job] = {}
        self.waiting: deque[Job] = deque()
        self.retired = self.tasks = 0
        self.state: int = upstream.RUN
        self._semaphore = semaphore
        self._mailbox = Mailbox()
        self._loop = LoopThread(self._on_crash) if threaded else None
        self._tick_entry: Any = None
        self._closed = threading.Event()
        self._time_limits = TimeLimits(lambda job, soft: self._mailbox.post(self._on_limit, job, soft))
        self.crew = Crew(origin, make_start_method, self, self._mailbox, start_timeout=start_timeout)
        self.fleet = self.crew.fleet
        self.ledger = Ledger(self.fleet)
        self._probe = Probe(on_warning=lambda text: logger.warning("%s", text))
        self.reading = self._probe.read()
        self.supervisor = supervisor.Supervisor(self.fleet, bound=bound, **rules)

    # -- life

    def begin(self) -> None:
        """Get ready to start children; none is started."""
        if self._loop is not None:
            # While this process has one thread.
            self.crew.start_method.begin()
            self._loop.start(lambda: self._run_on(self._loop.hub))  # type: ignore[union-attr]

    def register_with_event_loop(self, hub: Any) -> None:
        """Run on Celery's loop from now on; called again when it has been reset."""
        if self.crew.hub is None:
            # As late as possible: what the worker writes to memory after a fork is not
            # shared, and connecting to the broker writes to a lot of it.
            self.crew.hub = hub
            self.crew.start_method.begin()
        self._run_on(hub)

    def _run_on(self, hub: Any) -> None:
        self._mailbox.own()
        self._mailbox.attach(hub)
        self.crew.attach(hub)
        if self._tick_entry is not None:
            self._tick_entry.cancel()
        # Through the mailbox: while the pool is joined, Celery fires its timers from another thread.
        self._tick_entry = hub.call_repeatedly(TICK_SECONDS, self._mailbox.post, self._tick)
        self._time_limits.attach(hub, self.jobs.values())
        self._decide(supervisor.Tick(len(self.waiting)))
        self._check_closed()

    def close(self) -> None:
        """Take no more jobs; children leave when they have ended theirs."""
        self._mailbox.post(self._close, upstream.CLOSE)

    def terminate(self) -> None:
        """End all children, whatever they do, and wait for it."""
        self._mailbox.post(self._close, upstream.TERMINATE)
        self.join()

    def join(self) -> None:
        """Wait until all children have ended.

        As long as the tasks they run take; everything else in it has a deadline.
        """
        if self._loop is not None:
            while not self._closed.wait(timeout=1.0):
                if self._loop.join(timeout=0):
                    break  # it has crashed, and said so
            self._loop.join(timeout=5.0)
        elif not self._closed.is_set():
            # Celery's loop does not run any more, or is waiting for us.
            hub = Hub()
            self._run_on(hub)
            run_until(hub, self._closed.is_set)
            hub.close()
        self._mailbox.close()

    def _close(self, state: int) -> None:
        if self._closed.is_set() or state <= self.state:
            return
        self.state = state
        self._discard_waiting()
        self.crew.stop(terminate=state == upstream.TERMINATE)
        self._check_closed()

    def _check_closed(self) -> None:
        if self.state == upstream.RUN or self._closed.is_set():
            return
        if not self.crew.stopped:
            if not self.fleet.size:
                # What children were forked from is about to end, and nothing tells when.
                self.crew.hub.call_later(0.02, self._mailbox.post, self._check_closed)
            return
        if self._tick_entry is not None:
            self._tick_entry.cancel()
        if self._loop is not None:
            self._loop.stop()
        self._closed.set()

    def _on_crash(self, exc: Exception) -> None:
        upstream.stop_worker(os.EX_SOFTWARE)
        self._closed.set()

    # -- jobs

    def apply_async(
        self,
        function: Callable[..., Any],
        args: Any = (),
        kwargs: Any = None,
        *,
        callback: Any = None,
        error_callback: Any = None,
        accept_callback: Any = None,
        timeout_callback: Any = None,
        soft_timeout: float | None = None,
        timeout: float | None = None,
        callbacks_propagate: tuple[type[BaseException], ...] = (),
        correlation_id: str | None = None,
        **_ignored: Any,
    ) -> Job | None:
        """Run ``function(*args, **kwargs)`` in a child; None if the pool takes no more jobs."""
        if self.state != upstream.RUN:
            return None
        job = Job(
            function,
            args,
            kwargs or {},
            on_success=callback,
            on_error=error_callback,
            on_accept=accept_callback,
            on_timeout=timeout_callback,
            limits=(soft_timeout or self.limits[0], timeout or self.limits[1]),
            propagate=callbacks_propagate,
            correlation_id=correlation_id,
        )
        self._mailbox.post(self._submit, job)
        return job

    def _submit(self, job: Job) -> None:
        self.jobs[job.id] = job
        if self.fleet.idle:
            self._give(self.fleet.idle.pop(), job)
        else:
            self.waiting.append(job)
            self._decide(supervisor.Waiting(len(self.waiting)))

    def _give_again(self, job: Job) -> None:
        """Find another child for a job, before all others."""
        self.waiting.appendleft(job)
        if self.fleet.idle:
            self._give(self.fleet.idle.pop(), None)
        else:
            self._decide(supervisor.Waiting(len(self.waiting)))

    def _give(self, child: Child, job: Job | None) -> None:
        """Give a child this job, else the next that waits, else let it be idle.

        The child is not in the stack of idle ones, and has no job.
        """
        while job is not None or self.waiting:
            job = job or self.waiting.popleft()
            data = self._prepare(job)
            if data is not None:
                child.state, child.job, job.child = State.BUSY, job, child
                self.tasks += 1
                if not child.link.send(data):
                    child.job = job.child = None
                    self.fleet.move(child, State.LEAVING)
                    self._give_again(job)
                return
            job = None
        child.state = State.IDLE
        child.idle_since = time.monotonic()
        self.fleet.idle.append(child)

    def _prepare(self, job: Job) -> bytes | None:
        """Return the message for a job, or end it if it is not to be run, or can not be."""
        if job.done:
            return None
        if job.terminated is not None or upstream.is_revoked(job.correlation_id):
            self._accept(job, os.getpid(), time.monotonic())
            self._finish(job, False, upstream.failed(upstream.Terminated(job.terminated or 0)))
            return None
        try:
            body = upstream.dump_task(job.function, job.args, job.kwargs)
        except Exception as exc:  # noqa: BLE001 - pickling runs foreign code
            self._accept(job, os.getpid(), time.monotonic())
            self._finish(job, False, upstream.failed(upstream.MaybeEncodingError(exc, job.args)))
            return None
        return wire.head(wire.TASK, len(body), job.id, self.ledger.peaks.is_little(job.name)) + body

    def _accept(self, job: Job, pid: int, at: float) -> None:
        job.accept(pid, at)
        self._time_limits.watch(job)

    def _finish(self, job: Job, succeeded: bool, value: Any) -> None:
        if job.done:
            return
        self._forget(job)
        # First the next task, which the semaphore may hand over here and now, then the
        # bookkeeping of this one.
        if self._semaphore is not None:
            self._semaphore.release()
        job.finish(succeeded, value)

    def _forget(self, job: Job) -> None:
        job.done = True
        self.jobs.pop(job.id, None)
        self._time_limits.forget(job)

    def _discard_waiting(self) -> None:
        """Drop jobs that no child has: the broker delivers them again."""
        while self.waiting:
            self._forget(self.waiting.popleft())

    def flush(self) -> None:
        """Drop what no child has, because the connection to the broker was lost."""
        self._mailbox.post(self._discard_waiting)

    def terminate_job(self, pid: int, signum: int | None = None) -> None:
        """Send a signal to the child ``pid`` to end its task; the task counts as terminated."""
        self._mailbox.post(self._terminate_job, pid, signum or upstream.TERM_SIGNAL)

    def _terminate_job(self, pid: int, signum: int) -> None:
        child = self.fleet.by_pid.get(pid)
        if child is not None and child.job is not None and child.signal(signum):
            child.job_terminated = child.expected = True

    def _on_limit(self, job: Job, soft: bool) -> None:
        child = job.child
        if job.done or child is None or child.job is not job:
            return
        if soft:
            job.soft_limit_passed = True
            job.time_out(soft=True)
            child.signal(signal.SIGUSR1)
            self._time_limits.watch(job)
        else:
            limit = upstream.TimeLimitExceeded(job.limits[1])
            self._finish(job, False, upstream.failed(limit))
            job.time_out(soft=False)
            self.crew.kill(child, signal.SIGTERM, after=HARD_LIMIT_SECONDS)

    # -- what children say

    def on_message(self, child: Child, kind: int, number: int, value: float, payload: memoryview) -> None:
        """Act on a message of a child, see ``wire``."""
        job = child.job
        if kind == wire.ACK:
            if job is None or job.id != number or job.done:
                return
            if self.state != upstream.RUN and upstream.is_cold_shutdown():
                # Celery has cancelled what it knew to be running, and did not know of this.
                self._forget(job)
                self.crew.kill(child, upstream.TERM_SIGNAL)
            else:
                self._accept(job, child.pid, value)
        elif kind == wire.DONE:
            if job is not None and job.id == number:
                self._on_done(child, job, payload)
        elif kind == wire.UP:
            self.crew.started(child, number)
            child.report = wire.Report.unpack(payload)
            child.first_private_bytes = child.report.private
            if child.state is State.STARTING:
                self._decide(supervisor.Up())
                self.fleet.starting_children.discard(child)
                self._next(child)
        elif kind == wire.TRIMMED:
            self.ledger.trimmed(child, wire.Report.unpack(payload), int(value))
            logger.debug("%s gave back %s", child, _mib(value))
        elif kind == wire.FAILED:
            child.failure = bytes(payload).decode(errors="replace")

    def _on_done(self, child: Child, job: Job, payload: memoryview) -> None:
        child.job = None
        child.tasks += 1
        self.ledger.ended(child, job.name, wire.Report.unpack(payload))
        try:
            succeeded, value = wire.loads(payload[wire.REPORT.size :])
        except Exception as exc:  # noqa: BLE001 - unpickling runs foreign code
            succeeded, value = upstream.undecodable(job.function, exc)
        if child.state is State.BUSY:
            if child.job_terminated:
                self.crew.let_go(child)  # the signal that was meant for this job may still arrive
            else:
                self._next(child)
        self._finish(job, succeeded, value)

    def _next(self, child: Child) -> None:
        """Let a child without a job have one, be idle, or go."""
        if self.state != upstream.RUN or child.generation != self.crew.generation:
            self.crew.let_go(child)
            return
        if self.supervisor.watches_tasks:
            self._decide(supervisor.Done(child))
            if child.state is State.LEAVING:
                return
        self._give(child, None)

    def on_gone(self, child: Child, exitcode: int | None, *, failed: bool) -> None:
        """Act on a child's end."""
        job, child.job = child.job, None
        if job is not None:
            self._on_job_left(child, job, exitcode)
        self._decide(supervisor.Gone(failed, child.born, len(self.waiting)))
        self._check_closed()

    def on_hopeless(self, reason: str) -> None:
        """Stop the worker: no child can be started, now or later."""
        logger.critical("Stopping the worker: %s.", reason)
        upstream.stop_worker(os.EX_SOFTWARE)

    def _on_job_left(self, child: Child, job: Job, exitcode: int | None) -> None:
        """Settle a job whose child has ended."""
        job.child = None
        if job.done:
            return
        if child.job_terminated:
            if job.accepted_at is None:
                self._accept(job, child.pid, time.monotonic())
            self._finish(job, False, upstream.failed(upstream.Terminated(-(exitcode or 0))))
        elif self.state == upstream.TERMINATE:
            self._forget(job)
        elif job.accepted_at is not None or job.tries >= MAX_TRIES:
            self._finish(job, False, lost(job, exitcode))
        elif self.state == upstream.RUN:
            job.tries += 1
            self._give_again(job)
        else:
            self._forget(job)

    # -- decisions

    def _decide(self, event: supervisor.Event) -> None:
        if self.state != upstream.RUN:
            return  # nobody is started or retired any more: all leave
        for action in self.supervisor.handle(event, time.monotonic()):
            match action:
                case supervisor.Start(count):
                    self._start(count)
                case supervisor.Retire(child, reason):
                    logger.debug("Retiring %s: %s", child, reason)
                    self.retired += 1
                    self.crew.let_go(cast("Child", child))
                case supervisor.StopWorker(reason):
                    self.on_hopeless(reason)

    def _start(self, count: int) -> None:
        for _ in range(count):
            if not self.crew.start(sender=self):
                now = time.monotonic()
                self._decide(supervisor.Gone(failed=True, born=now, waiting=len(self.waiting)))
                return

    def _tick(self) -> None:
        now = time.monotonic()
        self.crew.tick(now)
        self._look_at_memory()
        self._decide(supervisor.Tick(len(self.waiting)))
        self._check_closed()

    def _look_at_memory(self) -> None:
        """Follow the memory limit, which may be changed while the worker runs."""
        before, self.reading = self.reading, self._probe.read()
        if self.reading.lowest_limit_bytes != before.lowest_limit_bytes:
            logger.warning(
                "The memory limit is now %s (%s), after %s (%s).",
                _mib(self.reading.lowest_limit_bytes),
                self.reading.lowest_limit_source,
                _mib(before.lowest_limit_bytes),
                before.lowest_limit_source,
            )

    def restart(self) -> None:
        """Replace all children, running tasks first, and what they are forked from."""
        if self.state == upstream.RUN:
            self._mailbox.post(self.crew.renew)

    def grow(self, count: int = 1) -> None:
        """Raise the upper bound of the number of children."""
        self._mailbox.post(self._resize, count)

    def shrink(self, count: int = 1) -> None:
        """Lower the upper bound of the number of children; running tasks are not disturbed."""
        self._mailbox.post(self._resize, -count)

    def _resize(self, difference: int) -> None:
        bound = max(self.supervisor.bound + difference, 0)
        if self._semaphore is not None:
            for _ in range(abs(bound - self.supervisor.bound)):
                if difference > 0:
                    self._semaphore.grow()
                else:
                    self._semaphore.shrink()
        self._decide(supervisor.Resized(bound, len(self.waiting)))

    @property
    def interrupted(self) -> bool:
        """Whether a signal handler asks, which has interrupted the engine in what it does."""
        return self._mailbox.interrupted

    @property
    def _state(self) -> int:
        """The state under the name that ``TaskPool.on_stop`` reads."""
        return self.state


def _mib(size: float) -> str:
    return f"{size / (1 << 20):.0f} MiB"
