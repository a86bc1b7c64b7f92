"""An app that cannot be imported without a thread."""

import starts_thread  # noqa: F401
from witness import app, meet, place  # noqa: F401
