"""Tasks ``hungry.steps`` from outside: how much memory each is to have, and when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .worker import Gate, Worker

MIB = 1 << 20


def memory(worker: Worker) -> dict[str, Any]:
    """What the worker says of its limit and what is used."""
    return dict(worker.stats()["pool"]["memsafe"]["memory"])


def headroom(worker: Worker) -> int:
    """MiB that tasks can have under the limit: what the pool has is as of now, the rest is a guess."""
    said = memory(worker)
    return int(said["limit"] - said["total"]) // MIB - 16


class Growth:
    """One such task, which has begun."""

    def __init__(self, worker: Worker, gate: Gate, name: str, task: str = "steps", **options: Any) -> None:
        self.worker, self.name, self.folder = worker, name, Path(gate.path)
        # So it is begun, whatever tasks of its name have needed before.
        options.setdefault("headers", {"memsafe_memory": "1MiB"})
        self.result = worker.call(f"hungry.{task}", gate.path, name, **options)
        self.id = self.result.id
        worker.until(self._file("started").exists, f"the task {name} to begin")

    @property
    def pid(self) -> int:
        """The child that runs it, or that ran it last."""
        return int(self._file("started").read_text())

    def _file(self, kind: str) -> Path:
        return self.folder / f"{self.name}.{kind}"

    def want(self, mib: int, pace: float = 0.01) -> None:
        """Have it grow to so many MiB, with so many seconds for each."""
        new = self._file("wanted")
        new.write_text(f"{mib} {pace}")
        new.replace(self._file("want"))

    def has(self, mib: int) -> bool:
        """Whether it has so many MiB."""
        has = self._file("has")
        return has.exists() and int(has.read_text()) >= mib

    def wait_has(self, mib: int) -> None:
        self.worker.until(lambda: self.has(mib), f"the task {self.name} to have {mib} MiB")

    def open(self) -> None:
        """Let it end."""
        self._file("open").touch()

    def end(self) -> Any:
        """Let it end, and return its result."""
        self.open()
        return self.worker.get(self.result)

    @property
    def row(self) -> dict[str, Any] | None:
        """Its row in the table of ``inspect stats``."""
        rows = self.worker.stats()["pool"]["memsafe"]["table"]
        return next((row for row in rows if row["task_id"] == self.id), None)

    def is_paused(self) -> bool:
        """Whether the worker says so."""
        row = self.row
        return row is not None and row["state"] == "paused"
