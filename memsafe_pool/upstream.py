"""What this package uses of Celery's and billiard's inner parts, all in one place.

Everything else in the package uses documented interfaces only. The names are looked
up when this module is imported, so that a release that moved one of them says so at
the start of the worker and not in the middle of a task.

Celery 5.4 to 5.7, billiard 4.2 and 4.3.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from functools import partial, wraps
from types import SimpleNamespace
from typing import Any

import billiard
import celery

try:
    from billiard.common import TERM_SIGNAL, human_status
    from billiard.context import Process
    from billiard.einfo import ExceptionInfo
    from billiard.exceptions import SoftTimeLimitExceeded, Terminated, TimeLimitExceeded, WorkerLostError
    from billiard.pool import CLOSE, RUN, TERMINATE, MaybeEncodingError
    from billiard.process import _children as _billiard_children
    from billiard.process import _set_current_process
    from billiard.util import _finalizer_registry, _run_after_forkers
    from celery._state import _set_task_join_will_block, set_default_app
    from celery.app import backends, trace
    from celery.app.trace import build_tracer, fast_trace_task, trace_task_ret
    from celery.concurrency.prefork import WORKER_SIGIGNORE, WORKER_SIGRESET, TaskPool
    from celery.local import PromiseProxy, Proxy
    from celery.platforms import set_mp_process_title, signals
    from celery.signals import (
        celeryd_after_setup,
        celeryd_init,
        worker_before_create_process,
        worker_init,
        worker_process_init,
        worker_process_shutdown,
    )
    from celery.utils.functional import maybe_list
    from celery.worker import state as worker_state
    from celery.worker.request import Request
except ImportError as exc:
    raise ImportError(
        f"memsafe_pool works with Celery 5.4 to 5.7; the installed Celery {celery.__version__} with "
        f"billiard {billiard.__version__} lacks something it needs: {exc}"
    ) from exc

__all__ = [
    "CLOSE",
    "RUN",
    "TERMINATE",
    "TERM_SIGNAL",
    "ExceptionInfo",
    "MaybeEncodingError",
    "SoftTimeLimitExceeded",
    "TaskMemoryError",
    "TaskPool",
    "Terminated",
    "TimeLimitExceeded",
    "WorkerLostError",
    "become_child",
    "body_size",
    "build_tracers",
    "config_changes",
    "count_kept",
    "dump_task",
    "failed",
    "give_back",
    "headers_of",
    "holds_requests",
    "human_status",
    "install_django_fixup",
    "is_cold_shutdown",
    "is_counted",
    "is_fetching",
    "is_revoked",
    "leave_to_broker",
    "message_size",
    "no_requeue",
    "prepare_app",
    "prepare_process",
    "queued_requests",
    "request_of",
    "send_before_create_process",
    "send_process_init",
    "send_process_shutdown",
    "set_banner_name",
    "set_title",
    "shield_worker",
    "start_handlers",
    "stop_worker",
    "task_name",
    "undecodable",
    "unproxied",
    "unqueue",
    "withdraw",
    "wrap_run",
]

_PROXIES = (Proxy, PromiseProxy)
_TRACERS = (fast_trace_task, trace_task_ret)
#: Where their arguments have the encoded body.
_BODY = 3


class TaskMemoryError(Exception):
    """Stands for a task's MemoryError on its way to the worker; its argument is the text of that.

    Celery's ``Request.on_failure`` raises a MemoryError again in the worker, which ends
    it. The caller of the task gets the MemoryError itself: the child has stored it.
    """

    def __repr__(self) -> str:
        return str(self.args[0])


def failed(exc: BaseException) -> ExceptionInfo:
    """Return what Celery's error callbacks take, for an exception made by us."""
    try:
        raise exc from None
    except type(exc):
        return ExceptionInfo()


def dump_task(function: Callable[..., Any], args: Any, kwargs: Any) -> bytes:
    """Pickle a call for a child.

    Celery's two trace functions take the task's arguments from the message body and
    put them into the request themselves, so the decoded copy need not travel as well:
    that halves the bytes of a call with large arguments.
    """
    if function in _TRACERS:
        name, task_id, request, *body = args
        args = (
            name,
            task_id,
            {key: value for key, value in request.items() if key not in {"args", "kwargs"}},
            *body,
        )
    return pickle.dumps((function, args, kwargs), pickle.HIGHEST_PROTOCOL)


def task_name(function: Callable[..., Any], args: Any) -> str:
    """Return the name of the task that a call runs; of the function, for a call that is none of Celery's."""
    if function in _TRACERS:
        return str(args[0])
    return getattr(function, "__qualname__", type(function).__qualname__)


def headers_of(function: Callable[..., Any], args: Any) -> dict[str, Any] | None:
    """Return the headers of a call's message, or None for a call that is none of Celery's."""
    if function in _TRACERS:
        request: dict[str, Any] = args[2]
        return request
    return None


