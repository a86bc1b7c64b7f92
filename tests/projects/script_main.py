"""A script whose app is in ``__main__``: ``script_main.py worker_main ...`` or ``script_main.py Worker``."""

from __future__ import annotations

import json
import os
import sys

from celery import Celery

app = Celery("main_script")
app.conf.update(json.loads(os.environ["TEST_CONFIG"]))


@app.task(name="main_script.double")
def double(number):
    return 2 * number, os.getpid(), os.getppid()


if __name__ == "__main__":
    if sys.argv[1] == "worker_main":
        app.worker_main(sys.argv[2:])
    else:
        worker = app.Worker(
            pool=os.environ["TEST_POOL"], concurrency=2, hostname=sys.argv[2], loglevel="INFO"
        )
        worker.start()
        sys.exit(worker.exitcode)
