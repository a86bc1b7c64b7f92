"""Workers under the same memory limit tell each other what they have reserved and not used yet.

What another worker uses is seen in the cgroup. What it has promised to its tasks and they have not taken yet
is not, and two workers would spend the same free memory. So each writes that number into a slot of a file
they share, and whoever wants to spend more takes a turn: nobody else can meanwhile.

The file is in ``/dev/shm``, which is there in containers whose other folders are read-only, is memory, and is
the same whatever ``TMPDIR`` and ``XDG_RUNTIME_DIR`` are; where there is none, in the folder for temporary
files. Its name has the user and the cgroup of the limit in it: workers of other users are not seen (their
file could say anything, and block us), nor those in a container with a ``/dev/shm`` of its own.

Everything is by locks on bytes of the file (``fcntl``), which the kernel takes from a process that ends,
however it ends, and does not give to its children: one byte for the turn, one for each slot, by which others
know that its worker lives. A number that was given to another process since, or that means something else in
another pid namespace, matters to nobody.

A worker that is killed leaves its slot, which counts for a second at most, and perhaps the file, of 16 bytes
for each slot. The next worker of this user removes that, whatever its own limit is. Imports neither Celery
nor billiard.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
import stat
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memsafe_pool.probe import Reading

__all__ = ["Neighbours", "key"]

#: One slot: the pid, for people who look at the file (0: the slot is free), and bytes.
_SLOT = struct.Struct("=QQ")
_FREE = bytes(_SLOT.size)

#: Slots there can be: one page of memory.
MAX_SLOTS = 4096 // _SLOT.size

#: The byte whose lock is the turn; behind all slots.
_TURN = 1 << 20

#: Anybody may write there: see _open.
_SHARED_MEMORY = "/dev/shm"  # noqa: S108 - as above

#: Seconds between two looks for workers that have ended, and between two tries after one that failed.
SWEEP_SECONDS = 1.0

#: Seconds to wait for a turn, and between two tries to get it.
WAIT_SECONDS, _NAP_SECONDS = 0.005, 0.0002

#: Seconds to wait for the turn when joining and leaving.
_JOIN_SECONDS = 0.5

#: What a lock that somebody else has is told by.
_HELD = (errno.EACCES, errno.EAGAIN)

_MOST = (1 << 64) - 1


def key(reading: Reading) -> str:
    """Return what is the same for all workers under the lowest limit, and for no others.

    The device and inode of the cgroup's folder, which are the same in all containers that see it; "machine"
    where the machine's memory is the lowest limit.
    """
    folder = os.path.dirname(reading.lowest_limit_source)
    if not folder:
        return "machine"
    try:
        found = os.stat(folder)
    except OSError:
        return "machine"  # removed since it was read
    return f"{found.st_dev:x}-{found.st_ino:x}"


class _Replaced(Exception):
    """The file that is open is not the one with its name any more."""


class Neighbours:
    """The other workers under the same limit. Never an error: what goes wrong is one warning, and 0 bytes.

    For one thread at a time, and one in a process: locks are a process's. In a process that was forked from
    the one that made it, it does nothing.

    Arguments:
        key: What workers under the same limit have in common: letters, digits and dashes.
        folder: Where the file is; None for the place described above.
        on_warning: Gets one sentence if the file cannot be used; None for this module's logger.
        clock: Tells the time in seconds.
    """

    def __init__(
        self,
        key: str,
        *,
        folder: str | None = None,
        on_warning: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        warn = logging.getLogger(__name__).warning
        self._on_warning = on_warning or (lambda text: warn("%s", text))
        stem = os.path.join(folder or _folder(), f"memsafe-pool-{os.geteuid()}-")
        self.path = stem + key
        self._clock = clock
        self._warned = False
        self._pid = os.getpid()
        self._file = -1
        self._slot = -1
        self._own = 0
        self._closed = False
        #: What was last read of the file; of the others in it their number and the sum.
        self._seen, self._count, self._sum = b"", 0, 0
        self._sweep_at = self._patient_at = float("-inf")
        self._tidy(stem)
        with self.turn(_JOIN_SECONDS):
            pass

    @property
    def alone(self) -> bool:
        """Whether nobody else was there at the last look."""
        return not self._count

    def others(self) -> int:
        """Return the bytes that the others have reserved and not used.

        About 1.5 us if nothing has changed, also when we are alone: one read of a file that is in memory, and
        a comparison. 5 us when a number has changed; once a second, where others have reserved something, a
        look for those that have ended (10 us for each).
        """
        if not self._usable():
            return 0
        try:
            self._look()
            if self._sum and self._clock() >= self._sweep_at and self._lock(_TURN):
                try:
                    self._sweep()
                finally:
                    self._unlock(_TURN)
        except _Replaced:
            self._leave()  # the next turn joins the others where they are
        except OSError as exc:
            self._give_up(exc)
        return self._sum

    def publish(self, own_bytes: int) -> None:
        """Tell the others what we have reserved and not used. 1 us; nothing if it is what it was."""
        own = min(max(own_bytes, 0), _MOST)
        if own != self._own:
            self._own = own
            if self._usable():
                try:
                    self._write()
                except OSError as exc:
                    self._give_up(exc)

    @contextlib.contextmanager
    def turn(self, wait: float = WAIT_SECONDS) -> Iterator[int]:
        """Be the only one to reserve; gives what the others have reserved and not used (bytes).

        To be held for the decision and :meth:`publish` only. 5 us, 9 us with what is published. If somebody
        else keeps it (a stopped process), it is done without after ``wait`` seconds, and for the next second
        without waiting.
        """
        held = self._begin(wait)
        try:
            yield self._sum
        finally:
            if held and self._file >= 0:
                try:
                    self._unlock(_TURN)
                except OSError as exc:
                    self._give_up(exc)

    def close(self) -> None:
        """Leave. The last one removes the file."""
        if self._pid == os.getpid() and self._slot >= 0:
            try:
                held = self._take_turn(_JOIN_SECONDS)
                if held:
                    self._sweep()
                os.pwrite(self._file, _FREE, self._slot * _SLOT.size)
                if held and not self._count:
                    os.unlink(self.path)
            except (OSError, _Replaced):
                pass  # whoever comes next finds a slot that nobody holds, or no file
        self._leave()
        self._closed = True

    # -- joining and leaving

    def _tidy(self, stem: str) -> None:
        """Remove files that workers under other limits, now gone, have left."""
        for path in glob.glob(f"{glob.escape(stem)}*"):
            if path != self.path:
                with contextlib.suppress(OSError):  # somebody is in it, or has just removed it
                    _remove_unused(path)

    def _usable(self) -> bool:
        return self._slot >= 0 and self._pid == os.getpid()

    def _begin(self, wait: float) -> bool:
        """Take the turn, joining the others first if we have not yet; return whether it was to be had."""
        if self._closed or self._pid != os.getpid():
            return False
        if self._slot < 0 and self._clock() < self._sweep_at:
            return False
        try:
            for _ in range(3):
                if self._file < 0:
                    self._file = _open(self.path)
                held = self._take_turn(wait)
                try:
                    if held and (self._slot < 0 or self._clock() >= self._sweep_at):
                        self._sweep()
                        self._join()
                    if self._slot >= 0:
                        self._look()
                except _Replaced:
                    self._leave()
                    continue
                return held
        except OSError as exc:
            self._give_up(exc)
        return False

    def _join(self) -> None:
        """Take the first free slot, in our turn."""
        if self._slot >= 0:
            return
        used = [slot[0] for slot in _SLOT.iter_unpack(self._read())]
        number = used.index(0) if 0 in used else len(used)
        if number >= MAX_SLOTS:
            raise OSError(errno.ENOSPC, f"{MAX_SLOTS} workers are in it")
        if self._lock(number * _SLOT.size):
            self._slot = number
            self._write()

    def _leave(self) -> None:
        """Close the file, and with it give up all locks in it."""
        file, self._file, self._slot = self._file, -1, -1
        self._seen, self._count, self._sum = b"", 0, 0
        self._sweep_at = float("-inf")
        if file >= 0:
            try:
                os.close(file)
            except OSError:
                pass  # closed by somebody who closes all

    def _give_up(self, exc: OSError) -> None:
        """Do without, and try again later."""
        if not self._warned:
            self._warned = True
            self._on_warning(
                f"{self.path} cannot be used ({exc.strerror or exc}): what other workers under the same "
                "memory limit have reserved is not known"
            )
        self._leave()
        self._sweep_at = self._clock() + SWEEP_SECONDS

    # -- the turn

    def _take_turn(self, wait: float) -> bool:
        if self._lock(_TURN):
            return True
        now = time.monotonic()
        if self._clock() < self._patient_at:
            return False
        while time.monotonic() - now < wait:
            time.sleep(_NAP_SECONDS)
            if self._lock(_TURN):
                return True
        self._patient_at = self._clock() + SWEEP_SECONDS
        return False

    def _lock(self, at: int) -> bool:
        """Lock a byte; return False if another process has it."""
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
        except OSError as exc:
            if exc.errno in _HELD:
                return False
            raise
        return True

    def _unlock(self, at: int) -> None:
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, at)

    # -- the slots

    def _write(self) -> None:
        os.pwrite(self._file, _SLOT.pack(self._pid, self._own), self._slot * _SLOT.size)

    def _read(self) -> bytes:
        text = os.pread(self._file, MAX_SLOTS * _SLOT.size, 0)
        return text[: len(text) // _SLOT.size * _SLOT.size]

    def _look(self) -> None:
        """Add up what the others have."""
        text = self._read()
        if text != self._seen:
            self._seen = text
            others = [
                pending
                for number, (pid, pending) in enumerate(_SLOT.iter_unpack(text))
                if pid and number != self._slot
            ]
            self._count, self._sum = len(others), sum(others)

    def _sweep(self) -> None:
        """Free the slots of workers that have ended, and see that ours is still ours; in our turn.

        Raises:
            _Replaced: It is not, or the file was removed: by the last one, or by somebody who tidies up.
        """
        self._sweep_at = self._clock() + SWEEP_SECONDS
        slots = list(_SLOT.iter_unpack(self._read()))
        if not os.fstat(self._file).st_nlink or (self._slot >= 0 and not self._is_ours(slots)):
            raise _Replaced
        for number, (pid, _) in enumerate(slots):
            at = number * _SLOT.size
            if pid and number != self._slot and self._lock(at):
                # Nobody holds it.
                os.pwrite(self._file, _FREE, at)
                self._unlock(at)
        self._look()

    def _is_ours(self, slots: list[tuple[int, ...]]) -> bool:
        """Whether our slot is in our name, and locked; it is locked again if somebody has closed the file."""
        number = self._slot
        return number < len(slots) and slots[number][0] == self._pid and self._lock(number * _SLOT.size)


def _folder() -> str:
    if not os.access(_SHARED_MEMORY, os.W_OK):
        try:
            return tempfile.gettempdir()
        except OSError:
            pass  # there is none that can be written to, which is said when the file is to be opened
    return _SHARED_MEMORY


def _remove_unused(path: str) -> None:
    """Remove a file that nobody is in.

    Raises:
        OSError: Somebody is, or it is not ours.
    """
    file = _open(path, create=False)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # all of it; who comes meanwhile begins anew
        os.unlink(path)
    finally:
        os.close(file)


def _open(path: str, *, create: bool = True) -> int:
    """Open the file, made if it is not there, if it is really ours.

    Raises:
        OSError: It is not: somebody may have put a link there, or a file of his own.
    """
    # Not through a link, and without waiting for the other end of a pipe.
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    file = os.open(path, flags | (os.O_CREAT if create else 0), 0o600)
    found = os.fstat(file)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
        os.close(file)
        raise OSError(errno.EPERM, "it is not a file of this user alone")
    return file
