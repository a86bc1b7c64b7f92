"""Loads something large where Celery says that a process is about to be created, as some apps do."""

import os

import folders  # noqa: F401  # makes the broker url folders:// known
import psutil
from celery import signals
from witness import app, meet, place  # noqa: F401

#: Bytes that are worth sharing.
SIZE = 64 << 20

loaded = None
loaded_by = None


@signals.worker_before_create_process.connect
def load(**kwargs):
    """Sent once for each child, so it has to look whether it was done."""
    global loaded, loaded_by
    if loaded is None:
        loaded, loaded_by = b"\1" * SIZE, os.getpid()


@app.task
def shared():
    """Who has loaded it, who asks, and how much memory is this process's alone."""
    return loaded_by, os.getpid(), sum(loaded[:: SIZE // 4]), psutil.Process().memory_full_info().uss
