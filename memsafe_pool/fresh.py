"""A fresh interpreter that imports the app: a spawned child, or a forkserver.

The worker leaves what this process has to know as one pickled :class:`Order` in a file
without a name, inherited next to the socket. The app itself is never pickled: it is imported by the name that
``-A`` gave, so that every signal handler and task class of its module is here too, and
a configuration with a lock or a lambda in it is no obstacle.

Functions say so where they run in the worker; everything else runs in the new process.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import machinery
from multiprocessing import spawn
from types import ModuleType
from typing import IO, TYPE_CHECKING, Any, NoReturn

from celery.app.utils import find_app as find_app_by_argument
from celery.utils.imports import import_from_cwd

from memsafe_pool import child, forkserver, upstream

if TYPE_CHECKING:
    import click

__all__ = ["AppName", "Order", "find_app", "main", "preparation", "start"]


@dataclass(frozen=True)
class AppName:
    """Where a fresh interpreter finds the app.

    Attributes:
        argument: What ``-A`` named, or None.
        module: Else the module that has the app as an attribute; ``__main__`` for the
            script that was run.
        attribute: Name of that attribute.
    """

    argument: str | None = None
    module: str = ""
    attribute: str = ""


@dataclass(frozen=True)
class Order:
    """What a fresh interpreter has to know.

    Attributes:
        role: Be a child of these terms, or a forkserver in this role.
        app: Where the app is.
        preparation: Module search path, arguments, folder, as multiprocessing passes them on.
        includes: Further modules with tasks that the worker has imported.
        config: Configuration that was changed at run time, each value pickled by itself.
    """

    role: child.Terms | forkserver.Role
    app: AppName
    preparation: dict[str, Any]
    includes: tuple[str, ...]
    config: Mapping[str, bytes]


def find_app(app: Any) -> AppName | None:
    """Return where a fresh interpreter can import this app from, or None. Runs in the worker."""
    import click

    context = click.get_current_context(silent=True)
    if context is not None and (argument := _app_argument(context.find_root())):
        return AppName(argument=argument)
    app = upstream.unproxied(app)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in {"celery", "memsafe_pool"} or not isinstance(module, ModuleType):
            continue
        for attribute, value in list(vars(module).items()):
            if upstream.unproxied(value) is app and _can_be_imported(name, module):
                return AppName(module=name, attribute=attribute)
    return None


def _app_argument(root: click.Context) -> str | None:
    """Return what ``-A`` or the environment named, or None."""
    from click import UsageError
    from click.core import ParameterSource

    value = root.params.get("app")
    given = root.get_parameter_source("app") in {ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT}
    if given and not isinstance(value, str):
        # Before Celery 5.5 it is the app itself by now, so what was named is read once more.
        option = next(param for param in root.command.params if param.name == "app")
        try:
            named, _, _ = root.command.make_parser(root).parse_args(sys.argv[1:])
        except UsageError:
            return None  # the command's arguments were others, as with worker_main
        value, _ = option.consume_value(root, named)
    return value if isinstance(value, str) else None


def preparation(app: AppName) -> dict[str, Any]:
    """Return what multiprocessing's ``prepare`` makes of a fresh interpreter. Runs in the worker."""
    data: dict[str, Any] = {"sys_path": list(sys.path), "sys_argv": list(sys.argv), "dir": os.getcwd()}
    if app.module == "__main__":
        main_module = sys.modules["__main__"]
        if main_module.__spec__ is not None:
            data["init_main_from_name"] = main_module.__spec__.name
        else:
            data["init_main_from_path"] = main_module.__file__
    return data


def _can_be_imported(name: str, module: ModuleType) -> bool:
    if name == "__main__":
        return getattr(module, "__spec__", None) is not None or hasattr(module, "__file__")
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError, AttributeError):
        return False


def start(sock: socket.socket, order: Order, env: Mapping[str, str]) -> int:
    """Start a fresh interpreter with ``sock`` and an order; return its pid. Runs in the worker.

    Raises:
        OSError: The interpreter could not be started.
    """
    # The interpreter's own flags matter (-I, -W, -X): multiprocessing keeps them, and so do we.
    line = spawn.get_command_line()
    flags = line[: line.index("-c")]
    with _nameless_file() as file:
        # A file, because a pipe would block the worker when the order is large.
        pickle.dump(order, file)
        file.seek(0)
        fds = sock.fileno(), file.fileno()
        code = f"from memsafe_pool.fresh import main; main{fds}"
        process = subprocess.Popen(
            [sys.executable, *flags[1:], "-c", code],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **env},
        )
    # The engine reaps it; without this, Popen would want to as well, and warn.
    process.returncode = 0
    return process.pid


