"""Stands for the package of this name: notes titles in place of showing them in ``ps``."""

import os


def setproctitle(title):
    """Note the title that this process has from now on."""
    with open("titles", "a") as titles:
        titles.write(f"{os.getpid()} {title}\n")


def setthreadtitle(title):
    """Nothing."""
