"""Tasks that use the database."""

import os
import time
from pathlib import Path

from celery import shared_task
from django.db import connection

from .models import Note


@shared_task
def add(text):
    """Add a note; return whether a connection was open, the process that opened it, and this process."""
    was_open = connection.connection is not None
    Note.objects.create(text=text)
    return was_open, connection.opened_by, os.getpid()


@shared_task(bind=True)
def add_together(self, folder, number):
    """Add a note when so many of these run at once."""
    Path(folder, self.request.id).touch()
    while len(os.listdir(folder)) < number:
        time.sleep(0.01)
    return add(self.request.id)


@shared_task
def count():
    return Note.objects.count()
