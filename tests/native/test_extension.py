"""The extension is there, fits its declarations, and its C is sound; without it, importing stays cheap."""

from __future__ import annotations

import errno
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from memsafe_pool import native, native_ctypes

CSRC = Path(__file__).parents[2] / "csrc"

FUNCTIONS = sorted(name for name in vars(native._Library) if name.startswith("ms_"))


def test_the_extension_is_built():
    """A user can do without the extension; its tests cannot, so a missing one is a failure here."""
    assert native.HAVE_EXTENSION, f"memsafe_pool._native cannot be imported: {native.EXTENSION_ERROR}"


@pytest.mark.skipif(
    bool(sysconfig.get_config_var("Py_GIL_DISABLED")), reason="free-threaded Python has no abi3"
)
def test_one_build_is_for_every_python_version():
    """The extension uses the stable ABI only, so that one wheel does for all versions."""
    assert ".abi3." in importlib.import_module("memsafe_pool._native").__file__


def test_it_declares_what_the_package_expects():
    """The header, the fallback and the typed description have the same functions."""
    extension = importlib.import_module("memsafe_pool._native")
    assert sorted(name for name in dir(extension.lib) if name.startswith("ms_")) == FUNCTIONS
    assert sorted(name for name in vars(native_ctypes.CtypesLibrary) if name.startswith("ms_")) == FUNCTIONS


def test_it_names_the_allocators_in_the_same_order():
    """A number of ms_allocator means the same in C and in Python."""
    library = importlib.import_module("memsafe_pool._native").lib
    prefix = "MS_ALLOCATOR_"
    numbers = {
        name.removeprefix(prefix).lower(): getattr(library, name)
        for name in dir(library)
        if name.startswith(prefix)
    }
    assert numbers == {name: number for number, name in enumerate(native_ctypes.ALLOCATORS)}


@pytest.mark.parametrize("blocked", [False, True], ids=["extension", "ctypes"])
def test_importing_it_is_cheap(blocked):
    """The import brings in neither Celery nor billiard, nor ctypes, which only the first call may need."""
    script = f"""
import sys
if {blocked}:
    sys.modules["memsafe_pool._native"] = None
from memsafe_pool import native
print(sorted({{"billiard", "celery", "cffi", "ctypes", "kombu", "psutil"}} & sys.modules.keys()))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


MAIN = """
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "memsafe_native.h"

static void show(long long status)
{
    printf("%d\\n", status < 0 ? (int)status : 0);
}

static void nothing(void)
{
}

int main(void)
{
    int64_t first_bytes, second_bytes, numbers[4];

    show(ms_own_memory_bytes(&first_bytes, &second_bytes));
    show(ms_peak_resident_bytes());
    show(ms_measure(numbers));
    show(ms_reset_peak());
    show(ms_raise_oom_score_adj(0));
    show(ms_set_parent_death_signal(0));
    show(ms_set_child_subreaper(1));
    show(ms_get_child_subreaper() - 1);
    /* These depend on the allocator, which a sanitizer replaces. */
    show(ms_allocator());
    show(ms_release_heap_bytes());
    /* Descriptors that are gone, and those of a parent. */
    for (int number = 3; number < 200; number++)
        close(number);
    show(ms_reset_peak());
    fflush(stdout);
    if (fork() == 0) {
        show(ms_reset_peak());
        show(ms_raise_oom_score_adj(1));
        return 0;
    }
    show(ms_fork_orphan(nothing, nothing, nothing, &first_bytes)); /* in both */
    return 0;
}
"""

COMPILER = shutil.which(os.environ.get("CC", "cc"))

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


def _compile(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Compile the C sources with a main of their own, all warnings being errors."""
    (folder / "main.c").write_text(MAIN)
    warnings = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]
    sources = [CSRC / "allocator.c", CSRC / "orphan.c", CSRC / "process.c", folder / "main.c"]
    command = [COMPILER, *warnings, *flags, f"-I{CSRC}", *sources, "-ldl", "-o", folder / "main"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def _output(folder: Path) -> list[str]:
    # The leak sanitizer needs ptrace, which containers forbid; leaks are counted in test_native.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    done = subprocess.run(
        [folder / "main"], capture_output=True, text=True, check=False, timeout=60, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="expects what Linux does")
def test_the_c_code_compiles_without_a_warning(tmp_path):
    """It is C99, and does from C what it does from Python."""
    built = _compile(tmp_path)
    assert built.returncode == 0, built.stderr
    output = _output(tmp_path)
    assert output[:9] + output[10:] == ["0"] * 14


@needs_compiler
@pytest.mark.skipif(sys.platform != "linux", reason="expects what Linux does")
def test_the_sanitizers_find_nothing(tmp_path):
    """No access out of bounds, no undefined behaviour."""
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = _compile(tmp_path, *flags)
    if built.returncode != 0 and _compile(tmp_path).returncode == 0:
        pytest.skip("the compiler comes without sanitizers")
    assert built.returncode == 0, built.stderr
    output = _output(tmp_path)
    assert output[:9] + output[10:] == ["0"] * 14


@needs_compiler
def test_elsewhere_the_c_code_says_so(tmp_path):
    """On a platform that is neither Linux nor macOS it compiles too, and every function returns -ENOSYS."""
    built = _compile(tmp_path, "-U__linux__", "-U__APPLE__")
    assert built.returncode == 0, built.stderr
    enosys = str(-errno.ENOSYS)
    # The eighth is a 1 that is missing, the ninth the number of an unknown allocator.
    output = _output(tmp_path)
    assert output[:7] + output[9:] == [enosys] * (len(output) - 2)
    assert output[7:9] == [str(-errno.ENOSYS - 1), "0"]
