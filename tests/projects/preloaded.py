"""A module to load before children are forked: it knows the process that did."""

import os

IMPORTED_BY = os.getpid()
