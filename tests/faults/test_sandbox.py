"""System calls that a container's seccomp profile refuses: the worker does without."""

from __future__ import annotations

import pytest
from billiard.exceptions import WorkerLostError
from harness import processes, sandbox

pytestmark = [
    pytest.mark.ours_only("how this pool takes faults"),
    pytest.mark.skipif(not sandbox.usable(), reason="a seccomp filter is made for Linux on x86-64 and arm64"),
]

#: By themselves, as each is what something hangs on; the others all at once.
ALONE = ("vfork", "prctl", "prlimit64", "memfd_create", "sched_getaffinity", "clone3", "waitid")
REFUSED = [*ALONE, ",".join(sorted(set(sandbox.SYSCALLS) - set(ALONE)))]


@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
@pytest.mark.parametrize("names", REFUSED, ids=lambda names: names if names in ALONE else "others")
def test_refused_calls(start_worker, names, error):
    """Tasks run, a child's end is known, and nothing is a traceback. vfork alone costs no start method."""

    def confine(worker):
        worker.command = sandbox.command(error, names.split(","), worker.command)

    worker = start_worker("faulty", prepare=confine)
    assert worker.run("proj.add", 1, 2) == 3
    assert "Traceback" not in worker.log()
    [child] = worker.children()
    with pytest.raises(WorkerLostError, match="SIGKILL"):
        worker.run("proj.die")
    worker.until(lambda: child not in processes.children(worker.pid), "the child to be reaped")
    assert worker.run("proj.add", 3, 4) == 7
    if names == "vfork":
        assert worker.stats()["pool"]["memsafe"]["start_method"] == "forkserver"
    assert worker.stop() == 0
    assert "failed to start" not in worker.log()
