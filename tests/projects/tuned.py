"""An app whose configuration is changed when the worker starts."""

from __future__ import annotations

import threading

from celery import signals
from witness import app


@signals.celeryd_init.connect
def tune(conf, **kwargs):
    conf.town = "Rome"
    conf.door = threading.Lock()


@app.task
def town():
    return app.conf.town
