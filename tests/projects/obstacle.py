"""An app whose children start only if nothing is in the way.

A file ``import`` or ``init`` in the worker's folder is an obstacle to the import of this module, or to
the loader's preparation of a child: with ``raise`` in it that fails, with ``wait`` in it that waits until
the file is gone, with ``close`` in it that closes all descriptors, and ends half a second later, with
``hoard`` in it that takes memory until the process is killed for it, once, with ``narrow`` in it that
leaves the process no more than 16 MiB to take.
"""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import folders  # noqa: F401  # makes the broker url folders:// known
from celery import Celery
from celery.loaders.app import AppLoader


def pass_by(step):
    obstacle = Path(step)
    kind = obstacle.read_text() if obstacle.exists() else ""
    if kind == "raise":
        raise RuntimeError(f"something is in the way of {step}")
    if kind == "wait":
        Path(f"{os.getpid()}.new").write_text(str(os.getpid()))
        Path(f"{os.getpid()}.new").rename(f"{step}.waits")
        while obstacle.exists():
            time.sleep(0.02)
    if kind == "hoard":
        obstacle.unlink()
        hoard = []
        while True:
            hoard.append(bytearray(b"x") * (1 << 20))
    if kind == "narrow":
        data = 1024 * int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0])
        resource.setrlimit(resource.RLIMIT_DATA, (data + (16 << 20), resource.RLIM_INFINITY))
    if kind == "close":
        os.closerange(3, 4096)
        time.sleep(0.5)
        os._exit(7)


class Loader(AppLoader):
    def on_worker_process_init(self):
        pass_by("init")


pass_by("import")

app = Celery("obstacle", loader=Loader)
app.conf.update(json.loads(os.environ.get("TEST_CONFIG", "{}")))


@app.task
def pid():
    return os.getpid()


@app.task
def length(text):
    return len(text)
