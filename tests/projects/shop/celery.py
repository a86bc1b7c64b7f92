"""An app of a class of its own, with a task class of its own, and a configuration that nobody can pickle."""

from __future__ import annotations

import json
import os
import threading

from celery import Celery, Task


class ShopTask(Task):
    """Counts the runs of each task in a process."""

    runs = 0
    till = "none"

    def __call__(self, *args, **kwargs):
        self.runs += 1
        return super().__call__(*args, **kwargs)

    def before_start(self, task_id, args, kwargs):
        self.till = "open"


class Shop(Celery):
    """An app that takes another argument, and holds what must not be pickled."""

    task_cls = ShopTask

    def __init__(self, name, town, **kwargs):
        super().__init__(name, **kwargs)
        self.town = town
        self.door = threading.Lock()

    def __reduce__(self):
        raise TypeError("a shop is not portable")


app = Shop("shop", "Paris")
app.conf.update(json.loads(os.environ.get("TEST_CONFIG", "{}")))
app.conf.shop_lock = threading.Lock()
app.conf.shop_price = lambda amount: 3 * amount

till = Shop("shop.till", "Lyon")
till.conf.update(app.conf.changes)


def description(task):
    with task.app.door, task.app.conf.shop_lock:
        return [
            type(task.app).__name__,
            task.app.town,
            task.app.conf.shop_price(2),
            isinstance(task, ShopTask),
            task.till,
            os.getpid(),
        ]


@app.task(bind=True)
def describe(self):
    """What this process knows about the app and this task."""
    return description(self)


@till.task(bind=True, name="shop.till.describe")
def describe_in_till(self):
    return description(self)
