"""The app of the measured workers: it imports numpy and pandas, as a data team's worker does.

What else it does at import is chosen by environment variables, so that every worker here runs with `-A app`:

    BENCH_BROKER, BENCH_PREFIX   the Redis database and this worker's own key prefix in it
    BENCH_MODEL_MB               load a numpy array of that size at import
    BENCH_IMPORT_SECONDS         take that long to import
    BENCH_IMPORT_STYLE           "busy": burn CPU for that long, instead of sleeping
    BENCH_STAMPS                 file to which tasks append when they ran, one JSON object per line
    BENCH_RECEIVED               also stamp when the worker received each task
    BENCH_START_METHOD           `worker_pool_start_method`, for stock prefork
"""

from __future__ import annotations

import json
import os
import time
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
)

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
