"""An app with a thread in the worker alone, as a tracing agent has it."""

import threading

from celery import signals
from witness import app, meet, place  # noqa: F401


@signals.celeryd_init.connect
def start_agent(**kwargs):
    threading.Thread(target=threading.Event().wait, name="agent", daemon=True).start()
