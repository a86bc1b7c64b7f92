"""What a task will need, as far as anybody can tell before it runs.

The first that is known of: what the call's own header says, what the task declares, what tasks
like it needed lately. One task's name may stand for several sizes, so what was learned is kept for
each name and *label* (the queue and the size of the arguments, or what the task's own function says),
and for each name alone, which is used until a label has been seen a few times.

What was learned is a guess at the next peak: the largest of the last few. Beside it stands the largest
of many: what a task of that kind may turn out to need, against all expectation.

Data only. Imports neither Celery nor billiard.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["LITTLE_BYTES", "UNKNOWN", "Estimate", "Reservations", "after_loss", "pending"]

_MIB = 1 << 20

#: Recent peaks of which the largest is expected, and those of which the largest is thought possible.
RECENT, KEPT = 3, 200

#: A label counts by itself from so many tasks on.
ENOUGH = 3

#: Names and labels kept; the one used least recently goes first.
KEPT_KEYS = 2000

#: What is expected of a task that never needed more than that.
LITTLE_BYTES = _MIB

#: What is set aside at least for a task that is run again.
LEAST_AGAIN_BYTES = 32 * _MIB

#: Added to what was learned: peaks are measured to 2 %, and no two tasks are the same. Where the recent ones
#: differ by no more than the second number, that is all that is added.
MARGIN, STEADY = 1.1, 1.03


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a task is thought to need beyond what its child has, in bytes.

    Attributes:
        reserved: What is set aside for it.
        most: What it may need in the worst case that was ever seen; at least ``reserved``.
        known: Whether anything is known of it; else all are 0.
        ended: What is thought possible by those that have ended; ``most`` is higher where one that runs has
            more. 0 if that was not learned.
    """

    reserved: int = 0
    most: int = 0
    known: bool = False
    ended: int = 0


#: Of a task that nobody has said anything about, and that never ran.
UNKNOWN = Estimate()
_LITTLE = Estimate(LITTLE_BYTES, LITTLE_BYTES, known=True)

Key = tuple[str, str | None]


class _Record:
    __slots__ = ("bound", "count", "estimate", "kept", "recent", "running")

    def __init__(self) -> None:
        self.count = 0
        self.recent: deque[int] = deque(maxlen=RECENT)
        self.kept: deque[int] = deque(maxlen=KEPT)
        self.running = 0  # the most that one has taken that has not ended
        self.bound = True  # whether no peak was exact: then there is the last upper bound
        self.estimate = UNKNOWN

    def add(self, peak: int, hidden: int = 0) -> bool:
        """Enter a peak; return whether that changes much."""
        self.count += 1
        if hidden:
            last = (
                peak + hidden if not self.estimate.known else self.recent[-1] if self.recent else LITTLE_BYTES
            )
            peak = min(max(peak, last), peak + hidden)
        if self.bound:
            self.recent.clear()
            self.kept.clear()
            self.bound = hidden > 0
        if peak <= LITTLE_BYTES and self.estimate is _LITTLE and not self.running:
            return False
        self.running = 0
        self.recent.append(peak)
        self.kept.append(peak)
        if max(self.kept) > LITTLE_BYTES:
            most = max(self.recent)
            steady = len(self.recent) == RECENT and most <= min(self.recent) * STEADY
            return self._set(most, max(self.kept), STEADY if steady else MARGIN, ended=max(self.kept))
        self.recent.clear()
        self.kept.clear()
        changed = self.estimate is not _LITTLE
        self.estimate = _LITTLE
        return changed

    def rise(self, grown: int) -> bool:
        """Enter what one has taken that still runs; return whether that changes much."""
        if not self.estimate.known or grown <= max(self.running * MARGIN, self.estimate.reserved):
            return False
        self.running = grown
        return self._set(grown, max(self.estimate.most / MARGIN, grown), MARGIN)

    def _set(self, expected: float, most: float, margin: float, ended: float | None = None) -> bool:
        before = self.estimate
        self.estimate = Estimate(
            max(int(expected * margin), LITTLE_BYTES),
            max(int(most * margin), LITTLE_BYTES),
            known=True,
            ended=before.ended if ended is None else int(ended * margin),
        )
        return not before.reserved / MARGIN < self.estimate.reserved < before.reserved * MARGIN


