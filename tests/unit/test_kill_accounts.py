"""Who is thought to have been killed by the kernel, and what is said of it."""

from __future__ import annotations

import pytest

from memsafe_pool import kernel_kills
from memsafe_pool.kernel_kills import KILL_TICKS, QUIET_SECONDS, KernelKills
from memsafe_pool.probe import Level, Reading

MIB = 1 << 20


class Account:
    """An account of kills, the counter that it is told, and what it has said."""

    def __init__(self, monkeypatch, caplog, folder):
        self.folder, self.log, self.now, self.count, self.cgroup = folder, caplog, 1000.0, 5, str(folder)
        self.forkserver = None
        monkeypatch.setattr(kernel_kills.time, "monotonic", lambda: self.now)
        self.kills = KernelKills(self.reading(), list, lambda: "So it is.")

    def reading(self):
        source = str(self.folder / "memory.limit_in_bytes")
        charged = str(self.folder / "memory.usage_in_bytes")
        levels = (
            Level(400 * MIB, "max", source, 100 * MIB, charged, charged_file=charged),
            Level(4096 * MIB, "physical", "physical memory", 1000 * MIB, "meminfo"),
        )
        return Reading(
            400 * MIB, "max", source, 100 * MIB, charged, 400 * MIB, source, None, None, 4096 * MIB,
            self.cgroup, self.count, oom_group=False, pressure=None, levels=levels,
        )  # fmt: skip

    def claim(self):
        return self.kills.claim(self.reading())

    def tick(self, times=1, seconds=1.0):
        """Let time pass; return what is said meanwhile."""
        self.log.clear()
        for _ in range(times):
            self.now += seconds
            self.kills.tick(self.reading(), self.forkserver)
        return [record.getMessage() for record in self.log.records]


@pytest.fixture
def account(monkeypatch, caplog, tmp_path):
    (tmp_path / "memory.max_usage_in_bytes").write_text(f"{400 * MIB}\n")
    return Account(monkeypatch, caplog, tmp_path)


def test_each_kill_is_claimed_once(account):
    """What the kernel had killed before counts for nobody."""
    assert not account.claim()
    account.count += 2
    assert [account.claim() for _ in range(3)] == [True, True, False]
    assert not account.tick(10)


def test_a_child_may_take_some_ticks_to_end(account):
    """Until then nothing is said; a child that ends later was not hit by it."""
    account.count += 1
    assert not account.tick(KILL_TICKS)
    assert account.claim()
    account.count += 1
    [line] = account.tick(KILL_TICKS + 1)
    assert line == (
        f"Memory was out, and the kernel has killed 1 process in {account.folder}, no child of this pool: "
        "more is not known. So it is."
    )
    assert not account.claim()


def test_who_takes_time_to_end(account, monkeypatch):
    """The kernel counts a kill before its victim has gone: that is looked for again when it is said."""
    account.forkserver = 4240
    account.tick()
    living = {4240}
    monkeypatch.setattr(
        kernel_kills, "_gone", lambda those: {pid: text for pid, text in those.items() if pid not in living}
    )
    account.count += 1
    assert not account.tick()
    living.clear()
    account.forkserver = 4250
    [line] = account.tick(KILL_TICKS)
    assert "it may have been the forkserver (pid 4240). So it is." in line


def test_many_kills_are_few_lines(account):
    """All are counted, and said once a minute."""
    lines = []
    for _ in range(3 * int(QUIET_SECONDS)):
        account.count += 1
        lines += account.tick()
    assert len(lines) == 3
    assert "has killed 1 process in" in lines[0]
    assert f"has killed {QUIET_SECONDS:g} processes in" in lines[1]


def test_the_rest_is_said_at_the_end(account):
    """Also what was noticed just now; and nothing where all is said."""
    account.count += 1
    account.tick(KILL_TICKS + 1)
    account.log.clear()
    account.kills.close(account.reading())
    assert not account.log.records
    account.count += 2
    account.tick(KILL_TICKS + 1)
    account.count += 5
    account.kills.close(account.reading())
    [record] = account.log.records
    assert "has killed 7 processes in" in record.getMessage()


def test_another_cgroup_counts_anew(account):
    """Its kills were before the worker came to it."""
    account.count, account.cgroup = 70, "/elsewhere"
    assert not account.claim()
    assert not account.tick(10)
    account.count += 1
    assert account.claim()


@pytest.mark.parametrize(
    ("name", "text", "hidden"),
    [
        ("memory.max_usage_in_bytes", f"{399 * MIB}\n", False),
        ("memory.max_usage_in_bytes", f"{200 * MIB}\n", True),
        ("memory.events", "low 0\nhigh 0\nmax 9\noom 1\noom_kill 6\n", False),
        ("memory.events", "low 0\nhigh 0\nmax 9\noom 0\noom_kill 6\n", True),
    ],
)
def test_a_limit_that_was_never_reached(account, name, text, hidden):
    """Then another one may be the reason: that is said once, whoever was hit."""
    (account.folder / name).write_text(text)
    account.count += 1
    assert account.claim()
    lines = account.tick()
    account.count += 1
    assert account.claim()
    lines += account.tick()
    assert ["memsafe_memory_budget" in line for line in lines] == [True] * hidden
