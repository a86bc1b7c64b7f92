"""Ways to start a child, seen from the worker: one class each, of the same shape.

``start`` takes the worker's record of the child and the child's end of the socket pair,
which it closes in the worker. It reports to the engine: :meth:`Owner.started` with the
pid, or :meth:`Owner.start_failed`. It may do so later, and does for the forkserver.

Everything here runs in the worker, except the few lines after a ``fork``.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from celery.utils.log import get_logger

from memsafe_pool import child as child_side
from memsafe_pool import forkserver, fresh, scarcity, upstream

if TYPE_CHECKING:
    from memsafe_pool.fleet import Child

__all__ = ["Fork", "Origin", "Owner", "Spawn", "StartMethod"]

logger = get_logger(__name__)


class Owner(Protocol):
    """What a start method needs of the engine."""

    hub: Any
    post: Callable[..., None]

    def started(self, child: Child, pid: int) -> None:
        """Say that a child has this pid."""

    def start_failed(self, child: Child, reason: str, *, shortage: bool = False) -> None:
        """Say that no process came to be, and why; ``shortage``: because the system had no room for it."""

    def start_withdrawn(self, child: Child) -> None:
        """Forget a child that was asked for, as nobody knows whether it came to be."""

    def fall_back(self, why: str, waiting: Sequence[tuple[Child, socket.socket]]) -> None:
        """Start children by spawn from now on, these first."""

    def pids(self) -> Sequence[int]:
        """Return the pids of all children."""


@dataclass(frozen=True)
class Origin:
    """What children come from.

    Attributes:
        app: The Celery app.
        terms: What all children have in common.
        app_name: Where a fresh interpreter finds the app, or None if it can not.
        preload: Modules to import where children are forked from.
        child_env: Environment variables of the children.
        descriptors: What was open when the pool began, and may be shared with children.
    """

    app: Any
    terms: child_side.Terms
    app_name: fresh.AppName | None
    preload: tuple[str, ...]
    child_env: Mapping[str, str]
    descriptors: forkserver.Descriptors

    def tell_what_is_missing(self) -> None:
        """Say once which handlers have made state that a fresh interpreter does not have.

        They are not called again: many open a port, start a thread, send a task or clean up.
        """
        if handlers := upstream.start_handlers(self.terms.hostname):
            _tell_what_is_missing(self.terms.hostname, ", ".join(handlers))

    def start_interpreter(self, sock: socket.socket, role: child_side.Terms | forkserver.Role) -> int:
        """Start a fresh interpreter in this role, with the app as it is now; return its pid.

        Raises:
            OSError: The interpreter could not be started.
        """
        if self.app_name is None:
            raise RuntimeError("the app can not be imported by a fresh interpreter")
        order = fresh.Order(
            role=role,
            app=self.app_name,
            preparation=fresh.preparation(self.app_name),
            includes=_task_modules(self.app),
            config=upstream.config_changes(self.app),
        )
        return fresh.start(sock, order, self.child_env)


@cache
def _tell_what_is_missing(hostname: str, handlers: str) -> None:  # the host name: once for each worker
    logger.warning(
        "Children are fresh interpreters, and lack what these handlers made in the worker: %s. "
        "If tasks need it, connect them to worker_process_init as well.",
        handlers,
    )


def _task_modules(app: Any) -> tuple[str, ...]:
    modules = {type(task).__module__ for task in app.tasks.values()} | set(app.conf.include)
    return tuple(
        sorted(name for name in modules if name != "__main__" and name.partition(".")[0] != "celery")
    )


class StartMethod(Protocol):
    """One way to start children."""

    name: str
    process_name: str

    def begin(self) -> None:
        """Get ready; called once, when the pool starts."""

    def attach(self) -> None:
        """Register with the owner's event loop, which is new."""

    def start(self, child: Child, sock: socket.socket) -> None:
        """Start a child that has ``sock``."""

    def catch_up(self) -> None:
        """Take note of what has become of children until now."""

    def tick(self, now: float) -> None:
        """Do what is due; called about once a second."""

    def give_up(self, child: Child) -> None:
        """Take note that ``child`` has not come to be in time, and nobody knows why."""

    def renew(self) -> None:
        """Forget the code that is loaded; children started from now on have it new."""

    def stop(self) -> None:
        """Begin to end; no more children will be asked for."""

    @property
    def stopped(self) -> bool:
        """Whether nothing is left of it."""


class _WithoutServer:
    """What the methods that start a child at once have in common."""

    def __init__(self, owner: Owner, origin: Origin) -> None:
        self.owner = owner
        self.origin = origin

    def begin(self) -> None: ...
    def attach(self) -> None: ...
    def catch_up(self) -> None: ...
    def tick(self, now: float) -> None: ...
    def give_up(self, child: Child) -> None: ...
    def renew(self) -> None: ...
    def stop(self) -> None: ...

    @property
    def stopped(self) -> bool:
        return True


class Spawn(_WithoutServer):
    """A fresh interpreter for each child."""

    name = "spawn"
    process_name = "SpawnPoolWorker"

    def __init__(self, owner: Owner, origin: Origin) -> None:
        super().__init__(owner, origin)
        origin.tell_what_is_missing()

    def start(self, child: Child, sock: socket.socket) -> None:
        """Start an interpreter that has ``sock``."""
        terms = replace(self.origin.terms, name=child.name, index=child.index)
        upstream.send_before_create_process(terms.hostname)  # as Celery does with its own spawn
        with sock:
            try:
                pid = self.origin.start_interpreter(sock, terms)
            except OSError as exc:
                return self.owner.start_failed(
                    child, f"could not start {sys.executable}: {exc}", shortage=scarcity.is_shortage(exc)
                )
        return self.owner.started(child, pid)


class Fork(_WithoutServer):
    """A fork of the worker for each child, as prefork does it."""

    name = "fork"
    process_name = "ForkPoolWorker"

    def start(self, child: Child, sock: socket.socket) -> None:
        """Fork a child that has ``sock``."""
        upstream.send_before_create_process(self.origin.terms.hostname)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        try:
            pid = os.fork()
        except OSError as exc:
            sock.close()
            shortage = scarcity.is_shortage(exc)
            return self.owner.start_failed(child, f"could not fork: {exc}", shortage=shortage)
        if pid == 0:
            self._be_child(child, sock)
        sock.close()
        return self.owner.started(child, pid)

    def _be_child(self, child: Child, sock: socket.socket) -> None:
        try:
            gc.freeze()  # a collection here would write to, and so copy, all that the worker has
            forkserver.cut_off(self.origin.descriptors, sock.fileno())
            terms = replace(self.origin.terms, name=child.name, index=child.index)
            upstream.become_child(terms.name, terms.index, terms.worker_pid)
            upstream.build_tracers(self.origin.app, terms.hostname)
            upstream.prepare_app(self.origin.app, terms.hostname, fresh=False)
            child_side.run(self.origin.app, sock, terms)
        except BaseException:  # noqa: BLE001 - the worker logs it
            child_side.send_failure(sock)
        finally:
            os._exit(1)