class Reservations:
    """What was learned of all tasks.

    Attributes:
        version: Another number when an estimate has changed by much.
        changed: Names and labels of which something was learned; whoever writes that down clears it.
    """

    def __init__(self) -> None:
        self.version = 0
        self.changed: set[Key] = set()
        self._records: OrderedDict[Key, _Record] = OrderedDict()

    def learn(self, name: str, label: str | None, peak: int, hidden: int = 0) -> None:
        """Enter what a task needed at its peak, or has needed so far where it was stopped.

        Arguments:
            peak: Bytes that were seen.
            hidden: Bytes that it may have used besides, unseen: then it needed the same as the one before it,
                as far as that can be, and all of it where nothing is known.
        """
        records = self._records
        for key in ((name, None),) if label is None else ((name, None), (name, label)):
            record = records.get(key)
            if record is None:
                record = records[key] = _Record()
                if len(records) > KEPT_KEYS:
                    self.changed.discard(records.popitem(last=False)[0])
            else:
                records.move_to_end(key)
            self.changed.add(key)
            self.version += record.add(peak, hidden)

    def rise(self, name: str, label: str | None, estimate: Estimate, grown: int) -> Estimate:
        """Enter what a task has taken so far, which runs and was expected to need less (bytes).

        Returns what it may need then: as much as any of its kind did, those that run included.

        Arguments:
            estimate: What was known when it was admitted.
        """
        for key in (name, None), (name, label):
            record = self._records.get(key)
            if record is not None:
                self.version += record.rise(grown)
        now = self.estimate(name, label)
        if not estimate.known or (now.most <= estimate.most and now.ended <= estimate.ended):
            return estimate
        return replace(estimate, most=max(now.most, estimate.most), ended=max(now.ended, estimate.ended))

    def estimate(self, name: str, label: str | None) -> Estimate:
        """Return what was learned, or :data:`UNKNOWN`."""
        records = self._records
        record = records.get((name, label))
        if record is None or record.count < ENOUGH:
            record = records.get((name, None))
        return UNKNOWN if record is None else record.estimate

    # -- across restarts

    def dump(self, *, changed: bool = False) -> list[dict[str, Any]]:
        """Return all of it, or what has changed, for JSON; the one used least recently first."""
        return [
            {
                "name": name,
                "label": label,
                "count": record.count,
                "recent": list(record.recent),
                "most": max(record.kept, default=0),
            }
            for (name, label), record in self._records.items()
            if not record.bound and (not changed or (name, label) in self.changed)
        ]

    def load(self, rows: Any) -> None:
        """Take over what :meth:`dump` returned.

        Raises:
            ValueError: It is something else.
        """
        try:
            for row in rows:
                name, label, count = row["name"], row["label"], int(row["count"])
                if not isinstance(name, str) or not isinstance(label, str | None) or count < 1:
                    raise ValueError
                record = _Record()
                for peak in (int(row["most"]), *map(int, row["recent"])):
                    record.add(peak)
                record.count = count
                self._records[name, label] = record
        except (TypeError, KeyError, AttributeError, OverflowError):
            raise ValueError("not what was written by this package") from None


def after_loss(estimate: Estimate, grown: int) -> Estimate:
    """Return what a task is thought to need that was ended for want of memory, and is run again.

    Arguments:
        estimate: What was known when it was admitted.
        grown: What it had taken when it was looked at last, which may have been early.
    """
    enough = max(2 * grown, estimate.reserved, LEAST_AGAIN_BYTES)
    return Estimate(enough, enough, known=True)


def pending(estimate: Estimate, grown: int, free: int = 0, *, growing: bool, resting: bool = False) -> int:
    """Return how much more memory a running task is to be expected to take (bytes).

    What is left of its reservation. One that has gone over that and still grows may need what the largest
    of its kind did; and where none has ended that was as large, it may double: nobody knows, and it must be
    no surprise. Nothing, while it rests: it may wait for somebody who waits for that memory.

    Arguments:
        estimate: What was known when it was admitted.
        grown: What it has taken so far.
        free: What its child had free before, at most: it need not take that, but may not have found it
            useful, so what it has grown by tells alone whether it has gone over.
        growing: Whether it took some of that just now.
        resting: See ``rest``.
    """
    if resting:
        return 0
    left = max(estimate.reserved - grown - free, 0)
    if growing and grown > estimate.reserved:
        rest = max(estimate.most, estimate.ended) - grown
        return rest if grown < estimate.ended else max(rest, grown)
    return left
