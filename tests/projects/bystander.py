"""The app of ``faulty``; a thread of the worker starts programs, as apps do, and waits for them when told to.

It does so when there is a file ``programs`` with their number in the worker's folder. When there is a file
``wait``, it waits for all of them, and leaves their exit statuses in ``statuses``.
"""

from __future__ import annotations

import json
import subprocess
import threading
import time
from pathlib import Path

from celery.signals import worker_ready
from faulty import app  # noqa: F401 - for celery's -A


def _run_programs():
    order = Path("programs")
    while not order.exists():
        time.sleep(0.01)
    programs = []
    for _ in range(int(order.read_text())):
        programs.append(subprocess.Popen(["sh", "-c", "exit 3"]))
        time.sleep(0.02)  # so that they are spread over many starts of children
    Path("started").touch()
    while not Path("wait").exists():
        time.sleep(0.01)
    new = Path("statuses.new")
    new.write_text(json.dumps([program.wait() for program in programs]))
    new.rename("statuses")


@worker_ready.connect
def _begin(**kwargs):
    threading.Thread(target=_run_programs, daemon=True).start()
