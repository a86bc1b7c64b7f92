"""The memory of this process is its own: after a fork, with descriptors gone, in threads."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="compares with /proc")

MB = 1_000_000

#: Numbers as /proc has them, and a peak that is known: a mapping of its own starts from nothing.
TOOLS = """
import contextlib, gc, mmap, os, sys

def status(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))

def use(size):
    mapping = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for at in range(0, size, mmap.PAGESIZE):
        mapping[at] = 1
    mapping.close()

def peak_of(size):
    native.reset_peak()
    before = native.own_memory().resident
    use(size)
    return native.peak() - before

def right():
    # Whether all numbers are those of this process, within 1 MB. Twice: the first time in a child maps code.
    return [_right(), _right()][1]

def _right():
    own = native.own_memory()
    pairs = [(own.resident, "VmRSS"), (own.anonymous, "RssAnon"), (native.peak(), "VmHWM")]
    return all(abs(number - status(name)) < 1_000_000 for number, name in pairs)

def in_child(function):
    # What `function` returns in a child made by fork, as text.
    sys.stdout.flush()
    told, tell = os.pipe()
    if (child := os.fork()) == 0:
        os.close(told)
        os.write(tell, str(function()).encode())
        os._exit(0)
    os.close(tell)
    answer = b""
    while piece := os.read(told, 1000):
        answer += piece
    os.close(told)
    assert os.waitpid(child, 0)[1] == 0
    return answer.decode()

def open_files():
    return sorted(os.listdir("/proc/self/fd"))
"""

needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="changes its user or mounts, which takes root"
)


def test_the_numbers_are_those_of_proc(run):
    """Resident, anonymous and peak memory are VmRSS, RssAnon and VmHWM, with much memory in use as well."""
    lines = run(
        TOOLS
        + """
print(right())
buffer = bytearray(300_000_000)
print(right())
del buffer
print(right(), native.peak() > 300_000_000)
"""
    )
    assert lines == ["True", "True", "True True"]


def test_file_pages_are_not_anonymous(run, tmp_path):
    """A file that is mapped and read is resident, but not anonymous."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 50 * MB)
    resident, anonymous = map(
        int,
        run(
            TOOLS
            + f"""
import mmap

before = native.own_memory()
with open({str(path)!r}, "rb") as file:
    mapping = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
sum(mapping[::4096])
after = native.own_memory()
print(after.resident - before.resident)
print(after.anonymous - before.anonymous)
"""
        ),
    )
    assert resident > 49 * MB
    assert anonymous < 2 * MB


@pytest.mark.parametrize("ancestor", ["none", "large parent", "large parent that spawned it"])
def test_each_peak_is_its_own(run, ancestor):
    """After a reset the peak is exact to 1 MB, also that of a small use after a large one.

    And so it is in a process whose parent was large: one made by fork, and a program that it started,
    where ru_maxrss begins at the parent's peak.
    """
    measure = """
for size in (1, 2, 5, 10, 50, 500, 1, 100, 3, 500, 1):
    print(size, peak_of(size * 1_000_000))
"""
    starts = {
        "none": measure,
        "large parent": """
buffer = bytearray(500_000_000)
native.peak()
def child():
    global buffer
    del buffer
    return [(size, peak_of(size * 1_000_000)) for size in (1, 2, 5, 10, 50, 500, 1, 100, 3, 500, 1)]
for size, peak in eval(in_child(child)):
    print(size, peak)
""",
        "large parent that spawned it": f"""
import subprocess

use(600_000_000)
with open("/proc/self/cmdline") as file:
    script = file.read().split("\\0")[-2].split("# the parent begins")[0]
sys.stdout.flush()
subprocess.run([sys.executable, "-c", script + {measure!r}], check=True)
""",
    }
    lines = run(TOOLS + "\n# the parent begins\n" + starts[ancestor])
    assert len(lines) == 11
    for line in lines:
        size, peak = map(int, line.split())
        assert abs(peak - size * MB) < MB, lines


def test_after_a_fork_the_numbers_are_the_childs(run):
    """A child sees itself although descriptors came with it; its parent's numbers stay what they were."""
    lines = run(
        TOOLS
        + """
native.own_memory(), native.reset_peak(), native.peak()
use(200_000_000)
before = native.peak()

def child():
    buffer = bytearray(100_000_000)
    first = right()
    del buffer
    small = peak_of(5_000_000)
    return first, right(), abs(small - 5_000_000) < 1_000_000, in_child(right)

print(in_child(child))
print(native.peak() == before, right())
print(in_child(child))
"""
    )
    assert lines == ["(True, True, True, 'True')", "True True", "(True, True, True, 'True')"]


