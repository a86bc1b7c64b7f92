"""Answers on a socket in each process that its handlers say: metrics and health checks do that."""

import socketserver
import threading
from pathlib import Path

from billiard import current_process
from celery import signals
from witness import app, meet, place  # noqa: F401


class Answer(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.sendall(b"well")


def serve(path):
    server = socketserver.UnixStreamServer(path, Answer)
    threading.Thread(target=server.serve_forever, name=path, daemon=True).start()


@signals.worker_process_init.connect
def serve_in_child(**kwargs):
    path = Path(f"child-{current_process().index}")
    path.unlink(missing_ok=True)  # of the one before
    serve(str(path))


@signals.worker_ready.connect
def serve_in_worker(**kwargs):
    serve("worker")
