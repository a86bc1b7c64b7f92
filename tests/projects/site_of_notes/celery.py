"""The Celery app of the project, as Celery's guide to Django has it."""

import os

from celery import Celery

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "site_of_notes.settings")

app = Celery("site_of_notes")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()