def test_a_child_does_not_collect_descriptors(run):
    """Each generation has as many open files as the one before it."""
    lines = run(
        TOOLS
        + """
def generation(depth):
    right(), native.reset_peak()
    count = len(open_files())
    return [count] if depth == 0 else [count, *eval(in_child(lambda: generation(depth - 1)))]

counts = generation(5)
# The end of the pipe to its parent stays open in each child: one per generation.
print([count - counts[0] - number for number, count in enumerate(counts)])
"""
    )
    assert lines == ["[0, 0, 0, 0, 0, 0]"]


def test_no_low_descriptor_is_taken(run):
    """Standard input, output and error that were closed stay so, with room and without."""
    lines = run(
        TOOLS
        + """
import resource

def taken():
    kept = [os.dup2(fd, fd + 30) for fd in (0, 1, 2)]
    for fd in (0, 1, 2):
        os.close(fd)
    right(), native.reset_peak()
    low = {"0", "1", "2"} & {fd for fd in open_files() if os.path.exists(f"/proc/self/fd/{fd}")}
    return low

print(in_child(taken))
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
print(in_child(taken), right())
"""
    )
    assert lines == ["set()", "set() True"]


def test_closed_descriptors_are_opened_again(run):
    """After os.closerange, as daemons do it, the numbers go on being right."""
    lines = run(
        TOOLS
        + """
print(right(), abs(peak_of(5_000_000) - 5_000_000) < 1_000_000)
os.closerange(3, 1000)
print(right(), abs(peak_of(5_000_000) - 5_000_000) < 1_000_000)
os.closerange(3, 1000)
print(in_child(lambda: (right(), abs(peak_of(5_000_000) - 5_000_000) < 1_000_000)))
"""
    )
    assert lines == ["True True", "True True", "(True, True)"]


def test_a_file_of_the_user_under_the_same_number_is_left_alone(run, tmp_path):
    """What user code opened where our descriptors were is not written to, read or closed, nor in a child."""
    path = tmp_path / "precious"
    path.write_text("9" * 1000)
    lines = run(
        TOOLS
        + f"""
def in_use():
    return [int(fd) for fd in open_files() if int(fd) > 2 and os.path.exists(f"/proc/self/fd/{{fd}}")]

def replace(numbers):
    with open({str(path)!r}, "r+b") as file:
        for number in numbers:
            os.dup2(file.fileno(), number)

def same(numbers):
    return all(os.readlink(f"/proc/self/fd/{{number}}") == {str(path)!r} for number in numbers)

def check():
    right(), native.reset_peak()
    numbers = in_use() or [64, 65, 66]
    replace(numbers)
    good = right(), abs(peak_of(5_000_000) - 5_000_000) < 1_000_000, same(numbers)
    os.closerange(3, 1000)
    return good

def check_replaced_before_fork():
    right(), native.reset_peak()
    numbers = in_use() or [64, 65, 66]
    replace(numbers)
    def in_the_child():
        return right(), abs(peak_of(5_000_000) - 5_000_000) < 1_000_000, same(numbers)
    return eval(in_child(in_the_child))

print(check())
print(check_replaced_before_fork())
"""
    )
    assert lines == ["(True, True, True)"] * 2
    assert path.read_text() == "9" * 1000


def test_threads_and_forks_at_once(run):
    """Eight threads read and reset while the process forks: numbers are right, no descriptor is lost."""
    lines = run(
        TOOLS
        + """
import threading, warnings

# Forking with threads is what is tested.
warnings.simplefilter("ignore", DeprecationWarning)
stop, failures = threading.Event(), []

def work():
    while not stop.is_set():
        own = native.own_memory()
        native.reset_peak()
        peak = native.peak()
        if not (0 < own.anonymous < own.resident < 200_000_000 and 0 < peak < 200_000_000):
            failures.append((own, peak))

right(), native.reset_peak()
files = open_files()
threads = [threading.Thread(target=work) for _ in range(8)]
for thread in threads:
    thread.start()
children = {in_child(right) for _ in range(50)}
stop.set()
for thread in threads:
    thread.join()
print(failures, children, right())
print(open_files() == files)
"""
    )
    assert lines == ["[] {'True'} True", "True"]


def test_without_a_free_descriptor(run):
    """EMFILE is reported; what is open already keeps working, and all does again when there is room."""
    lines = run(
        TOOLS
        + """
import errno, resource

def refused(function):
    try:
        function()
    except OSError as error:
        return errno.errorcode[error.errno]

def fill():
    files = []
    try:
        while True:
            files.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        return files

resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
files = fill()
print([refused(function) for function in (native.own_memory, native.reset_peak, native.peak)])
for fd in files:
    os.close(fd)
print(right(), abs(peak_of(5_000_000) - 5_000_000) < 1_000_000)
files = fill()
print([refused(function) for function in (native.own_memory, native.reset_peak, native.peak)])
"""
    )
    assert lines[:2] == [str(["EMFILE"] * 3), "True True"]
    expected = [None] * 3 if run.implementation == "extension" else ["EMFILE"] * 3
    assert lines[2:] == [str(expected)]


