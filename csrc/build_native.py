"""Describes the extension ``memsafe_pool._native`` to cffi; setup.py names this file.

The declarations are the header itself, so the two cannot drift apart. The C that cffi generates
lands in the build directory and is not kept.
"""

from pathlib import Path

from cffi import FFI

HEADER = Path(__file__).resolve().parent / "memsafe_native.h"

ffibuilder = FFI()
ffibuilder.cdef("\n".join(line for line in HEADER.read_text().splitlines() if not line.startswith("#")))
ffibuilder.set_source(
    "memsafe_pool._native",
    '#include "memsafe_native.h"',
    sources=["csrc/allocator.c", "csrc/orphan.c", "csrc/process.c"],
    depends=["csrc/memsafe_native.h"],
    include_dirs=["csrc"],
    # Without a compiler the package installs all the same; memsafe_pool.native then goes through ctypes.
    optional=True,
)
