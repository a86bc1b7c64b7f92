"""Settings: what is accepted, what is refused and how that is said, and which source wins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsafe_pool.settings import SETTINGS, SettingError, load

NAMES = [setting.name for setting in SETTINGS]


def value(name, given_value):
    return getattr(load({name: given_value}, {}), name.removeprefix("memsafe_"))


def test_nothing_said_means_the_defaults():
    """Without configuration and environment each setting has its declared default."""
    chosen = load({}, {})
    assert chosen.start_method == "auto"
    assert chosen.idle_timeout == 60
    assert chosen.min_children == 0
    assert chosen.start_timeout == 60
    assert chosen.trim_idle == 0.5
    assert chosen.trim_min == 8 * 1024**2
    assert chosen.memory_budget == "auto"
    assert chosen.overtake_time == 10
    assert chosen.pause is True
    assert chosen.memory_tries == 2
    assert chosen.max_child_growth is None
    assert chosen.max_child_age is None
    assert chosen.state is None
    assert chosen.preload == ()
    assert chosen.child_env == {}


def test_every_default_is_accepted():
    """A default that is written down as a value means the same."""
    assert load({setting.name: setting.default for setting in SETTINGS}, {}) == load({}, {})


class Whole:
    """A whole number that is not Python's own, such as numpy's."""

    def __init__(self, number):
        self.number = number

    def __index__(self):
        return self.number


ACCEPTED = [
    ("memsafe_start_method", "auto", "auto"),
    ("memsafe_start_method", "forkserver", "forkserver"),
    ("memsafe_start_method", "spawn", "spawn"),
    ("memsafe_start_method", "fork", "fork"),
    ("memsafe_idle_timeout", 0, 0.0),
    ("memsafe_idle_timeout", 1.5, 1.5),
    ("memsafe_idle_timeout", "2.5", 2.5),
    ("memsafe_idle_timeout", "1e2", 100.0),
    ("memsafe_idle_timeout", None, None),
    ("memsafe_idle_timeout", False, None),
    ("memsafe_idle_timeout", "None", None),
    ("memsafe_idle_timeout", "none", None),
    ("memsafe_idle_timeout", "FALSE", None),
    ("memsafe_min_children", 0, 0),
    ("memsafe_min_children", 7, 7),
    ("memsafe_min_children", " 7 ", 7),
    ("memsafe_min_children", Whole(7), 7),
    ("memsafe_start_timeout", 0.1, 0.1),
    ("memsafe_start_timeout", "30", 30.0),
    ("memsafe_trim_idle", 0, 0.0),
    ("memsafe_trim_idle", None, None),
    ("memsafe_trim_idle", "0.25", 0.25),
    ("memsafe_trim_min", 0, 0),
    ("memsafe_trim_min", 1000, 1000),
    ("memsafe_trim_min", "1000", 1000),
    ("memsafe_trim_min", "8MiB", 8 * 1024**2),
    ("memsafe_trim_min", " 1.5 GiB ", 3 * 512 * 1024**2),
    ("memsafe_trim_min", "512k", 512 * 1024),
    ("memsafe_trim_min", "2G", 2 * 1024**3),
    ("memsafe_trim_min", "2GB", 2 * 10**9),
    ("memsafe_trim_min", "10 b", 10),
    ("memsafe_trim_min", "64Ki", 64 * 1024),
    ("memsafe_trim_min", "512Mi", 512 * 1024**2),
    ("memsafe_trim_min", "1.5 Gi", 3 * 512 * 1024**2),
    ("memsafe_trim_min", "2Ti", 2 * 1024**4),
    ("memsafe_trim_min", Whole(1000), 1000),
    ("memsafe_memory_budget", "512Mi", 512 * 1024**2),
    ("memsafe_memory_budget", Whole(1 << 30), 1024**3),
    ("memsafe_overtake_time", "2.5", 2.5),
    ("memsafe_pause", False, False),
    ("memsafe_pause", "no", False),
    ("memsafe_pause", "TRUE", True),
    ("memsafe_max_pause", "90", 90.0),
    ("memsafe_max_pause", "none", None),
    ("memsafe_memory_tries", 1, 1),
    ("memsafe_memory_tries", "3", 3),
    ("memsafe_max_child_growth", "auto", None),
    ("memsafe_max_child_growth", "200MiB", 200 * 1024**2),
    ("memsafe_max_child_growth", "200Mi", 200 * 1024**2),
    ("memsafe_max_child_age", None, None),
    ("memsafe_max_child_age", "3600", 3600.0),
    ("memsafe_state", "", None),
    ("memsafe_state", "/var/lib/needs", "/var/lib/needs"),
    ("memsafe_preload", "", ()),
    ("memsafe_preload", "numpy", ("numpy",)),
    ("memsafe_preload", " numpy , a.b_c ,", ("numpy", "a.b_c")),
    ("memsafe_preload", ["numpy", "pandas"], ("numpy", "pandas")),
    ("memsafe_preload", ("numpy",), ("numpy",)),
    ("memsafe_preload", {"numpy"}, ("numpy",)),
    ("memsafe_child_env", "", {}),
    ("memsafe_child_env", "A=1", {"A": "1"}),
    ("memsafe_child_env", " A = 1 , B=x=y, C=", {"A": "1", "B": "x=y", "C": ""}),
    ("memsafe_child_env", {"A": 1, "B": 0.5, "C": "x,y"}, {"A": "1", "B": "0.5", "C": "x,y"}),
]


@pytest.mark.parametrize(("name", "given_value", "meant"), ACCEPTED)
def test_what_is_accepted(name, given_value, meant):
    """Each accepted spelling, and what it means."""
    assert value(name, given_value) == meant
    assert type(value(name, given_value)) is type(meant)


NAN, INFINITE, HUGE = float("nan"), float("inf"), 10**400

REFUSED = [
    ("memsafe_start_method", ["Spawn", "", "thread", None, 1, ["spawn"]]),
    ("memsafe_idle_timeout", ["", -1, -0.001, "soon", True, NAN, INFINITE, "inf", "nan", [], HUGE]),
    ("memsafe_min_children", [Whole(-1), -1, "-1", 1.0, "1.0", "two", None, True, False, "", [1]]),
    ("memsafe_start_timeout", [0, 0.0, -1, "0", "", None, True, NAN, INFINITE, "-inf", {}, HUGE]),
    ("memsafe_trim_idle", ["", -1, "soon", True, NAN, INFINITE]),
    ("memsafe_trim_min", [-1, 1.5, None, True, "", "MiB", "8 XB", "8 Mi B", "8i", "1e3", "8MiB8", NAN, []]),
    ("memsafe_overtake_time", [0, -1, "", None, True, NAN, INFINITE]),
    ("memsafe_pause", [None, 1, 0, "", "maybe", []]),
    ("memsafe_max_pause", [-1, "", True, NAN, INFINITE]),
    ("memsafe_memory_tries", [-1, 1.0, "", None, True]),
    ("memsafe_max_child_growth", [0, "0", -1, 0.5, None, True, "much"]),
    ("memsafe_max_child_age", [-1, "", True, NAN, INFINITE]),
    ("memsafe_state", [1, True, b"x", ["x"], "a\0b"]),
    ("memsafe_preload", [None, 1, ["a", 2], ["a-b"], "a b", ".x", "x.", "a..b", [""], {"a": 1}, b"numpy"]),
    (
        "memsafe_child_env",
        [None, 1, ["A=1"], "A", "A=1,B", "=1", {"": "1"}, {"A=B": "1"}, {1: "1"}, {"A": None}, {"A": True},
         {"A": ["1"]}, {"A\0": "1"}, {"A": "\0"}],
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        pytest.param(name, wrong, id=f"{name}-{repr(wrong)[:20]}")
        for name, values in REFUSED
        for wrong in values
    ],
)
def test_what_is_refused(name, wrong):
    """A wrong value raises one sentence with the setting's name, the value, and what is accepted."""
    accepted = next(setting.accepted for setting in SETTINGS if setting.name == name)
    with pytest.raises(SettingError) as caught:
        load({name: wrong}, {})
    assert str(caught.value) == f"{name}={wrong!r} is not valid: it must be {accepted}."
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "in_config", "in_environment", "meant"),
    [
        ("memsafe_start_method", "fork", "spawn", "spawn"),
        ("memsafe_idle_timeout", 1, "none", None),
        ("memsafe_idle_timeout", None, "3", 3.0),
        ("memsafe_min_children", 1, "0", 0),
        ("memsafe_start_timeout", 1, "2", 2.0),
        ("memsafe_preload", ["a"], "b,c", ("b", "c")),
        ("memsafe_preload", ["a"], "", ()),
        ("memsafe_child_env", {"A": 1}, "B=2", {"B": "2"}),
    ],
)
def test_the_environment_wins(name, in_config, in_environment, meant):
    """A variable in the environment takes the place of the configuration's value as a whole."""
    chosen = load({name: in_config}, {name.upper(): in_environment})
    assert getattr(chosen, name.removeprefix("memsafe_")) == meant


