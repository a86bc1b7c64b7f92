"""Debian packages, unpacked into a folder of this project's: nothing is installed, root is not needed.

Covers where the emulator, the kernel, and a static busybox come from.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

#: Debian's kernel for virtual machines: ext4 and NVMe are built in, so that it needs no modules at all.
KERNEL = "linux-image-cloud-amd64"

PROGRAMS = ("qemu-system-x86", "busybox-static", "e2fsprogs", "redis-server", "util-linux", "dash")

#: Seconds for one call of apt-get or dpkg-deb; about 60 MB are fetched.
DEADLINE = 300


class Missing(Exception):
    """What has to be there and is not, as a sentence for whoever called make."""


class Packages:
    """Programs and files of unpacked packages; what is installed on the machine is found as well."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def environment(self) -> dict[str, str]:
        """Have programs find the libraries that were unpacked."""
        folders = [self.root / "usr/lib/x86_64-linux-gnu", self.root / "lib/x86_64-linux-gnu"]
        return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(map(str, folders))}

    def program(self, name: str) -> str:
        unpacked = [str(self.root / part) for part in ("usr/bin", "usr/sbin", "bin", "sbin")]
        system = [os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
        path = shutil.which(name, path=os.pathsep.join(unpacked + system))
        if path is None:
            raise Missing(f"there is no {name}, and Debian's packages {', '.join(PROGRAMS)} brought none")
        return path

    def place(self, path: str) -> str:
        """Where a file belongs that may be an unpacked one."""
        return "/" + os.path.relpath(path, self.root if Path(path).is_relative_to(self.root) else "/")

    def kernel(self) -> Path:
        return next(iter(sorted((self.root / "boot").glob("vmlinuz-*"))))


def unpack(folder: Path) -> Packages:
    """Return the packages in ``folder``, fetched and unpacked if an earlier call has not done it."""
    root = folder / "root"
    if not root.is_dir():
        _check_machine()
        shutil.rmtree(folder, ignore_errors=True)
        unfinished, archives = folder / "unfinished", folder / "archives"
        for path in (unfinished, archives, folder / "lists/partial"):
            path.mkdir(parents=True)
        for name in _fetch(folder, archives):
            _run(["dpkg-deb", "-x", str(archives / name), str(unfinished)], folder)
        shutil.rmtree(archives)
        shutil.rmtree(folder / "lists")
        unfinished.rename(root)
    return Packages(root)


def _check_machine() -> None:
    if platform.machine() != "x86_64":
        raise Missing(f"the machine that is emulated is x86_64; this one is {platform.machine()}")
    for program in ("apt-get", "apt-cache", "dpkg-deb"):
        if shutil.which(program) is None:
            raise Missing(
                f"there is no {program}: emulator and kernel come from Debian's packages; "
                "use Debian 12 or later, or a container of it"
            )


def _fetch(folder: Path, archives: Path) -> list[str]:
    """Download the packages, with what they depend on and is not installed; return the names of files."""
    # Lists of our own: those of the system may be old or missing, and may not be ours to renew.
    options = [
        f"Dir::State::lists={folder}/lists",
        f"Dir::Cache={folder}",
        "Debug::NoLocking=1",
        "APT::Sandbox::User=root",
    ]
    apt = [word for option in options for word in ("-o", option)]
    _run(["apt-get", *apt, "update"], folder)
    about = _run(["apt-cache", *apt, "depends", KERNEL], folder)
    kernel = re.search(r"Depends: (linux-image-\S+)", about)
    if kernel is None:
        raise Missing(f"Debian's package {KERNEL} is not in the package archives of this system")
    simulated = _run(
        ["apt-get", *apt, "install", "--simulate", "--no-install-recommends", *PROGRAMS], folder
    ).splitlines()
    names = [line.split()[1] for line in simulated if line.startswith("Inst ")]
    _run(["apt-get", *apt, "download", kernel[1], *names], archives)
    return sorted(os.listdir(archives))


def _run(command: list[str], folder: Path) -> str:
    try:
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=DEADLINE, env={**os.environ, "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Missing(f"{' '.join(command)} did not end within {DEADLINE} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip()[-1500:]
        raise Missing(f"{' '.join(command)} failed with exit status {done.returncode}:\n{said}")
    return done.stdout