def _nameless_file() -> IO[bytes]:
    """Return a file in memory, or else on disk: there need not be a folder that can be written to.

    Raises:
        OSError: Neither is possible.
    """
    try:
        return os.fdopen(os.memfd_create("memsafe-order"), "w+b")
    except (AttributeError, OSError):  # not on this platform, or forbidden
        return tempfile.TemporaryFile()


def main(sock_fd: int, order_fd: int) -> NoReturn:
    """Run a fresh interpreter: read the order, import the app, fill the role."""
    sock = socket.socket(fileno=sock_fd)
    sock.set_inheritable(False)  # it had to be, to come here; what tasks start must not have it
    with open(order_fd, "rb") as file:
        order: Order = pickle.load(file)
    if isinstance(order.role, child.Terms):
        _be_child(sock, order, order.role)
    _be_forkserver(sock, order, order.role)


def _be_child(sock: socket.socket, order: Order, terms: child.Terms) -> NoReturn:
    child.tie_to_parent(terms.worker_pid)
    try:
        upstream.become_child(terms.name, terms.index, terms.worker_pid)
        app = _import_app(order)
        upstream.prepare_app(app, terms.hostname, fresh=True)
        # What its handlers load for children that are forked is not here yet.
        upstream.send_before_create_process(terms.hostname)
    except BaseException:  # noqa: BLE001 - the worker logs it and decides
        child.send_failure(sock)
        os._exit(1)
    child.run(app, sock, terms)


def _be_forkserver(sock: socket.socket, order: Order, role: forkserver.Role) -> NoReturn:
    forkserver.settle(role)
    watch = _ImportWatch()
    try:
        with watch:
            app = _import_app(order)
            forkserver.preload(role)
    except BaseException:  # noqa: BLE001 - the worker logs it and decides
        forkserver.send_failure(sock)
        os._exit(1)
    forkserver.serve(app, role, sock, fresh=True, blame=watch.blame)


def _import_app(order: Order) -> Any:
    spawn.prepare(order.preparation)
    name = order.app
    if name.argument is not None:
        app = find_app_by_argument(name.argument)
    else:
        app = upstream.unproxied(getattr(_import(name.module), name.attribute))
    for key, value in order.config.items():
        app.conf[key] = pickle.loads(value)
    app.set_current()
    app.loader.init_worker()  # the modules Celery imports by itself; Django is set up before them
    upstream.install_django_fixup(app)
    for module in order.includes:
        _import(module)
    return app


def _import(name: str) -> ModuleType:
    # As Celery does: from the current folder, which need not be on the path.
    module: ModuleType = import_from_cwd(name)
    return module


class _ImportWatch:
    """Notices which module's import starts threads, while it is entered."""

    _LOADERS = (machinery.SourceFileLoader, machinery.SourcelessFileLoader, machinery.ExtensionFileLoader)

    def __init__(self) -> None:
        self._starters: dict[int, str] = {}

    def __enter__(self) -> None:
        for loader in self._LOADERS:
            loader.exec_module = self._watched(loader.exec_module)  # type: ignore[method-assign]

    def __exit__(self, *exc_info: object) -> None:
        for loader in self._LOADERS:
            original = loader.exec_module.original  # type: ignore[attr-defined]
            loader.exec_module = original  # type: ignore[method-assign]

    def blame(self, tids: Collection[int]) -> str:
        """Return the names of the modules that started these threads; all where none is given."""
        starters = self._starters.items()
        return ", ".join(dict.fromkeys(name for tid, name in starters if not tids or tid in tids))

    def _watched(self, exec_module: Callable[..., None]) -> Callable[..., None]:
        def watched(loader: Any, module: ModuleType) -> None:
            before = forkserver.thread_ids()
            try:
                exec_module(loader, module)
            finally:
                # What modules imported by this one have started is theirs, not its.
                for tid in forkserver.thread_ids() - before:
                    self._starters.setdefault(tid, module.__name__)

        watched.original = exec_module  # type: ignore[attr-defined]
        return watched
