"""A module whose import starts a thread; with TEST_HOG it has a lock that each forked process wants."""

import os
import threading

lock = threading.Lock()
there = threading.Event()


def background():
    """Do nothing, for ever, with the lock."""
    with lock:
        there.set()
        threading.Event().wait()


threading.Thread(target=background, name="background", daemon=True).start()
there.wait()
if "TEST_HOG" in os.environ:
    os.register_at_fork(after_in_child=lock.acquire)
