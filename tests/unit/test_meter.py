"""What a child measures of its tasks, in a process of its own: each script is a child without a worker."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import gc, os, sys, time
from memsafe_pool import meter as module, native, wire
from memsafe_pool.meter import Meter

MIB = 1 << 20

def small(mib, keep=0):
    # Blocks of the C heap, too large for the arenas of Python: 752 bytes each, and 8 for the pointer.
    blocks = [None] * (mib * MIB // 760)
    for at in range(len(blocks)):
        blocks[at] = bytes(700)
    return blocks[::keep] if keep else None

def tiny(mib, keep=0):
    # Objects of Python's own arenas: 144 bytes each, 8 for the pointer; a pool has 113.
    objects = [None] * (mib * MIB // 153)
    for at in range(len(objects)):
        objects[at] = bytes(100)
    return objects[::keep] if keep else None

def large(mib, keep=0):
    bytearray(mib * MIB)

def buffers(mib, keep=0):
    # Below what glibc maps by itself, once one of them was freed.
    blocks = [bytearray(MIB) for _ in range(mib)]

def measure(meter, task, *args):
    meter.begin()
    result = task(*args)
    return wire.Report.unpack(meter.end()), result

def close(report, mib):
    # As exact as it says.
    doubt = max(module.DOUBT_BYTES, module.DOUBT_SHARE * mib * MIB) + MIB
    said = report.peak / MIB, report.hidden / MIB, mib
    assert report.peak <= mib * MIB + doubt, said
    assert report.peak + report.hidden >= mib * MIB - doubt, said
"""


def run(code: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELUDE + textwrap.dedent(code)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="the kernel's peak counter can be reset on Linux only"
)


@linux_only
@pytest.mark.parametrize("task", ["large", "buffers", "small", "tiny"])
def test_what_a_task_needs_in_a_fresh_child(task):
    """It is within the bounds that are said, apart by what the child has kept at most; exact after a trim."""
    run(f"""
        meter = Meter(8 * MIB, None)
        report, _ = measure(meter, {task}, 40)
        assert report.exact, report
        close(report, 40)
        kept = []
        for mib in (1, 200, 2, 50, 1, 120, 30, 3):
            had = report.trimmable
            report, rest = measure(meter, {task}, mib, 100)
            close(report, mib)
            assert report.hidden <= had, (report, had)
            kept.append(rest)
        kept.clear()
        for mib in (1, 200, 2, 50):
            meter.trim()
            report, rest = measure(meter, {task}, mib, 100)
            assert report.exact, report
            close(report, mib)
    """)


@linux_only
def test_what_leaks_is_not_what_a_task_needs():
    """Before a trim nobody can tell it from free heap, and it is said; after it the peak is exact."""
    run("""
        meter, leaked = Meter(8 * MIB, None), []
        def leak():
            leaked.append(bytearray(b"x") * (5 * MIB))
            large(20)
        for number in range(10):
            report, _ = measure(meter, leak)
            close(report, 25)
            assert report.exact is (number < 1), (number, report)
        meter.trim()
        report, _ = measure(meter, leak)
        assert report.exact, report
        close(report, 25)
    """)


@linux_only
def test_what_the_first_run_loads_is_in_that_run_alone():
    """A module or a model is what the task needs in a fresh child, and not in one that has it."""
    run("""
        meter, model = Meter(8 * MIB, None), []
        def predict():
            if not model:
                model.append(bytearray(b"x") * (60 * MIB))
            large(10)
        report, _ = measure(meter, predict)
        assert report.exact
        close(report, 70)
        report, _ = measure(meter, predict)
        assert not report.exact
        assert report.peak < 15 * MIB and report.peak + report.hidden > 60 * MIB, report
        meter.trim()
        report, _ = measure(meter, predict)
        assert report.exact
        close(report, 10)
    """)


@linux_only
def test_reading_a_model_is_no_peak():
    """Memory that a task only reads is not its own, however much it is."""
    run("""
        model = bytearray(b"x") * (200 * MIB)
        meter = Meter(8 * MIB, None)
        report, _ = measure(meter, sum, memoryview(model)[:: 4096])
        assert report.exact and report.peak <= MIB, report
    """)


@linux_only
def test_a_trim_for_the_number_alone_is_paid_by_work():
    """The first may be made at once; the next when as much CPU time was spent as makes it a small share."""
    run("""
        module.TRIM_PRICE = 20
        meter = Meter(8 * MIB, None)
        assert meter.affords_trim
        kept = measure(meter, small, 100, 100)[1]
        began = time.process_time()
        meter.trim(collect=False)
        spent = time.process_time() - began
        assert not meter.affords_trim
        began = time.process_time()
        while not meter.affords_trim:
            sum(range(10000))
        assert time.process_time() - began > 10 * spent
    """)


