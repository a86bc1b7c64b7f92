"""Holds no tasks that can not run here: the consumer's prefetch follows admission.

A worker that has no memory for its next task would still fetch as many as Celery lets it,
and keep them from other workers of the same queue. So while the first waiting task is not
admitted:

- The broker is told a lower prefetch: what stays here anyway (running tasks that are not
  acknowledged yet, tasks with an ETA), and one task more. It is never below one, and never
  above Celery's own.
- When that has lasted for half a second, all waiting tasks but the oldest go back to the
  broker. They have not begun, so nothing runs twice, and they go to the front of the queue.
  (The oldest that the broker counts: it would send another one in its place, again and again.)

Celery's own count is not touched: it goes on with it (autoscale, ETA, what follows a
reconnect), and only what the broker is told is bounded. When the block has been over for a
second, the broker is told Celery's count again. Until then tasks come one by one, each when
the one before has been admitted. Else a worker with room for one more task would fetch
twenty, and give nineteen back.

With early acknowledgement, running tasks do not count at the broker, so the lowered prefetch
is one; with late, it is one more than run. A single worker stays at work: it always has the
oldest task, and takes the next when that one was admitted.

What it does not do: tasks with an ETA in the future, and tasks that wait for a rate limit,
stay where they are. It needs Redis or RabbitMQ, without quorum queues: see :func:`obstacle`.

All of this runs in the thread of Celery's event loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from celery import bootsteps
from celery.utils.log import get_logger
from kombu.common import QoS

from memsafe_pool import upstream

__all__ = ["Hold", "Job", "Prefetch", "install", "obstacle"]

logger = get_logger(__name__)

#: Seconds that admission is blocked before tasks go back: a task that ends sooner leaves the broker in peace.
GIVE_BACK_SECONDS = 0.5

#: Seconds that admission has not been blocked before the prefetch is Celery's again.
RELEASE_SECONDS = 1.0


#: Tasks that go back at once, at most; the next ones at the next look. On Redis 100 take some 0.1 s.
GIVE_BACK_TASKS = 100


class Job(Protocol):
    """What is read of a job that waits in the pool.

    Attributes:
        memory_tries: How often it was ended for want of memory.
    """

    memory_tries: int

    @property
    def request(self) -> Any:
        """The request of Celery's that it runs, or None."""


AnyJob = TypeVar("AnyJob", bound=Job)


def obstacle(consumer: Any) -> str:
    """Return why the prefetch of a connected consumer can not follow admission; empty if it can."""
    if consumer.hub is None:
        return "this broker is polled, without an event loop"
    kind = consumer.connection.transport.driver_type
    if kind not in {"amqp", "redis"}:
        return f"for a broker of the kind {kind} it is not known how tasks go back to it"
    if kind == "amqp":
        # Their prefetch is fixed when the consumer begins, and what goes back to one too often is dropped.
        for name, queue in consumer.app.amqp.queues.items():
            if (queue.queue_arguments or {}).get("x-queue-type") in {"quorum", "stream"}:
                return f"the prefetch of a quorum queue ({name}) is fixed"
    return ""


def install(app: Any) -> None:
    """Have each consumer of this app say to ``pool.prefetch`` when it starts and stops."""
    app.steps["consumer"].add(Attachment)


