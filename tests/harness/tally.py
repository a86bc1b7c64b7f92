"""What the tasks ``faulty.count`` and ``faulty.work`` have written: which of them ran, and how often."""

from __future__ import annotations

from collections import Counter
from pathlib import Path


class Tally:
    """A file in which each run of a task leaves a line."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        path.touch()

    def lines(self) -> list[list[str]]:
        return [line.split() for line in Path(self.path).read_text().splitlines()]

    def runs(self) -> Counter[str]:
        """How often each value was counted."""
        return Counter(line[0] for line in self.lines())

    def of(self, word: str) -> Counter[str]:
        """How often each value has a line that begins with this word."""
        return Counter(value for first, value, *_ in self.lines() if first == word)
