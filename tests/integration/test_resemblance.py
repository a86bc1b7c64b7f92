"""What a task can see of its process is what it sees under prefork, but for what is listed here."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.ours_only("a comparison with prefork")

#: In all children, with the reason.
EVERYWHERE = {
    "oom score": "the kernel is to take a child before the worker",
    "signals": "our own handlers for the signals that prefork handles, and SIGUSR2 for memory limits",
    "start method": "prefork tells billiard which one to use; on Linux that is fork anyway",
}

#: What handlers have set in the worker, and what only the interpreter that the user has started has.
FRESH = {
    "contextvar",
    "decimal context",
    "decimal default",
    "excepthook",
    "float errors",
    "gc",
    "levels",
    "locale",
    "loggers",
    "main module",
    "numpy random",
    "recursion limit",
    "socket timeout",
    "switch interval",
    "warning filters",
}

WAYS = {
    "forkserver": ({"memsafe_start_method": "forkserver"}, set()),
    "fork": ({"memsafe_start_method": "fork"}, set()),
    "spawn": ({"memsafe_start_method": "spawn"}, FRESH),
    "fresh forkserver": (
        {"memsafe_start_method": "forkserver", "memsafe_child_env": {"A": "1"}},
        FRESH | {"environment"},
    ),
}


@pytest.fixture(scope="module")
def under_prefork(start_module_worker):
    return start_module_worker("resemblance", pool="prefork", concurrency=1).run("resemblance.look")


@pytest.mark.parametrize("way", WAYS)
def test_what_a_task_sees(start_worker, under_prefork, way):
    """Folder, limits, streams, loggers, warnings, locale and so on, after handlers have changed them."""
    config, differences = WAYS[way]
    found = start_worker("resemblance", config=config, concurrency=1).run("resemblance.look")
    assert found.keys() == under_prefork.keys()
    different = {name for name in found if found[name] != under_prefork[name]}
    assert different == differences | EVERYWHERE.keys(), {
        name: (under_prefork[name], found[name]) for name in different ^ (differences | EVERYWHERE.keys())
    }


@pytest.mark.parametrize("way", ["forkserver", "fork"])
def test_signals(start_worker, under_prefork, way):
    """Handled, ignored, or left to the system: as under prefork, but for the signal of soft memory limits."""
    found = start_worker("resemblance", config=WAYS[way][0], concurrency=1).run("resemblance.look")["signals"]

    def kinds(signals):
        return {name: handler if len(handler) == 1 else "handled" for name, handler in signals.items()}

    assert kinds(found) == kinds(under_prefork["signals"]) | {"SIGUSR2": "handled"}
