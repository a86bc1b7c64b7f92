"""Where the cgroups of a process are, and how files of ``/proc`` and ``/sys`` are read.

Covers cgroup v1, v2 and the hybrid of both, with and without a cgroup namespace, and a root for both trees
that is a parameter. What the numbers in the files mean together is in ``probe``. Imports neither Celery nor
billiard.

The formats are those of the kernel's documentation: ``cgroups(7)`` for ``/proc/<pid>/cgroup``, ``proc(5)``
for ``mountinfo``, ``admin-guide/cgroup-v2.rst`` and ``admin-guide/cgroup-v1/memory.rst`` for the rest.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from memsafe_pool import scarcity

__all__ = ["NO_LIMIT", "Files", "Place", "field", "find", "whole_number"]

#: Bytes from which a limit is none. Version 1 writes 9223372036854771712 (the largest number of whole pages).
NO_LIMIT = 1 << 60

#: What a kernel answers where a feature of it is not there or is switched off (the latter for pressure).
_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.EOPNOTSUPP)

_ESCAPED = re.compile(rb"\\([0-3][0-7][0-7])")


def whole_number(text: bytes) -> int | None:
    """Return the number that a file holds, or None where it is something else: empty, negative, words."""
    text = text.strip()
    # 20 digits are those of 2**64.
    return int(text) if text.isdigit() and len(text) <= 20 else None  # noqa: PLR2004 - said above


def field(text: bytes, name: bytes) -> int | None:
    """Return the number on the line ``<name> <number>`` or ``<name>: <number> kB``, as it stands there.

    None where there is no such line, or no number on it.
    """
    start = 0 if text.startswith(name) else text.find(b"\n" + name) + 1
    if not start and not text.startswith(name):
        return None
    words = text[start + len(name) : start + len(name) + 64].partition(b"\n")[0].split()
    return whole_number(words[0]) if words else None


class Files:
    """Reads files beneath ``root``; says once per file and kind of failure what was wrong.

    Args:
        root: What stands in front of ``/proc`` and ``/sys``.
        on_warning: Gets one sentence that names the file, what is wrong with it, and what is used instead.

    Attributes:
        unread: What there would be to say about files that ``get`` could not read for want of descriptors or
            memory; whoever wants to know clears it before.
    """

    def __init__(self, root: str, on_warning: Callable[[str], object]) -> None:
        self.prefix = root.rstrip("/")
        self._on_warning = on_warning
        self._warned: set[tuple[str, str]] = set()
        self.unread: list[tuple[str, str, str, str]] = []

    def read(self, path: str) -> bytes:
        """Return what is in the file ``path`` beneath the root. About 7 us.

        Raises:
            OSError: It cannot be read.
        """
        try:
            fd = os.open(self.prefix + path, os.O_RDONLY | os.O_CLOEXEC)
        except ValueError as exc:  # a path out of a broken file, with a NUL in it
            raise OSError(errno.EINVAL, str(exc), path) from exc
        try:
            parts = []
            while part := os.read(fd, 65536):
                parts.append(part)
        finally:
            os.close(fd)
        return b"".join(parts)

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        try:
            os.stat(self.prefix + path)
        except (OSError, ValueError):
            return False
        return True

    def warn(self, path: str, kind: str, problem: str, fallback: str) -> None:
        """Say what is wrong with a file, unless that was said before about ``path`` and ``kind``."""
        if (path, kind) not in self._warned:
            self._warned.add((path, kind))
            self._on_warning(f"{self.prefix}{path} {problem}: {fallback}")

    def get(self, path: str, fallback: str, *, optional: bool = False) -> bytes | None:
        """Return what is in a file; None where it cannot be read, with a warning.

        Args:
            path: The file, beneath the root.
            fallback: What is used instead, for the warning.
            optional: A file that is not there is no failure: not every kernel has it.
        """
        try:
            return self.read(path)
        except OSError as exc:
            if not optional or exc.errno not in _ABSENT:
                reason = os.strerror(exc.errno) if exc.errno else str(exc)
                warning = path, f"errno {exc.errno}", f"cannot be read ({reason})", fallback
                if scarcity.is_errno(exc.errno):
                    self.unread.append(warning)
                else:
                    self.warn(*warning)
        return None

    def odd(self, path: str, text: bytes, expected: str, fallback: str) -> None:
        """Warn that a file holds something else than ``expected``."""
        self.warn(path, f"no {expected}", f"has no {expected} but {text[:60]!r}", fallback)

    def number(self, path: str, fallback: str, *, optional: bool = False) -> int | None:
        """Return the one number in a file; None where there is none, with a warning: as ``get``."""
        text = self.get(path, fallback, optional=optional)
        if text is None:
            return None
        number = whole_number(text)
        if number is None:
            self.odd(path, text, "whole number", fallback)
        return number

    def number_on_line(self, path: str, text: bytes | None, name: bytes, fallback: str) -> int | None:
        """Return the number on the line ``name`` of a file; None where there is none, with a warning.

        ``text`` is what is in it, None where it could not be read: that has been warned about.
        """
        if text is None:
            return None
        number = field(text, name)
        if number is None:
            self.odd(path, text, f"number on a line {name.decode().strip()!r}", fallback)
        return number

    def limit(self, path: str, *, optional: bool = False) -> int | None:
        """Return the limit in a file, in bytes; ``NO_LIMIT`` for none.

        Also for one that makes no sense, with a warning: 0 makes none, nobody would be there to read it.
        None where the file does not exist and is optional.
        """
        fallback = "taken as no limit"
        text = self.get(path, fallback, optional=optional)
        if text is None:
            return None if optional and not self.exists(path) else NO_LIMIT
        if text.strip() == b"max":
            return NO_LIMIT
        number = whole_number(text)
        if not number:
            self.odd(path, text, "limit in bytes", fallback)
            return NO_LIMIT
        return min(number, NO_LIMIT)


@dataclass(frozen=True, slots=True)
class Place:
    """The cgroup of a process, and its ancestors.

    Attributes:
        version: 1 or 2.
        folders: From its own cgroup up to the highest one that can be seen, which is the mount point. Beneath
            the root of the ``Files`` that they were found with.
        own: The folder of the process's own cgroup; None where only ancestors of it can be seen.
    """

    version: int
    folders: tuple[str, ...]
    own: str | None


def find(files: Files, pid: int | str, controller: str = "memory") -> Place | None:
    """Find the cgroup of a process; None where there is none, or none can be seen (with a warning).

    The mounts are those of the calling process, who will open the files. With one file read after another, a
    process that moves meanwhile is found where it was or where it is.
    """
    fallback = f"{controller} cgroups are not looked at, only the machine's {controller}"
    path = f"/proc/{pid}/cgroup"
    text = files.get(path, fallback)
    if text is None:
        return None
    cgroups = _cgroups(text, controller)
    if cgroups is None:
        files.odd(path, text, "list of cgroups", fallback)
        return None
    # A controller is in one hierarchy at a time: if version 1 has it, version 2 has it not.
    version = 1 if 1 in cgroups else 2
    if version not in cgroups:
        return None
    mounts_path = "/proc/self/mountinfo"
    mounts = files.get(mounts_path, fallback)
    if mounts is None:
        return None
    place = _place(files, cgroups[version], _mounts(mounts, version, controller), version)
    if place is None:
        problem = (
            f"has no mount of the version {version} {controller} cgroups that shows {cgroups[version]!r}"
        )
        files.warn(mounts_path, "no mount", problem, fallback)
        return None
    return _without_gone(files, place)


def _cgroups(text: bytes, controller: str) -> dict[int, str] | None:
    """Return the path in the hierarchy of version 1 and in version 2, where there is one.

    None where the text is something else.
    """
    found = {}
    for line in text.split(b"\n"):
        hierarchy, _, rest = line.partition(b":")
        controllers, colon, path = rest.partition(b":")
        if not line:
            continue
        if not colon or not hierarchy.isdigit() or not path.startswith(b"/"):
            return None
        if controller.encode() in controllers.split(b","):
            found[1] = os.fsdecode(path)
        elif hierarchy == b"0" and not controllers:
            found[2] = os.fsdecode(path)
    return found if text.strip() else None


def _place(files: Files, path: str, mounts: list[tuple[list[str], str]], version: int) -> Place | None:
    """Return the mount through which most ancestors can be seen."""
    names = _names(path)
    hidden = None
    found: list[tuple[list[str], str]] = []
    for root, point in mounts:
        if names[: len(root)] == root and ".." not in names[len(root) :]:
            found.append((names[len(root) :], point))
        elif set(root) == {".."} and len(root) > names.count(".."):
            hidden = point
    # More names beneath the mount point are more ancestors.
    found.sort(key=lambda each: -len(each[0]))
    if len(found) > 1:
        found = [each for each in found if files.exists(each[1])] or found
    if found:
        below, point = found[0]
        point = point.rstrip("/")
        folders = tuple("/".join([point, *below[:count]]) for count in range(len(below), -1, -1))
        return Place(version, folders, folders[0])
    if hidden is not None:
        # A cgroup namespace whose mounts are still those of outside: /../.. is mounted, and we are in /.
        # Nothing says the names in between.
        files.warn(
            hidden,
            "hidden",
            f"is mounted from outside the cgroup namespace, which hides where {path!r} is in it",
            "the limits between are not seen",
        )
        return Place(version, (hidden.rstrip("/"),), None)
    return None


def _names(path: str) -> list[str]:
    return [name for name in path.split("/") if name not in ("", ".")]


def _mounts(text: bytes, version: int, controller: str) -> list[tuple[list[str], str]]:
    """Return what each mount of these cgroups shows: the root, as names, and the mount point."""
    found = []
    # Not line by line: a machine with containers has thousands of mounts, and few of them are cgroups.
    at = -1
    while (at := text.find(b" - cgroup", at + 1)) >= 0:
        left = text[text.rfind(b"\n", 0, at) + 1 : at]
        right = text[at + 3 : at + 4096].partition(b"\n")[0]
        words, (kind, *options) = left.split(b" "), right.split(b" ")
        if version == 1:
            is_ours = kind == b"cgroup" and bool(options) and controller.encode() in options[-1].split(b",")
        else:
            is_ours = kind == b"cgroup2"
        if is_ours and len(words) > 4:  # noqa: PLR2004 - number, parent, device, root, point, ...
            found.append((_names(_unescaped(words[3])), _unescaped(words[4])))
    return found


def _unescaped(text: bytes) -> str:
    r"""Return a path of ``mountinfo``, in which ``\040`` is a space."""
    if b"\\" in text:
        text = _ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), text)
    return os.fsdecode(text)


def _without_gone(files: Files, place: Place) -> Place | None:
    """Leave out the folders of cgroups that were removed or are not shown, with a warning."""
    folders = place.folders
    while folders and not files.exists(folders[0]):
        files.warn(
            folders[0], "gone", "is not there", "the cgroup's ancestors are looked at, as far as they are"
        )
        folders = folders[1:]
    if not folders:
        return None
    return Place(place.version, folders, place.own if folders[0] == place.own else None)