def test_the_environment_wins_over_a_wrong_value():
    """What the environment overrides is not looked at."""
    assert load({"memsafe_min_children": "many"}, {"MEMSAFE_MIN_CHILDREN": "2"}).min_children == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_variable_is_named_as_such(name):
    """A wrong value from the environment is reported under the variable's name."""
    wrong = "not,\0good!"  # a file may have any name but for the zero
    with pytest.raises(SettingError) as caught:
        load({}, {name.upper(): wrong})
    assert str(caught.value).startswith(f"{name.upper()}={wrong!r} is not valid: it must be ")


def test_other_variables_do_not_matter():
    """Only the exact names are read."""
    environ = {"memsafe_min_children": "5", "MEMSAFE_MIN": "5", "CELERY_MEMSAFE_MIN_CHILDREN": "5"}
    assert load({}, environ) == load({}, {})


@pytest.mark.parametrize("setting", SETTINGS, ids=NAMES)
def test_each_setting_is_described(setting):
    """Name, accepted values and meaning can be shown to people as they are."""
    assert setting.name.startswith("memsafe_")
    assert setting.name == setting.name.lower()
    assert setting.accepted[0].islower()
    assert not setting.accepted.endswith(".")
    assert setting.meaning[0].isupper()
    assert setting.meaning.endswith(".")


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(name=st.sampled_from(NAMES), wild=ANYTHING)
def test_any_value_is_accepted_or_refused(name, wild):
    """There is no value that ends otherwise than in settings or in the sentence."""
    try:
        chosen = load({name: wild}, {})
    except SettingError as refusal:
        error = refusal
    else:
        assert chosen.start_timeout > 0
        assert chosen.idle_timeout is None or chosen.idle_timeout >= 0
        assert chosen.min_children >= 0
        return
    assert str(error).startswith(f"{name}={wild!r} is not valid: ")


@given(name=st.sampled_from(NAMES), text=st.text(max_size=30))
def test_any_variable_is_accepted_or_refused(name, text):
    """The same for the environment, where everything is text."""
    try:
        load({}, {name.upper(): text})
    except SettingError as refusal:
        error = refusal
    else:
        return
    assert error.name == name.upper()


@given(
    st.dictionaries(st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,9}", fullmatch=True), st.integers() | st.floats())
)
def test_numbers_become_text_in_the_childrens_environment(numbers):
    """Whatever is accepted can be put into an environment as it is."""
    assert value("memsafe_child_env", numbers) == {name: str(number) for name, number in numbers.items()}
