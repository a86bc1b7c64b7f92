"""The heap and prctl do what they say, with the extension and through ctypes."""

from __future__ import annotations

import errno
import os
import resource
import signal
import sys

import pytest

from memsafe_pool import native, native_ctypes

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="looks at the effect in /proc and through prctl"
)

#: Blocks of 1000 bytes go to the C heap (pymalloc takes up to 512). One in 50 survives, so that the heap
#: cannot shrink by its end.
FRAGMENT = """
import os

def anonymous_bytes():
    with open("/proc/self/statm") as statm:
        fields = statm.read().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGESIZE")

blocks = [bytes(1000) for _ in range(100_000)]
survivors = blocks[::50]
del blocks
before = anonymous_bytes()
"""

MB = 1_000_000


def _has_malloc_trim() -> bool:
    try:
        native.release_heap()
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        return False
    return True


needs_malloc_trim = pytest.mark.skipif(not _has_malloc_trim(), reason="this C library cannot trim its heap")


def test_it_runs_on_the_implementation_that_is_meant(run):
    """The tests below really use the extension, or really do without it."""
    assert run("print(native.HAVE_EXTENSION)") == [str(run.implementation == "extension")]


# Heap


@needs_malloc_trim
def test_a_fragmented_heap_is_given_back(run):
    """What small freed blocks leave behind goes back to the kernel; the number is what the process lost."""
    released, measured = map(
        int,
        run(
            FRAGMENT + "released = native.release_heap()\nprint(released)\nprint(before - anonymous_bytes())"
        ),
    )
    assert measured > 50 * MB
    assert abs(released - measured) < 4 * MB


@needs_malloc_trim
def test_the_second_release_finds_little(run):
    """Pages that have gone back are not counted again."""
    second = run(FRAGMENT + "native.release_heap()\nprint(native.release_heap())")
    assert 0 <= int(second[0]) < 4 * MB


@needs_malloc_trim
def test_without_proc_a_release_counts_nothing(monkeypatch):
    """The fallback cannot count where /proc is missing: the heap is released, the number is 0."""
    monkeypatch.setattr(native_ctypes.CtypesLibrary, "_anonymous_memory", lambda _: -errno.ENOENT)
    monkeypatch.setattr(native, "_library", native_ctypes.CtypesLibrary())
    assert native.release_heap() == 0


# Parent death signal


def test_the_parents_death_is_signalled(run):
    """A child that asked for a signal gets exactly that one when its parent is killed."""
    lines = run("""
        import os, signal

        told, tell = os.pipe()
        if (parent := os.fork()) == 0:
            ready, is_ready = os.pipe()
            if os.fork() == 0:
                signal.alarm(60)
                signal.signal(signal.SIGUSR2, lambda *_: (os.write(tell, b"got SIGUSR2"), os._exit(0)))
                native.set_parent_death_signal(signal.SIGUSR2)
                os.write(is_ready, b".")
                while True:
                    signal.pause()
            os.read(ready, 1)
            os.kill(os.getpid(), signal.SIGKILL)
        os.close(tell)
        os.waitpid(parent, 0)
        print(os.read(told, 100).decode())
    """)
    assert lines == ["got SIGUSR2"]


def test_the_parent_death_signal_can_be_turned_off(run):
    """Signal 0 takes it back."""
    lines = run("""
        import ctypes, signal

        def armed():
            signum = ctypes.c_int(-1)
            assert ctypes.CDLL(None).prctl(2, ctypes.byref(signum)) == 0  # PR_GET_PDEATHSIG
            return signum.value

        print(armed())
        native.set_parent_death_signal(signal.SIGTERM)
        print(armed())
        native.set_parent_death_signal(0)
        print(armed())
    """)
    assert lines == ["0", str(int(signal.SIGTERM)), "0"]


@pytest.mark.parametrize("signum", [-1, 65, 1000])
def test_a_number_that_is_no_signal_is_refused(run, signum):
    """What the kernel refuses is an OSError that carries the kernel's number."""
    lines = run(f"""
        try:
            native.set_parent_death_signal({signum})
        except OSError as error:
            print(type(error).__name__, error.errno)
    """)
    assert lines == [f"OSError {errno.EINVAL}"]


# Subreaper


def test_a_subreaper_adopts_orphans(run):
    """While it is on, an orphaned grandchild becomes a child: waitpid reports how it really ended."""
    lines = run("""
        import os, signal

        native.set_child_subreaper(True)
        from_middle, to_us = os.pipe()
        if (middle := os.fork()) == 0:
            if (orphan := os.fork()) == 0:
                signal.alarm(60)
                while True:
                    signal.pause()
            os.write(to_us, str(orphan).encode())
            os._exit(0)
        orphan = int(os.read(from_middle, 20))
        os.waitpid(middle, 0)
        os.kill(orphan, signal.SIGKILL)
        pid, status = os.waitpid(orphan, 0)
        print(pid == orphan, os.WTERMSIG(status))
    """)
    assert lines == [f"True {int(signal.SIGKILL)}"]


def test_no_subreaper_adopts_nobody(run):
    """Once it is off again, an orphan goes to somebody else."""
    lines = run("""
        import os

        native.set_child_subreaper(True)
        native.set_child_subreaper(False)
        go, let_go = os.pipe()
        told, tell = os.pipe()
        us = os.getpid()
        if (middle := os.fork()) == 0:
            if os.fork() == 0:
                os.close(let_go)
                os.read(go, 1)
                os.write(tell, str(os.getppid() == us).encode())
            os._exit(0)
        os.waitpid(middle, 0)
        os.close(let_go)
        os.close(tell)
        print(os.read(told, 20).decode())
    """)
    assert lines == ["False"]


