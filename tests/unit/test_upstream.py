"""What is found in Celery's registries."""

from __future__ import annotations

import pytest
from celery import signals

from memsafe_pool import upstream


class Callable:
    """A handler that is no function."""

    def __call__(self, **kwargs): ...


def of_all(**kwargs): ...


def of_one(**kwargs): ...


def of_another(**kwargs): ...


def of_celery(**kwargs): ...


@pytest.fixture
def connect():
    """Connect handlers, until the test ends."""
    connected = []

    def connect(signal, handler, **options):
        signal.connect(handler, **options)
        connected.append((signal, handler, options))

    yield connect
    for signal, handler, options in connected:
        signal.disconnect(handler, **options)


def test_handlers_of_the_start(connect):
    """Those of the app that were called on this host are named; others, and Celery's own, are not."""
    connect(signals.celeryd_init, of_all)
    connect(signals.celeryd_init, of_one, sender="one@host")
    connect(signals.celeryd_after_setup, of_another, sender="another@host")
    of_celery.__module__ = "celery.fixups.django"
    connect(signals.worker_init, of_celery)
    instance = Callable()
    connect(signals.worker_init, instance)
    assert upstream.start_handlers("one@host") == [
        f"{__name__}:of_all (celeryd_init)",
        f"{__name__}:of_one (celeryd_init)",
        f"{__name__}:Callable (worker_init)",
    ]
