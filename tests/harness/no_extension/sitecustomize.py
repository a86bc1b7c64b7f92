"""With this folder on the path, no interpreter finds the C helper: each imports this module at its start."""

import sys

sys.modules["memsafe_pool._native"] = None
