"""An app with a thread in the worker alone, as a tracing agent has it; no handler makes anything there."""

import threading

from celery import bootsteps
from witness import app, meet, place  # noqa: F401


class Agent(bootsteps.Step):
    """Starts the thread before there is a pool."""

    def __init__(self, parent, **options):
        threading.Thread(target=threading.Event().wait, name="agent", daemon=True).start()


app.steps["worker"].add(Agent)
