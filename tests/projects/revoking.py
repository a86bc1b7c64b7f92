"""The tasks of ``proj``, with a handler of ``task_revoked`` that says what it was told.

No child is ready while there is a file ``wait`` in the worker's folder.
"""

from __future__ import annotations

import json
import os
import time

from celery.signals import task_revoked, worker_process_init
from proj import app  # noqa: F401


@task_revoked.connect
def say(request, terminated, signum, expired, **kwargs):
    """Append to the file ``revoked`` in the worker's folder, in the worker."""
    with open("revoked", "a") as said:
        said.write(json.dumps([request.id, terminated, signum and str(signum), expired]) + "\n")


@worker_process_init.connect
def wait(**kwargs):
    while os.path.exists("wait"):
        time.sleep(0.05)
