"""A program with an app that only a function knows, and a worker: ``script_embedded.py POOL [HOSTNAME]``.

With a name the worker is all of it; without, it runs in a thread, and what its tasks return is written into
the file ``results``.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path

from celery import Celery
from celery.contrib.testing.worker import start_worker


def make_app():
    app = Celery("embedded", set_as_current=False)
    app.conf.update(json.loads(os.environ["TEST_CONFIG"]))
    app.conf.lock = threading.Lock()

    @app.task(name="embedded.double")
    def double(number):
        with app.conf.lock:
            return 2 * number, os.getpid()

    return app


def main(pool, *hostname):
    app = make_app()
    if hostname:
        worker = app.Worker(pool=pool, concurrency=2, hostname=hostname[0], loglevel="INFO")
        worker.start()
        sys.exit(worker.exitcode)
    if pool == "class":
        from memsafe_pool import Pool as pool  # noqa: N813
    options = {"perform_ping_check": False, "shutdown_timeout": 60.0, "loglevel": "INFO"}
    with start_worker(app, pool=pool, concurrency=2, **options):
        double = app.tasks["embedded.double"]
        results = [double.delay(number).get(timeout=60, disable_sync_subtasks=False) for number in range(3)]
    Path("results").write_text(json.dumps([os.getpid(), *results]))


if __name__ == "__main__":
    main(*sys.argv[1:])
