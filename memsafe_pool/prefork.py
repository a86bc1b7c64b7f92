"""The pool as Celery sees it.

The module has this name because Celery looks at it: the Django fix-up and
``celery.contrib.testing`` treat a pool whose module is called ``prefork`` as one that
runs tasks in processes.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from celery.exceptions import ImproperlyConfigured
from celery.utils.imports import cwd_in_path
from celery.utils.log import get_logger
from click import ClickException, get_current_context

from memsafe_pool import (
    child,
    cores,
    forkserver,
    fresh,
    native,
    prefetch,
    scarcity,
    settings,
    start,
    upstream,
)
from memsafe_pool.engine import Engine
from memsafe_pool.recycle import Rules
from memsafe_pool.start_forkserver import Forkserver
from memsafe_pool.steward import MemoryTerms

__all__ = ["Pool", "PoolConfigurationError"]

logger = get_logger(__name__)

_METHODS: dict[str, Callable[[start.Owner, start.Origin], start.StartMethod]] = {
    "forkserver": Forkserver,
    "spawn": start.Spawn,
    "fork": start.Fork,
}


class PoolConfigurationError(ImproperlyConfigured, ClickException):  # type: ignore[misc]
    """A setting is wrong; the ``celery`` command shows it as one sentence."""

    def __init__(self, message: str) -> None:
        ClickException.__init__(self, message)


class Pool(upstream.TaskPool):  # type: ignore[misc]
    """A drop-in for prefork whose children start on demand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(os, "fork"):
            raise PoolConfigurationError("memsafe_pool needs Linux, macOS or another Unix; this is none.")
        self._app_name = fresh.find_app(self.app)
        try:
            self.settings = settings.load(self.app.conf, os.environ)
            self._method = self._check(self.settings)
        except settings.SettingError as exc:
            raise PoolConfigurationError(str(exc)) from None
        self._pool: Engine | None = None
        self.prefetch: prefetch.Prefetch | None = None
        prefetch.install(self.app)  # before the consumer is made

    def _check(self, chosen: settings.Settings) -> str:
        """Refuse what is wrong only here and now; return the start method to use."""
        method = chosen.start_method
        if method == "auto":
            # Celery's own option asks for spawn by saying that forking is not enabled.
            method = "forkserver" if sys.platform == "linux" and self.forking_enable else "spawn"
        most = max(self.limit or 0, _autoscale_maximum())
        if most and chosen.min_children > most:
            raise settings.SettingError(
                "memsafe_min_children", chosen.min_children, f"at most the concurrency, which is {most}"
            )
        for module in chosen.preload:
            if not _exists(module):
                raise settings.SettingError(
                    "memsafe_preload",
                    list(chosen.preload),
                    f"names of modules that exist: {module!r} does not",
                )
        if method == "forkserver" and sys.platform != "linux":
            raise settings.SettingError("memsafe_start_method", method, "'auto', 'spawn' or 'fork' here")
        if method == "fork" and chosen.child_env:
            raise settings.SettingError(
                "memsafe_child_env", chosen.child_env, "empty with memsafe_start_method='fork'"
            )
        if self._app_name is None and (method == "spawn" or chosen.child_env):
            name = "memsafe_start_method" if method == "spawn" else "memsafe_child_env"
            raise settings.SettingError(
                name,
                method if method == "spawn" else chosen.child_env,
                "left alone for an app that a fresh interpreter can not import: one that -A does not "
                "name, and that is no attribute of a module",
            )
        return method

    def on_start(self) -> None:
        """Make the engine; no child is started."""
        if missing := native.missing():
            logger.warning(
                "Memory of children is looked after as far as that goes here: %s.", "; ".join(missing)
            )
        _heed_children()
        descriptors = forkserver.open_descriptors()
        options = self.options
        app, hostname = options["initargs"]
        memory_kib = options.get("max_memory_per_child") or 0
        origin = start.Origin(
            app=app,
            terms=child.Terms(
                worker_pid=os.getpid(),
                hostname=hostname,
                index=0,
                name="",
                trim_idle=self.settings.trim_idle,
                trim_bytes=self.settings.trim_min,
            ),
            app_name=self._app_name,
            preload=self.settings.preload,
            child_env=self.settings.child_env,
            descriptors=descriptors,
        )
        chosen = self.settings
        pool = self._pool = Engine(
            origin,
            _METHODS[self._method],
            bound=self.limit,
            threaded=options.get("threads", True),
            semaphore=options.get("semaphore"),
            limits=(options.get("soft_timeout"), options.get("timeout")),
            start_timeout=chosen.start_timeout,
            memory=MemoryTerms(
                budget=chosen.memory_budget,
                pause=chosen.pause,
                tries=chosen.memory_tries,
                state=chosen.state,
                cores=cores.count(),
                cores_at_once=cores.at_once(),
            ),
            rules=Rules(
                max_tasks=options.get("maxtasksperchild"),
                max_private_bytes=memory_kib * 1024 or None,
                max_growth_bytes=chosen.max_child_growth,
                max_age=chosen.max_child_age,
            ),
            min_children=chosen.min_children,
            idle_timeout=chosen.idle_timeout,
            patience=chosen.overtake_time,
            max_pause=chosen.max_pause,
        )
        self.prefetch = pool.prefetch
        pool.begin()
        self.on_apply = pool.apply_async
        self.terminate_job = pool.terminate_job
        self.grow = pool.grow
        self.shrink = pool.shrink
        self.flush = pool.flush

    def on_stop(self) -> None:
        """Wait until running tasks have ended."""
        if self._pool is not None and self._pool.interrupted:
            # Cold shutdown stops the pool in a signal handler. What that has interrupted can
            # not go on before it returns, and may be what it would wait for. Celery
            # terminates the pool right after.
            self._pool.close()
            return
        try:
            super().on_stop()
        except RuntimeError as exc:
            # The pool is closed by then, and Celery wants a thread that sends heartbeats while tasks end.
            if self._pool is None or not scarcity.is_shortage(exc):
                raise
            logger.warning("The broker gets no heartbeats while the last tasks end: %s", exc)
            self._pool.join()
            super().on_stop()  # acknowledges what has ended: there is room for a thread now

    def restart(self) -> None:
        """Replace all children, running tasks first."""
        if self._pool is not None:
            self._pool.restart()

    def did_start_ok(self) -> bool:
        """No child has started yet, so none has failed."""
        return True

    def maintain_pool(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the engine looks after its children itself."""

    def register_with_event_loop(self, loop: Any) -> None:
        """Run on Celery's event loop."""
        if self._pool is not None:
            self._pool.register_with_event_loop(loop)

    @property
    def num_processes(self) -> int:
        """Upper bound of the number of children: what ``-c`` and autoscale move."""
        return self.limit if self._pool is None else self._pool.supervisor.bound

    def _get_info(self) -> dict[str, Any]:
        pool = self._pool
        if pool is None:
            return {"max-concurrency": self.limit}
        fleet = pool.fleet
        return {
            "implementation": f"{type(self).__module__}:{type(self).__name__}",
            "max-concurrency": self.num_processes,
            "processes": pool.crew.pids(),
            "max-tasks-per-child": pool.supervisor.rules.max_tasks or "N/A",
            "put-guarded-by-semaphore": self.putlocks,
            "timeouts": tuple(limit or 0 for limit in pool.limits),
            "writes": _writes(pool),
            "memsafe": {
                "start_method": pool.crew.start_method.name,
                "forkserver": pool.forkserver,
                "children": fleet.size,
                "idle": len(fleet.idle),
                "busy": fleet.busy,
                "starting": fleet.starting,
                "waiting": len(pool.waiting),
                "starts": pool.crew.starts,
                "retired": pool.retired,
                "tasks": pool.tasks,
                "pauses": pool.pauses,
                "kills": pool.kills,
                "redelivered": pool.redelivered,
                "given_back": pool.prefetch.given_back,
                "trims": pool.ledger.trims,
                "trimmed": pool.ledger.trimmed_bytes,
                "memory": _memory(pool),
                "table": pool.ledger.table(),
                "peaks": pool.ledger.peaks.summaries(),
            },
        }


def _heed_children() -> None:
    """Have the kernel keep how children ended, if whoever has started the worker ignores that."""
    if signal.getsignal(signal.SIGCHLD) is not signal.SIG_IGN:
        return
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except ValueError:  # not the main thread
        logger.warning("SIGCHLD is ignored in this process: how a child has ended is not known.")


def _memory(pool: Engine) -> dict[str, Any]:
    """Return what the limit is, what is used of it, and what of that is ours."""
    reading, account = pool.watch.refresh(), pool.ledger.account(pool.forkserver)
    return {
        "limit": reading.lowest_limit_bytes,
        "limit_source": reading.lowest_limit_source,
        "budget": pool.room.budget,
        "reserved": pool.room.pending,
        "child": pool.room.child_bytes,
        "used": reading.used_bytes,
        "headroom": reading.headroom_bytes,
        "oom_kills": reading.oom_kills,
        "allocator": native.allocator(),
        "worker": account.worker,
        "forkserver": account.forkserver,
        "children": account.children,
        "total": account.total,
    }


def _writes(pool: Engine) -> dict[str, Any]:
    """Return the field that shows how tasks were spread over the living children."""
    children = list(pool.fleet.children)  # they may come and go meanwhile, in another thread
    tasks = [child.tasks for child in children]
    total = sum(tasks)
    shares = [f"{count / total if total else 0:.2f}" for count in tasks]
    return {
        "total": pool.tasks,
        "avg": f"{1 / len(tasks) if total else 0:.2f}",
        "all": ", ".join(shares),
        "raw": ", ".join(map(str, tasks)),
        "strategy": "fair",
        "inqueues": {
            "total": len(tasks),
            "active": sum(1 for child in children if child.link.writing),
        },
    }


def _autoscale_maximum() -> int:
    """Return the upper end of ``--autoscale``, which Celery does not tell the pool; 0 without it."""
    context = get_current_context(silent=True)
    autoscale = context.params.get("autoscale") if context is not None else None
    return max(autoscale) if autoscale else 0


def _exists(module: str) -> bool:
    """Whether a module, or the package that it is in, can be found.

    To look further would import the package, in the worker. If it lacks the module the forkserver says so.
    """
    package = module.partition(".")[0]
    try:
        with cwd_in_path():
            return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


upstream.set_banner_name(Pool, "memsafe_pool")
