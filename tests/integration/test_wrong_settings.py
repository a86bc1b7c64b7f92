"""A wrong setting stops the worker at its start, with one sentence."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.ours_only("its settings")

SECONDS = "a number of seconds above 0"
SECONDS_OR_NEVER = "a number of seconds, 0 or more, or None for never"
COUNT = "a whole number from 0 up to the worker's concurrency"
METHODS = "one of 'auto', 'forkserver', 'spawn', 'fork'"
MODULES = "a list of names of modules that can be imported"
ENVIRONMENT = "a dict of names and values"

IN_CONFIG = [
    ("start_method", "threads", METHODS),
    ("start_method", 3, METHODS),
    ("idle_timeout", -1, SECONDS_OR_NEVER),
    ("idle_timeout", "soon", SECONDS_OR_NEVER),
    ("idle_timeout", True, SECONDS_OR_NEVER),
    ("min_children", -1, COUNT),
    ("min_children", 1.5, COUNT),
    ("min_children", None, COUNT),
    ("min_children", 3, "at most the concurrency, which is 2"),
    ("start_timeout", 0, SECONDS),
    ("start_timeout", -5, SECONDS),
    ("start_timeout", None, SECONDS),
    ("preload", 5, MODULES),
    ("preload", ["a module"], MODULES),
    ("preload", ["json", "no_such_module"], "names of modules that exist: 'no_such_module' does not"),
    ("preload", ["no_such_package.module"], "names of modules that exist: 'no_such_package.module' does not"),
    ("child_env", ["A"], ENVIRONMENT),
    ("child_env", {"A": None}, ENVIRONMENT),
    ("child_env", {"A=B": "1"}, ENVIRONMENT),
]

IN_ENVIRONMENT = [
    ("START_METHOD", "threads", METHODS),
    ("IDLE_TIMEOUT", "-1", SECONDS_OR_NEVER),
    ("IDLE_TIMEOUT", "nan", SECONDS_OR_NEVER),
    ("MIN_CHILDREN", "many", COUNT),
    ("MIN_CHILDREN", "3", "at most the concurrency, which is 2"),
    ("START_TIMEOUT", "", SECONDS),
    ("START_TIMEOUT", "inf", SECONDS),
    ("PRELOAD", "no_such_module", "names of modules that exist: 'no_such_module' does not"),
    ("CHILD_ENV", "A", ENVIRONMENT),
]


def assert_refused(worker, name, value, accepted):
    """The worker ended with one sentence that names setting, value and what is accepted."""
    assert worker.wait_exit() != 0
    lines = worker.log().strip().splitlines()
    errors = [line for line in lines if name.lower() in line.lower()]
    assert len(errors) == 1, lines
    assert errors[0].startswith("Error: ")
    assert value in errors[0]
    assert accepted in errors[0]
    assert "Traceback" not in worker.log()
    assert not worker.pids()


@pytest.mark.parametrize(("name", "value", "accepted"), IN_CONFIG)
def test_wrong_in_the_configuration(start_worker, filesystem, name, value, accepted):
    """A wrong value in the configuration."""
    worker = start_worker(broker=filesystem, config={f"memsafe_{name}": value}, ready=False)
    assert_refused(worker, f"memsafe_{name}", repr(value), accepted)


@pytest.mark.parametrize(("name", "value", "accepted"), IN_ENVIRONMENT)
def test_wrong_in_the_environment(start_worker, filesystem, name, value, accepted):
    """A wrong value in the environment, which wins over a right one in the configuration."""
    right = {"memsafe_idle_timeout": 5, "memsafe_min_children": 1, "memsafe_start_timeout": 5}
    worker = start_worker(broker=filesystem, config=right, env={f"MEMSAFE_{name}": value}, ready=False)
    assert_refused(worker, f"MEMSAFE_{name}", value, accepted)


def test_environment_of_children_needs_an_interpreter_of_their_own(start_worker, filesystem):
    """``memsafe_child_env`` comes too late for children that are forked from the worker."""
    config = {"memsafe_start_method": "fork", "memsafe_child_env": {"A": "1"}}
    worker = start_worker(broker=filesystem, config=config, ready=False)
    assert_refused(worker, "memsafe_child_env", repr({"A": "1"}), "empty with memsafe_start_method='fork'")


@pytest.mark.parametrize(("minimum", "refused"), [(3, False), (4, True)])
def test_with_autoscale_its_upper_bound_counts(start_worker, redis, minimum, refused):
    """With ``--autoscale`` the minimum may be what that allows at most, and no more."""
    config = {"memsafe_min_children": minimum}
    worker = start_worker("proj", "--autoscale", "3,1", broker=redis, config=config, ready=not refused)
    if refused:
        assert_refused(worker, "memsafe_min_children", "4", "at most the concurrency, which is 3")


@pytest.mark.parametrize(
    ("config", "env"),
    [
        ({"memsafe_idle_timeout": None, "memsafe_min_children": 2, "memsafe_preload": []}, {}),
        ({"memsafe_idle_timeout": 0, "memsafe_start_timeout": 0.5, "memsafe_child_env": {}}, {}),
        ({"memsafe_min_children": -1}, {"MEMSAFE_MIN_CHILDREN": "0", "MEMSAFE_IDLE_TIMEOUT": "none"}),
        (
            {},
            {
                "MEMSAFE_PRELOAD": "json, csv",
                "MEMSAFE_CHILD_ENV": "A=1, B=2=3",
                "MEMSAFE_START_TIMEOUT": "5.5",
            },
        ),
    ],
)
def test_right_values_are_accepted(start_worker, config, env):
    """The edges of what is accepted; the environment wins."""
    start_worker(config=config, env=env)
