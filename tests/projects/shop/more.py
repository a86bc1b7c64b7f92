"""Tasks in a module that the app does not import: ``-I shop.more`` does."""

from celery import shared_task


@shared_task
def weigh(goods):
    return len(goods)
