"""The app of notes: opens a connection to the database as soon as it is ready."""

import os

from django.apps import AppConfig
from django.db.backends.signals import connection_created


def remember_process(connection, **kwargs):
    connection.opened_by = os.getpid()


class NotesConfig(AppConfig):
    name = "site_of_notes.notes"

    def ready(self):
        from django.db import connection

        connection_created.connect(remember_process)
        with connection.cursor() as cursor:
            cursor.execute(
                "CREATE TABLE IF NOT EXISTS notes_note (id integer PRIMARY KEY, text text NOT NULL)"
            )
