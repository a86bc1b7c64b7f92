"""Run tests on a real cgroup version 2, which this machine may not have: in an emulated machine of its own.

It boots Debian's kernel in QEMU with a disk made of what the tests need, runs pytest there, and ends with its
output and its exit status. All that it starts and writes is gone afterwards, but for the unpacked packages.

Without hardware virtualization Python is 5 to 15 times slower there, so deadlines are scaled (TEST_SLOWNESS).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import disk
from packages import Missing, Packages, unpack

#: The exit status when no tests could be run.
CANNOT = 3

#: Seconds to boot, for the last test to end, and to shut down.
BOOT = 120

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def say(text: str) -> None:
    sys.stderr.write(f"test-v2: {text}\n")
    sys.stderr.flush()


def command_line(arguments: argparse.Namespace, environment: Path) -> str:
    """What runs in the machine, as a script."""
    slowness = arguments.slowness
    settings = {"TEST_SLOWNESS": f"{slowness:g}", "COLUMNS": "120", "PYTHONDONTWRITEBYTECODE": "1"}
    pytest = [
        *("-m", "pytest", "-n", str(arguments.processes), "--dist", "loadgroup", "-p", "no:cacheprovider"),
        # As in pyproject.toml
        *("--timeout", f"{400 * slowness:g}", "-o", f"faulthandler_timeout={350 * slowness:g}"),
        *("--session-timeout", f"{arguments.seconds - BOOT:g}"),
        *arguments.pytest,
    ]
    words = [f"{name}={value}" for name, value in settings.items()]
    command = arguments.command or [str(environment / "bin/python"), *pytest]
    return f"cd {shlex.quote(str(disk.REPOSITORY))} && env {shlex.join(words)} {shlex.join(command)}\n"


def qemu(packages: Packages, image: Path, log: Path, arguments: argparse.Namespace) -> list[str]:
    append = [
        *("root=/dev/nvme0n1", "rw", "init=/init", "console=ttyS1", "panic=-1", "psi=1"),
        # The kernel's trial of the timer fails, with a panic, where the emulator waits for a core meanwhile.
        "no_timer_check",
        # Each costs much where each instruction is emulated.
        *("mitigations=off", "init_on_alloc=0", "nokaslr", "audit=0", "random.trust_cpu=on"),
    ]
    data = packages.root / "usr/share"
    return [
        packages.program("qemu-system-x86_64"),
        *(
            "-L",
            str(data / "qemu"),
            "-L",
            str(data / "seabios"),
            "-L",
            "/usr/share/qemu",
            "-L",
            "/usr/share/seabios",
        ),
        *("-accel", arguments.accelerator, "-cpu", "max", "-smp", "2", "-m", "3G"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-drive", f"file={image},format=raw,if=none,id=disk,cache=unsafe"),
        *("-device", "nvme,serial=disk,drive=disk"),
        *("-serial", "stdio", "-serial", f"file:{log}"),
        *("-kernel", str(packages.kernel()), "-append", " ".join(append)),
    ]


def end_with_parent() -> None:
    """In the new process: end when this one does, however that comes about."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def boot(command: list[str], environment: dict[str, str], seconds: float) -> None:
    """Run the machine until it is off, and show what it says; end it after ``seconds``."""
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
        preexec_fn=end_with_parent,  # noqa: PLW1509 - one C call
    ) as machine:
        late = threading.Timer(seconds, machine.kill)
        late.start()
        try:
            while piece := os.read(machine.stdout.fileno(), 65536):
                sys.stdout.buffer.write(piece.replace(b"\r", b""))
                sys.stdout.buffer.flush()
        finally:
            late.cancel()
            machine.kill()


def status_in(log: str) -> int | None:
    """The exit status of the command; None where the machine did not get that far."""
    words = [line.split() for line in log.splitlines() if line.startswith("exit status ")]
    return int(words[-1][2]) if words else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--packages", type=Path, required=True, help="folder for packages, kept between runs")
    parser.add_argument("--seconds", type=float, default=5400, help="the deadline of the emulated machine")
    parser.add_argument("--slowness", type=float, default=10, help="factor for the deadlines of tests")
    parser.add_argument("--processes", type=int, default=2, help="test processes")
    parser.add_argument("--accelerator", default="tcg,thread=multi", help="QEMU's; kvm where that works")
    parser.add_argument("--command", type=shlex.split, help="what to run in place of pytest")
    parser.add_argument("pytest", nargs="*", help="options for pytest")
    arguments = parser.parse_args()
    # So that what is begun is also ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    environment = Path(sys.prefix)
    try:
        packages = unpack(arguments.packages.absolute())
    except Missing as exc:
        say(f"cannot run: {exc}")
        return CANNOT
    with tempfile.TemporaryDirectory(prefix="machine-", dir=arguments.packages) as name:
        folder = Path(name)
        try:
            image = disk.make(folder, packages, environment, command_line(arguments, environment))
        except Missing as exc:
            say(f"cannot run: {exc}")
            return CANNOT
        say("the emulated machine starts; pytest is silent for its first minute")
        log = folder / "log"
        boot(qemu(packages, image, log, arguments), packages.environment(), arguments.seconds)
        said = log.read_text(errors="replace") if log.exists() else ""
    status = status_in(said)
    if status is None:
        say(
            f"failed: the machine crashed, or was ended after {arguments.seconds:g} s; "
            f"its kernel said last:\n{said[-3000:]}"
        )
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
