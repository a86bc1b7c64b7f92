"""Result backends that fail when the test says so."""

from __future__ import annotations

from pathlib import Path

from celery.backends.redis import RedisBackend


class Unrevoking(RedisBackend):
    """Cannot store that a task was revoked while there is a file ``down``; in it is what is raised then."""

    def mark_as_revoked(self, *args, **kwargs):
        down = Path("down")
        if down.exists():
            raise {"lost": ConnectionError, "full": RuntimeError}[down.read_text()]("not now")
        super().mark_as_revoked(*args, **kwargs)