def body_size(args: Any) -> int:
    """Return the size of the encoded arguments of a call of Celery's: bytes, or characters."""
    return len(args[_BODY] or ()) if len(args) > _BODY else 0


@contextlib.contextmanager
def no_requeue(request: Any) -> Iterator[None]:
    """Within this, a request whose worker was lost fails, whatever ``reject_on_worker_lost`` says.

    What was tried as often as makes sense would come back for ever.
    """
    task: Any = getattr(request, "task", None)
    if not getattr(task, "reject_on_worker_lost", False):
        yield
        return
    task.reject_on_worker_lost = False
    try:
        yield
    finally:
        task.reject_on_worker_lost = True


def unproxied(value: Any) -> Any:
    """Return what a proxy such as ``current_app`` stands for; anything else as it is."""
    return value._get_current_object() if type(value) in _PROXIES else value


def is_revoked(request: Any) -> bool:
    """Whether the worker was told to revoke a request's task, by its id or by a stamp; says nothing of it."""
    if request.id in worker_state.revoked:
        return True
    stamps = worker_state.revoked_stamps
    return bool(stamps) and any(
        value in maybe_list(stamps[name])
        for name, values in request.stamps.items()
        if name in stamps
        for value in maybe_list(values)
    )


def has_rate_limit(consumer: Any, request: Any) -> bool:
    """Whether tasks of its name begin by a rate limit, so that others may wait in Celery for theirs."""
    return bool(consumer.task_buckets.get(request.task_name))


def is_cold_shutdown() -> bool:
    """Whether the worker shuts down without waiting for tasks."""
    return worker_state.should_terminate not in {None, False}


def stop_worker(exitcode: int) -> None:
    """Ask the worker to shut down, running tasks first, and to exit with ``exitcode``."""
    worker_state.should_stop = exitcode


def config_changes(app: Any) -> dict[str, bytes]:
    """Return what was changed in the app's configuration at run time and can be pickled.

    These are, among others, changes from the command line and from ``celeryd_init``
    handlers; a fresh interpreter that imports the app would not have them.
    """
    changes = {}
    for key, value in dict(app.conf.changes).items():
        try:
            changes[key] = pickle.dumps(value)
        except Exception:  # noqa: BLE001, S112 - pickling runs foreign code; the child has its own value
            continue
    return changes


def become_child(name: str, index: int | None, parent_pid: int) -> None:
    """Make billiard and the logging module see this process as pool process ``name``.

    Called in the forkserver and in each child, before any other code of Celery runs.
    """
    if sys.stdin is not None:
        try:
            sys.stdin.close()
        except (OSError, ValueError):
            pass  # it was closed already, which is what is wanted
        sys.stdin = open(os.devnull)  # noqa: SIM115 - stays open for the life of the process
    process = Process(name=name)
    process.daemon = True
    process._parent_pid = parent_pid
    if index is not None:
        process.index = index
    _set_current_process(process)
    _billiard_children.clear()
    _finalizer_registry.clear()
    _run_after_forkers()


def build_tracers(app: Any, hostname: str) -> None:
    """Build the functions that run tasks.

    They are the larger part of what there is to prepare, so the worker does this before it
    forks the forkserver: memory that both have written to is not shared.
    """
    for name, task in app.tasks.items():
        task.__trace__ = build_tracer(name, task, app.loader, hostname, app=app)


def prepare_app(app: Any, hostname: str, *, fresh: bool) -> None:
    """Do what each child needs of Celery and what can be done once for all of them.

    Runs in the forkserver, or in a child that was not forked from one. ``fresh``: this
    process is a new interpreter that imported the app.
    """
    _set_task_join_will_block(True)
    app.loader.init_worker()
    if not _logs_per_child():
        _set_up_logging(app, hostname)
    if fresh:
        trace.setup_worker_optimizations(app, hostname)
        build_tracers(app, hostname)
        _import_what_tasks_use(app)
    else:
        app.set_current()
        set_default_app(app)
        trace._tasks = app._tasks
    worker_state.reset_state()


def _import_what_tasks_use(app: Any) -> None:
    """Import the result backend and the transport, as the worker has; nothing is connected.

    Else each child does that in its first task.
    """
    loads: tuple[Callable[[], object], ...] = (
        lambda: app.amqp,
        lambda: backends.by_url(app.backend_cls or app.conf.result_backend, app.loader),
        lambda: app.connection_for_write().get_transport_cls(),
    )
    for load in loads:
        with contextlib.suppress(Exception):  # the task that uses it says what is wrong with it
            load()


