"""A message broker in a folder, for programs that must run with nothing installed or started beforehand.

It is kombu's filesystem transport, with one change. kombu opens a message under its final name and then
writes it, so that a reader who is quick finds it empty; here a message gets that name when it is complete.

Not for production: readers look for messages again and again, and the folder must be on one machine.
"""

from __future__ import annotations

import time
import uuid
from pathlib import Path

from kombu.transport import TRANSPORT_ALIASES, filesystem
from kombu.utils.json import dumps

#: Seconds between two looks into the folder.
POLLING_SECONDS = 0.05


class Channel(filesystem.Channel):
    """Writes messages whole."""

    def _put(self, queue, payload, **_ignored):
        name = f"{time.monotonic_ns():020}_{uuid.uuid4()}"
        # The queue is not in this name: kombu 5.4 looks for it anywhere.
        draft = Path(self.data_folder_out, f"{name}.draft")
        draft.write_text(dumps(payload))
        draft.rename(draft.with_name(f"{name}.{queue}.msg"))


class Transport(filesystem.Transport):
    """The transport of ``folder://``."""

    Channel = Channel


TRANSPORT_ALIASES["folder"] = f"{__name__}:Transport"


def config(folder):
    """Return the Celery settings of a broker and a result backend in this folder, which exists."""
    parts = {name: Path(folder, name) for name in ("messages", "control", "processed", "results")}
    for part in parts.values():
        part.mkdir(exist_ok=True)
    return {
        "broker_url": "folder://",
        "broker_transport_options": {
            "data_folder_in": str(parts["messages"]),
            "data_folder_out": str(parts["messages"]),
            "control_folder": str(parts["control"]),
            # Without these two a message passes through the temporary folder of the system when it is read.
            "processed_folder": str(parts["processed"]),
            "store_processed": True,
            "polling_interval": POLLING_SECONDS,
        },
        "result_backend": f"file://{parts['results']}",
    }
