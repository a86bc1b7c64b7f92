"""The app of the measured workers: it imports numpy and pandas, as a data team's worker does.

What else it does at import is chosen by environment variables, so that every worker here runs with `-A app`:

    BENCH_BROKER, BENCH_PREFIX   the Redis database and this worker's own key prefix in it
    BENCH_IMPORTS                modules to import besides, such as pyarrow
    BENCH_MODEL_MB               load a numpy array of that size at import
    BENCH_IMPORT_SECONDS         take that long to import
    BENCH_IMPORT_STYLE           "busy": burn CPU for that long, instead of sleeping
    BENCH_STAMPS                 file to which tasks append when they ran, one JSON object per line
    BENCH_RECEIVED               also stamp when the worker received each task
    BENCH_START_METHOD           `worker_pool_start_method`, for stock prefork
    BENCH_POOL_RESTARTS          allow `pool_restart`
    BENCH_REAL                   have the tasks of `real_work`
    BENCH_METER                  a file for what tasks cost with and without a report, see `no_meter`
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import pandas as pd  # noqa: F401  (imported for its weight)
from celery import Celery, signals

_began = {"started": time.monotonic(), "initialized": 0.0}  # this process, and its process_init
_stamps = os.environ.get("BENCH_STAMPS")

app = Celery("app", broker=os.environ["BENCH_BROKER"])
app.conf.update(
    task_default_queue="bench",
    task_ignore_result=True,
    broker_transport_options={"global_keyprefix": os.environ["BENCH_PREFIX"]},
    broker_connection_retry_on_startup=True,
    worker_pool_start_method=os.environ.get("BENCH_START_METHOD", "fork"),
    worker_pool_restarts=bool(os.environ.get("BENCH_POOL_RESTARTS")),
)

for _module in os.environ.get("BENCH_IMPORTS", "").split():
    importlib.import_module(_module)

_import_seconds = float(os.environ.get("BENCH_IMPORT_SECONDS", "0"))
if os.environ.get("BENCH_IMPORT_STYLE") == "busy":
    _until = time.process_time() + _import_seconds
    while time.process_time() < _until:
        sum(range(1000))
else:
    time.sleep(_import_seconds)

_model = np.ones(int(os.environ.get("BENCH_MODEL_MB", "0")) * 1024 * 1024 // 8)


def _stamp(**fields: Any) -> None:
    """Append one line; a single write to a file opened with O_APPEND is not torn."""
    if _stamps is None:
        return
    file = os.open(_stamps, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(file, json.dumps({"pid": os.getpid(), **fields}).encode() + b"\n")
    os.close(file)


def _forked() -> None:
    _began["started"] = time.monotonic()


os.register_at_fork(after_in_child=_forked)


@signals.worker_process_init.connect
def _process_init(**_: Any) -> None:
    _began["initialized"] = time.monotonic()


if os.environ.get("BENCH_RECEIVED"):

    @signals.task_received.connect
    def _received(request: Any, **_: Any) -> None:
        at = time.monotonic()
        _stamp(event="received", id=request.id, at=at)


@signals.task_failure.connect
def _failed(task_id: str, exception: BaseException, **_: Any) -> None:
    """In the child that raised; in the worker when the child was lost, and it is final."""
    _stamp(event="failed", id=task_id, at=time.monotonic(), error=type(exception).__name__)


if _rounds := os.environ.get("BENCH_METER"):
    import no_meter

    no_meter.install(_rounds)


if os.environ.get("BENCH_REAL"):
    import real_tasks

    @app.task(name="real", bind=True)
    def real(self: Any, kind: str, share: float = 1.0) -> None:
        """Do real work; stamp CPU seconds and page faults of this process before and after."""
        faults, cpu = getrusage(RUSAGE_SELF).ru_minflt, time.process_time()
        real_tasks.work(kind, share)
        after = {"faults": getrusage(RUSAGE_SELF).ru_minflt, "cpu": time.process_time()}
        _stamp(event="done", id=self.request.id, faults_before=faults, cpu_before=cpu, **after)


@app.task(name="noop")
def noop() -> None:
    """Do nothing."""


@app.task(name="nap", bind=True)
def nap(self: Any, seconds: float) -> None:
    """Read the model, then sleep; stamp when the task began, when its process did, and when it was done."""
    at = time.monotonic()
    _stamp(event="begun", id=self.request.id, at=at, **_began)
    _model.sum()
    time.sleep(seconds)
    _stamp(event="done", id=self.request.id, at=time.monotonic())


# Tasks that need memory. "done" is stamped while they have it, with the bytes that they asked for.


def _done(task: Any, asked_bytes: int, seconds: float = 0.0) -> None:
    time.sleep(seconds)
    _stamp(event="done", id=task.request.id, bytes=asked_bytes)


def _block_bytes(value: object) -> int:
    """What the allocator takes for an object: Python's up to 512 bytes, then malloc's, whose head is 8."""
    size = sys.getsizeof(value)
    return (size + (0 if size <= 512 else 8) + 15) // 16 * 16


@app.task(name="take_bytearray", bind=True)
def take_bytearray(self: Any, size: int, seconds: float = 0.0) -> None:
    """Have one block of `size` bytes, written to."""
    block = bytearray(size)
    _done(self, len(block), seconds)


@app.task(name="take_numpy", bind=True)
def take_numpy(self: Any, size: int, seconds: float = 0.0) -> None:
    """Have an array of `size` bytes, written to."""
    array = np.ones(size // 8)
    _done(self, array.nbytes, seconds)


def _objects(size: int, length: int) -> tuple[list[Any], int]:
    """Make byte strings of that length, `size` bytes with their list; and how much it is exactly."""
    each = _block_bytes(bytes(length))
    objects: list[Any] = [None] * (size // (each + 8))
    for index in range(len(objects)):
        objects[index] = bytes(length)
    return objects, len(objects) * each + sys.getsizeof(objects)


@app.task(name="take_malloced", bind=True)
def take_malloced(self: Any, size: int, seconds: float = 0.0) -> None:
    """Have objects that are large enough to come from malloc, but in blocks of less than a page."""
    objects, asked_bytes = _objects(size, 700)
    _done(self, asked_bytes, seconds)
    del objects


@app.task(name="take_small", bind=True)
def take_small(self: Any, size: int, seconds: float = 0.0) -> None:
    """Have objects that live in Python's own arenas."""
    objects, asked_bytes = _objects(size, 100)
    _done(self, asked_bytes, seconds)
    del objects


