"""Start a real `celery worker`, wait for it, measure it, and leave no process of it behind.

Every wait is bounded; one that runs out shows the end of the worker's log.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import processes
from broker import Lane

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

HERE = Path(__file__).resolve().parent


class Worker:
    """A worker process with its tree, as a context manager.

    `environment` is added to this process's own: BENCH_* variables choose what the app does (see `app`),
    MEMSAFE_* ones are our pool's settings.
    """

    def __init__(self, url: str, pool: str, concurrency: int, *options: str, **environment: object) -> None:
        self.lane = Lane(url)
        self.pool = pool
        self.name = f"{self.lane.prefix[:-1]}@localhost"
        self.folder = tempfile.TemporaryDirectory(prefix="bench-")
        self.log = Path(self.folder.name, "log")
        self._stamps = Path(self.folder.name, "stamps")
        self.command = [
            *(sys.executable, "-m", "celery", "-A", "app", "worker"),
            *("--pool", pool, "-c", str(concurrency), "-n", self.name, "-l", "warning", *options),
        ]
        self.environment = {
            **os.environ,
            "BENCH_BROKER": url,
            "BENCH_PREFIX": self.lane.prefix,
            "BENCH_STAMPS": str(self._stamps),
            **{name: str(value) for name, value in environment.items()},
        }
        self.process: subprocess.Popen[bytes] | None = None
        self.executed_at = 0.0

    def __enter__(self) -> Worker:  # noqa: PYI034  (typing.Self is of Python 3.11)
        with self.log.open("wb") as log:
            self.executed_at = time.monotonic()
            self.process = subprocess.Popen(
                self.command, cwd=HERE, env=self.environment, stdout=log, stderr=log, start_new_session=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        self.lane.close()
        self.folder.cleanup()

    @property
    def pid(self) -> int:
        """Return the worker's own pid."""
        assert self.process is not None, "the worker is not started"
        return self.process.pid

    def fail(self, why: str) -> RuntimeError:
        """Make an error that carries the end of the worker's log."""
        return RuntimeError(f"{self.pool}: {why}\n--- end of its log ---\n{self.log.read_text()[-4000:]}")

    def wait(self, what: str, condition: Callable[[], Any], timeout: float, interval: float = 0.01) -> None:
        """Wait until `condition()` is true; fail after `timeout` seconds, or when the worker has ended."""
        deadline = time.monotonic() + timeout
        while not condition():
            if self.process is None or self.process.poll() is not None:
                raise self.fail(f"the worker ended while waiting for: {what}")
            if time.monotonic() > deadline:
                raise self.fail(f"after {timeout:g} s still waiting for: {what}")
            time.sleep(interval)

    def ready(self, timeout: float = 60) -> float:
        """Wait until the worker answers `ping`; return the seconds from exec to the answer (+- 10 ms)."""
        self.wait("an answer to ping", lambda: self.lane.ping(self.name), timeout)
        return time.monotonic() - self.executed_at

    def stamps(self, event: str) -> list[dict[str, Any]]:
        """Read what the app's tasks stamped so far under this event."""
        if not self._stamps.exists():
            return []
        whole_lines = self._stamps.read_text().rpartition("\n")[0].splitlines()
        stamps = [json.loads(line) for line in whole_lines]
        return [stamp for stamp in stamps if stamp["event"] == event]

    def run(self, name: str, *args: object, count: int = 1, timeout: float = 60) -> dict[str, Any]:
        """Run `count` tasks of those that stamp "done", wait until as many more are done; return the last."""
        done = len(self.stamps("done")) + count
        self.lane.stage(name, *args, count=count)
        self.lane.release()
        self.wait(f"{count} {name}", lambda: len(self.stamps("done")) >= done, timeout)
        return self.stamps("done")[-1]

    def nap(self, count: int, seconds: float, timeout: float = 60) -> None:
        """Run `count` tasks that sleep, and wait until as many more are done."""
        self.run("nap", seconds, count=count, timeout=timeout)

    def noops(self, count: int, timeout: float = 120, in_flight: int = 0) -> float:
        """Run `count` no-op tasks, and return the CPU seconds that the whole tree spent on them.

        All at once, or with `in_flight` no more than so many at a time.
        """
        self.lane.stage("noop", count=count)
        before = processes.cpu_seconds(processes.tree(self.pid))
        if in_flight:
            self.lane.trickle(in_flight, timeout)
        else:
            self.lane.release()
        self.wait(f"{count} no-ops", lambda: self.lane.pending() == 0, timeout, interval=0.05)
        time.sleep(0.2)  # the last ones are accepted: let them end
        return processes.cpu_seconds(processes.tree(self.pid)) - before

    def stats(self) -> dict[str, Any]:
        """Return `inspect stats`' part about our pool."""
        return self.lane.stats(self.name)["pool"]["memsafe"]

    def pss_mb(self) -> float:
        """Measure proportional memory of the whole tree now, in MB (10^6 bytes)."""
        return processes.pss_bytes(processes.tree(self.pid)) / 1e6

    def stop(self, timeout: float = 15) -> None:
        """Warm shutdown; what is left of the tree after `timeout` seconds is killed."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                print(f"{self.pool}: no warm shutdown in {timeout:g} s, killed", file=sys.stderr)
        for pid in processes.tree(self.pid):
            if processes.is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(timeout)
        self.process = None
