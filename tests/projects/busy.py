"""An app with a thread that holds a lock half of the time, as a reporter may."""

import json
import os
import threading
import time

import folders  # noqa: F401  # makes the broker url folders:// known
from celery import Celery, signals

app = Celery("busy")
app.conf.update(json.loads(os.environ.get("TEST_CONFIG", "{}")))

lock = threading.Lock()


def report():
    while True:
        with lock:
            time.sleep(0.01)
        time.sleep(0.01)


def start(**kwargs):
    threading.Thread(target=report, name="reporter", daemon=True).start()


if "BUSY_HANDLER" in os.environ:
    signals.worker_init.connect(start)
else:
    start()


@app.task
def can_lock():
    """Whether nobody held the lock when this process was forked; its holder, if any, is not here."""
    return lock.acquire(timeout=0.1)
