"""kombu's filesystem transport, with messages that appear whole.

kombu writes a message under its final name, so that a reader may find it empty or half written and fail
with a JSONDecodeError.  That is not what the tests are about: here a message gets its name when it is
complete.
"""

from __future__ import annotations

import uuid
from pathlib import Path

from kombu.transport import TRANSPORT_ALIASES, filesystem


class Channel(filesystem.Channel):
    def _put(self, queue, payload, **kwargs):
        target, draft = Path(self.data_folder_out), uuid.uuid4().hex
        super()._put(draft, payload, **kwargs)
        for path in target.glob(f"*.{draft}.msg"):
            path.replace(str(path).replace(f".{draft}.", f".{queue}."))


class Transport(filesystem.Transport):
    Channel = Channel


TRANSPORT_ALIASES["folders"] = f"{__name__}:Transport"
