"""What children report of their memory, and what they give back."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import pytest

from memsafe_pool.memory import private_bytes

pytestmark = [
    pytest.mark.ours_only("reports and trims are this pool's"),
    pytest.mark.skipif(
        sys.platform != "linux", reason="the kernel's peak counter can be reset on Linux only"
    ),
]

MIB = 1 << 20


@pytest.fixture(scope="module")
def worker(start_module_worker, start_method):
    return start_module_worker("proj", start_method=start_method, concurrency=1)


@pytest.fixture(scope="module")
def untrimmed(start_module_worker, start_method):
    return start_module_worker(
        "proj", start_method=start_method, concurrency=1, config={"memsafe_trim_idle": None}
    )


def memsafe(worker):
    return worker.stats()["pool"]["memsafe"]


def row(worker, pid):
    [found] = [row for row in memsafe(worker)["table"] if row["pid"] == pid]
    return found


def peaks_of(worker, task, count):
    """The peaks of a task when so many runs are known: a result can be there before the report."""

    def known():
        found = memsafe(worker)["peaks"].get(task)
        return found if found and found["count"] == count else None

    return worker.until(known, f"{count} peaks of {task}")


def close(peak, mib):
    """Whether it is as exact as it is called."""
    return abs(peak - mib * MIB) <= max(4 * MIB, 0.05 * mib * MIB)


def test_each_task_has_its_own_peak(untrimmed, start_method):
    """Large, small, and small after large: what the task itself needed, whatever the child has."""
    for count, mib in enumerate((100, 1, 30, 250, 2), start=1):
        untrimmed.run("proj.peak", mib)
        last = peaks_of(untrimmed, "proj.peak", count)
        assert close(last["last"], mib), (mib, last)
    assert close(last["max"], 250)
    if start_method == "forkserver":
        assert last["exact"] == 5
        assert close(last["median"], 30)
    else:  # a spawned child loads some MiB with its first task: small peaks after it may hide in as much
        assert last["exact"] >= 2


def test_a_peak_in_free_heap_is_a_lower_bound(start_worker, start_method):
    """A task that fits into heap which an earlier one has left free needs more than is seen."""
    untrimmed = start_worker(
        "proj", start_method=start_method, concurrency=1, config={"memsafe_trim_idle": None}
    )
    child = untrimmed.run("proj.small_blocks", 100, 100)
    assert peaks_of(untrimmed, "proj.small_blocks", 1)["exact"] == 1
    assert row(untrimmed, child)["trimmable"] > 80 * MIB
    for count, mib in enumerate((60, 5, 90), start=2):
        assert untrimmed.run("proj.small_blocks", mib) == child
        peaks = peaks_of(untrimmed, "proj.small_blocks", count)
        assert peaks["last"] < mib * MIB
    assert peaks["exact"] == 1


def test_a_child_trims_to_see_what_a_task_needs(start_worker, start_method):
    """Before one run in some, without a pause between tasks; then its peak is that of a fresh child."""
    worker = start_worker(
        "proj", start_method=start_method, concurrency=1, config={"memsafe_trim_idle": 3600}
    )
    worker.run("proj.small_blocks", 100, 1000)
    worker.run("proj.small_blocks", 60, 1000)
    peaks = peaks_of(worker, "proj.small_blocks", 2)
    assert peaks["exact"] == 2
    assert close(peaks["last"], 60), peaks
    assert memsafe(worker)["trims"] == 1


def test_a_result_and_arguments_are_in_it(untrimmed):
    """What a task is given and what it returns is its own, too."""
    assert len(untrimmed.run("proj.echo", "x" * (20 * MIB))) == 20 * MIB
    assert peaks_of(untrimmed, "proj.echo", 1)["last"] > 60 * MIB
    assert len(untrimmed.run("proj.text", 30 * MIB)) == 30 * MIB
    assert peaks_of(untrimmed, "proj.text", 1)["last"] > 60 * MIB


def test_the_table_says_what_a_child_runs(worker):
    """Name, id and how long; its memory as it is now, not as it was at its last report."""
    worker.run("proj.pid")
    gate = worker.gate()
    result = worker.call("proj.hold_grown", gate.path, 120)
    child = gate.wait_started()[result.id]
    busy = row(worker, child)
    assert (busy["state"], busy["task"], busy["task_id"]) == ("busy", "proj.hold_grown", result.id)
    assert 0 <= busy["running"] < 60
    assert busy["private"] - busy["private_growth"] > 100 * MIB
    gate.open()
    worker.get(result)
    worker.until(lambda: row(worker, child)["state"] == "idle", "the child to be idle")
    idle = row(worker, child)
    assert (idle["task"], idle["task_id"], idle["running"]) == (None, None, None)
    assert close(idle["peak"], 120)
    assert idle["peak_rss"] > 120 * MIB
    assert idle["private"] < busy["private"] - 100 * MIB


def test_growth_is_private(worker):
    """What a child keeps is its private memory, by itself and in the sum of all; the kernel says the same."""
    child = worker.run("proj.pid")
    before = memsafe(worker)["memory"]
    assert worker.run("proj.keep", 50) == child
    worker.until(lambda: row(worker, child)["private_growth"] > 50 * MIB, "the report of the growth")
    after = memsafe(worker)["memory"]
    assert abs(row(worker, child)["private"] - private_bytes(child)) < 5 * MIB
    assert 48 * MIB < after["children"] - before["children"] < 60 * MIB
    assert after["total"] == after["worker"] + after["forkserver"] + after["children"]
    assert 0 < after["used"] < after["limit"] <= psutil.virtual_memory().total


def test_an_idle_child_gives_memory_back(worker):
    """Heap that fragments keep is given back when there is no work, and said so; the child stays."""
    child = worker.run("proj.small_blocks", 100, 100)
    worker.until(lambda: row(worker, child)["trimmed"] > 80 * MIB, "the child to give memory back")
    found = row(worker, child)
    assert 1 <= found["trims"] <= memsafe(worker)["trims"]
    assert found["rss"] < psutil.Process(child).memory_info().rss + 5 * MIB
    assert found["peak_rss"] - found["rss"] > 80 * MIB
    assert worker.run("proj.pid") == child


def test_never_means_never(untrimmed):
    """With ``memsafe_trim_idle`` None free heap stays until it is used or the child goes."""
    child = untrimmed.run("proj.small_blocks", 50, 100)
    resident = psutil.Process(child).memory_info().rss
    untrimmed.run("proj.sleep", 1)  # longer than the default
    assert memsafe(untrimmed)["trims"] == 0
    assert psutil.Process(child).memory_info().rss > resident - 5 * MIB


def test_large_blocks_go_back_when_idle(worker):
    """60 blocks of 8 MiB that were freed are gone soon after, whatever the allocator has kept of them."""
    child = worker.run("proj.pid")
    before, _ = worker.run("proj.buffers", 60, 8)
    worker.until(lambda: psutil.Process(child).memory_info().rss < 1.25 * before, "the memory to go back")


def test_blocks_are_not_taken_from_the_kernel_each_time(untrimmed):
    """Three blocks of 3 MiB, freed and taken again: taken anew, 300 rounds of them are 691,200 page faults.

    glibc does so, with any pool, in a process that has not freed a larger block yet.
    """
    assert untrimmed.run("proj.faults", 3, 300) < 20_000


def test_the_kernel_is_to_take_children_first(worker):
    """A child's ``oom_score_adj`` is 300 above the worker's, at most 1000."""
    child = worker.run("proj.pid")
    own = int(Path(f"/proc/{worker.pid}/oom_score_adj").read_text())
    assert int(Path(f"/proc/{child}/oom_score_adj").read_text()) == min(own + 300, 1000)


def test_a_restarted_pool_has_another_generation(start_worker, start_method):
    """``pool_restart`` shows in the table; the peaks of tasks stay known."""
    worker = start_worker("proj", start_method=start_method, config={"worker_pool_restarts": True})
    first = worker.run("proj.peak", 10)
    assert row(worker, first)["generation"] == 0
    worker.control("pool_restart")
    worker.until(lambda: first not in worker.children(), "the first child to go")
    second = worker.run("proj.peak", 10)
    assert row(worker, second)["generation"] == 1
    assert row(worker, second)["start_method"] == start_method
    peaks_of(worker, "proj.peak", 2)


def test_without_the_extension_it_is_the_same(start_worker, start_method):
    """Through ctypes and /proc: peaks, private memory and trims; the worker says once what is missing."""

    def prepare(worker):
        (worker.folder / "sitecustomize.py").write_text(
            "import sys\nsys.modules['memsafe_pool._native'] = None\n"
        )
        worker.env["PYTHONPATH"] = f"{worker.folder}:{worker.env['PYTHONPATH']}"

    worker = start_worker("proj", start_method=start_method, concurrency=1, prepare=prepare)
    worker.wait_for_log(
        "Memory of children is looked after as far as that goes here: the C extension is not built"
    )
    child = worker.run("proj.small_blocks", 100, 1000)
    assert worker.run("proj.small_blocks", 60) == child
    assert close(peaks_of(worker, "proj.small_blocks", 2)["last"], 60)
    worker.until(lambda: memsafe(worker)["trims"], "the child to give memory back")
    assert worker.log().count("Memory of children is looked after") == 1
