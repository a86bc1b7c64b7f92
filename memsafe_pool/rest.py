"""Whether a running task rests: it neither takes memory nor uses CPU, as it waits for something.

For a lock that another task has, for a task that it has sent, for a server, or for time to pass. What was set
aside for it is no promise then that it keeps: others would wait for it, perhaps the one that it waits for.

Pure: no I/O and no clock. Imports neither Celery nor billiard.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["LOOK_SECONDS", "REST_SECONDS", "Rest"]

#: A task rests that has neither grown nor used CPU for so many seconds.
REST_SECONDS = 5.0

#: Seconds between two looks at the CPU time of a task that has not grown.
LOOK_SECONDS = 1.0

#: Less growth, and a smaller share of a core, is none: whoever asks for a lock again and again, as Redis'
#: clients do, or for a result, uses up to 1 %.
NOISE_BYTES, NOISE_SHARE = 1 << 20, 0.02


class Rest:
    """What is remembered of one task.

    Arguments:
        now: When it began (monotonic seconds).

    Attributes:
        resting: Whether it rests.
    """

    __slots__ = ("_cpu", "_grown", "_looked_at", "_since", "resting")

    _cpu: float | None

    def __init__(self, now: float) -> None:
        self.wake(now, 0)

    def look(self, now: float, grown: int, cpu_seconds: Callable[[], float | None], *, paused: bool) -> None:
        """Take note of how it is; ``cpu_seconds`` is asked when that is due.

        Arguments:
            now, grown: As for :meth:`is_due`.
            cpu_seconds: Returns what :meth:`see` takes.
            paused: Whether it is kept from doing anything.
        """
        if paused:
            self.wake(now, grown)
        elif self.is_due(now, grown):
            self.see(now, cpu_seconds())

    def wake(self, now: float, grown: int) -> None:
        """Take note that it does something, or is kept from it."""
        self.resting = False
        self._since = self._looked_at = now
        self._grown, self._cpu = grown, None

    def is_due(self, now: float, grown: int) -> bool:
        """Whether its CPU time is to be looked at; one that grows does not rest, whatever it uses.

        Arguments:
            now: Monotonic seconds.
            grown: Bytes it has taken since it began.
        """
        if abs(grown - self._grown) >= NOISE_BYTES:
            self.wake(now, grown)
        return now - self._looked_at >= LOOK_SECONDS

    def see(self, now: float, cpu_seconds: float | None) -> None:
        """Take note of the CPU time that it has used in all; None where that can not be told."""
        used = None if self._cpu is None or cpu_seconds is None else cpu_seconds - self._cpu
        if used is not None and used <= NOISE_SHARE * (now - self._since):
            self._looked_at = now
            self.resting = now - self._since >= REST_SECONDS
        else:
            self.wake(now, self._grown)
            self._cpu = cpu_seconds
