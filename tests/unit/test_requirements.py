"""What installing the package asks of pip."""

from __future__ import annotations

import re
from importlib.metadata import metadata


def test_a_broker_s_client_is_celerys_business():
    """No extra for users, and nothing of a broker: pip would replace the client that another package pins."""
    found = metadata("memsafe-pool")
    assert set(found.get_all("Provides-Extra")) == {"bench", "dev", "test"}
    needed = [line for line in found.get_all("Requires-Dist") if "extra ==" not in line]
    assert sorted(re.split(r"[^a-z]", line)[0] for line in needed) == ["billiard", "celery", "cffi", "psutil"]
    assert [line for line in needed if "[" in line or "<" in line] == []
