"""Memory numbers of a process."""

from __future__ import annotations

import os

import pytest

from memsafe_pool.memory import private_bytes, resident_bytes

MB = 1_000_000


def test_this_process_has_memory():
    """Resident memory has private memory in it, both in bytes."""
    assert 5 * MB < private_bytes() <= resident_bytes() * 1.05
    assert resident_bytes() < 100_000 * MB


def test_growth_shows():
    """What was written to is there, in both numbers, and goes again."""
    resident, private = resident_bytes(), private_bytes()
    block = bytearray(b"x") * (50 * MB)
    assert resident_bytes() - resident > 45 * MB
    assert private_bytes() - private > 45 * MB
    del block
    assert private_bytes() - private < 25 * MB


def test_another_process():
    """Any process can be asked about by its pid."""
    assert abs(resident_bytes(os.getpid()) - resident_bytes()) < 5 * MB


@pytest.mark.parametrize("function", [resident_bytes, private_bytes])
def test_a_process_that_is_not_there(function):
    """It raises OSError, so that no number is made up."""
    with pytest.raises(OSError, match="No such"):
        function(2**22 + 1)
