"""Says what each process of the worker has seen: imports, environment, signals of Celery.

Every process appends to the file ``notes`` in the worker's folder, one JSON object in a line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from celery import Celery, signals

app = Celery("witness")
app.conf.update(json.loads(os.environ.get("TEST_CONFIG", "{}")))


def note(what, **facts):
    with open("notes", "a") as notes:  # short lines written at once do not mix
        notes.write(json.dumps({"what": what, "pid": os.getpid(), "ppid": os.getppid(), **facts}) + "\n")


IMPORTED_BY = os.getpid()
OMP_NUM_THREADS = os.environ.get("OMP_NUM_THREADS")

note("import", omp=OMP_NUM_THREADS)


@signals.worker_before_create_process.connect
def before_create_process(**kwargs):
    note("before_create_process")


@signals.worker_process_init.connect
def process_init(**kwargs):
    note("process_init", modules=[name for name in sys.modules if name.endswith(".redis")])


@signals.worker_process_shutdown.connect
def process_shutdown(pid, exitcode, **kwargs):
    note("process_shutdown", of=pid, exitcode=exitcode)


@app.task
def place():
    """Where this task runs, and what was there before it."""
    preloaded = sys.modules.get("preloaded")
    return {
        "pid": os.getpid(),
        "ppid": os.getppid(),
        "imported_by": IMPORTED_BY,
        "omp": OMP_NUM_THREADS,
        "preloaded_by": preloaded and preloaded.IMPORTED_BY,
    }


@app.task(bind=True)
def meet(self, folder, number):
    """Be ``place`` when so many of these run at once."""
    Path(folder, self.request.id).touch()
    while len(os.listdir(folder)) < number:
        time.sleep(0.01)
    return place()


@app.task
def say(text):
    """Print."""
    print(text)  # noqa: T201  # that is the point
    return os.getpid()


@app.task
def variables(*names):
    """The environment as it is now."""
    return [os.environ.get(name) for name in names]


@app.task
def inherited():
    """Descriptors of a process that a task starts as the C library's ``system`` does."""
    listing = "import os; print(*[fd for fd in os.listdir('/dev/fd') if os.path.exists(f'/dev/fd/{fd}')])"
    command = [sys.executable, "-I", "-c", listing]
    done = subprocess.run(command, close_fds=False, capture_output=True, check=True, text=True)
    return sorted(map(int, done.stdout.split()))
