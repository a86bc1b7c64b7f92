"""What each function of `memsafe_pool.native` costs, and whether it leaks memory or descriptors.

Each is called 100,000 times, the slow ones less often, in a process of its own that has imported what a child
has; first with the C extension, then without it, through ctypes. Growth is that of resident memory and of
open descriptors from the end of a first hundredth of the calls to the end of all; 256 KB are the kernel's
own uncertainty about resident memory (it adds up what each CPU has counted in portions).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import processes
import row

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CALLS = 100_000
#: What takes long is called so many times less often.
SLOW = {"release_heap": 50, "missing": 5}
UNCERTAIN_BYTES = 256 << 10


def calls() -> dict[str, Callable[[], Any]]:
    """All functions, with arguments that change nothing in this process."""
    from memsafe_pool import native

    arguments: dict[str, tuple[Any, ...]] = {
        "raise_oom_score_adj": (0,),
        "set_child_subreaper": (False,),
        "set_parent_death_signal": (0,),
    }
    found = {}
    for name in native.__all__:
        function = getattr(native, name)
        if callable(function) and not isinstance(function, type):
            found[name] = lambda f=function, n=name: f(*arguments.get(n, ()))
    return found


def descriptors() -> int:
    """Count this process's open descriptors."""
    return len(os.listdir("/proc/self/fd"))


def measure(count: int) -> dict[str, tuple[int, float, int, int]]:
    """Call everything: number of calls, microseconds per call, bytes and descriptors grown by."""
    results = {}
    for name, function in calls().items():
        times = max(count // SLOW.get(name, 1), 100)
        for _ in range(times // 100):
            function()
        gc.collect()  # so that garbage is not taken for a leak
        bytes_before, descriptors_before = processes.resident_bytes(os.getpid()), descriptors()
        began = time.perf_counter()
        for _ in range(times):
            function()
        spent = time.perf_counter() - began
        gc.collect()
        grown = processes.resident_bytes(os.getpid()) - bytes_before
        results[name] = times, spent / times * 1e6, grown, descriptors() - descriptors_before
    return results


def in_a_process_of_its_own(count: int, *, extension: bool) -> dict[str, tuple[int, float, int, int]]:
    """Run `measure` in a new interpreter."""
    script = "import json, sys; import celery, numpy, pandas; "
    if not extension:
        script += "sys.modules['memsafe_pool._native'] = None; "
    script += f"import native_calls; print(json.dumps(native_calls.measure({count})))"
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.abspath(__file__))}
    done = subprocess.run([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def rows(options: row.Options) -> Iterator[row.Row]:
    """One row for each function."""
    count = CALLS // 10 if options.quick else CALLS
    plain = in_a_process_of_its_own(count, extension=False)
    for name, (times, spent, grown, opened) in in_a_process_of_its_own(count, extension=True).items():
        grown_plain, opened_plain = plain[name][2:]
        yield row.Row(
            f"native.{name}, {times:,} calls",
            f"ctypes {plain[name][1]:.1f} us, {grown_plain / 1024:+.0f} KB, {opened_plain:+} descriptors",
            f"{spent:.1f} us, {grown / 1024:+.0f} KB, {opened:+} descriptors",
            must="no growth",
            met=max(grown, grown_plain) <= UNCERTAIN_BYTES and opened <= 0 and opened_plain <= 0,
        )


if __name__ == "__main__":
    row.main(rows, __doc__)
