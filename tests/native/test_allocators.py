"""Each allocator is recognized, and gives its free pages back in its own way."""

from __future__ import annotations

import errno
import glob
import os
import sys

import pytest

from memsafe_pool import native

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or native.allocator() != "glibc", reason="puts allocators in the place of glibc's"
)

MB = 1_000_000

#: Name, file, and the Debian package that has it.
LIBRARIES = {
    "jemalloc": ("libjemalloc.so.2", "libjemalloc2"),
    "mimalloc": ("libmimalloc.so.2*", "libmimalloc2.0"),
    "tcmalloc": ("libtcmalloc.so.4", "libgoogle-perftools4"),
    "tcmalloc minimal": ("libtcmalloc_minimal.so.4", "libtcmalloc-minimal4"),
}

FOLDERS = ("/usr/lib/*-linux-*", "/usr/lib64", "/usr/lib", "/usr/local/lib")


def _library(name: str) -> str:
    file, package = LIBRARIES[name]
    for folder in FOLDERS:
        for path in sorted(glob.glob(os.path.join(folder, file))):
            return path
    return pytest.skip(f"{file} is not here; the Debian package is {package}")


@pytest.fixture(params=LIBRARIES)
def preload(request):
    return request.param.split()[0], _library(request.param)


def test_it_is_recognized(run, preload):
    """The name is that of the library that replaces malloc; what it cannot do is refused, and said."""
    name, path = preload
    lines = run(
        """
        import errno

        print(native.allocator())
        try:
            native.set_allocator_thresholds(mmap_bytes=131072)
        except OSError as error:
            print(errno.errorcode[error.errno])
        print(f"allocator thresholds cannot be set ({native.allocator()} allocator)" in native.missing())
        print(any("given back" in phrase for phrase in native.missing()))
        try:
            native.heap_bytes()
            measured = True
        except OSError as error:
            assert error.errno == errno.ENOSYS
            measured = False
        print(measured != any("measured" in phrase for phrase in native.missing()))
        """,
        LD_PRELOAD=path,
    )
    assert lines == [name, "ENOSYS", "True", "False", "True"]


#: mimalloc 2.0 keeps a segment of 32 MB in which a block survives, so with it all of them are freed.
RELEASE = """
import sys, time

everything = native.allocator() == "mimalloc"
if everything:
    blocks = [bytearray(8_000_000) for _ in range(30)]
else:
    blocks = [bytes(1000) for _ in range(200_000)]
survivors = [] if everything else blocks[::50]
del blocks
try:
    free = native.heap_bytes().free
except OSError:
    free = -1
before = native.own_memory().anonymous
released = native.release_heap()
after = native.own_memory().anonymous
print(before - after)
print(released)
print(free)
"""


@pytest.mark.parametrize("malloc", ["default", "malloc"])
def test_free_memory_is_really_released(run, preload, malloc):
    """What freed blocks left behind goes back to the kernel; the number is what the process lost."""
    _, path = preload
    measured, released, free = map(int, run(RELEASE, LD_PRELOAD=path, PYTHONMALLOC=malloc))
    assert measured > 100 * MB
    assert abs(released - measured) < 4 * MB
    if free >= 0:
        assert abs(free - measured) < 0.1 * measured


@pytest.mark.parametrize("mode", ["RTLD_LOCAL", "RTLD_GLOBAL"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_is_only_loaded_does_not_count(run, name, mode):
    """A package may bring an allocator for itself: malloc is still glibc's, and so is what is asked for."""
    path = _library(name)
    lines = run(
        f"""
        import ctypes

        library = ctypes.CDLL({path!r}, mode=ctypes.{mode})
        print(native.allocator())
        native.set_allocator_thresholds(trim_bytes=131072)
        print(native.release_heap() >= 0)
        """,
        # jemalloc wants more room for thread-local variables than is left once a program runs.
        GLIBC_TUNABLES="glibc.rtld.optional_static_tls=65536",
    )
    assert lines == ["glibc", "True"]


# glibc


def test_free_bytes_are_what_a_release_can_win(run):
    """Much before a release, and not below what it wins; little after it, although fordblks is the same."""
    before, won, after = map(
        int,
        run("""
            blocks = [bytes(1000) for _ in range(200_000)]
            survivors = blocks[::50]
            del blocks
            before = native.heap_bytes().free
            print(before)
            print(native.release_heap())
            print(native.heap_bytes().free)
        """),
    )
    assert won > 100 * MB
    assert won - MB < before < 1.25 * won + 10 * MB
    assert after < before - 0.9 * won


def test_mapped_blocks_are_counted(run):
    """A block above the mmap threshold is in the mapped bytes while it lives."""
    lines = run("""
        native.set_allocator_thresholds(mmap_bytes=1_000_000)
        before = native.heap_bytes().mmapped
        block = bytearray(50_000_000)
        print(native.heap_bytes().mmapped - before >= 50_000_000)
        del block
        print(native.heap_bytes().mmapped == before)
    """)
    assert lines == ["True", "True"]


@pytest.mark.parametrize("fixed", [False, True])
def test_fixed_thresholds_let_large_buffers_go(run, fixed):
    """60 buffers of 8 MB that were freed are back within 1.25x without a trim if thresholds are fixed."""
    start, end = map(
        int,
        run(f"""
            if {fixed}:
                native.set_allocator_thresholds(mmap_bytes=128 * 1024, trim_bytes=128 * 1024)
            holes = [bytes(4000) for _ in range(500)]
            start = native.own_memory().resident
            for _ in range(2):
                # Something small after each, so that the heap does not shrink by its end.
                buffers, kept = zip(*[(bytearray(8_000_000), bytes(4000)) for _ in range(60)])
                del buffers
            print(start)
            print(native.own_memory().resident)
        """),
    )
    assert (end <= 1.25 * start) is fixed


def test_each_threshold_can_be_left_alone(run):
    """None changes nothing; each of the three is accepted alone; a forked child has inherited them."""
    lines = run("""
        import os

        native.set_allocator_thresholds()
        native.set_allocator_thresholds(arenas=2)
        native.set_allocator_thresholds(trim_bytes=0)
        native.set_allocator_thresholds(mmap_bytes=32 * 1024 * 1024)
        before = native.heap_bytes().mmapped
        block = bytearray(30_000_000)
        print(native.heap_bytes().mmapped == before, flush=True)
        native.set_allocator_thresholds(mmap_bytes=1_000_000)
        if os.fork() == 0:
            block = bytearray(30_000_000)
            print(native.heap_bytes().mmapped - before >= 30_000_000, flush=True)
            os._exit(0)
        os.wait()
    """)
    assert lines == ["True", "True"]


@pytest.mark.parametrize(
    "arguments",
    ["mmap_bytes=2**31", "mmap_bytes=-2", "trim_bytes=2**31", "trim_bytes=-2", "arenas=-2"],
)
def test_a_threshold_that_glibc_refuses_is_an_error(run, arguments):
    """EINVAL, not a value cut to an int."""
    lines = run(f"""
        try:
            native.set_allocator_thresholds({arguments})
        except OSError as error:
            print(error.errno)
    """)
    assert lines == [str(errno.EINVAL)]
