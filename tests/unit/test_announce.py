"""What the worker says of memory at its start, on recorded trees."""

from __future__ import annotations

import logging

import pytest
from harness import trees
from harness.trees import GB, MB, tree, v1, v2

from memsafe_pool import budget as budgets
from memsafe_pool.announce import Surroundings, lines, say
from memsafe_pool.probe import Probe

V1 = "/sys/fs/cgroup/memory"
V2 = "/sys/fs/cgroup"

SWAP = {"/proc/meminfo": trees.meminfo(swap=1 * GB)}
SERVICE = "/sys/fs/cgroup/system.slice/celery.service"
INVOKED = {"INVOCATION_ID": "1f"}


class Told:
    """What is said on a tree."""

    def __init__(self, folder, files, setting="auto", environ=None, **facts):
        self.folder = str(folder)
        tree(folder, files)
        reading = Probe(folder).read()
        self.surroundings = Surroundings.read(folder, environ=environ or {})
        facts = {"worker_bytes": 85 * MB, "child_bytes": 12 * MB, "bound": 20, **facts}
        budget = budgets.find(setting, reading.lowest_limit_bytes)
        line, warnings = lines(reading, budget, self.surroundings, **facts)
        self.line = line.replace(self.folder, "")
        self.warnings = [text.replace(self.folder, "") for text in warnings]

    @property
    def warning(self):
        [text] = self.warnings
        return text


@pytest.fixture
def told(tmp_path):
    def tell(*files, **arguments):
        return Told(tmp_path, {path: text for each in files for path, text in each.items()}, **arguments)

    return tell


def test_in_a_container(told):
    """The limit and its file, the budget, what worker and child cost, and what fits."""
    it = told(trees.DOCKER_V2)
    assert it.line == (
        "Memory: limit 512 MiB (/sys/fs/cgroup/memory.max), budget 461 MiB; the worker has 85 MiB, "
        "a child about 12 MiB before its first task: room for 21 children at once, -c is 20."
    )
    assert it.warnings == []


def test_on_a_machine(told):
    """Without a limit the machine's memory is it."""
    it = told(trees.UNLIMITED_V2)
    assert it.line.startswith("Memory: limit 16384 MiB (physical memory), budget 14746 MiB; ")
    assert it.warnings == []


def test_room_for_one(told):
    """One child is a child."""
    assert "room for 1 child at once" in told(trees.DOCKER_V2, child_bytes=200 * MB).line


def test_no_room(told):
    """Not one child: said as a warning, too."""
    it = told(trees.DOCKER_V2, v2(V2, maximum=512 * MB, used=458 * MB))
    assert "room for 0 children" in it.line
    assert it.warning.startswith(
        "There is no room for a child: 3 MiB are left of the memory budget of 461 MiB, and a child takes "
        "about 12 MiB"
    )


def test_nothing_left(told):
    """Above the budget it is 0 that is left, not less."""
    assert ": 0 MiB are left" in told(trees.DOCKER_V2, v2(V2, maximum=512 * MB, used=500 * MB)).warning


def test_a_size(told):
    """The pool's own memory counts against it, not what others use."""
    it = told(trees.DOCKER_V2, setting=109 * MB)
    assert "budget 109 MiB" in it.line
    assert "room for 2 children" in it.line


def test_the_room_of_a_fuller_pod(told):
    """What fits is by the limit with the least room; the limit that is named is the lowest."""
    it = told(trees.KUBERNETES_V2_HOST)
    assert it.line.startswith("Memory: limit 1024 MiB (")
    assert "room for 0 children" in it.line


def test_a_budget_above_the_limit(told):
    """The budget's own warning is among them."""
    assert told(trees.DOCKER_V2, setting=2 * GB).warning.startswith("memsafe_memory_budget is 2048 MiB, but ")


def test_all_are_killed_together(told):
    """Kubernetes since 1.28."""
    it = told(trees.KUBERNETES_V2, environ=INVOKED)
    assert it.warning.startswith(
        "The kernel ends all processes of /sys/fs/cgroup/worker.service when it ends one"
    )


# systemd


def test_a_unit(told):
    """A service that says nothing of OOMPolicy is stopped when one of its processes is killed."""
    it = told(trees.UNLIMITED_V2, environ=INVOKED)
    assert it.surroundings.unit == "celery.service"
    assert it.warning.startswith(
        "This is the systemd unit celery.service. Unless it has OOMPolicy=continue, "
    )


