"""The file that keeps what tasks needed: read at the start, and brought up to date once a minute.

Several workers may use one file, also in containers that share nothing but its folder. So what is written is
made of what the file has by now and of what this worker has learned since it wrote last, under a lock on the
folder, which leaves nothing behind; and it takes the file's place as a whole. The new file has a name that
nobody can know before, and is never opened through a link: the folder may be one that others may write to.

Imports neither Celery nor billiard.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["read", "update"]

#: Seconds to wait for the lock, which is held for some milliseconds. If somebody was stopped with it, what
#: another worker writes at that moment may be lost.
WAIT_SECONDS = 0.2

#: Seconds between two tries to get the lock.
NAP_SECONDS = 0.01

#: Rows that are kept, the ones changed last.
MOST_ROWS = 2000


def read(path: str) -> list[dict[str, Any]]:
    """Return the rows in the file.

    Raises:
        OSError: It is not there, or can not be read.
        ValueError: It is something else.
    """
    # Without waiting for the other end of a pipe.
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ValueError("not a regular file")
    with open(file, encoding="utf-8") as text:
        try:
            rows = json.load(text)
        except RecursionError:
            rows = None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("not what was written by this package")
    return rows


def update(path: str, rows: Sequence[dict[str, Any]]) -> None:
    """Put rows into the file, each in place of the one with the same name and label.

    Raises:
        OSError: It can not be written: then it is as it was.
    """
    with _locked(os.path.dirname(path) or "."):
        try:
            kept = read(path)
        except (OSError, ValueError):
            kept = []  # what it is was said when it was read first
        changed = {_key(row) for row in rows}
        _replace(path, ([row for row in kept if _key(row) not in changed] + list(rows))[-MOST_ROWS:])


def _key(row: dict[str, Any]) -> tuple[str, str]:
    return repr(row.get("name")), repr(row.get("label"))


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Keep other workers from the files in a folder, if that is possible there."""
    directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(NAP_SECONDS)
            except OSError:
                break  # not with this file system
            else:
                break
        yield
    finally:
        os.close(directory)


def _replace(path: str, rows: list[dict[str, Any]]) -> None:
    """Put a new file in the place of the old one, with its mode and, as far as possible, its owner."""
    new = f"{path}.{secrets.token_hex(8)}"
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(file, "w", encoding="utf-8") as text:
            try:
                before = os.lstat(path)
            except FileNotFoundError:
                pass  # the first time: as the umask has it
            else:
                if stat.S_ISREG(before.st_mode):
                    with suppress(OSError):  # somebody else's
                        os.fchown(file, before.st_uid, before.st_gid)
                    with suppress(OSError):
                        os.fchmod(file, stat.S_IMODE(before.st_mode))
            json.dump(rows, text)
        os.replace(new, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(new)
        raise
