"""How many cores there are for this process; neither Celery nor billiard is needed for that."""

from __future__ import annotations

import os

__all__ = ["count"]


def count() -> int:
    """Return the number of cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
