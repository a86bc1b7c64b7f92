"""An app whose log goes to places of its own: another file, or another set-up altogether."""

from __future__ import annotations

import logging
import os

from celery.signals import after_setup_logger, setup_logging
from celery.utils.log import get_task_logger
from witness import app

logger = get_task_logger(__name__)
FORMAT = "%(processName)s|%(levelname)s|%(message)s"


def add_journal(logger):
    handler = logging.FileHandler("journal")
    handler.setFormatter(logging.Formatter(FORMAT))
    logger.addHandler(handler)


@after_setup_logger.connect
def keep_journal(logger, **kwargs):
    add_journal(logger)


if os.environ.get("TEST_OWN_LOGGING"):

    @setup_logging.connect
    def set_up(**kwargs):
        logging.basicConfig(level=logging.INFO, filename="own", format=FORMAT)


@app.task
def tell(text):
    logger.info(text)