def prepare_process(app: Any, hostname: str) -> None:
    """Do what each child needs of Celery and what cannot be done before it exists."""
    signals.reset(*WORKER_SIGRESET)
    signals.ignore(*WORKER_SIGIGNORE)
    set_title(hostname)
    app.loader.init_worker_process()
    if _logs_per_child():
        app.log.already_setup = False
        _set_up_logging(app, hostname)
    for name, task in app.tasks.items():
        # A tracer remembers the pid of the process that built it, for the STARTED state.
        if task.track_started:
            task.__trace__ = build_tracer(name, task, app.loader, hostname, app=app)


def wrap_run(app: Any, name: str, hostname: str, context: Any) -> None:
    """Have the body of a task, and nothing else of what Celery does with it, run in a context.

    Each time it runs in this process from now on.
    """
    task = app.tasks.get(name)
    if task is None:
        return  # which Celery says itself
    run = task.run
    if getattr(run, "memsafe_context", None) is context:
        return

    @wraps(run)
    def within(*args: Any, **kwargs: Any) -> Any:
        with context:
            return run(*args, **kwargs)

    within.memsafe_context = context  # type: ignore[attr-defined]
    task.run = within
    task.__trace__ = build_tracer(name, task, app.loader, hostname, app=app)


def set_title(hostname: str) -> None:
    """Show this process in ``ps`` by its own name, where setproctitle is installed."""
    set_mp_process_title("celeryd", hostname=hostname)


def send_before_create_process(hostname: str) -> None:
    """Send ``worker_before_create_process`` in the process that is about to be forked."""
    worker_before_create_process.send(sender=hostname)


def set_banner_name(pool_cls: type, name: str) -> None:
    """Have the banner of a worker with this pool show ``name``.

    Celery shows the last part of the name of the pool's module. That has to be ``prefork``, as
    ``celery.contrib.testing`` looks at it.
    """

    def name_pool(instance: Any, **_: Any) -> None:
        startup_info = instance.startup_info

        def named(*args: Any, **kwargs: Any) -> str:
            text: str = startup_info(*args, **kwargs)
            return text.replace(" (prefork)", f" ({name})", 1)

        if isinstance(instance.pool, pool_cls):
            instance.startup_info = named

    celeryd_after_setup.connect(name_pool, weak=False, dispatch_uid=name)


def start_handlers(hostname: str) -> list[str]:
    """Return the app's own handlers that ran when the worker started, as ``module:function (signal)``.

    What they have made is in processes forked from the worker, and in no others.
    """
    receivers = [
        (receiver, signal.name)
        for signal, sender in ((celeryd_init, hostname), (celeryd_after_setup, hostname), (worker_init, None))
        for receiver in signal._live_receivers(sender)
    ]
    return [
        f"{receiver.__module__}:{getattr(receiver, '__qualname__', type(receiver).__qualname__)} ({signal})"
        for receiver, signal in receivers
        if receiver.__module__.partition(".")[0] not in {"celery", "memsafe_pool"}
    ]


def send_process_init(hostname: str) -> None:
    """Send ``worker_process_init`` in a child."""
    worker_process_init.send(sender=hostname)


def send_process_shutdown(hostname: str, exitcode: int) -> None:
    """Send ``worker_process_shutdown`` in a child."""
    worker_process_shutdown.send(sender=hostname, pid=os.getpid(), exitcode=exitcode)


def _logs_per_child() -> bool:
    return "%i" in os.environ.get("CELERY_LOG_FILE", "").lower()


def _set_up_logging(app: Any, hostname: str) -> None:
    app.log.setup(
        int(os.environ.get("CELERY_LOG_LEVEL") or 0),
        os.environ.get("CELERY_LOG_FILE") or None,
        bool(os.environ.get("CELERY_LOG_REDIRECT")),
        str(os.environ.get("CELERY_LOG_REDIRECT_LEVEL")),
        hostname=hostname,
    )


def install_django_fixup(app: Any) -> None:
    """Connect Django's database handling in a fresh interpreter.

    Celery connects it when the worker starts, by ``worker_init``, which is not sent in
    other processes. A forked child inherits it.
    """
    for fixup in getattr(app, "_fixups", None) or ():
        worker_fixup = getattr(fixup, "worker_fixup", None)
        if worker_fixup is not None:
            worker_fixup.worker = SimpleNamespace(pool_cls="memsafe_pool.prefork", app=app)
            worker_fixup.install()


def undecodable(function: Any, exc: Exception) -> tuple[bool, Any]:
    """Return the outcome of a call whose real outcome can not be unpickled in the worker.

    A task of Celery's has its result stored by the child: that one stays.
    """
    error = failed(MaybeEncodingError(exc, "what the child sent"))
    return (True, (1, error, 0.0)) if function in _TRACERS else (False, error)


def shield_worker(value: Any) -> Any:
    """Return what a tracer returned, with a MemoryError of the task in a form the worker survives.

    Runs in the child, where Celery's tracer has stored the MemoryError as the task's result.
    """
    match value:
        case 1, ExceptionInfo() as einfo, _ if isinstance(einfo.exception, MemoryError):
            einfo.exception = TaskMemoryError(repr(einfo.exception))
            einfo.type = TaskMemoryError
    return value


