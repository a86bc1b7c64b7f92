"""An app whose import loads a shared library that starts a thread, as allocators and runtimes do.

``TEST_LIBRARY`` is the library; its function ``answer`` can be called by the task.
"""

import ctypes
import os

from witness import app, meet, place  # noqa: F401

library = ctypes.CDLL(os.environ["TEST_LIBRARY"])


@app.task
def answer():
    return library.answer()
