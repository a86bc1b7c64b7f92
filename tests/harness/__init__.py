"""What every test that starts a real worker stands on: brokers, workers, and the check that nothing is left.

``brokers`` finds or starts the message brokers, ``worker`` runs the real ``celery`` command,
``residue`` looks for processes and descriptors that outlived a test, ``waiting`` waits for a
condition with a deadline.
The fixtures built from them are in ``tests/conftest.py``.
"""
