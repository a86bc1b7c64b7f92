"""Holds no more tasks than there is memory for: the prefetch follows admission and sizes of messages.

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

What waits takes memory too: the message, and its decoded arguments. So few messages may come
before it is known how large they are, twice as many each time that so many have come, and never
so many that those that wait would take more than a share of the budget. See :class:`Window`.

What it does not do: tasks with an ETA in the future, and tasks that have a rate limit, stay
where they are, however large they are. (The others of their name that wait for the limit stay in
Celery, and those that came before them must not come after them.) It needs Redis or RabbitMQ,
without quorum queues: see :func:`obstacle`.

All of this runs in the thread of Celery's event loop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from celery import bootsteps
from celery.signals import task_received
from celery.utils.log import get_logger
from kombu.common import QoS

from memsafe_pool import upstream
from memsafe_pool.settings import mib

__all__ = ["Hold", "Job", "Prefetch", "Window", "install", "obstacle"]

logger = get_logger(__name__)

#: Seconds that admission is blocked before tasks go back: a task that ends sooner leaves the broker in peace.
GIVE_BACK_SECONDS = 0.5

#: Seconds that admission has not been blocked before the prefetch is Celery's again.
RELEASE_SECONDS = 1.0


#: Seconds for which tasks go back at once; the next ones at the next look. On Redis each takes 2 to 4 ms, in
#: which no task is given to a child that has ended its last.
GIVE_BACK_AT_ONCE_SECONDS = 0.02

#: Bytes that a message takes in the worker for each byte of its body: the body, and what it is decoded
#: to. Measured for JSON: 1.7 with text, 3.0 with floats, 5.7 with integers, 7.6 with dicts.
DECODED = 3

#: Of the budget, what messages that wait may take.
WAITING_SHARE = 1 / 8

#: One message may come for each so many bytes of the budget when nothing is known of their sizes.
UNKNOWN_BYTES = 128 << 20

#: The broker can be told no higher number.
MOST_MESSAGES = 65535

#: What is left of the largest size with each message that is smaller: half of it after 44.
FADING = 63 / 64


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


class Window:
    """Tells how many messages may wait here, by what they take.

    A broker such as RabbitMQ sends as many as it was told to at once, and nobody knows how large the next
    one is. So it begins with few, and doubles when so many have come, as TCP does. That costs a round trip
    to the broker for each time; where the budget is ample for all that Celery would fetch, nothing. When
    next to nothing has come for a second it begins anew: many large ones may come at once then.

    Arguments:
        budget: Returns what the pool may use (bytes).

    Attributes:
        count: How many messages may wait.
        message_bytes: What a message takes, by the largest of the last ones.
    """

    def __init__(self, budget: Callable[[], int]) -> None:
        self.message_bytes = 0.0
        self._budget = budget
        self._lately = self._missing = 0
        self._opened = self.count = 1
        self.close()

    def close(self) -> None:
        """Begin anew, as nothing is known of what comes next."""
        self._lately = 0
        self._open(self._first)
        self._missing = self._opened

    @property
    def _first(self) -> int:
        return max(self._budget() // UNKNOWN_BYTES, 1)

    @property
    def is_narrow(self) -> bool:
        """Whether more could come but for their sizes."""
        return self.count < self._opened

    def arrive(self, body_bytes: int) -> None:
        """Take note of a message that has come."""
        taken = body_bytes * DECODED
        known = self.message_bytes
        self.message_bytes = taken if taken > known else known * FADING
        self._missing -= 1
        self._lately += 1
        if self._missing <= 0:
            self._open(2 * self._opened)
        elif self.count < self._opened or taken > known:
            self._reckon()

    def tick(self, *, idle: bool) -> None:
        """Take note once a second whether nothing at all is here."""
        lately, self._lately = self._lately, 0
        if idle and lately < self._opened / 4:
            self._open(max(self._first, 2 * lately))
            self._missing = self._opened

    def _open(self, count: int) -> None:
        """Let so many wait. As half of them may wait already, it is the other half that opens it further."""
        self._opened = count
        self._missing = count // 2
        self._reckon()

    def _reckon(self) -> None:
        self.count = self._opened
        fitting = self._budget() * WAITING_SHARE
        if self.message_bytes * self._opened > fitting:
            # In powers of two: each other number is one more message to the broker.
            self.count = 1 << max(math.floor(math.log2(fitting / self.message_bytes)), 0)


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

    def __init__(
        self,
        waiting: Iterable[AnyJob],
        drop: Callable[[AnyJob], None],
        budget: Callable[[], int] = lambda: 1 << 60,
    ) -> None:
        self.obstacle = ""
        self.given_back = self._unsaid = 0
        self._waiting: Iterable[Job] = waiting
        self._drop: Callable[[Any], None] = drop
        self._hold = Hold()
        self._window = Window(budget)
        self._said_large = False
        self._consumer: Any = None
        self._tell: Callable[..., Any] = lambda **_: None
        self._told = self._own = math.inf
        self._enough: float = 0
        self._outdated = False
        task_received.connect(self._on_received)

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
        self._told = self._own = celerys.value or math.inf
        self._consumer = consumer
        consumer.qos = _FollowingQoS(celerys, self._send, self._is_due)
        self._window.close()
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
        self._compare()
        # What went back before the broker knows the new prefetch would come again at once.
        more = give_back and not self._outdated and self._give_back(consumer)
        if self._unsaid and not more:
            text = "Gave %d waiting tasks back to the broker: no memory for them here now."
            logger.info(text, self._unsaid)
            self._unsaid = 0

    def refresh(self) -> None:
        """Take note that a child has been given a task: if it is acknowledged late, one more may come."""
        if self._told < self._own:
            self._compare()

    def tick(self) -> None:
        """Take note once a second of how much comes."""
        consumer = self._consumer
        if consumer is not None:
            self._window.tick(idle=not upstream.holds_requests(consumer))
            self._compare()

    def _on_received(self, sender: Any = None, request: Any = None, **_: Any) -> None:
        """Take note of a message, in the middle of what Celery does with it."""
        if sender is not self._consumer:
            return
        window = self._window
        window.arrive(upstream.message_size(request))
        if self._told < self._own or window.count < self._enough:
            self._outdated = True  # perhaps: what it counts as is known when Celery has done with it

    # -- what the broker is told

    def _compare(self) -> None:
        """Have the broker told in the next round of Celery's loop if it is to be told something else."""
        if self._consumer is not None:
            self._outdated = self._bound(self._consumer.qos.value) != self._told

    def _bound(self, count: int) -> float:
        """Return what to tell the broker where Celery says ``count``."""
        celerys = self._own = count or math.inf
        # Beyond that it is for tasks with an ETA, which are many perhaps, and need not be counted then.
        self._enough = min(self._consumer.max_prefetch_count or math.inf, MOST_MESSAGES)
        allowed = 1 if self._hold.bounded else self._window.count
        if allowed >= self._enough:
            return celerys
        waiting = {id(request) for _, request in self._waiting_requests()}
        bound = upstream.count_kept(self._consumer, waiting) + allowed
        return celerys if bound > MOST_MESSAGES else min(celerys, bound)

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
            self._say_large(prefetch_count)
        self._outdated = False

    def _say_large(self, prefetch_count: int) -> None:
        window = self._window
        if window.is_narrow and not self._said_large and window.count < self._enough:
            self._said_large = True
            logger.info(
                "Messages are large, up to %s each in the worker: the broker is to send %d ahead, not %d.",
                mib(window.message_bytes),
                window.count,
                prefetch_count,
            )

    def _is_due(self) -> bool:
        return self._outdated and not upstream.is_fetching(self._consumer)

    # -- what goes back

    def _waiting_requests(self) -> list[tuple[Job | None, Any]]:
        """Return requests that wait, those in the pool with their jobs; the one to run next first."""
        in_pool: list[tuple[Job | None, Any]] = [(job, job.request) for job in self._waiting]
        return in_pool + [(None, request) for request in upstream.queued_requests(self._consumer)]

    def _give_back(self, consumer: Any) -> bool:
        """Let the broker have all waiting tasks again but the first it counts; whether there are more."""
        until = time.monotonic() + GIVE_BACK_AT_ONCE_SECONDS
        counted = [pair for pair in self._waiting_requests() if upstream.is_counted(consumer, pair[1])]
        # The newest first: each goes to the front of the queue, so that they are in order there.
        for job, request in reversed(counted[1:]):
            if (job is not None and job.memory_tries) or upstream.is_revoked(request):
                continue  # what was begun here is counted here; and what was revoked ends here
            if upstream.has_rate_limit(consumer, request):
                continue
            if job is None:
                upstream.unqueue(consumer, request)
            else:
                self._drop(job)
            upstream.give_back(request)
            self.given_back += 1
            self._unsaid += 1
            if time.monotonic() >= until:
                return True
        return False


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
