"""State made when the worker starts, where the documentation of Sentry and others has it made."""

import json
import os
import threading
import time
from pathlib import Path

import folders  # noqa: F401  # makes the broker url folders:// known
from celery import Celery, signals

app = Celery("stateful")
app.conf.update(json.loads(os.environ.get("TEST_CONFIG", "{}")))

#: Which process has handled which signal.
made = {}


@signals.celeryd_init.connect
def configure(**kwargs):
    made["celeryd_init"] = os.getpid()
    if "STATEFUL_THREAD" in os.environ:
        threading.Thread(target=threading.Event().wait, name="agent", daemon=True).start()


@signals.celeryd_after_setup.connect
def adjust(**kwargs):
    made["celeryd_after_setup"] = os.getpid()


@signals.worker_init.connect
def connect(**kwargs):
    made["worker_init"] = os.getpid()


@app.task(bind=True)
def state(self, folder=None, number=1):
    """What was made before this process was there; run in so many processes at once."""
    if folder is not None:
        Path(folder, self.request.id).touch()
        while len(os.listdir(folder)) < number:
            time.sleep(0.01)
    return {"pid": os.getpid(), **made}
