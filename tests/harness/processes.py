"""Processes of a worker as the kernel sees them: who is whose child, who is a zombie, who has what open."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import psutil

from .waiting import until


def children(pid: int) -> dict[int, str]:
    """The direct children of a process and their status, zombies too."""
    found = {}
    try:
        for child in psutil.Process(pid).children():
            try:
                found[child.pid] = child.status()
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        pass  # it has ended, and has none
    return found


def zombies(pid: int) -> list[int]:
    """The children of a process that have ended and that it has not waited for."""
    return [child for child, status in children(pid).items() if status == psutil.STATUS_ZOMBIE]


def is_alive(pid: int) -> bool:
    """Whether there is such a process that has not ended."""
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def descriptors(pid: int) -> dict[int, str]:
    """The open descriptors of a process and what they lead to."""
    folder, found = Path(f"/proc/{pid}/fd"), {}
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return found  # it has just ended
    for name in names:
        try:
            found[int(name)] = os.readlink(folder / name)
        except FileNotFoundError:
            continue  # closed meanwhile
    return found


def kill(*pids: int, number: int = signal.SIGKILL) -> int:
    """Send a signal to processes; return how many there were to get it."""
    reached = 0
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
        reached += 1
    return reached


def wait_idle(pid: int, looks: int = 10) -> None:
    """Wait until a process sleeps and uses no time, at several looks in a row."""
    process, seen = psutil.Process(pid), []

    def is_idle() -> bool:
        seen.append((process.status(), *process.cpu_times()[:2]))
        return len(seen) >= looks and len(set(seen[-looks:])) == 1 and seen[-1][0] == psutil.STATUS_SLEEPING

    until(is_idle, f"process {pid} to wait for something")


def wait_for_event_loop(pid: int) -> None:
    """Wait until the main thread of a process waits for events, and so for none in particular."""
    wchan = Path(f"/proc/{pid}/wchan")
    until(lambda: re.match("ep_poll|do_epoll_wait", wchan.read_text()), f"process {pid} to be idle")
