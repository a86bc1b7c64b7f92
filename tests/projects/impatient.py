"""An app that sets a default timeout for all sockets, as people do for the sake of HTTP."""

import json
import os
import socket

from celery import Celery

socket.setdefaulttimeout(0.5)

app = Celery("impatient")
app.conf.update(json.loads(os.environ.get("TEST_CONFIG", "{}")))


@app.task
def pid():
    """Return the process that runs this."""
    return os.getpid()
