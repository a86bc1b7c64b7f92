"""One row of the table, and the command line that every script here has."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence


@dataclass(frozen=True)
class Options:
    """What the command line chose."""

    ours: str
    repeat: int
    quick: bool
    profile: str | None

    def repeats(self, default: int) -> int:
        """How often to repeat a pair of runs: as told, else once when quick, else `default` times."""
        return self.repeat or (1 if self.quick else default)


@dataclass(frozen=True)
class Row:
    """What was measured, what it is held against, and whether that is met: None is for information only."""

    measure: str
    stock: str
    ours: str
    ratio: str = ""
    must: str = ""
    aim: str = ""
    met: bool | None = None

    def cells(self) -> tuple[str, ...]:
        verdict = {None: "", True: "met", False: "missed"}[self.met]
        return (self.measure, self.stock, self.ours, self.ratio, self.must, self.aim, verdict)


def paired(
    measure: str,
    pairs: Sequence[tuple[float, float]],
    unit: str,
    must: float | None = None,
    aim: float | None = None,
    *,
    against: str = "prefork",
    digits: int = 0,
) -> Row:
    """Make a row of (stock, ours) pairs: both medians; the median of the pairs' ratios is held to `must`.

    In brackets: the middle half of the ratios.
    """
    stock, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
    ratios = sorted(ours / stock for stock, ours in pairs)
    ratio = statistics.median(ratios)
    quarter = len(ratios) // 4
    spread = f" ({ratios[quarter]:.2f}-{ratios[-1 - quarter]:.2f}, n={len(ratios)})"
    return Row(
        measure,
        f"{against} {stock:.{digits}f} {unit}",
        f"{ours:.{digits}f} {unit}",
        f"{ratio:.2f} x{spread}",
        "" if must is None else f"<= {must:.2f} x",
        "" if aim is None else f"{aim:.2f} x",
        None if must is None else ratio <= must,
    )


def say(text: str) -> None:
    """Progress, on standard error, with the machine's load, and the share of it that the host took since."""
    stolen = getattr(psutil.cpu_times_percent(), "steal", 0.0)
    print(f"  [load {os.getloadavg()[0]:.1f}, stolen {stolen:.0f} %] {text}", file=sys.stderr, flush=True)


def line(cells: Iterable[str]) -> str:
    """Format one line of a markdown table."""
    return f"| {' | '.join(cells)} |"


def main(measure: Callable[[Options], Iterable[Row]], about: str | None) -> None:
    """Read the command line, measure, print; the exit code says whether every bound was met."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--ours", default="memsafe_pool:Pool", metavar="POOL", help="pool to hold against stock"
    )
    parser.add_argument(
        "--repeat", type=int, default=0, metavar="N", help="pairs of runs (default: the script's own)"
    )
    parser.add_argument("--quick", action="store_true", help="one pair and small batches: does it work?")
    parser.add_argument(
        "--profile", metavar="FOLDER", help="task_cpu only: also record both pools with py-spy"
    )
    options = Options(**vars(parser.parse_args()))
    header = ("measure", "stock", options.ours, "ratio", "must reach", "aim for", "")
    print(line(header), line(("---",) * len(header)), sep="\n", flush=True)
    missed = False
    for row in measure(options):  # each as it comes: a long run that is interrupted is not lost
        print(line(row.cells()), flush=True)
        missed |= row.met is False
    sys.exit(missed)
