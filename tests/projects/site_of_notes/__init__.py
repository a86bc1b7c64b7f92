"""A Django project whose Celery app is where people expect it."""

from .celery import app

__all__ = ["app"]
