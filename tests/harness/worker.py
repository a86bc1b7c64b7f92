"""Run the real ``celery worker`` command and talk to it.

A worker runs in an empty folder, in a session of its own, with its output in a log file.  The project
module it serves (``tests/projects``) takes its Celery settings from the JSON in ``TEST_CONFIG``.  Every
process of the worker carries a tag in its environment: that is how its tree is found, also the parts that
were adopted by somebody else.

``MEMSAFE_TEST_POOL`` names another pool to run the tests on, such as ``prefork``.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import kombu.pools
import psutil
from celery import Celery
from celery.canvas import Signature
from celery.exceptions import TimeoutError as CeleryTimeoutError
from celery.result import AsyncResult

from .brokers import Broker
from .waiting import DEADLINE, SLOWNESS, DeadlineMissed, until

T = TypeVar("T")

POOL = os.environ.get("MEMSAFE_TEST_POOL", "memsafe_pool:Pool")

#: Do the tests run on this project's pool (and not, for comparison, on one of Celery's own)?
OURS = POOL.startswith("memsafe")

PROJECTS = Path(__file__).parent.parent / "projects"

_TAG = "TEST_WORKER_TAG"

#: Characters of the log that a failure shows.
LOG_TAIL = 12_000


def _end_with_parent() -> None:
    """In the new process: be killed when the test process ends without having stopped us."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class WorkerGone(AssertionError):
    """The worker ended, or would not end, against the test's expectation."""