_kept: deque[Any] = deque()


@app.task(name="fragment", bind=True)
def fragment(self: Any, count: int, length: int, most: int, scattered: bool) -> None:
    """Make `count` byte strings, keep each hundredth or the last 1 %, of `most` tasks."""
    objects = [bytes(length) for _ in range(count)]
    _kept.append(objects[::100] if scattered else objects[-count // 100 :])
    while len(_kept) > most:
        _kept.popleft()
    _done(self, sum(map(_block_bytes, objects)))


_cache: deque[bytes] = deque(maxlen=20)


@app.task(name="cache", bind=True)
def cache(self: Any, size: int) -> None:
    """Keep one block more, until there are 20."""
    _cache.append(b"x" * size)
    _done(self, size)


# Tasks for workers in small containers. "begun" is stamped at each try, "done" when it was held long enough.


def _touched(size: int) -> np.ndarray[Any, Any]:
    """Make an array of `size` bytes and write to it piece by piece, as fast as one core can."""
    array = np.empty(size, np.uint8)
    for start in range(0, size, 1 << 20):
        array[start : start + (1 << 20)] = 1
    return array


def _hold(task: Any, size: int, seconds: float) -> None:
    _stamp(event="begun", id=task.request.id, at=time.monotonic(), worker=os.getppid())
    array = _touched(size)
    time.sleep(seconds)
    _stamp(event="done", id=task.request.id, at=time.monotonic(), bytes=array.nbytes, worker=os.getppid())


@app.task(name="fill", bind=True)
def fill(self: Any, kind: str, path: str, amount: int) -> None:
    """Fill the container's cache: with a file, a mapped one, or `amount` names that are not there.

    Or, if asked to write, with a file of `amount` bytes, again and again, until there is a file `path`.end.
    """
    _stamp(event="begun", id=self.request.id, at=time.monotonic(), worker=os.getppid())
    if kind == "read":
        for _ in range(3):
            with Path(path).open("rb", buffering=0) as file:
                while file.read(1 << 20):
                    pass
    elif kind == "map":
        model = np.memmap(path, np.uint8, "r")
        _kept.append(model)
        for _ in range(2):
            int(model[::4096].sum())
    elif kind == "miss":
        for number in range(amount):
            Path(f"{path}-{number:0>200}").exists()
    while kind == "write" and not Path(f"{path}.end").exists():
        with Path(path).open("wb", buffering=0) as file:
            for _ in range(amount >> 20):
                file.write(bytes(1 << 20))
    _stamp(event="done", id=self.request.id, at=time.monotonic(), worker=os.getppid())


@app.task(name="hold", bind=True)
def hold(self: Any, size: int, seconds: float) -> None:
    """Have `size` bytes for that many seconds."""
    _hold(self, size, seconds)


@app.task(name="hold_late", bind=True, acks_late=True)
def hold_late(self: Any, size: int, seconds: float) -> None:
    """Do as `hold`, acknowledged at its end."""
    _hold(self, size, seconds)


@app.task(name="hold_requeued", bind=True, acks_late=True, reject_on_worker_lost=True)
def hold_requeued(self: Any, size: int, seconds: float) -> None:
    """Do as `hold_late`, and back to the queue when its child is lost."""
    _hold(self, size, seconds)


_leaked: list[Any] = []


@app.task(name="leak", bind=True)
def leak(self: Any, size: int, cpu_seconds: float, keep: bool) -> None:
    """Have `size` bytes, use the CPU that long, and keep them for ever or not."""
    _stamp(event="begun", id=self.request.id, at=time.monotonic())
    array = _touched(size)
    if keep:
        _leaked.append(array)
    until = time.process_time() + cpu_seconds
    while time.process_time() < until:
        sum(range(1000))
    _stamp(event="done", id=self.request.id, at=time.monotonic())
