"""The app of ``faulty``; who forks can be held up in the middle of it, by handlers of the C library."""

import ctypes
import os
import time

from faulty import app  # noqa: F401 - for celery's -A

FOLDER = os.environ["FORK_GATES"]


def _stop_while_there_is(name):
    path = os.path.join(FOLDER, name)

    @ctypes.CFUNCTYPE(None)
    def stop():
        while os.path.exists(path):
            time.sleep(0.01)

    return stop


#: Before a fork, and after it in the process that was there before. They must outlive this module's import.
HANDLERS = _stop_while_there_is("before"), _stop_while_there_is("after")

ctypes.CDLL(None).__register_atfork(*HANDLERS, None, None)
