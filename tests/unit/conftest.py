"""What the unit tests share: they start nothing, and search with Hypothesis."""

from __future__ import annotations

import os

import pytest
from harness.residue import Residue
from hypothesis import HealthCheck, settings

settings.register_profile(
    "unit",
    derandomize=True,  # what has passed passes again; to search is for the long one, and make check-model
    deadline=None,  # timings are not asserted
    database=None,  # no folder of examples is left behind
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
#: For a long search by hand: HYPOTHESIS_PROFILE=long.
settings.register_profile("long", settings.get_profile("unit"), derandomize=False, max_examples=5000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "unit"))


@pytest.fixture(autouse=True, scope="module")
def nothing_left():
    """The check after every test, here once per module: it takes longer than most tests."""
    before = Residue()
    yield
    before.check(set)
