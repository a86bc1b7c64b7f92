"""Exceptions that tasks raise: importable by the worker and by the test, without an app."""

from __future__ import annotations

import threading


class TwoArguments(Exception):
    """An exception whose constructor takes something else than it keeps in ``args``."""

    def __init__(self, code, reason):
        super().__init__(f"{code}: {reason}")
        self.code, self.reason = code, reason


class KeywordOnly(Exception):
    """An exception that cannot be built from its own ``args``."""

    def __init__(self, *, code):
        super().__init__(f"keyword only: {code}")
        self.code = code


class Unpicklable(Exception):
    """An exception that carries something that cannot leave its process."""

    def __init__(self, text):
        super().__init__(text, threading.Lock())


class Breaks(Exception):
    """An exception that cannot be pickled, nor shown."""

    def __repr__(self):
        raise RuntimeError("no repr")

    __str__ = __repr__

    def __reduce__(self):
        raise RuntimeError("no pickle")


class Big(Exception):
    """An exception with a payload, which shows up in no log line."""

    def __repr__(self):
        return f"Big(<{len(self.args[0])}>)"

    __str__ = __repr__
