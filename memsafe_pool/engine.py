"""The engine: gives jobs to children and settles their outcome.

It takes the place of billiard's pool under ``TaskPool``. The supervisor decides, the
engine and its crew act and tell it what happened.

One task at a time is with a child. A task that a child had not begun when it ended goes
to another; one that it had begun is lost, unless it was terminated, or was ended for want of memory
and may be run again. Waiting tasks are in one queue, idle children in a stack, so that nothing a
task costs depends on how many children there are.

All of it runs in one thread: the one of Celery's event loop or, on brokers without one,
the one of ``loop.LoopThread``. Public methods may be called from any thread.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from celery.utils.log import get_logger
from kombu.asynchronous import Hub

from memsafe_pool import events, recycle, scarcity, upstream, wire
from memsafe_pool.crew import Crew
from memsafe_pool.errors import MemoryLimitExceeded
from memsafe_pool.fleet import Child, Fleet, State
from memsafe_pool.job import Job, lost
from memsafe_pool.ledger import Account, Ledger
from memsafe_pool.loop import LoopThread, Mailbox, run_until
from memsafe_pool.prefetch import Prefetch
from memsafe_pool.reservations import after_loss
from memsafe_pool.scheduler import RETRY_SECONDS, TICK_SECONDS, Scheduler
from memsafe_pool.settings import mib
from memsafe_pool.steward import Steward
from memsafe_pool.supervisor import Supervisor
from memsafe_pool.time_limits import TimeLimits

if TYPE_CHECKING:
    from memsafe_pool.recycle import Rules
    from memsafe_pool.start import Origin, Owner, StartMethod
    from memsafe_pool.steward import MemoryTerms

__all__ = ["Engine"]

logger = get_logger(__name__)

#: Seconds after SIGTERM until SIGKILL for a child whose hard time limit has passed, as in billiard.
HARD_LIMIT_SECONDS = 0.1

#: A job that was with so many children that ended before they began it counts as lost.
MAX_TRIES = 3

#: Beyond a time limit a child may go on to hand over what its task has returned, as long as some of it comes
#: within so many seconds.
HAND_OVER_SECONDS = 1.0

#: Acknowledgements wait for the next round of Celery's loop, which is less than so many seconds away.
ACKNOWLEDGED_SECONDS = 0.05


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
        memory: What is done about memory.
        rules: When a child is replaced.
        others: Further arguments of :class:`supervisor.Supervisor`.
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
        memory: MemoryTerms,
        rules: Rules,
        **others: Any,
    ) -> None:
        self.limits = limits
        self.jobs: dict[int, Job] = {}
        self.waiting: deque[Job] = deque()
        self.retired = self.tasks = self.pauses = self.kills = self.redelivered = 0
        self.state: int = upstream.RUN
        self._semaphore = semaphore
        self._mailbox = Mailbox()
        self._loop = LoopThread(self._on_crash) if threaded else None
        self._tick_entry: Any = None
        self._retry_entry: Any = None
        self._closed = threading.Event()
        self._time_limits = TimeLimits(lambda *passed: self._mailbox.post(self._on_limit, *passed))
        self._auto_growth = rules.max_growth_bytes is None
        terms = origin.terms
        self._trim_bytes: float = max(terms.trim_bytes, 1) if terms.trim_idle is not None else math.inf
        self.fleet = Fleet()
        self.steward = Steward(
            memory,
            origin.app,
            self.fleet,
            self.waiting,
            starting_bytes=lambda forked: self.ledger.coming_bytes(self.room.child_bytes, forked=forked),
            on_pause=lambda *change: self._mailbox.post(self._on_pause, *change),
            on_stuck=lambda look: self._mailbox.post(self.scheduler.stuck, look),
            on_limit=lambda *passed: self._mailbox.post(self._on_memory_limit, *passed),
        )
        self.room, self.sizes = self.steward.room, self.steward.sizes
        self.watch = self.steward.watch
        self.crew = Crew(
            origin,
            make_start_method,
            self,
            self._mailbox,
            fleet=self.fleet,
            watch=self.watch,
            killed_by_kernel=self.steward.killed_by_kernel,
            start_timeout=start_timeout,
        )
        self.ledger = Ledger(self.fleet)
        self._first_runs = recycle.FirstRuns()
        self.supervisor = Supervisor(
            self.fleet, self.waiting, self.room, bound=bound, cores=memory.cores, rules=rules, **others
        )
        self.prefetch = Prefetch(self.waiting, self._drop, lambda: self.room.budget)
        self.scheduler = Scheduler(self, self.supervisor, self.waiting, time.monotonic)
        self._share_budget()

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
        self._mailbox.post(self._attach, hub)

    def _attach(self, hub: Any) -> None:
        self._mailbox.attach(hub)
        self.crew.attach(hub)
        for entry in (self._tick_entry, self._retry_entry):
            if entry is not None:
                entry.cancel()
        self._retry_entry = None
        # Through the mailbox: while the pool is joined, Celery fires its timers from another thread.
        self._tick_entry = hub.call_repeatedly(TICK_SECONDS, self._mailbox.post, self._tick)
        self._catch_up(*self.fleet.children)
        self._time_limits.attach(hub, self.jobs.values())
        self.watch.start()
        account = self._account()
        if self.crew.start_method.name == "spawn" and not self.crew.starts:
            # The best guess until there is one: it imports what the worker has imported.
            self.steward.learn_start(account.worker)
        self.steward.announce(account.total, self.supervisor.bound)
        self.scheduler.decide(events.Tick())
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
        if self._mailbox.failed:
            state = upstream.TERMINATE  # nobody may be left to take note of what a child has done
        if self._closed.is_set() or state <= self.state:
            return
        self.state = state
        self.scheduler.stopped = True  # nobody is started or retired any more: all leave
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
        self.steward.close()
        if self._loop is not None:
            self._loop.stop()
        self._closed.set()

    def _on_crash(self, exc: BaseException) -> None:
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
        self.sizes.size_up(job)
        self.scheduler.submit(job)

    def give(self, child: Child, job: Job) -> None:
        """Give an admitted job to a child that has none."""
        data = self._prepare(job, child)
        if data is None:
            self.scheduler.declined(child, job)
            return
        child.job, job.child = job, child
        self.tasks += 1
        self.watch.begin(child, job)
        self.prefetch.refresh()
        if not child.link.send(data):
            child.job = job.child = None
            self._released(child, job)
            self.crew.cut_off(child)
            self.scheduler.give_again(job)

    def _released(self, child: Child, job: Job) -> None:
        """Take back what was set aside for a job that a child has no more."""
        self.watch.end(child)
        self.supervisor.ended(job)

    def _prepare(self, job: Job, child: Child) -> bytes | None:
        """Return the message to a child for a job, or end it if it is not to be run, or can not be."""
        if job.done:
            return None
        if job.discard_revoked():
            self._give_up(job)
            return None
        if job.terminated is not None:
            self._accept(job, os.getpid(), time.monotonic())
            self._finish(job, False, upstream.failed(upstream.Terminated(job.terminated or 0)))
            return None
        try:
            body = upstream.dump_task(job.function, job.args, job.kwargs)
        except Exception as exc:  # noqa: BLE001 - pickling runs foreign code
            self._accept(job, os.getpid(), time.monotonic())
            self._finish(job, False, upstream.failed(upstream.MaybeEncodingError(exc, job.args)))
            return None
        message = wire.head(wire.TASK, len(body), job.id, self._hint(child, job)) + body
        if job.hard_limit is not None:
            return wire.head(wire.LIMIT, 0, 0, float(job.hard_limit)) + message
        return message

    def _hint(self, child: Child, job: Job) -> int:
        """Whether a child is to give back free heap before a job.

        When memory is short; and now and then, to learn what such tasks need, or what a child can not win.
        """
        trimmable = child.report.trimmable
        if trimmable < self._trim_bytes:
            return 0
        if self.supervisor.trims:
            return wire.TRIM
        growth = self.supervisor.rules.max_growth_bytes
        unknown = not self.ledger.peaks.is_known(job.name) or (growth is not None and trimmable > growth)
        return wire.EXACT if unknown else 0

    def _accept(self, job: Job, pid: int, at: float) -> None:
        job.accept(pid, at)
        self._time_limits.watch(job)

    def _finish(self, job: Job, succeeded: bool, value: Any, *, final: bool = False) -> None:
        if job.done:
            return
        # First the next task, which the semaphore may hand over here and now, then the
        # bookkeeping of this one.
        self._give_up(job)
        job.finish(succeeded, value, final=final)

    def _forget(self, job: Job) -> None:
        job.done = True
        self.jobs.pop(job.id, None)
        self._time_limits.forget(job)

    def _discard_waiting(self) -> None:
        """Drop jobs that no child has: the broker delivers them again."""
        while self.waiting:
            self._forget(self.waiting.popleft())

    def _drop(self, job: Job) -> None:
        """Forget a job that waits, and goes back to the broker."""
        self.waiting.remove(job)
        self._give_up(job)

    def _give_up(self, job: Job) -> None:
        """Forget a job, and let the next one have its slot."""
        self._forget(job)
        if self._semaphore is not None:
            self._release_slot()

    def _release_slot(self) -> None:
        """Let Celery hand the slot to the next request that waits for one.

        What fails there, such as telling a result backend of a revoked task, is not about what is done here.
        """
        while True:
            try:
                self._semaphore.release()
            except Exception as exc:
                hub = self.crew.hub
                if isinstance(exc, hub.propagate_errors):
                    # The consumer connects again: when what is done here has been acknowledged.
                    hub.call_later(ACKNOWLEDGED_SECONDS, _raise, exc)
                    return
                logger.exception("A task could not be begun; it comes again with the next connection")
            else:
                return

    def flush(self) -> None:
        """Drop what no child has, because the connection to the broker was lost."""
        self._mailbox.post(self._flush)

    def _flush(self) -> None:
        self._discard_waiting()
        for job in self.jobs.values():
            # What has not begun is not acknowledged either.
            job.delivered_again = job.redeliverable or job.accepted_at is None

    def terminate_job(self, pid: int, signum: int | None = None) -> None:
        """Send a signal to the child ``pid`` to end its task; the task counts as terminated."""
        child = self.fleet.by_pid.get(pid)
        if child is not None:
            self._mailbox.post(self._terminate_job, child, child.job, signum or upstream.TERM_SIGNAL)

    def _terminate_job(self, child: Child, job: Job | None, signum: int) -> None:
        if job is not None and child.job is job and child.signal(signum):
            child.job_terminated = child.expected = True
            self.watch.let_go_on(child)  # a paused process does not act on signals
            job.resume(time.monotonic())
            self._time_limits.watch(job)

    def _on_limit(self, job: Job, received: int) -> None:
        child = job.child
        if child is not None:
            self._catch_up(child)
        if job.done or child is None or child.job is not job:
            return
        limit = job.next_limit()
        if limit is None or limit[0] > time.monotonic():
            self._time_limits.watch(job)  # it was paused
            return
        if child.link.partial and child.link.received > received:
            # It has ended its task, and is handing over what that has returned.
            self._time_limits.put_off(job, HAND_OVER_SECONDS, child.link.received)
            return
        if limit[1]:
            job.soft_limit_passed = True
            job.time_out(soft=True)
            child.signal(signal.SIGUSR1)
            self._time_limits.watch(job)
        else:
            self._finish(job, False, upstream.failed(upstream.TimeLimitExceeded(job.limits[1])))
            job.time_out(soft=False)
            self.crew.kill(child, signal.SIGTERM, after=HARD_LIMIT_SECONDS)

    # -- what children say

    def _catch_up(self, *children: Child) -> None:
        """Act on what has been said until now, before a deadline is.

        The loop may have stood still for longer than that, as it does while Celery connects to the broker;
        and it looks at its timers first.
        """
        for child in children:
            self.crew.catch_up(child)
        self._mailbox.deliver()

    def on_message(self, child: Child, kind: int, number: int, value: float, payload: memoryview) -> None:
        """Act on a message of a child, see ``wire``."""
        job = child.job
        if kind == wire.ACK:
            if job is None or job.id != number or job.done:
                return
            if self.state != upstream.RUN and upstream.is_cold_shutdown():
                # Celery has cancelled what it knew to be running, and did not know of this. It stays one that
                # has not begun, and goes back to the broker, unless it has ended already.
                self.crew.kill(child, upstream.TERM_SIGNAL)
            else:
                self._accept(job, child.pid, value)
        elif kind == wire.DONE:
            if job is not None and job.id == number:
                if job.accepted_at is None and not job.done:
                    self._accept(job, child.pid, time.monotonic())
                self._on_done(child, job, payload, repeated=bool(value))
        elif kind == wire.UP:
            self.crew.started(child, number)
            self._on_up(child, wire.Report.unpack(payload))
        elif kind == wire.TRIMMED:
            self.ledger.trimmed(child, wire.Report.unpack(payload), int(value))
            self._first_runs.settle(child, child.report.kept - child.first_private_bytes)
            logger.debug("%s gave back %s", child, mib(value))
        elif kind == wire.FAILED:
            child.failure, child.shortage = bytes(payload).decode(errors="replace"), bool(number)

    def _on_up(self, child: Child, report: wire.Report) -> None:
        child.report, child.first_private_bytes = report, report.private
        self.steward.learn_start(report.private)
        if child.state is not State.STARTING:
            return  # it was told to go, or has ended: then it was never of use
        child.was_ready = True
        self.fleet.starting_children.discard(child)
        if self.state == upstream.RUN and not child.outdated:
            self.scheduler.up(child)
        else:
            self.crew.let_go(child)

    def _on_done(self, child: Child, job: Job, payload: memoryview, *, repeated: bool) -> None:
        child.job = None
        child.tasks += 1
        report, body = child.report, payload
        if not repeated:
            report, body = wire.Report.unpack(payload), payload[wire.REPORT.size :]
        # What it keeps is gone, although nobody has looked since.
        self.room.headroom -= max(report.private - child.report.private, 0)
        private = child.report.private
        self.ledger.ended(child, job.name, report)
        self._first_runs.note(child, job.name, report.private - private)
        self.sizes.learn(job, report.peak, report.hidden)
        if child.tasks == 1:  # by now it has what every child needs beside its tasks
            self.steward.learn_child(report.private)
        self._released(child, job)
        try:
            succeeded, value = wire.loads(body)
        except Exception as exc:  # noqa: BLE001 - unpickling runs foreign code
            succeeded, value = upstream.undecodable(job.function, exc)
        if child.state is State.BUSY:
            if child.job_terminated:
                self.crew.let_go(child)  # the signal that was meant for this job may still arrive
            else:
                self.scheduler.free(child)
        self._finish(job, succeeded, value)

    def on_gone(self, child: Child, exitcode: int | None, *, failed: bool, by_kernel: bool) -> None:
        """Act on a child's end."""
        self.scheduler.gone(child)
        job, child.job = child.job, None
        if job is not None:
            self.supervisor.ended(job)
            self._on_job_left(child, job, exitcode, by_kernel=by_kernel)
        # Memory was out, which says nothing of the app: it is tried again, but not at once.
        shortage = child.failure if failed and child.shortage else None
        self.scheduler.decide(events.Gone(failed, child.born, child, failed and by_kernel, shortage))
        self._check_closed()

    def on_fall_back(self) -> None:
        """Expect a child to take what the worker takes, as with spawn, and say what fits now."""
        account = self._account()
        self.steward.learn_start(account.worker)
        self.steward.announce(account.total, self.supervisor.bound, again=True)

    def _on_job_left(self, child: Child, job: Job, exitcode: int | None, *, by_kernel: bool) -> None:
        """Settle a job whose child has ended."""
        job.child = None
        if job.done:
            return
        if child.job_terminated:
            self._fail(job, child, upstream.failed(upstream.Terminated(-(exitcode or 0))))
        elif self.state == upstream.TERMINATE:
            self._forget(job)
        elif reason := self._out_of_memory(child, job, by_kernel=by_kernel):
            self._on_memory_lost(child, job, reason, exitcode)
        elif job.accepted_at is not None or job.tries >= MAX_TRIES:
            self._fail(job, child, lost(job, exitcode))
        elif self.state != upstream.RUN:
            self._forget(job)
        elif job.delivered_again:
            self._leave_to_broker(job)
        else:
            job.tries += 1
            job.leave()
            self.scheduler.give_again(job)

    def _leave_to_broker(self, job: Job) -> None:
        self._give_up(job)
        upstream.leave_to_broker(job.request)

    def _fail(self, job: Job, child: Child, error: Any, *, final: bool = False) -> None:
        """End a job that its child will not end any more."""
        if job.accepted_at is None:
            self._accept(job, child.pid, time.monotonic())  # so that it is acknowledged
        self._finish(job, False, error, final=final)

    # -- memory

    def _share_budget(self) -> None:
        """Let a child grow by its share of the budget, if nobody has said by how much it may."""
        if self._auto_growth:
            self.supervisor.rules.max_growth_bytes = recycle.default_growth_bytes(
                self.room.budget, self.supervisor.bound
            )

    def _account(self) -> Account:
        """Who has how much, but for the children."""
        return self.ledger.account(self.forkserver, children=False)

    @property
    def forkserver(self) -> int | None:
        """Pid of the forkserver, or None."""
        return getattr(self.crew.start_method, "pid", None) or None

    def _on_pause(self, child: Child, job: Job, paused: bool, at: float) -> None:
        """Take note that a job was paused, or goes on."""
        if job.done or job.child is not child or (paused and at <= job.resumed_at):
            return  # it was let go on since
        if paused:
            self.pauses += 1
            job.pause(at)
            logger.info("Paused %s in %s: memory is short", job, child)
        else:
            job.resume(at)
            logger.info("%s goes on in %s", job, child)
        self._time_limits.watch(job)
        self.scheduler.decide(events.Tick())

    def _on_memory_limit(self, child: Child, job: Job, soft: bool, grown: int) -> None:
        """Act on it that a job has taken more than its own limit."""
        if job.done or child.job is not job or child.state is not State.BUSY:
            return
        if soft:
            logger.warning("%s has taken %s, its soft limit is %s", job, mib(grown), mib(job.soft_limit or 0))
            child.signal(signal.SIGUSR2)
        else:
            job.alone = True  # more room would not help
            self.scheduler.kill(job, f"its own limit is {mib(job.hard_limit or 0)} (memsafe_hard_limit)")

    def kill(self, job: Job, reason: str) -> Child | None:
        """End the child that runs a job, as memory is out, and return it."""
        child = job.child
        if child is None or job.done or child.state is not State.BUSY:
            return None
        child.memory_error = (
            f"{job.name} had taken {mib(job.grown)} beyond what its child had, with "
            f"{mib(job.estimate.reserved)} set aside for it: {reason}. {self.steward.describe()}"
        )
        self.kills += 1
        logger.error("Ending %s in %s: %s", job, child, child.memory_error)
        self.crew.kill(child, signal.SIGKILL)
        return child

    def _out_of_memory(self, child: Child, job: Job, *, by_kernel: bool) -> str | None:
        """Return why a child has ended, if that was for want of memory."""
        if not by_kernel:
            return child.memory_error
        return (
            f"{job.name} had taken {mib(job.grown)} when looked at last, and the kernel has ended its "
            f"child, as memory was out. {self.steward.describe()}"
        )

    def _on_memory_lost(self, child: Child, job: Job, reason: str, exitcode: int | None) -> None:
        """Run a job again that was ended for want of memory, with more room, or say that it has failed."""
        may_run_again = job.redeliverable or job.accepted_at is None
        again = not job.alone and job.memory_tries < self.steward.terms.tries and may_run_again
        self.sizes.rise(job, job.grown)  # it would have needed more
        if job.delivered_again:
            logger.warning("%s is not run again here, as the broker has delivered it again: %s", job, reason)
            self._leave_to_broker(job)
            return
        if self.state != upstream.RUN and may_run_again:
            self._forget(job)  # the broker delivers it again
            return
        if again:
            job.memory_tries += 1
            job.estimate = after_loss(job.estimate, job.grown)
            job.withdraw()
            self._time_limits.forget(job)
            too_large = job.estimate.reserved > self.room.budget
            job.alone = job.memory_tries >= self.steward.terms.tries or too_large
            job.since = time.monotonic()
            self.redelivered += 1
            logger.warning("%s is run again%s: %s", job, " alone" * job.alone, reason)
            self.scheduler.give_again(job)
            return
        text = f"{reason} Job: {job.id}."
        if exitcode is not None:
            text = f"{upstream.human_status(exitcode)}: {text}"
        self._fail(job, child, upstream.failed(MemoryLimitExceeded(text)), final=True)

    # -- what is decided, see ``scheduler.Actor``

    @property
    def shares(self) -> bool:
        """Whether other workers spend the same memory."""
        return self.steward.shared

    def look(self) -> None:
        """Look at memory, and decide what follows, while no other worker does."""
        self.steward.look(self.scheduler.saw, lambda: self.scheduler.coming)

    def size_up_waiting(self) -> None:
        """Size waiting jobs anew when more is known than when they came."""
        self.steward.resize_waiting()

    def decided(self) -> None:
        """Have the prefetch follow."""
        self.prefetch.follow(blocked=self.supervisor.short)

    def retry_later(self) -> None:
        """Look at memory again in a moment."""
        if self._retry_entry is None:
            self._retry_entry = self.crew.hub.call_later(RETRY_SECONDS, self._mailbox.post, self._retry)

    def _retry(self) -> None:
        self._retry_entry = None
        blocked = cast("Job | None", self.supervisor.blocked)
        if blocked is not None and blocked in self.waiting and blocked.discard_revoked():
            self._drop(blocked)  # it would hold up the others until there is room for it
        self.scheduler.decide(events.Waiting())

    def dismiss(self, child: Child) -> None:
        """Let a child go that has no job."""
        self.crew.let_go(child)

    def say(self, shortage: str | None) -> None:
        """Say that the system has no room for more children, or has again."""
        if shortage is None:
            logger.info("There is room for more children again.")
            return
        logger.warning(
            "The system has no room for more children (%s). Those that are there go on, others are tried "
            "from time to time.",
            shortage,
        )

    def stop_worker(self, reason: str) -> None:
        """Stop the worker: no child can be started, now or later."""
        logger.critical("Stopping the worker: %s.", reason)
        upstream.stop_worker(os.EX_SOFTWARE)

    def retire(self, child: Child, reason: str) -> None:
        """Let a child go that has no job."""
        if child.job is None and child.state in {State.IDLE, State.BUSY}:
            logger.debug("Retiring %s: %s", child, reason)
            self.retired += 1
            self.crew.let_go(child)
        elif child.state is State.STARTING and child.pid:
            logger.info("%s is given up: %s", child, reason)
            self.retired += 1
            self.crew.kill(child, signal.SIGKILL)  # it does not listen yet

    def start(self, count: int) -> None:
        """Start so many children."""
        for _ in range(count):
            try:
                self.crew.start()
            except OSError as exc:
                shortage = f"no socket for it: {exc.strerror}" if scarcity.is_shortage(exc) else None
                if shortage is None:
                    logger.error("A child could not be started: %s", exc)  # noqa: TRY400 - this says all
                self.scheduler.decide(events.Gone(failed=True, born=time.monotonic(), shortage=shortage))
                return

    def _tick(self) -> None:
        self._mailbox.deliver()  # what has happened is heard before deadlines are acted on
        now = time.monotonic()
        self.crew.tick(now)
        self.watch.start()  # there may not have been room for its thread
        if self.steward.tick(self.ledger, self.forkserver):
            self._share_budget()
        self.scheduler.decide(events.Tick())
        self.prefetch.tick()
        self._check_closed()
        self._mailbox.failed = False  # all goes on as it should

    def restart(self) -> None:
        """Replace all children, running tasks first, and what they are forked from."""
        self._mailbox.post(self._restart)

    def _restart(self) -> None:
        if self.state == upstream.RUN:
            self.crew.renew()
            self.scheduler.decide(events.Outdated())

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
        self.scheduler.decide(events.Resized(bound))
        self._share_budget()

    @property
    def interrupted(self) -> bool:
        """Whether a signal handler asks, which has interrupted the engine in what it does."""
        return self._mailbox.interrupted

    @property
    def _state(self) -> int:
        """The state under the name that ``TaskPool.on_stop`` reads."""
        return self.state


def _raise(exc: Exception) -> None:
    raise exc