# Requests of the consumer


def request_of(callback: Any) -> Any:
    """Return the request that a callback given to ``apply_async`` belongs to; None for others."""
    owner = getattr(callback, "__self__", None)
    return owner if isinstance(owner, Request) else None


def queued_requests(consumer: Any) -> list[Any]:
    """Return the requests that wait for the pool to have a slot free, the oldest first.

    Celery keeps them, beyond the concurrency, in the queue of a semaphore.
    """
    semaphore = getattr(consumer.controller, "semaphore", None)
    return [] if semaphore is None else [args[0] for _, args, _ in semaphore._waiting if args]


def unqueue(consumer: Any, request: Any) -> None:
    """Take a request out of that queue."""
    waiting = consumer.controller.semaphore._waiting
    for entry in waiting:
        if entry[1] and entry[1][0] is request:
            waiting.remove(entry)
            return


def count_kept(consumer: Any, waiting: set[int]) -> int:
    """Return how many tasks the broker counts as sent that are not among those that wait.

    These are tasks with an ETA, and running tasks that are acknowledged late. A task that
    is acknowledged early counts for a moment only. What another connection has brought is
    none of this one's.

    Arguments:
        waiting: The ``id()`` of each request that waits.
    """
    running = sum(
        1
        for request in tuple(worker_state.reserved_requests)
        if request.task.acks_late and id(request) not in waiting and is_counted(consumer, request)
    )
    return running + _count_scheduled(consumer)


def _count_scheduled(consumer: Any) -> int:
    """Return how many tasks with an ETA this connection has brought."""
    scheduled = getattr(worker_state, "scheduled_requests", None)
    if scheduled is not None:  # Celery 5.7
        return len(scheduled)
    channel = consumer.task_consumer.channel
    entries = (scheduled.entry for scheduled in consumer.timer.schedule.queue)
    return sum(
        1
        for entry in entries
        if entry.args
        and isinstance(entry.args[0], Request)
        and not entry.canceled
        and entry.args[0].message.channel is channel
    )


def holds_requests(consumer: Any) -> bool:
    """Whether the worker has any task that runs, or waits; the time of one with an ETA has not come yet."""
    return bool(worker_state.reserved_requests) or any(
        bucket.contents for bucket in consumer.task_buckets.values() if bucket
    )


def message_size(request: Any) -> int:
    """Return the size of a request's message as it came: bytes, or characters."""
    return len(request.message.body or ())


def is_fetching(consumer: Any) -> bool:
    """Whether a lower prefetch has to wait, because Redis has been asked for a message.

    What it answers when there is no prefetch left for it stays in the socket, lost to all
    workers; and kombu before 5.7 loops over it at full speed. Redis answers within a second
    (``brpop_timeout``), with nothing if there is nothing.
    """
    return bool(getattr(consumer.task_consumer.channel, "_in_poll", False))


def is_counted(consumer: Any, request: Any) -> bool:
    """Whether a request is one that the broker counts as sent on this connection.

    Not a call that is none of Celery's tasks, one that is acknowledged, and one that came by an
    earlier connection.
    """
    return (
        request is not None
        and not request.acknowledged
        and request.message.channel is consumer.task_consumer.channel
    )


def withdraw(request: Any) -> None:
    """Make a request that has begun one that has not, as its task is to be run again."""
    if request is not None:
        worker_state.active_requests.discard(request)
        request.time_start = request.worker_pid = None


def leave_to_broker(request: Any) -> None:
    """Forget a request that was ended here, and that the broker has delivered again already."""
    if request is not None:
        worker_state.task_ready(request)


def give_back(request: Any) -> None:
    """Put a request's message back to the front of its queue, and forget the request.

    It must not have begun, and nobody may begin it any more.
    """
    worker_state.task_ready(request)
    if hasattr(getattr(request.message.channel, "qos", None), "restore_by_tag"):
        request.on_reject = partial(_requeue_in_redis, request.message)
    request.reject(requeue=True)


def _requeue_in_redis(message: Any, logger: Any, errors: Any, requeue: bool) -> None:
    """Put a message to the front of its queue in Redis; kombu's own ``reject`` puts it to the end."""
    from kombu.transport.virtual import QoS

    qos = message.channel.qos
    try:
        qos.restore_by_tag(message.delivery_tag)
    except Exception as exc:  # also that Redis has no memory left
        # It is restored when the connection is closed or its visibility timeout has passed.
        logger.critical("Couldn't give back %r, reason: %r", message.delivery_tag, exc, exc_info=True)
        return
    QoS.ack(qos, message.delivery_tag)
    message._state = "REQUEUED"
