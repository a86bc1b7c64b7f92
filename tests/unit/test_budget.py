"""The budget: by what is set and by the limit; spellings of the setting; and what holds for all of them."""

from __future__ import annotations

import pytest
from harness.trees import GB, MB
from hypothesis import given
from hypothesis import strategies as st

from memsafe_pool.budget import LEAST_MARGIN_BYTES, find, margin
from memsafe_pool.settings import SettingError, load

LIMITS = st.integers(1, 1 << 50)
SETTINGS = st.just("auto") | st.integers(MB, 1 << 50) | st.floats(0, 1, exclude_min=True, exclude_max=True)


def setting(value, **environ):
    return load({"memsafe_memory_budget": value}, environ).memory_budget


@pytest.mark.parametrize(
    ("limit", "budget"),
    [
        (64 * MB, 48 * MB),
        (128 * MB, 96 * MB),
        (256 * MB, 224 * MB),
        (320 * MB, 288 * MB),
        (1000 * MB, 900 * MB),
        (10 * GB, 9 * GB),
        (1, 1),
        (5, 4),
    ],
)
def test_auto(limit, budget):
    """Nine tenths, and less where that would leave less than 32 MiB free; never nothing."""
    found = find("auto", limit)
    assert (found.bytes, found.limit, found.auto, found.lowered) == (budget, limit, True, False)
    assert found.margin == limit - budget


def test_a_size_below_the_limit():
    """It is the pool's own; what stays free under the limit is what it is with ``auto``."""
    found = find(256 * MB, 512 * MB)
    assert (found.bytes, found.auto, found.warning) == (256 * MB, False, None)
    assert found.margin == find("auto", 512 * MB).margin


def test_a_size_close_below_the_limit():
    """Who says more than ``auto`` has gets it."""
    found = find(500 * MB, 512 * MB)
    assert (found.bytes, found.margin, found.auto, found.lowered) == (500 * MB, 12 * MB, False, False)


@pytest.mark.parametrize("size", [512 * MB, 2 * GB])
def test_a_size_that_is_not_below_the_limit(size):
    """It is lowered to what ``auto`` would be, and that is said."""
    found = find(size, 512 * MB)
    assert (found.bytes, found.auto, found.lowered) == (find("auto", 512 * MB).bytes, True, True)
    assert found.warning == (
        f"memsafe_memory_budget is {size // MB} MiB, but the memory limit is 512 MiB: "
        "460 MiB are used as the budget."
    )


@pytest.mark.parametrize(
    ("setting", "within", "ceiling"),
    [(0.9, 900, 1000), (0.95, 950, 1000), (900 * MB, 900, 1000), (450 * MB, 450, 500), (200 * MB, 200, 232)],
)
def test_all_of_a_size_may_be_used(setting, within, ceiling):
    """What is admitted comes that far; what is paused, as far beyond it as with ``auto``."""
    found = find(setting, 1000 * MB)
    assert found.left(1000 * MB, lambda: 0) == (ceiling * MB, within * MB)
    assert found.ceiling == ceiling * MB


@given(limit=st.integers(1 << 20, 1 << 50))
def test_auto_as_a_size(limit):
    """Whoever sets what ``auto`` comes to gets the same ceiling, but for roundings."""
    auto = find("auto", limit)
    assert limit - 20 <= find(auto.bytes, limit).ceiling <= limit


def test_what_others_use_counts_for_a_size():
    """No more is left than under the limit, less what stays free there; nor than is left of the size."""
    found = find(500 * MB, 1000 * MB)
    assert found.left(300 * MB, lambda: 100 * MB) == (300 * MB, 200 * MB)
    assert found.left(900 * MB, lambda: 450 * MB)[1] == 50 * MB


def test_a_share():
    """It is of the limit, and follows it."""
    assert find(0.5, 1 * GB).bytes == 512 * MB
    assert find(0.5, 2 * GB).bytes == 1 * GB
    assert not find(0.5, 1 * GB).auto


@given(setting=SETTINGS, limit=LIMITS)
def test_what_always_holds(setting, limit):
    """There is a budget, it is no more than the limit, and the margin fits to it."""
    found = find(setting, limit)
    assert 0 < found.bytes <= limit
    assert found.limit == limit
    assert 0 <= found.margin <= limit - found.bytes
    assert found.margin <= margin(limit)
    assert found.lowered == (isinstance(setting, int) and setting >= limit)
    assert found.auto == (setting == "auto" or found.lowered)
    if found.auto:
        assert found.margin == limit - found.bytes


@given(setting=SETTINGS, one=LIMITS, other=LIMITS)
def test_more_limit_is_never_less_budget_by_much(setting, one, other):
    """The budget rises with the limit; a size that comes to be below it counts as it is from then on."""
    low, high = sorted([one, other])
    assert find(setting, high).bytes >= find(setting, low).bytes
    assert high - margin(high) >= low - margin(low)


@given(limit=st.integers(4 * LEAST_MARGIN_BYTES, 1 << 50))
def test_the_least_margin(limit):
    """From 128 MiB on, 32 MiB stay free at least, and a tenth."""
    assert margin(limit) >= max(LEAST_MARGIN_BYTES, limit // 10)


# The setting


@pytest.mark.parametrize(
    ("value", "meant"),
    [
        ("auto", "auto"),
        ("512MiB", 512 * MB),
        (" 1.5 GiB ", 1536 * MB),
        (1 << 30, 1 << 30),
        ("1073741824", 1 << 30),
        (0.8, 0.8),
        ("0.8", 0.8),
        (".8", 0.8),
        ("80%", 0.8),
        (" 80 % ", 0.8),
        ("12.5%", 0.125),
    ],
)
def test_spellings(value, meant):
    """A size, a share, percent, or ``auto``; as text, too, as in the environment."""
    for chosen in (setting(value), setting("nonsense", MEMSAFE_MEMORY_BUDGET=value)):
        assert chosen == pytest.approx(meant)
        assert type(chosen) is type(meant)


@pytest.mark.parametrize(
    "wrong",
    [
        *[None, True, False, "", "Auto", "none", 0, 1, 512, "512", -1, "1000k", [], b"auto"],
        *[0.0, 1.0, 1.5, -0.5, float("nan"), float("inf"), "0.0", "1.0", "1.5", ".", "-0.5"],
        *["0%", "100%", "-5%", "%", "nan%", "many%", "8 XB", "1e-1"],
    ],
)
def test_wrong_values(wrong):
    """One sentence with the name, the value and what is accepted; sizes below 1 MiB are a unit forgotten."""
    with pytest.raises(SettingError) as caught:
        setting(wrong)
    assert str(caught.value).startswith(f"memsafe_memory_budget={wrong!r} is not valid: it must be a size of")
    assert "\n" not in str(caught.value)


@given(st.floats() | st.integers() | st.text(max_size=12))
def test_what_is_accepted_leads_to_a_budget(value):
    """Whatever gets through the setting is one that a budget can be found for."""
    try:
        chosen = setting(value)
    except SettingError:
        return
    assert 0 < find(chosen, 1 * GB).bytes < 1 * GB
