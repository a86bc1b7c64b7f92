"""What the tests of faults share."""

from __future__ import annotations

import pytest
from harness.tally import Tally


def pytest_collection_modifyitems(config, items):
    """Leave out what says least for its time: killed fresh interpreters, on the second broker."""
    out = []
    for item in items:
        callspec = getattr(item, "callspec", None)
        chosen = callspec.params if callspec else {}
        if (
            item.path.stem in ("test_killed_child", "test_stray_signals")
            and chosen.get("start_method") == "spawn"
            and chosen.get("broker_kind") == "filesystem"
        ):
            out.append(item)
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture(scope="module", params=["redis", "filesystem"])
def broker_kind(request):
    """One broker with an event loop of Celery's, one without: the two ways the engine runs."""
    return request.param


@pytest.fixture
def tally(tmp_path):
    """What tasks ``faulty.count`` and ``faulty.work`` have written."""
    return Tally(tmp_path / "tally")
