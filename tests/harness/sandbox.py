"""Runs a command with some system calls refused, as a container's seccomp profile does.

``python sandbox.py EPERM vfork,mincore -- COMMAND...``; ``SYSCALLS`` has the calls it knows. A program of its
own, so that the filter is there before the command's first instruction.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

#: Numbers on x86-64 and arm64; 0 where there is no such call. ``vfork`` is a ``clone`` there.
SYSCALLS = {
    "clone3": (435, 435),
    "close_range": (436, 436),
    "faccessat2": (439, 439),
    "membarrier": (324, 283),
    "memfd_create": (319, 279),
    "mincore": (27, 232),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "prctl": (157, 167),
    "prlimit64": (302, 261),
    "process_vm_readv": (310, 270),
    "rseq": (334, 293),
    "sched_getaffinity": (204, 123),
    "statx": (332, 291),
    "vfork": (58, 0),
    "waitid": (247, 95),
}

_MACHINES = {"x86_64": 0, "aarch64": 1}

_CLONE, _CLONE_VFORK = (56, 220), 0x4000

# <linux/bpf_common.h>, <linux/seccomp.h>, <linux/prctl.h>
_LOAD, _IF_EQUAL, _IF_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NUMBER_AT, _FIRST_ARGUMENT_AT = 0, 16
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2


def usable() -> bool:
    """Whether this machine's numbers are known."""
    return sys.platform == "linux" and platform.machine() in _MACHINES


def command(number: str, names: list[str], line: list[str]) -> list[str]:
    """The command, run with these calls refused with this error."""
    return [sys.executable, __file__, number, ",".join(names), "--", *line]


def _program(number: int, names: list[str]) -> bytes:
    """The filter: load the call's number; if it is one of these, refuse; else allow."""
    machine = _MACHINES[platform.machine()]
    refuse = struct.pack("=HBBI", _RETURN, 0, 0, _ERRNO | number)
    parts = [struct.pack("=HBBI", _LOAD, 0, 0, _NUMBER_AT)]
    for name in names:
        if call := SYSCALLS[name][machine]:
            parts += [struct.pack("=HBBI", _IF_EQUAL, 0, 1, call), refuse]
    if "vfork" in names:
        parts += [
            struct.pack("=HBBI", _IF_EQUAL, 0, 3, _CLONE[machine]),
            struct.pack("=HBBI", _LOAD, 0, 0, _FIRST_ARGUMENT_AT),
            struct.pack("=HBBI", _IF_SET, 0, 1, _CLONE_VFORK),
            refuse,
        ]
    return b"".join([*parts, struct.pack("=HBBI", _RETURN, 0, 0, _ALLOW)])


def _main() -> None:
    number, names, line = getattr(errno, sys.argv[1]), sys.argv[2].split(","), sys.argv[4:]
    program = ctypes.create_string_buffer(_program(number, names))
    count = (len(program) - 1) // 8
    description = ctypes.create_string_buffer(struct.pack("HP", count, ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(description), 0, 0),
    ):
        if libc.prctl(*arguments):
            sys.exit(f"system calls cannot be filtered here: {os.strerror(ctypes.get_errno())}")
    os.execvp(line[0], line)


if __name__ == "__main__":
    _main()