@linux_only
def test_trims_that_are_undone_become_rarer():
    """What is given back and needed again soon is kept for longer, but not for long."""
    run("""
        meter = Meter(8 * MIB, 0.5)
        delays = []
        for _ in range(5):
            rest = measure(meter, small, 30, 100)[1]
            delays.append(meter.patience)
            assert meter.trim()[0] > 10 * MIB
        assert delays == [0.5, 0.5, 1.0, 2.0, 2.0], delays
        module.SOON_SECONDS = 0.0
        rest = measure(meter, small, 30, 100)[1]
        meter.trim()
        rest = measure(meter, small, 30, 100)[1]
        assert meter.patience == 0.5
    """)


def test_a_result_that_goes_after_the_report():
    """It is still there when its task is measured, and must not be counted against the next one."""
    run("""
        meter = Meter(8 * MIB, None)
        for _ in range(3):
            measure(meter, int)
        meter.begin()
        result = bytearray(50 * MIB)
        large_one = wire.Report.unpack(meter.end(len(result)))
        del result
        quiet = measure(meter, int)[0]
        assert large_one.resident - quiet.resident > 45 * MIB, (large_one, quiet)
        if sys.platform == "linux":
            close(measure(meter, large, 30)[0], 30)
    """)


def test_what_is_repeated_is_what_was_said_last():
    """The worker has nothing else: the report itself is not sent again."""
    run("""
        meter = Meter(8 * MIB, None)
        said, repeated = None, 0
        for number in range(300):
            meter.begin()
            if number % 7 == 0:
                tiny(1)
            last, said = said, meter.end()
            assert not meter.repeated or said == last, number
            repeated += meter.repeated
        assert repeated > 100, repeated
    """)


def test_tasks_that_change_nothing_are_not_measured_at_length():
    """They have the same report, until so many of them have had it, or something has changed."""
    run("""
        meter = Meter(8 * MIB, None)
        seen = []
        real = meter._pack
        meter._pack = lambda *args, **options: seen.append(1) or real(*args, **options)
        for _ in range(1000):
            measure(meter, int)
        assert 10 < len(seen) < 500, len(seen)
        kept = bytearray(b"x") * (5 * MIB)
        before = len(seen)
        assert measure(meter, int)[0].peak >= 0
        assert len(seen) == before + 1
    """)


@linux_only
def test_writing_to_what_was_shared_is_seen_soon():
    """It changes neither resident memory nor its peak, but page faults tell."""
    run("""
        from memsafe_pool.memory import private_bytes
        model = bytearray(b"x") * (40 * MIB)
        pid = os.fork()
        if pid == 0:
            module.START_SECONDS = 0
            meter = Meter(8 * MIB, None)
            def write(pages=iter(range(0, 40 * MIB, 4096))):
                for at, _ in zip(pages, range(100)):
                    model[at] = 1
            for _ in range(200):
                report, _ = measure(meter, write)
            deadline = time.monotonic() + 10
            while abs(report.private - private_bytes()) > 3 * MIB and time.monotonic() < deadline:
                report, _ = measure(meter, sum, range(10000))
            assert abs(report.private - private_bytes()) <= 3 * MIB, (report, private_bytes())
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    """)


@linux_only
def test_reading_private_memory_is_paid_by_cpu_time():
    """Many children that share a few cores have much time, and little of the CPU, each."""
    run("""
        from memsafe_pool import memory
        module.START_SECONDS, module.PRIVATE_PRICE = 0, 10
        cost, readings, real = 0.005, [], memory.private_bytes
        def private_bytes():
            end = time.process_time() + cost
            while time.process_time() < end:
                pass
            readings.append(1)
            return real()
        memory.private_bytes = private_bytes
        began = time.process_time()
        meter = Meter(8 * MIB, None)
        def touch_and_wait():
            bytes(2 * MIB)[::4096]
            time.sleep(0.01)
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            measure(meter, touch_and_wait)
        used = time.process_time() - began
        assert 1 <= len(readings) <= 1 + used / (cost * module.PRIVATE_PRICE), (len(readings), used)
    """)


@linux_only
def test_files_that_go_are_no_peak():
    """A task that unmaps a large file has needed nothing."""
    run("""
        import mmap, tempfile
        with tempfile.TemporaryFile() as file:
            file.write(bytes(30 * MIB))
            file.flush()
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
            assert sum(mapped[::4096]) == 0
            meter = Meter(8 * MIB, None)
            report, _ = measure(meter, mapped.close)
            assert report.peak < MIB, report
    """)