@needs_root
def test_a_process_that_changed_its_user(run):
    """It may not write its clear_refs: reset_peak says EACCES and missing() says so; the rest works."""
    lines = run(
        TOOLS
        + """
import errno

native.allocator()  # finds it as the user who may read what that takes

def other_user():
    os.setresuid(65534, 65534, 65534)
    try:
        native.reset_peak()
    except OSError as error:
        refusal = errno.errorcode[error.errno]
    return refusal, right(), native.missing()[-1]

print(in_child(other_user))
"""
    )
    phrase = f"the peak of one task cannot be told from earlier ones ({os.strerror(errno.EACCES)})"
    assert lines == [str(("EACCES", True, phrase))]


@needs_root
def test_without_proc(run):
    """Where /proc is not mounted, each number is an OSError; releasing the heap works, and counts nothing."""
    unshare = shutil.which("unshare")
    can = unshare and subprocess.run(
        [unshare, "-m", "mount", "-t", "tmpfs", "none", "/proc"], capture_output=True, check=False
    )
    if not can or can.returncode != 0:
        pytest.skip("mounting is not allowed here")
    lines = run(
        """
import ctypes, errno, os

# CLONE_NEWNS, MS_REC | MS_PRIVATE: the mount is seen by this process only.
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x20000) == 0
assert libc.mount(b"none", b"/", None, 0x44000, None) == 0
assert libc.mount(b"none", b"/proc", b"tmpfs", 0, None) == 0
for function in (native.own_memory, native.peak, native.reset_peak, lambda: native.raise_oom_score_adj(1)):
    try:
        function()
    except OSError as error:
        print(errno.errorcode[error.errno])
print(native.release_heap() if native.allocator() != "musl" else 0)
print(len(native.missing()) - (not native.HAVE_EXTENSION))
"""
    )
    assert lines == ["ENOENT"] * 4 + ["0", "4"]


# Out-of-memory order


def test_the_oom_score_is_added_to(run):
    """It is raised by what is asked for, to 1000 at most, never lowered; the result says by how much."""
    lines = run(
        TOOLS
        + """
import errno

def score():
    with open("/proc/self/oom_score_adj") as file:
        return int(file.read())

def child():
    start = score()
    results = [native.raise_oom_score_adj(by) for by in (0, 100, 23, 2000, 5)]
    try:
        native.raise_oom_score_adj(-1)
    except OSError as error:
        results.append(errno.errorcode[error.errno])
    return [*results[:3], results[3] == 1000 - start - 123, *results[4:], score()]

before = score()
print(in_child(child))
print(score() == before)
"""
    )
    assert lines == ["[0, 100, 23, True, 0, 'EINVAL', 1000]", "True"]


@pytest.mark.parametrize("start", [-1000, -7, 0, 999])
def test_the_oom_score_from_any_start(run, start):
    """Negative scores are added to as well."""
    lines = run(f"""
        try:
            with open("/proc/self/oom_score_adj", "w") as file:
                file.write("{start}")
        except PermissionError:
            raise SystemExit
        print(native.raise_oom_score_adj(100))
        with open("/proc/self/oom_score_adj") as file:
            print(int(file.read()))
    """)
    if not lines:
        pytest.skip("lowering the score takes CAP_SYS_RESOURCE")
    assert lines == [str(min(100, 1000 - start)), str(min(start + 100, 1000))]


# Leaks


@pytest.mark.parametrize(
    ("call", "times"),
    [
        ("native.allocator()", 100_000),
        ("native.own_memory()", 100_000),
        ("native.peak()", 100_000),
        ("native.measure()", 100_000),
        ("native.reset_peak()", 100_000),
        ("native.raise_oom_score_adj(0)", 100_000),
        ("refused(native.raise_oom_score_adj, -1)", 100_000),
        ("native.set_parent_death_signal(15)", 100_000),
        ("refused(native.set_parent_death_signal, -1)", 100_000),
        ("native.set_child_subreaper(True)", 100_000),
        ("native.get_child_subreaper()", 100_000),
        ("fits(native.release_heap)", 100_000),
        ("native.missing()", 100_000),
    ],
)
def test_no_call_leaks(run, call, times):
    """Many calls leave memory and open files as they were; 512 KB are 5 bytes per call."""
    files_before, files_after, grown = map(
        int,
        run(f"""
            import errno, os

            def refused(function, *arguments):
                try:
                    function(*arguments)
                except OSError:
                    return
                raise AssertionError("not refused")

            def fits(function):
                try:
                    function()
                except OSError as error:
                    assert error.errno == errno.ENOSYS

            def resident_bytes():
                with open("/proc/self/statm") as statm:
                    return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")

            def repeat(times):
                for _ in range(times):
                    {call}

            repeat(1000)
            files, resident = len(os.listdir("/proc/self/fd")), resident_bytes()
            repeat({times})
            print(files)
            print(len(os.listdir("/proc/self/fd")))
            print(resident_bytes() - resident)
        """),
    )
    assert files_after == files_before
    assert grown < 512 * 1024
