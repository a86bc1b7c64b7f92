"""The scheduler: what waits, what happens, and what is done about it, one thing after the other.

The supervisor decides, an *actor* acts: the engine with processes, the simulated machine with numbers, a test
with lists. What is in between is here, once, so that what is searched for faults is what runs: the queue, who
gets which child, the order in which events and actions follow each other, and what is decided while something
else is being done.

An action may lead to further events. They are handled when all that was decided before has been done: else it
would be decided again.

No I/O and no clock of its own. Imports neither Celery nor billiard.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Protocol

from memsafe_pool import events, recycle, supervisor
from memsafe_pool.reservations import LITTLE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from memsafe_pool.room import Look, Task

__all__ = ["RETRY_SECONDS", "TICK_SECONDS", "Actor", "Fleet", "Scheduler"]

#: Seconds between looks at the clock for idle children, late starts and late exits.
TICK_SECONDS = 1.0

#: Seconds between looks at memory while a task waits for it.
RETRY_SECONDS = 0.1

#: A look at memory is too old to end a task by after so many seconds: twice as many as pass until the next.
STALE_SECONDS = 1.0


class Fleet(supervisor.Fleet, Protocol):
    """All children, of whom those that are idle are a stack: the one used last is used next."""

    def take(self) -> Any:
        """Return the idle child that was used last, which is idle no more."""

    def rest(self, child: Any, now: float) -> None:
        """Enter a child as idle, at monotonic seconds ``now``."""


class Actor(Protocol):
    """Who does what is decided."""

    @property
    def shares(self) -> bool:
        """Whether others spend the same memory, so that it has to be looked at before it is spent."""

    def give(self, child: Any, task: Any) -> None:
        """Give a child a task for which memory is set aside.

        If that is not to be, say :meth:`Scheduler.declined`, or settle both otherwise.
        """

    def start(self, count: int) -> None:
        """Start so many children."""

    def retire(self, child: Any, reason: str) -> None:
        """Let a child go that has no task; things may have changed since that was decided."""

    def dismiss(self, child: Any) -> None:
        """Let a child go that has no task, as there are to be no more."""

    def kill(self, task: Any, reason: str) -> Any:
        """End the child that runs a task, and return it; None if there is none any more."""

    def look(self) -> None:
        """Look at memory, and say :meth:`Scheduler.saw`."""

    def size_up_waiting(self) -> None:
        """Estimate anew what waiting tasks need, if more is known than before."""

    def say(self, shortage: str | None) -> None:
        """Tell people what ``events.Say`` says."""

    def stop_worker(self, reason: str) -> None:
        """Give up."""

    def decided(self) -> None:
        """Take note that all has been done that is to be done now."""

    def retry_later(self) -> None:
        """Call :meth:`Scheduler.decide` with ``events.Waiting`` within ``RETRY_SECONDS``."""


class Scheduler:
    """The loop from what happens to what is done.

    Arguments:
        actor: Who does it.
        rules: Who decides.
        queue: The tasks that wait, the one to run next first; the same as the supervisor's.
        clock: Returns monotonic seconds.

    Attributes:
        stopped: Whether nothing is decided any more, as all children are to leave.
    """

    def __init__(
        self, actor: Actor, rules: supervisor.Supervisor, queue: deque[Any], clock: Callable[[], float]
    ) -> None:
        self.queue = queue
        self.stopped = False
        self._actor, self._rules, self._clock = actor, rules, clock
        self._events: deque[events.Event] = deque()
        self._actions: deque[events.Action] = deque()
        self._deciding = False
        # The child whose task was ended to make room, as long as it is there, and when the last one had gone.
        self._victim: Any = None
        self._victim_left = float("-inf")

    @property
    def _fleet(self) -> Fleet:
        return self._rules.fleet  # type: ignore[return-value]

    # -- tasks

    def submit(self, task: Task) -> None:
        """Let a task begin, or wait."""
        task.since = self._clock()
        if not self.queue and not self._deciding and self._fleet.idle and self._admit(task):
            self._actor.give(self._fleet.take(), task)
        else:
            self.queue.append(task)
            self.decide(events.Waiting())

    def give_again(self, task: Task) -> None:
        """Find another child for a task, before all others."""
        self.queue.appendleft(task)
        self.decide(events.Waiting())

    def declined(self, child: Any, task: Task) -> None:
        """Take note that a child was not given a task after all, as nobody is to run it."""
        self._rules.ended(task)
        if self.stopped:
            self._actor.dismiss(child)
            return
        self._rest(child)
        self.decide(events.Waiting())

    def _admit(self, task: Task) -> bool:
        """Whether a task that nobody waits before may begin at once; else that has to be decided."""
        if self._actor.shares and task.estimate.reserved > LITTLE_BYTES:
            return False  # what is free has to be looked at, and to be spent by one worker at a time
        return self._rules.admit(task, self._clock())

    # -- children

    def up(self, child: Any) -> None:
        """Take note that a child is ready for its first task."""
        self._rest(child)
        self.decide(events.Up())

    def free(self, child: Any) -> None:
        """Let a child whose task has ended have another one, be idle, or go."""
        if self.stopped:
            self._actor.dismiss(child)
            return
        grown = child.growth_bytes > recycle.LEAST_PRESSED_BYTES
        if self._rules.watches_tasks or child.outdated or grown:
            self.decide(events.Done(child))
            if child.leaving:
                return
        self._actor.size_up_waiting()
        # What is decided already may be the same: then it is not to be admitted again.
        if self.queue and not self._deciding and self._admit(self.queue[0]):
            self._actor.give(child, self.queue.popleft())
            return
        self._rest(child)
        if self.queue:
            self.decide(events.Waiting())

    def gone(self, child: Any) -> None:
        """Take note that a child has ended, before its task is settled and ``events.Gone`` is decided on."""
        if child is self._victim:
            self._victim, self._victim_left = None, self._clock()

    def _rest(self, child: Any) -> None:
        self._fleet.rest(child, self._clock())

    # -- memory

    def saw(self, look: Look) -> None:
        """Decide on a look at memory; what follows is done when what was decided before has been done."""
        self._actions.extend(self._rules.handle(events.Looked(look), self._clock()))

    @property
    def coming(self) -> int:
        """Number of children that are starting, or are about to."""
        starts = sum(action.count for action in self._actions if isinstance(action, events.Start))
        return self._fleet.starting + starts

    def stuck(self, look: Look) -> None:
        """Make room, as all tasks are paused and none can go on; also when all children are to leave."""
        now = self._clock()
        if self._victim is not None or look.at < self._victim_left:
            return  # somebody is about to make room, or has made some since
        if now - look.at > STALE_SECONDS:
            return  # if it is still so, that is said again
        for action in self._rules.handle(events.Stuck(look), now):
            self._act(action)

    def kill(self, task: Task, reason: str) -> None:
        """End a task, and wait for its memory before another one is ended."""
        child = self._actor.kill(task, reason)
        if child is not None:
            self._victim = child

    # -- the loop

    def decide(self, event: events.Event) -> None:
        """Tell the supervisor, and do what it says; one event after the other."""
        if self.stopped:
            return  # nobody is started or retired any more: all leave
        self._events.append(event)
        if self._deciding:
            return
        self._deciding = True
        try:
            looked = False
            while (self._events or self._actions) and not self.stopped:
                # What was decided is done before anything else is: it would be decided again.
                if self._actions:
                    self._act(self._actions.popleft())
                elif self._actor.shares and not looked and isinstance(self._events[0], events.Waiting):
                    self._actor.look()  # others may have spent what was free
                    looked = True
                else:
                    self._actions.extend(self._rules.handle(self._events.popleft(), self._clock()))
                    looked = False
        finally:
            self._deciding = False
        self._actor.decided()
        if self._rules.blocked is not None:
            # Others' memory may come back without a word to us.
            self._actor.retry_later()

    def _act(self, action: events.Action) -> None:
        match action:
            case events.Give(task):
                self._give(task)
            case events.Start(count):
                self._actor.start(count)
            case events.Measure():
                self._actor.look()
            case events.Retire(child, reason):
                self._actor.retire(child, reason)
            case events.Kill(task, reason):
                self.kill(task, reason)
            case events.Say(shortage):
                self._actor.say(shortage)
            case events.StopWorker(reason):
                self._actor.stop_worker(reason)

    def _give(self, task: Task) -> None:
        """Give a waiting task, which is admitted, to an idle child; things may have changed meanwhile."""
        if task not in self.queue or not self._fleet.idle:
            self._rules.ended(task)
            return
        self.queue.remove(task)
        self._actor.give(self._fleet.take(), task)
