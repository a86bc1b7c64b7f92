"""The kernel kills a child for want of memory, whatever that does: the log says so, and nothing is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from harness import processes
from harness.waiting import DEADLINE

from memsafe_pool import MemoryLimitExceeded

pytestmark = pytest.mark.ours_only("other pools do not ask the kernel")

#: MiB: the limit, and what an idle child has, so that it is the largest by far.
LIMIT, FAT = 400, 200

#: Takes memory in a cgroup until the kernel has killed somebody else, and holds it.
HOG = """
import re, sys
entrance, counter = sys.argv[1:]
open(entrance, "w").write("0")
def kills():
    return int(re.search(r"^oom_kill (\\d+)", open(counter).read(), re.MULTILINE)[1])
before, hoard = kills(), []
while kills() == before:
    hoard.append(bytearray(b"x") * (1 << 20))
print("killed", flush=True)
sys.stdin.read()
"""

#: A program that does little for some seconds, and then takes more than there is at once.
LEAP = """
import sys, time
seconds, mib = map(int, sys.argv[1:])
time.sleep(seconds)
bytearray(b"x") * (mib << 20)
"""

#: The same in a cgroup, as the first that the kernel would kill.
STRANGER = """
import sys
open("/proc/self/oom_score_adj", "w").write("1000")
open(sys.argv[1], "w").write("0")
bytearray(b"x") * (int(sys.argv[2]) << 20)
"""

#: Runs a command in a cgroup, and shows it that cgroup as the highest one, without the limits above it.
HIDDEN = {
    1: """
        set -e
        inner=$1 top=$2 folder=$3; shift 3
        echo $$ > "$inner/cgroup.procs"
        sed "s/^hierarchical_memory_limit .*/hierarchical_memory_limit 9223372036854771712/" \\
            "$inner/memory.stat" > "$folder/stat"
        mkdir "$folder/inner"
        mount --bind "$inner" "$folder/inner"
        umount "$top"
        mount --move "$folder/inner" "$top"
        mount --bind "$folder/stat" "$top/memory.stat"
        exec "$@"
        """,
    2: """
        set -e
        inner=$1 top=$2; shift 3
        echo $$ > "$inner/cgroup.procs"
        exec unshare --cgroup --mount \\
            sh -c 'umount "$0" && mount -t cgroup2 none "$0" && exec "$@"' "$top" "$@"
        """,
}

KILLED = r"exited with 'signal 9 \(SIGKILL\)': the kernel has killed it, as memory was out"


def shortage(cgroup):
    """Have the kernel kill the largest process in a cgroup; memory is short until the end of the block."""
    return cgroup.running(HOG, cgroup.kills_file, says="killed")


@pytest.fixture
def cgroup(container):
    return container(LIMIT)


def has_kept(worker):
    """Have a fat child, idle; its pid."""
    child = worker.run("proj.keep", FAT)
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["idle"] == 1, "the child to be idle")
    return child


def test_an_idle_child(start_contained, cgroup):
    """It is told from a stray SIGKILL: also from one that comes right after it."""
    worker = start_contained(cgroup, config={"memsafe_max_child_growth": "1GiB"})
    child = has_kept(worker)
    worker.signal(signal.SIGSTOP)  # else it would let the child go when memory is short
    try:
        with shortage(cgroup):
            worker.until(lambda: child in processes.zombies(worker.pid), "the child to be killed")
    finally:
        worker.signal(signal.SIGCONT)
    worker.wait_for_log(rf"pid:{child} {KILLED}")
    child = worker.run("proj.pid")
    os.kill(child, signal.SIGKILL)
    worker.wait_for_log(rf"pid:{child} exited with 'signal 9 \(SIGKILL\)'(?!:)")


def test_a_task_that_had_not_begun(start_contained, cgroup):
    """It runs in another child, also if it is acknowledged early."""
    config = {"memsafe_max_child_growth": "1GiB", "memsafe_pause": False}
    worker = start_contained(cgroup, concurrency=1, config=config)
    child = has_kept(worker)
    os.kill(child, signal.SIGSTOP)
    result = worker.call("proj.pid")
    worker.until(lambda: worker.stats()["pool"]["memsafe"]["busy"] == 1, "the child to be given the task")
    with shortage(cgroup):
        worker.wait_for_log(rf"pid:{child} {KILLED}")
        worker.wait_for_log(r"is run again: proj\.pid had taken 0 MiB when looked at last, and the kernel")
    assert worker.get(result) != child


def test_a_child_that_starts(start_contained, cgroup):
    """That says nothing of the app: it is tried again, and is no reason to stop the worker."""
    worker = start_contained(cgroup, "obstacle")
    (worker.folder / "init").write_text("hoard")
    assert worker.run("obstacle.pid")
    worker.wait_for_log(
        r"failed to start: it ended before it was ready: signal 9 \(SIGKILL\): the kernel has killed it, "
    )


def test_a_program_of_a_task(start_contained, cgroup):
    """It is no child of ours, and no less dead: the log says what it was, and whose."""
    worker = start_contained(cgroup, "faulty", start_method="forkserver")
    assert worker.run("faulty.run_program", LEAP, 4, LIMIT) == -signal.SIGKILL
    worker.wait_for_log(
        rf"Memory was out, and the kernel has killed 1 process in {cgroup.folder}, no child of this pool: "
        r"it may have been python\S* \(pid \d+, \d+ MiB when looked at last\) of faulty\.run_program "
        rf"in ForkServerPoolWorker-\d+\. Limit {LIMIT} MiB"
    )
    assert "cannot be seen" not in worker.log()


def test_a_stranger(start_contained, cgroup):
    """A process under the limit that the pool does not know: that is said, too; of the last, at the end."""
    worker = start_contained(cgroup)
    worker.run("proj.pid")
    command = [sys.executable, "-c", STRANGER, str(cgroup.folder / "cgroup.procs"), str(LIMIT)]
    said = r"the kernel has killed 1 process in \S+, no child of this pool: more is not known\. Lim"
    for number in (1, 2):
        assert subprocess.run(command, check=False, timeout=DEADLINE).returncode == -signal.SIGKILL
        if number == 2:
            worker.signal(signal.SIGTERM)
            worker.wait_exit()
        worker.wait_for_log(said, count=number)


def test_a_limit_that_cannot_be_seen(start_worker, cgroup, tmp_path):
    """As outside of a container: what is known here was never reached, and the log says what to do."""
    inner = cgroup.child("inner")
    inner.limit(1 << 30)

    def hide(worker):
        script = ["sh", "-c", HIDDEN[inner.version], "sh", inner.folder, cgroup.folder.parent, tmp_path]
        worker.command = ["unshare", "--mount", *map(str, script), *worker.command]

    worker = start_worker(prepare=hide)
    worker.wait_for_log(r"Memory: limit 1024 MiB")
    with pytest.raises(MemoryLimitExceeded, match="the kernel has ended its child"):
        worker.run("proj.keep", LIMIT)
    worker.wait_for_log(
        r"the limit known here, 1024 MiB \(\S+\), was never reached: a lower one that cannot be seen from "
        r"here may hold\. If so, set memsafe_memory_budget"
    )