class Attachment(bootsteps.StartStopStep):  # type: ignore[misc]
    """Tells the pool's :class:`Prefetch` of the consumer, each time it has connected."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def start(self, parent: Any) -> None:
        """Follow from now on; nothing has been fetched yet."""
        prefetch = getattr(parent.pool, "prefetch", None)
        if prefetch is not None:
            prefetch.attach(parent)

    def stop(self, parent: Any) -> None:
        """Leave the consumer alone: it stops, or its connection is lost."""
        prefetch = getattr(parent.pool, "prefetch", None)
        if prefetch is not None:
            prefetch.detach()


class Hold:
    """Tells from when to when the prefetch is bounded, and when tasks are to go back.

    Attributes:
        bounded: Whether the prefetch is bounded now.
    """

    def __init__(self) -> None:
        self.bounded = False
        self._blocked_since = math.inf
        self._blocked_last = -math.inf

    def follow(self, blocked: bool, now: float) -> bool:
        """Take note of admission at monotonic time ``now``; return whether tasks are to go back."""
        if blocked:
            self.bounded = True
            self._blocked_since = min(self._blocked_since, now)
            self._blocked_last = now
        else:
            self._blocked_since = math.inf
            if now - self._blocked_last >= RELEASE_SECONDS:
                self.bounded = False
        return now - self._blocked_since >= GIVE_BACK_SECONDS


class Prefetch:
    """What the broker is told to send ahead, and what it gets back.

    Arguments:
        waiting: The jobs that wait in the pool, the one to run next first; the engine's own
            collection, looked at anew each time.
        drop: Called with a job of these that goes back to the broker: it must be forgotten, as if
            it had never come, and its slot in the semaphore be released.

    Attributes:
        obstacle: Why nothing of this is done on this broker; empty if it is.
        given_back: Number of tasks that went back so far.
    """

    def __init__(self, waiting: Iterable[AnyJob], drop: Callable[[AnyJob], None]) -> None:
        self.obstacle = ""
        self.given_back = 0
        self._waiting: Iterable[Job] = waiting
        self._drop: Callable[[Any], None] = drop
        self._hold = Hold()
        self._consumer: Any = None
        self._tell: Callable[..., Any] = lambda **_: None
        self._told = math.inf
        self._outdated = False

    @property
    def count(self) -> int:
        """The prefetch that the broker was told last; 0 for no limit."""
        return 0 if self._told == math.inf else int(self._told)

    def attach(self, consumer: Any) -> None:
        """Follow admission with this consumer, which has connected and has fetched nothing yet."""
        said, self.obstacle = self.obstacle, obstacle(consumer)
        if self.obstacle:
            if self.obstacle != said:
                logger.warning(
                    "Without memory for its tasks this worker keeps them from others: %s.", self.obstacle
                )
            return
        celerys = consumer.qos
        self._tell = celerys.callback
        self._told = celerys.value or math.inf
        self._consumer = consumer
        consumer.qos = _FollowingQoS(celerys, self._send, self._is_due)
        if self._hold.bounded:
            self._send(celerys.value)

    def detach(self) -> None:
        """Leave the consumer alone until :meth:`attach`."""
        self._consumer = None
        self._outdated = False

    def follow(self, *, blocked: bool) -> None:
        """Take note whether the first waiting task is refused for want of memory.

        To be called whenever that changes, when a task begins or ends while it is so, and
        once in a second. Costs next to nothing while nothing is blocked. Calls ``drop``.
        """
        if not (blocked or self._hold.bounded):
            return
        give_back = self._hold.follow(blocked, time.monotonic())
        consumer = self._consumer
        if consumer is None:
            return
        self._outdated = self._bound(consumer.qos.value) != self._told
        # What went back before the broker knows the new prefetch would come again at once.
        if give_back and not self._outdated:
            self._give_back(consumer)

    # -- what the broker is told

    def _bound(self, count: int) -> float:
        """Return what to tell the broker where Celery says ``count``."""
        celerys = count or math.inf
        if not self._hold.bounded:
            return celerys
        waiting = {id(request) for _, request in self._waiting_requests()}
        return min(celerys, upstream.count_kept(self._consumer, waiting) + 1)

    def _send(self, prefetch_count: int) -> None:
        """Tell the broker; called by Celery's loop, in between its rounds."""
        if self._consumer is None:
            return
        bound = self._bound(prefetch_count)
        if bound < self._told and upstream.is_fetching(self._consumer):
            self._outdated = True
            return
        if bound != self._told:
            self._tell(prefetch_count=0 if bound == math.inf else int(bound))
            self._told = bound
        self._outdated = False

    def _is_due(self) -> bool:
        return self._outdated and not upstream.is_fetching(self._consumer)

    # -- what goes back

    def _waiting_requests(self) -> list[tuple[Job | None, Any]]:
        """Return requests that wait, those in the pool with their jobs; the one to run next first."""
        in_pool: list[tuple[Job | None, Any]] = [(job, job.request) for job in self._waiting]
        return in_pool + [(None, request) for request in upstream.queued_requests(self._consumer)]

    def _give_back(self, consumer: Any) -> None:
        """Let the broker have all waiting tasks again but the first that it counts."""
        count = 0
        counted = [pair for pair in self._waiting_requests() if upstream.is_counted(consumer, pair[1])]
        # The newest first: each goes to the front of the queue, so that they are in order there.
        for job, request in reversed(counted[1:]):
            if (job is not None and job.memory_tries) or upstream.is_revoked(request):
                continue  # what was begun here is counted here; and what was revoked ends here
            if job is None:
                upstream.unqueue(consumer, request)
            else:
                self._drop(job)
            upstream.give_back(request)
            count += 1
            if count == GIVE_BACK_TASKS:
                break
        if count:
            self.given_back += count
            logger.info("Gave %d waiting tasks back to the broker: no memory for them here now.", count)


class _FollowingQoS(QoS):
    """Celery's count, told to the broker by ``send``; also when ``is_due`` says so.

    Celery's loop asks in each round whether ``prev`` is still ``value``, and calls
    ``update`` if not.
    """

    def __init__(self, celerys: Any, send: Callable[..., None], is_due: Callable[[], bool]) -> None:
        super().__init__(send, celerys.value)  # type: ignore[no-untyped-call]
        if hasattr(celerys, "max_prefetch"):  # Celery 5.6 and later
            self.max_prefetch = celerys.max_prefetch
        self._is_due = is_due
        self._prev: Any = None

    @property
    def prev(self) -> Any:
        """The count of the last update; None when there is to be one."""
        return None if self._is_due() else self._prev

    @prev.setter
    def prev(self, count: Any) -> None:
        self._prev = count
