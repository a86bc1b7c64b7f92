"""A pool whose admission is blocked and let go by a control command, in place of want of memory."""

from __future__ import annotations

import time

from celery.worker.control import control_command, inspect_command
from proj import app, hold, hold_late, note  # noqa: F401  # the tasks

from memsafe_pool import prefork as ours
from memsafe_pool import upstream
from memsafe_pool.job import Job
from memsafe_pool.prefetch import Prefetch, install

if not hasattr(Job, "request"):
    Job.request = property(lambda job: upstream.request_of(job._callbacks[1]))


@app.task
def linger(path, value):
    """Take a moment, and write a line."""
    time.sleep(0.5)
    return note(path, value)


class Pool(ours.Pool):
    """Says twenty times in a second whether it is blocked, as an engine does that refuses tasks."""

    prefetch = None
    blocked = False
    entry = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        install(self.app)

    def on_start(self):
        super().on_start()
        self.prefetch = Prefetch(self._pool.waiting, self.drop)

    def drop(self, job):
        engine = self._pool
        engine.waiting.remove(job)
        engine._forget(job)
        if engine._semaphore is not None:
            engine._semaphore.release()

    def register_with_event_loop(self, hub):
        super().register_with_event_loop(hub)
        if self.entry is not None:
            self.entry.cancel()
        self.entry = hub.call_repeatedly(0.05, self.follow)

    def follow(self):
        self.prefetch.follow(blocked=self.blocked)


@control_command(args=[("blocked", bool)])
def block(state, blocked=True):
    """Refuse tasks from now on, or no longer."""
    state.consumer.pool.blocked = blocked
    return {"ok": blocked}


@control_command(args=[("bound", int)])
def most_children(state, bound=1):
    """Have no more children than this, with Celery's idea of the concurrency left as it is."""
    state.consumer.pool._pool.supervisor.bound = bound
    return {"ok": bound}


@inspect_command()
def prefetch(state):
    """What the broker was told, what Celery would have told it, what waits where, what went back."""
    consumer, pool = state.consumer, state.consumer.pool
    channel = consumer.task_consumer.channel
    return {
        "told": pool.prefetch.count,
        "celerys": consumer.qos.value,
        "in_pool": [job.correlation_id for job in pool._pool.waiting],
        "in_semaphore": [request.id for request in upstream.queued_requests(consumer)],
        "given_back": pool.prefetch.given_back,
        "obstacle": pool.prefetch.obstacle,
        "redis": channel.qos.prefetch_count if hasattr(channel, "qos") else None,
    }