@linux_only
def test_shared_memory_is_a_tasks_own_each_time():
    """What a task takes as shared memory and gives back counts for it, and not for the next one less."""
    run("""
        import mmap
        def share_and_keep(kept=[]):
            kept.append(mmap.mmap(-1, 20 * MIB))
            for at in range(0, 20 * MIB, 4096):
                kept[-1][at] = 1
        meter = Meter(8 * MIB, None)
        for _ in range(3):
            report, _ = measure(meter, share_and_keep)
            close(report, 20)
    """)


def test_private_memory_is_what_smaps_says():
    """New memory counts at once; what is given back is off."""
    run("""
        from memsafe_pool.memory import private_bytes
        meter = Meter(8 * MIB, None)
        kept = []
        for mib in (40, 20, 1):
            report, _ = measure(meter, lambda mib: kept.append(bytearray(mib * MIB)), mib)
            assert abs(report.private - private_bytes()) <= 2 * MIB, (report, private_bytes())
        kept.clear()
        report, _ = measure(meter, int)
        assert abs(report.private - private_bytes()) <= 2 * MIB, (report, private_bytes())
    """)


@linux_only
def test_a_forked_copy_is_measured_by_itself():
    """What is shared after a fork is not private; what is written to becomes it."""
    run("""
        from memsafe_pool.memory import private_bytes
        model = bytearray(b"x") * (100 * MIB)
        pid = os.fork()
        if pid == 0:
            meter = Meter(8 * MIB, None)
            first = wire.Report.unpack(meter.report())
            assert first.private < 20 * MIB, first
            def write():
                for at in range(0, 60 * MIB, 4096):
                    model[at] = 1
            report, _ = measure(meter, write)
            deadline = time.monotonic() + 10
            while report.private < 60 * MIB and time.monotonic() < deadline:
                report, _ = measure(meter, int)  # it looks again when that has become cheap
            assert abs(report.private - private_bytes()) <= 2 * MIB and report.private > 60 * MIB, report
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    """)


def test_trim():
    """Trimming gives back what is free, says how much, and is not worth it again until there is more."""
    run("""
        meter = Meter(8 * MIB, 0.5)
        assert meter.patience is None
        report, kept = measure(meter, small, 100, 100)
        if sys.platform == "linux":
            assert meter.patience == 0.5
        won, packed = meter.trim()
        after = wire.Report.unpack(packed)
        if sys.platform == "linux":
            assert won > 80 * MIB and after.resident < report.resident - 80 * MIB, (won, after)
        assert meter.patience is None and after.trimmable < 15 * MIB, after
        measure(meter, int)
        assert meter.patience is None
        close(measure(meter, small, 50)[0], 50)
    """)


def test_garbage_is_collected_before():
    """What only the collector can free is won, too."""
    run("""
        gc.disable()
        def cycles():
            for _ in range(60):
                ring = [bytearray(MIB)]
                ring.append(ring)
        meter = Meter(8 * MIB, 0.5)
        measure(meter, cycles)
        assert meter.trim()[0] > 55 * MIB
    """)


def test_trims_that_win_little_become_rare_also_without_a_delay():
    """Who wants them at once does not want them all the time."""
    run("""
        meter = Meter(8 * MIB, 0.0)
        kept = []
        delays = []
        for _ in range(4):
            measure(meter, lambda: kept.append(bytearray(10 * MIB)))
            delays.append(meter.patience)
            meter.trim()
        assert delays == [0.0, 1.0, 2.0, 4.0], delays
    """)


def test_trims_that_win_little_become_rare():
    """Growth that is in use is not worth a look every time; a good trim makes it as before."""
    run("""
        meter = Meter(8 * MIB, 0.5)
        kept = []
        delays = []
        for _ in range(10):
            measure(meter, lambda: kept.append(bytearray(10 * MIB)))
            delays.append(meter.patience)
            meter.trim()
        assert delays[:4] == [0.5, 1.0, 2.0, 4.0] and max(delays) == 60.0, delays
        _, rest = measure(meter, small, 100, 100)
        meter.trim()
        kept.append(bytearray(10 * MIB))
        measure(meter, int)
        assert meter.patience == 0.5
    """)


def test_never_means_never():
    """With no ``trim_idle`` nothing is waited for."""
    run("""
        meter = Meter(8 * MIB, None)
        measure(meter, small, 100, 100)
        assert meter.patience is None
    """)


@linux_only
def test_without_a_descriptor_left_it_goes_on():
    """A task that has taken all descriptors is measured as far as that goes, and nothing is raised."""
    run("""
        import resource
        meter = Meter(8 * MIB, 0.5)
        kept = measure(meter, small, 100, 100)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        taken = []
        try:
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
        report, _ = measure(meter, small, 50)
        assert report.resident > 0, report
        time.sleep(0.3)
        measure(meter, lambda: taken.append(bytearray(20 * MIB)))
        meter.trim()
    """)
