"""The disk of the emulated machine: an ext4 image with what tests need of this machine, at the same paths.

Reading it is much faster than sharing this machine's files over 9p: imports take a fourth of the time there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from packages import Missing, Packages

REPOSITORY = Path(__file__).resolve().parents[2]

#: Of the repository, what tests read.
PARTS = ("memsafe_pool", "tests", "benchmarks", "examples", "csrc", "docs", "pyproject.toml", "README.md")

#: Programs that are not busybox's, and what they are called where they come from. The shell, as busybox's own
#: runs its unshare and not the one that is there, and that knows no cgroup namespaces.
PROGRAMS = {"redis-server": "redis-server", "unshare": "unshare", "sh": "dash"}

#: Folders of Python's library that nobody imports here.
LEFT_OUT = {"site-packages", "dist-packages", "test", "idlelib", "lib2to3", "ensurepip", "turtledemo"}

#: Other files, where there are such: kombu wants time zones.
FILES = ("/etc/ld.so.cache", "/etc/passwd", "/etc/group", "/usr/lib/locale/C.utf8", "/usr/share/zoneinfo")

#: Only what is written takes room on the disk of this machine.
SIZE_BYTES = 4 << 30


class Stage:
    """A folder that becomes the disk. Files are linked, not copied, where that is possible."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def add(self, path: str | Path) -> None:
        """Add a file or a folder of this machine with all that is in it, at the path it has here."""
        given = os.path.abspath(path)
        target = self.follow(given)
        if os.path.isdir(target):
            shutil.copytree(
                target,
                self.at(target),
                symlinks=True,
                dirs_exist_ok=True,
                copy_function=_link,
                ignore=_left_out,
            )
        else:
            os.makedirs(os.path.dirname(self.at(target)), exist_ok=True)
            _link(target, self.at(target))

    def copy(self, path: str, target: str) -> None:
        """Add a file at another path than the one it has here."""
        os.makedirs(os.path.dirname(self.at(target)), exist_ok=True)
        if not os.path.lexists(self.at(target)):
            shutil.copy2(path, self.at(target))

    def at(self, path: str) -> str:
        return f"{self.folder}{path}"

    def follow(self, path: str) -> str:
        """Make the symbolic links on the way to a path; return where it leads to."""
        done = ""
        todo = path.strip("/").split("/")
        for _ in range(40):
            while todo and not os.path.islink(f"{done}/{todo[0]}"):
                done = f"{done}/{todo.pop(0)}"
            if not todo:
                return done
            link = f"{done}/{todo.pop(0)}"
            to = os.readlink(link)
            if not os.path.lexists(self.at(link)):
                os.makedirs(os.path.dirname(self.at(link)), exist_ok=True)
                os.symlink(to, self.at(link))
            target = os.path.normpath(os.path.join(done or "/", to))
            done, todo = "", [*target.strip("/").split("/"), *todo]
        raise Missing(f"{path} has too many symbolic links on its way")


def _link(source: str, target: str) -> None:
    if os.path.lexists(target):  # as part of another folder
        return
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    try:
        os.link(source, target)
    except OSError:  # another file system, or a file of somebody else's
        shutil.copy2(source, target)


def _left_out(folder: str, names: list[str]) -> set[str]:
    return LEFT_OUT.intersection(names) if folder in _library_folders() else set()


def _library_folders() -> set[str]:
    # DESTSHARED: a folder in the former, but for some distributions.
    folders = sysconfig.get_path("stdlib"), sysconfig.get_config_var("DESTSHARED")
    return {os.path.realpath(folder) for folder in folders if folder}


def _libraries(files: Iterable[str], packages: Packages) -> set[str]:
    """All shared libraries that these files need, and the dynamic linker."""
    said = subprocess.run(
        ["ldd", *sorted(files)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=120, env=packages.environment(),
    ).stdout  # fmt: skip
    words = [word for line in said.splitlines() if line.startswith("\t") for word in line.split()]
    return {word for word in words if word.startswith("/")}


def make(folder: Path, packages: Packages, environment: Path, command: str) -> Path:
    """Write the image into ``folder`` and return its path. ``environment`` is the virtual environment."""
    stage = Stage(folder / "stage")
    parts = [environment, sys.executable, os.path.realpath(sys.executable), *_library_folders()]
    parts += [REPOSITORY / part for part in PARTS]
    parts += filter(os.path.exists, FILES)
    for part in parts:
        stage.add(part)
    for name, source in PROGRAMS.items():
        stage.copy(os.path.realpath(packages.program(source)), f"/usr/bin/{name}")
    elves = [path for path in map(str, stage.folder.rglob("*")) if _is_elf(path)]
    for path in sorted(_libraries(elves, packages)):
        stage.copy(path, stage.follow(packages.place(path)))
    _furnish(stage, packages)
    Path(stage.at("/command")).write_text(command)
    image = folder / "disk.ext4"
    with image.open("wb") as file:
        file.truncate(SIZE_BYTES)
    format_it = [
        packages.program("mke2fs"),
        "-q",
        "-t",
        "ext4",
        "-O",
        "^has_journal",
        "-d",
        stage.folder,
        image,
    ]
    subprocess.run(format_it, check=True, stdin=subprocess.DEVNULL, env=packages.environment(), timeout=300)
    shutil.rmtree(stage.folder)
    return image


def _is_elf(path: str) -> bool:
    if os.path.islink(path) or not os.path.isfile(path):
        return False
    if ".so" not in os.path.basename(path) and not os.access(path, os.X_OK):
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"\x7fELF"


def _furnish(stage: Stage, packages: Packages) -> None:
    """What makes it a system: busybox under all its names, mount points, the first process."""
    for name in ("bin", "dev", "etc", "proc", "root", "run", "sys", "tmp", "var/tmp"):
        os.makedirs(stage.at(stage.follow(f"/{name}")), exist_ok=True)
    os.chmod(stage.at("/tmp"), 0o1777)
    busybox = packages.program("busybox")
    shutil.copy2(busybox, stage.at("/bin/busybox"))
    names = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True, timeout=60).stdout
    for name in names.split():
        if name != "busybox" and not os.path.lexists(stage.at(f"/bin/{name}")):
            os.symlink("busybox", stage.at(f"/bin/{name}"))
    Path(stage.at("/etc/hosts")).write_text("127.0.0.1 localhost\n")
    shutil.copy2(Path(__file__).with_name("init"), stage.at("/init"))
    os.chmod(stage.at("/init"), 0o755)