@pytest.mark.parametrize(
    "files",
    [
        trees.UNLIMITED_V2,  # and no INVOCATION_ID
        trees.DOCKER_V2,
        trees.WSL,
        trees.SYSTEMD_USER,  # a terminal's scope within a service
    ],
)
def test_no_unit(told, files):
    """Not started by systemd, or not as a service."""
    it = told(files, environ=INVOKED if files is not trees.UNLIMITED_V2 else {})
    assert it.surroundings.unit is None
    assert it.warnings == []


CONTINUE, STOP = "[Service]\nOOMPolicy=continue\n", "[Service]\n#OOMPolicy=continue\n OOMPolicy = stop\n"


@pytest.mark.parametrize(
    ("files", "warned"),
    [
        ({"/etc/systemd/system/celery.service": CONTINUE}, False),
        ({"/usr/lib/systemd/system/celery.service": CONTINUE}, False),
        ({"/usr/lib/systemd/system/celery.service": STOP}, True),
        ({"/usr/lib/systemd/system/other.service": CONTINUE}, True),
        (
            {
                "/etc/systemd/system/celery.service": STOP,
                "/usr/lib/systemd/system/celery.service": CONTINUE,
            },
            True,
        ),
        (
            {
                "/usr/lib/systemd/system/celery.service": STOP,
                "/etc/systemd/system/celery.service.d/memory.conf": CONTINUE,
            },
            False,
        ),
        (
            {
                "/etc/systemd/system/celery.service.d/10.conf": CONTINUE,
                "/run/systemd/system/celery.service.d/20.conf": STOP,
                "/run/systemd/system/celery.service.d/30.conf~": CONTINUE,
            },
            True,
        ),
    ],
)
def test_a_unit_that_says_so(told, files, warned):
    """Its file is looked at, and what adds to it, in systemd's order."""
    it = told(trees.UNLIMITED_V2, files, environ=INVOKED)
    assert bool(it.warnings) == warned


def test_a_unit_made_from_a_template(told):
    """``celery@.service`` is the file of ``celery@1.service``."""
    place = {
        "/proc/self/cgroup": "0::/system.slice/celery@1.service\n",
        **v2("/sys/fs/cgroup/system.slice/celery@1.service", used=1 * GB),
    }
    it = told(trees.UNLIMITED_V2, place, environ=INVOKED)
    assert it.surroundings.unit == "celery@1.service"
    it = told({"/etc/systemd/system/celery@.service": CONTINUE}, environ=INVOKED)
    assert it.surroundings.unit is None


def test_swap_is_said(told):
    """With how much."""
    it = told(trees.DOCKER_V2, SWAP)
    assert it.warning.startswith("Memory may be swapped out under the limit (1024 MiB): ")


def test_swap_of_a_machine(told):
    """There is no limit that it could get a task over."""
    assert told(trees.UNLIMITED_V2, SWAP).warnings == []


# The rest


@pytest.mark.parametrize(("text", "warned"), [("0\n", False), ("1\n", False), ("2\n", True), ("", False)])
def test_overcommit(told, text, warned):
    """Only 2 is strict."""
    it = told(trees.DOCKER_V2, {"/proc/sys/vm/overcommit_memory": text})
    assert it.surroundings.strict_overcommit == warned
    if warned:
        assert it.warning.startswith("vm.overcommit_memory is 2: ")


def test_several_at_once(told):
    """Each has a line of its own."""
    it = told(
        {**trees.DOCKER_V1, **v1(V1, limit=512 * MB, used=500 * MB)},
        SWAP,
        {"/proc/sys/vm/overcommit_memory": "2\n"},
        setting=1 * GB,
    )
    assert len(it.warnings) == 4
    assert all("\n" not in text and text[-1] == "." for text in [it.line, *it.warnings])


@pytest.mark.parametrize("name", sorted(trees.ALL))
def test_every_tree(told, name):
    """There is a line for each, and no failure."""
    it = told(trees.ALL[name], environ=INVOKED)
    assert it.line.startswith("Memory: limit ")


def test_say(caplog):
    """The line is information, the rest warnings; a % in a path means nothing."""
    with caplog.at_level(logging.INFO):
        say("a %s", ["b %d", "c"])
    assert [(each.levelname, each.getMessage()) for each in caplog.records] == [
        ("INFO", "a %s"),
        ("WARNING", "b %d"),
        ("WARNING", "c"),
    ]


def test_this_machine():
    """Its own files can be read."""
    reading = Probe().read()
    found = Surroundings.read()
    line, _ = lines(
        reading,
        budgets.find("auto", reading.lowest_limit_bytes),
        found,
        worker_bytes=1,
        child_bytes=1,
        bound=1,
    )
    assert line.endswith("-c is 1.")
