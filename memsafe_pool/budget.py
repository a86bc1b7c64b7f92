"""The budget: how much memory may be used, by the limit there is and by what the setting says.

Pure: no file, no clock. The limit is from ``probe``, the setting from ``settings``; what is left of the
budget at a moment is for whoever reads ``gauge``. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Budget", "find", "margin"]

_MIB = 1 << 20

#: The part of a limit that is kept free.
FREE_PART = 10

#: What is kept free at least: between two looks, some ms apart, two cores can touch 15 to 30 MB, and the
#: kernel charges processes by itself for page tables, sockets, and 64 pages ahead for each core. None of this
#: is less in a small container.
LEAST_MARGIN_BYTES = 32 * _MIB

#: But no more than this part, or nothing would be left of a very small one.
MOST_FREE_PART = 4


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be used.

    With ``auto`` everything counts that is charged towards the limit, whoever uses it. With a size or a share
    it is the pool's own memory that has to stay below ``bytes``; and everything together below the limit less
    ``margin``, as the size may be more than others leave.

    Attributes:
        bytes: The budget; more than 0.
        limit: The limit that it was found for.
        margin: What stays free under the limit, or under any other limit that has less room at a moment:
            ``limit - bytes``; for a small size what ``auto`` keeps free.
        auto: Whether it follows from the limit alone: by the setting, or as what was set is not below it.
        warning: One sentence for the log where the setting asks for as much as the limit, or more.
    """

    bytes: int
    limit: int
    margin: int
    auto: bool
    warning: str | None = None

    @property
    def ceiling(self) -> int:
        """What must not be reached: the limit, or the one for which ``auto`` would come to the same bytes."""
        if self.auto:
            return self.limit
        above = max(
            self.bytes // (FREE_PART - 1), min(LEAST_MARGIN_BYTES, self.bytes // (MOST_FREE_PART - 1))
        )
        return min(self.limit, self.bytes + above)

    def left(self, headroom: int, own: Callable[[], int]) -> tuple[int, int]:
        """Return the bytes that are left until the ceiling, and until what may be used.

        Arguments:
            headroom: Bytes that are left under the limit.
            own: Returns what the pool has; asked only where a size counts.
        """
        within = headroom - self.margin
        if self.auto:
            return headroom, within
        left = self.bytes - own()
        return min(headroom, left + self.ceiling - self.bytes), min(within, left)

    @property
    def lowered(self) -> bool:
        """Whether the setting asks for as much as the limit, or more."""
        return self.warning is not None


def margin(limit: int) -> int:
    """Return what ``auto`` keeps free under a limit, in bytes.

    A tenth from 320 MiB on; 32 MiB from 128 MiB on, as what has to be kept free does not get less; a quarter
    below. So the budget is 90 %, or ``limit - 32 MiB``, or 75 %: a higher limit never means a lower budget,
    and it is more than 0.
    """
    return max(limit // FREE_PART, min(LEAST_MARGIN_BYTES, limit // MOST_FREE_PART))


def find(setting: str | float, limit: int) -> Budget:
    """Return the budget. To be called again whenever the limit has changed.

    Arguments:
        setting: ``"auto"``, bytes (int), or a share of the limit (float between 0 and 1), as ``settings``
            leaves it.
        limit: The lowest limit that holds, in bytes, more than 0.
    """
    kept_free = margin(limit)
    automatic = limit - kept_free
    if isinstance(setting, str):
        return Budget(automatic, limit, kept_free, auto=True)
    if isinstance(setting, float):
        size = max(1, int(setting * limit))
        return Budget(size, limit, min(kept_free, limit - size), auto=False)
    if setting >= limit:
        # Not to the limit itself: nothing would be kept free, and whoever set this did not know of the limit.
        warning = (
            f"memsafe_memory_budget is {setting // _MIB} MiB, but the memory limit is {limit // _MIB} MiB: "
            f"{automatic // _MIB} MiB are used as the budget."
        )
        return Budget(automatic, limit, kept_free, auto=True, warning=warning)
    return Budget(setting, limit, min(kept_free, limit - setting), auto=False)
