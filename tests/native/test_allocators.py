"""Each allocator is recognized, and gives its free pages back in its own way."""

from __future__ import annotations

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


@pytest.mark.parametrize("run", ["extension"], indirect=True)
def test_it_is_recognized(run, preload):
    """The name is that of the library that replaces malloc; what it cannot do is said."""
    name, path = preload
    lines = run(
        """
        print(native.allocator())
        print(any("given back" in phrase for phrase in native.missing()))
        """,
        LD_PRELOAD=path,
    )
    assert lines == [name, "False"]


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
before = native.own_memory().anonymous
released = native.release_heap()
after = native.own_memory().anonymous
print(before - after)
print(released)
"""


@pytest.mark.parametrize("run", ["extension"], indirect=True)
@pytest.mark.parametrize("malloc", ["default", "malloc"])
def test_free_memory_is_really_released(run, preload, malloc):
    """What freed blocks left behind goes back to the kernel; the number is what the process lost."""
    _, path = preload
    measured, released = map(int, run(RELEASE, LD_PRELOAD=path, PYTHONMALLOC=malloc))
    assert measured > 100 * MB
    assert abs(released - measured) < 4 * MB


@pytest.mark.parametrize("run", ["ctypes"], indirect=True)
def test_through_ctypes_it_is_left_alone(run, preload):
    """Only glibc's is asked to give back then; that is said."""
    lines = run(
        """
        import errno

        print(native.allocator())
        print("free heap cannot be given back (unknown allocator)" in native.missing())
        try:
            native.release_heap()
        except OSError as error:
            print(error.errno == errno.ENOSYS)
        """,
        LD_PRELOAD=preload[1],
    )
    assert lines == ["unknown", "True", "True"]


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
        print(native.release_heap() >= 0)
        """,
        # jemalloc wants more room for thread-local variables than is left once a program runs.
        GLIBC_TUNABLES="glibc.rtld.optional_static_tls=65536",
    )
    assert lines == ["glibc", "True"]
