"""An app that has more files open than ``select()`` can count."""

from __future__ import annotations

import os

from proj import app  # noqa: F401  # the app

files = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