class Worker:
    """One run of the ``celery worker`` command; see the fixture ``start_worker`` for the arguments."""

    def __init__(
        self,
        folder: Path,
        broker: Broker,
        module: str = "proj",
        config: dict[str, Any] | None = None,
        arguments: Sequence[str] = (),
        *,
        concurrency: int = 2,
        pool: str | None = POOL,
        env: dict[str, str] | None = None,
        loglevel: str = "INFO",
        command: Sequence[str] | None = None,
    ) -> None:
        self.folder, self.broker = folder, broker
        self.config = {**broker.config, **(config or {})}
        name = broker.name + folder.parent.name  # several workers may share a broker
        self.tag = f"{os.getpid()}-{name}"
        self.hostname = f"{name}@localhost"
        self.log_path = folder.with_name(f"{folder.name}.log")
        self.temporary = folder.with_name(f"{folder.name}-tmp")
        self.gates = folder.with_name(f"{folder.name}-gates")
        folder.mkdir()
        self.temporary.mkdir()
        self.gates.mkdir()
        pool_option = [] if pool is None else ["--pool", pool]
        self.command = list(command) if command is not None else [
            sys.executable, "-m", "celery", "-A", module, "worker", *pool_option, "-c", str(concurrency),
            "-n", self.hostname, "-l", loglevel, "--without-mingle", *arguments,
        ]  # fmt: skip
        self.env = self._environment(env or {})
        self.process: subprocess.Popen[bytes] | None = None
        self._app: Celery | None = None
        # Up to Celery 5.4 a result that is collected while another one is waited for can lock up the client.
        self._results: list[AsyncResult] = []
        self._gate_count = 0
        self._ended_on_purpose = False

    def _environment(self, extra: dict[str, str]) -> dict[str, str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("CELERY", "MEMSAFE_", "PYTEST_", "FORKED_BY_MULTIPROCESSING", "TEST_"))
        }
        path = [str(PROJECTS), *filter(None, [inherited.get("PYTHONPATH")])]
        return {
            **inherited,
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "TMPDIR": str(self.temporary),
            "TEST_CONFIG": json.dumps(self.config),
            _TAG: self.tag,
            **extra,
        }

    def hide_extension(self) -> None:
        """Keep the C helper from every interpreter of the worker; before it is started."""
        folder = Path(__file__).parent / "no_extension"
        self.env["PYTHONPATH"] = os.pathsep.join([str(folder), self.env["PYTHONPATH"]])

    # Life

    def start(self, *, ready: bool = True) -> Worker:
        """Run the command; with ``ready``, return when the worker says that it is ready."""
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent if sys.platform == "linux" else None,  # noqa: PLW1509 - one C call
            )
        if ready:
            self.wait_for_log(r"\S+@\S+ ready\.")
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None, "the worker was not started"
        return self.process.pid

    @property
    def exitcode(self) -> int | None:
        """Exit status of the command (negative: the signal that ended it); None while it runs."""
        assert self.process is not None, "the worker was not started"
        return self.process.poll()

    def pids(self) -> set[int]:
        """Every living process of the worker: itself, children, forkserver, and what they started."""
        found = set()
        for process in psutil.process_iter():
            try:
                if process.environ().get(_TAG) == self.tag:
                    found.add(process.pid)
            except (psutil.Error, OSError):
                continue
        if self.process is not None and self.process.poll() is None:
            found.add(self.process.pid)
            try:
                found.update(child.pid for child in psutil.Process(self.process.pid).children(recursive=True))
            except psutil.NoSuchProcess:
                pass  # ended since: what it leaves behind was found by the tag
        return found

    def signal(self, number: signal.Signals | int) -> None:
        """Send a signal to the worker process alone."""
        os.kill(self.pid, number)

    def wait_exit(self, timeout: float = DEADLINE) -> int:
        """Wait for the command to end by itself and return its exit status."""
        assert self.process is not None, "the worker was not started"
        self._ended_on_purpose = True
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise WorkerGone(f"the worker did not end within {timeout:g} s") from None

    def stop(self, timeout: float = DEADLINE) -> int:
        """Ask the worker to end (warm shutdown) and return its exit status; kill one that will not."""
        assert self.process is not None, "the worker was not started"
        self._ended_on_purpose = True
        self.disconnect()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._kill()
            raise WorkerGone(f"the worker did not stop within {timeout:g} s") from None

    def close(self) -> None:
        """End of the test: stop the worker and check that it left nothing behind."""
        if self.process is None:
            return
        ended_before = self.process.poll()
        try:
            if ended_before is None:
                self.open_all_gates()
                self.stop()
            elif not self._ended_on_purpose:
                raise WorkerGone(f"the worker ended by itself with {ended_before}")
            self._check_nothing_left()
        finally:
            self.disconnect()
            self._kill()

    def _check_nothing_left(self) -> None:
        until(lambda: not self.pids(), f"the worker's processes to end, of {sorted(self.pids())}")
        left = sorted(str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*"))
        assert not left, f"the worker left temporary files behind: {left}"

    def _kill(self) -> None:
        """Kill what is left of the worker's own tree, after asking Python for tracebacks in the log."""
        left = self.pids()
        if self.process is not None and self.process.poll() is None:
            before = len(self.log())
            self.process.send_signal(signal.SIGUSR1)  # Celery writes the stack of every thread to the log
            try:
                until(lambda: len(self.log()) > before, "stacks", timeout=2 * SLOWNESS)
            except AssertionError:
                pass  # it cannot even do that; the log says what it can
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if self.process is not None and left:
            self.process.wait(DEADLINE)

    # Log

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def log_tail(self) -> str:
        text = self.log()
        return f"--- log of {self.hostname} ---\n{text[-LOG_TAIL:]}"

    def wait_for_log(self, pattern: str, timeout: float = DEADLINE, *, count: int = 1) -> re.Match[str]:
        """Wait until the log has ``count`` matches of the pattern; return the last of them."""
        regex = re.compile(pattern)

        def found() -> re.Match[str] | bool:
            over = self.exitcode is not None
            matches = list(regex.finditer(self.log()))
            return matches[count - 1] if len(matches) >= count else over

        match = until(found, f"a log line {pattern!r} ({count})", timeout)
        if isinstance(match, bool):
            raise WorkerGone(f"ended with {self.exitcode}, without a log line {pattern!r}")
        return match

    # Tasks

    @property
    def app(self) -> Celery:
        """A client for this worker; dropped, with all its connections, after each test."""
        if self._app is None:
            self._app = Celery("client", set_as_current=False)
            self._app.conf.update(self.config)
        return self._app

    def disconnect(self) -> None:
        """Close every connection of the client."""
        app, self._app = self._app, None
        if app is None:
            return
        consumer = getattr(app.backend, "result_consumer", None)
        if consumer is not None:
            consumer.stop()
            if getattr(consumer, "_pubsub", None) is not None:
                consumer._pubsub.close()
                consumer._pubsub = None  # results that are collected later would open it again to unsubscribe
        if "client" in vars(app.backend):
            app.backend.client.close()
            app.backend.client.connection_pool.disconnect()
        app.close()
        self._results.clear()
        kombu.pools.reset()  # kombu's pools are shared by all apps of a process
        self.broker.disconnect()

    def call(self, task: str, *args: Any, **options: Any) -> AsyncResult:
        """Send a task of the project module by its name; options are those of ``apply_async``."""
        result = self.app.send_task(task, args, **options)
        self._results.append(result)
        return result

    def signature(self, task: str, *args: Any, **options: Any) -> Signature:
        return self.app.signature(task, args=args, **options)

    def run(self, task: str, *args: Any, **options: Any) -> Any:
        """Send a task and return its result, or raise what it raised."""
        return self.get(self.call(task, *args, **options))

    def get(self, result: AsyncResult, timeout: float = DEADLINE, *, propagate: bool = True) -> Any:
        """The result of a task, or what it raised; fails when nothing arrives or the worker ended."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                return result.get(min(2.0, timeout), propagate=propagate, disable_sync_subtasks=False)
            except CeleryTimeoutError:
                if self.exitcode is not None:
                    raise WorkerGone(f"ended with {self.exitcode}, no result") from None
                if time.monotonic() > deadline:
                    raise DeadlineMissed(f"no result within {timeout:g} s") from None

    def gate(self) -> Gate:
        """A gate for tasks ``proj.hold``: they say that they started and wait until it opens."""
        self._gate_count += 1
        folder = self.gates / str(self._gate_count)
        folder.mkdir()
        return Gate(self, folder)

    def open_all_gates(self) -> None:
        for folder in self.gates.iterdir():
            (folder / "open").touch()

    # Remote control

    def inspect(self, method: str, *args: Any, timeout: float = DEADLINE / 2, **options: Any) -> Any:
        """This worker's own answer to ``celery inspect``, such as ``inspect("active")``.

        Asked again every few seconds: on Redis a worker says that it is ready a moment before it can hear.
        """
        inspector = self.app.control.inspect(destination=[self.hostname], timeout=min(5 * SLOWNESS, timeout))
        deadline = time.monotonic() + timeout
        while not (answers := getattr(inspector, method)(*args, **options)):
            if self.exitcode is not None or time.monotonic() > deadline:
                raise WorkerGone(
                    f"no answer to inspect {method} within {timeout:g} s, exit code {self.exitcode}"
                )
        return answers[self.hostname]

    def control(self, command: str, *, timeout: float = DEADLINE / 2, **arguments: Any) -> Any:
        """Send a remote control command and return this worker's answer."""
        self.inspect("ping", timeout=timeout)  # it hears; the command itself must not be sent twice
        answers = self.app.control.broadcast(
            command, arguments=arguments, destination=[self.hostname], reply=True, timeout=timeout, limit=1
        )
        if not answers:
            raise WorkerGone(f"no answer to control {command} within {timeout:g} s")
        return answers[0][self.hostname]

    def stats(self) -> dict[str, Any]:
        return dict(self.inspect("stats"))

    def children(self) -> list[int]:
        """The pool's children, as ``inspect stats`` lists them."""
        return list(self.stats()["pool"]["processes"])

    def until(self, condition: Callable[[], T], what: str, timeout: float = DEADLINE) -> T:
        """Wait for a condition of the worker."""
        return until(condition, what, timeout)

    @contextmanager
    def events(self) -> Iterator[Events]:
        """Collect the events the worker sends while the block runs (the worker needs ``-E``)."""
        events = Events(self)
        events.start()
        try:
            yield events
        finally:
            events.stop()


class Gate:
    """Tasks ``proj.hold(gate.path)`` stop at the gate until the test opens it."""

    def __init__(self, worker: Worker, folder: Path) -> None:
        self.worker, self.folder, self.path = worker, folder, str(folder)

    def started(self) -> dict[str, int]:
        """Ids of the tasks that have reached the gate, with their children's pids; a repeated run is one."""
        return {
            path.stem: int(path.read_text()) for path in self.folder.glob("*.started") if path.stat().st_size
        }

    def wait_started(self, count: int = 1, timeout: float = DEADLINE) -> dict[str, int]:
        """Wait until this many tasks have reached the gate."""
        self.worker.until(lambda: len(self.started()) >= count, f"{count} tasks at the gate", timeout)
        return self.started()

    def open(self) -> None:
        (self.folder / "open").touch()


class Events:
    """Events of one worker, read in a thread."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.seen: list[dict[str, Any]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read, name="events", daemon=True)

    def start(self) -> None:
        app = self.worker.app  # made before the thread asks for it, too
        self._thread.start()
        with app.events.default_dispatcher() as dispatcher:

            def arrives() -> bool:
                dispatcher.send("test-subscribed")
                return bool(self.seen)

            # Redis subscribes at the first poll, some time after the consumer says that it is there.
            until(arrives, "events to arrive", every=0.1)

    def stop(self) -> None:
        self._over.set()
        self._thread.join(DEADLINE)

    def _read(self) -> None:
        with self.worker.app.connection_for_read() as connection:
            receiver = self.worker.app.events.Receiver(connection, handlers={"*": self.seen.append})
            with receiver.consumer_context() as (own_connection, _, _):
                while not self._over.is_set():
                    try:
                        own_connection.drain_events(timeout=0.2)
                    except TimeoutError:
                        continue

    def kinds(self, task_id: str) -> list[str]:
        """Types of the events about this task so far, as they came."""
        return [event["type"] for event in list(self.seen) if event.get("uuid") == task_id]

    def wait_for(self, kind: str, task_id: str | None = None, timeout: float = DEADLINE) -> dict[str, Any]:
        """Wait for an event of this type, such as ``task-started``, about this task."""

        def found() -> dict[str, Any] | None:
            for event in list(self.seen):
                if event["type"] == kind and task_id in (None, event.get("uuid")):
                    return event
            return None

        event = self.worker.until(found, f"the event {kind} of {task_id}, of {len(self.seen)}", timeout)
        assert event is not None
        return event