def test_the_subreaper_flag_is_read_back(run):
    """It is off at first, follows what is set, and a child made by fork does not inherit it."""
    lines = run("""
        import os, sys

        print(native.get_child_subreaper())
        native.set_child_subreaper(True)
        print(native.get_child_subreaper(), flush=True)
        if (child := os.fork()) == 0:
            print(native.get_child_subreaper(), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        native.set_child_subreaper(False)
        print(native.get_child_subreaper())
    """)
    assert lines == ["False", "True", "False", "False"]


# Orphans

#: What they print, in place of what they are to, where there is no extension.
NO_ORPHANS = ["ENOSYS"]


def test_an_orphan_is_forked(run):
    """It belongs to who adopts orphans; hooks are called as by os.fork; nothing else is left."""
    lines = run("""
        import errno, os, sys

        called = []
        os.register_at_fork(
            before=lambda: called.append("before"),
            after_in_parent=lambda: called.append("in parent"),
            after_in_child=lambda: called.append("in child"),
        )
        native.set_child_subreaper(True)
        us, open_before = os.getpid(), os.listdir("/proc/self/fd")
        try:
            pid, midwife = native.fork_orphan()
        except OSError as error:
            print(errno.errorcode[error.errno])
            sys.exit()
        if pid == 0:
            while os.getppid() == midwife:
                pass
            print(*called, os.getppid() == us != midwife, sep=", ", flush=True)
            os._exit(3)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(*called, code, os.listdir("/proc/self/fd") == open_before, sep=", ")
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            print("nobody else")
    """)
    expected = ["before, in child, True", "before, in parent, 3, True", "nobody else"]
    assert lines == (expected if run.implementation == "extension" else NO_ORPHANS)


@pytest.mark.skipif(os.getuid() != 0, reason="needs a user who has no other process")
@pytest.mark.parametrize("others", [0, 1], ids=["the first fork", "the second"])
def test_an_orphan_that_cannot_be_forked(run, others):
    """The error arrives, hooks are called all the same, no process is left, and the next one works."""
    lines = run(f"""
        import ctypes, errno, os, resource, sys  # ctypes as long as it can be read

        called = []
        os.register_at_fork(
            before=lambda: called.append("before"),
            after_in_parent=lambda: called.append("in parent"),
        )
        os.setuid({54321 + os.getpid() % 10000})
        native.set_child_subreaper(True)
        limit = resource.getrlimit(resource.RLIMIT_NPROC)
        resource.setrlimit(resource.RLIMIT_NPROC, (1 + {others}, limit[1]))
        try:
            native.fork_orphan()
        except OSError as error:
            print(errno.errorcode[error.errno], *called, sep=", ")
            if error.errno == errno.ENOSYS:
                sys.exit()
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            print("nobody")
        resource.setrlimit(resource.RLIMIT_NPROC, limit)
        pid, _ = native.fork_orphan()
        if pid == 0:
            os._exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """)
    expected = ["EAGAIN, before, in parent", "nobody", "3"]
    assert lines == (expected if run.implementation == "extension" else NO_ORPHANS)


# Platforms without the calls


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (native.release_heap, ()),
        (native.set_parent_death_signal, (15,)),
        (native.set_child_subreaper, (True,)),
        (native.get_child_subreaper, ()),
    ],
)
def test_a_c_library_without_the_function_is_reported(monkeypatch, function, arguments):
    """Where the C library has neither an allocator that is known nor prctl, each call raises ENOSYS."""
    monkeypatch.setattr(native, "_library", native_ctypes.CtypesLibrary(c_library=object()))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)) as caught:
        function(*arguments)
    assert caught.value.errno == errno.ENOSYS


def test_what_is_missing_is_said(monkeypatch):
    """The phrases name each thing that this C library cannot do; with everything there, there are none."""
    monkeypatch.setattr(native, "_library", native_ctypes.CtypesLibrary(c_library=object()))
    monkeypatch.setattr(native, "HAVE_EXTENSION", False)
    assert native.missing() == [
        "the C extension is not built, so calls through ctypes and /proc are slower",
        "free heap cannot be given back (unknown allocator)",
        f"no prctl, so children cannot be tied to their parent ({os.strerror(errno.ENOSYS)})",
    ]


def test_a_kernel_that_says_less(monkeypatch):
    """Without VmHWM the peak is that of the program's life; what is missing is named, as is smaps_rollup."""
    real_read, real_open = native_ctypes._read, os.open

    def read(path):
        return real_read(path).replace(b"\nVmHWM:", b"\nVmXXX:")

    def open_but(path, *arguments):
        if path == "/proc/self/smaps_rollup":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        return real_open(path, *arguments)

    monkeypatch.setattr(native, "_library", native_ctypes.CtypesLibrary())
    monkeypatch.setattr(native_ctypes, "_read", read)
    monkeypatch.setattr(os, "open", open_but)
    assert native.peak() == 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert native.missing()[-2:] == [
        f"private memory cannot be read ({os.strerror(errno.ENOENT)})",
        f"the highest resident memory is that of the program's whole life ({os.strerror(errno.ENODATA)})",
    ]


@needs_malloc_trim
def test_nothing_is_missing_here():
    """With the extension and glibc on Linux nothing is."""
    if native.allocator() != "glibc":
        pytest.skip("another allocator")
    assert native.missing() == []
