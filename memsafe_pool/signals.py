"""Signals to child processes, which must not reach somebody else's.

A pid may be another process's as soon as the child has been reaped, and other code of the worker may wait for
any child, too. A pidfd stays with its process. Where there is none (before Linux 5.3, macOS) or the system
refuses to signal by it (seccomp), the pid is used; callers see to it that they have not reaped it.
"""

from __future__ import annotations

import os
import select
import signal

__all__ = ["open_pidfd", "send", "send_to_group"]

#: Linux 6.9 and later: <linux/pidfd.h>.
PIDFD_SIGNAL_PROCESS_GROUP = 4


def open_pidfd(pid: int) -> int:
    """Return a descriptor of a child that is not reaped yet; -1 where there are none."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):
        return -1


def send(pid: int, pidfd: int, signum: int) -> bool:
    """Send a signal to a process; return whether there was one to get it.

    Arguments:
        pidfd: Its descriptor, or -1.
    """
    try:
        if pidfd >= 0:
            signal.pidfd_send_signal(pidfd, signum)
            return True
    except ProcessLookupError:
        return False
    except (AttributeError, OSError):
        if _has_ended(pidfd):
            return False
    try:
        os.kill(pid, signum)
    except OSError:
        return False  # it has gone, or is another user's
    return True


def send_to_group(pid: int, pidfd: int, signum: int) -> bool:
    """As :func:`send`, to all of the process group that it leads if there is one."""
    try:
        if pidfd >= 0:
            signal.pidfd_send_signal(pidfd, signum, None, PIDFD_SIGNAL_PROCESS_GROUP)
            return True
    except ProcessLookupError:
        return send(pid, pidfd, signum)
    except (AttributeError, OSError):
        if _has_ended(pidfd):
            return False
    try:
        if os.getpgid(pid) != pid:
            return send(pid, pidfd, signum)
        os.killpg(pid, signum)
    except OSError:
        return False
    return True


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
