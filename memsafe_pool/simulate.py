"""What would have happened: replays a recorded trace of tasks on a simulated machine.

    python -m memsafe_pool.simulate TRACE --limit 1GiB -c 20

A trace is a file of JSON lines, or CSV with a line of names at the top. One line is one task:

=========== ====================================================================================
``start``   When it arrived, in seconds; ``arrival`` is another name for it
``name``    The task's name
``peak``    The most memory it took beyond what its child had: bytes, or a size such as ``50MB``
``seconds`` How long it took; ``duration`` is another name for it
``end``     In place of that: when it ended, on the clock of ``start``
``reserved``  Optional: what is declared for it, as with ``memsafe_memory``; bytes or a size
``kept``    Optional: what its child keeps of it for ever (a leak); bytes or a size
``rise``    Optional: seconds until its peak, evenly; half of its time if it is left out
``key``     Optional: what else its size is known by, as with ``memsafe_key``
``late``    Optional: whether it is acknowledged late, and so may be run again; yes if it is left out
=========== ====================================================================================

The rules are the pool's own, see ``machine`` for what is simulated and what is left out. Times are those
recorded, counted from the first arrival: tasks do not slow each other down. Imports neither Celery nor
billiard.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from memsafe_pool import cores
from memsafe_pool.machine import Machine, Terms, Work
from memsafe_pool.recycle import Rules
from memsafe_pool.settings import SETTINGS, Setting, mib, parse_computed_size, parse_size

__all__ = ["TraceError", "main", "read", "replay", "table"]

_MIB = 1 << 20

#: Names of one and the same column.
_SAME = {"arrival": "start", "duration": "seconds"}
_NEEDED = ("start", "name", "peak", "seconds")
_KNOWN = {*_NEEDED, "end", "reserved", "kept", "rise", "key", "late"}

#: The machine is looked at each second, so a longer time would take minutes. Who has one means another unit.
_LONGEST_SECONDS, _LONGEST_START_SECONDS = 366 * 86400.0, 3600.0

_DECLARED = {setting.name: setting for setting in SETTINGS}


class TraceError(ValueError):
    """A trace that can not be read; the text says which line, and why."""


def read(lines: Iterable[str]) -> list[tuple[float, Work]]:
    """Return each task with the time of its arrival.

    Raises:
        TraceError: A line is not valid, or there is none.
    """
    tasks = []
    first, last = float("inf"), float("-inf")
    for number, row in _rows(lines):
        fields = {_SAME.get(name, name): value for name, value in row.items() if value not in (None, "")}
        if "end" in fields:
            if "seconds" in fields:
                raise TraceError(f"line {number}: there are both 'seconds' and 'end'")
            fields["seconds"] = _until_end(fields, number)
        missing = [name for name in _NEEDED if name not in fields]
        if missing:
            raise TraceError(f"line {number}: there is no {missing[0]!r}")
        unknown = [name for name in fields if name not in _KNOWN]
        if unknown:
            raise TraceError(
                f"line {number}: {unknown[0]!r} is not known; known are {', '.join(sorted(_KNOWN))}"
            )
        at, work = _seconds(fields, "start", number), _work(fields, number)
        first, last = min(first, at), max(last, at)
        if last - first > _LONGEST_SECONDS:
            raise TraceError(f"line {number}: start is more than a year from that of another task")
        tasks.append((at, work))
    if not tasks:
        raise TraceError("there is no task in it")
    return tasks


def _rows(lines: Iterable[str]) -> Iterable[tuple[int, dict[str, Any]]]:
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if numbered and not numbered[0][1].lstrip().startswith("{"):
        names = _values(*numbered[0])
        for number, line in numbered[1:]:
            values = _values(number, line)
            if len(values) > len(names):
                raise TraceError(
                    f"line {number}: {len(values)} values, but there are {len(names)} names at the top"
                )
            yield number, dict(zip(names, values, strict=False))
        return
    for number, line in numbered:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as exc:
            raise TraceError(f"line {number}: not valid JSON: {exc}") from None
        if not isinstance(row, dict):
            raise TraceError(f"line {number}: not a JSON object")
        yield number, row


def _values(number: int, line: str) -> list[str]:
    try:
        return [value.strip() for value in next(csv.reader([line]))]
    except csv.Error as exc:
        raise TraceError(f"line {number}: not valid CSV: {exc}") from None


def _seconds(fields: dict[str, Any], name: str, number: int) -> float:
    value = fields[name]
    try:
        seconds = -1.0 if isinstance(value, bool) else float(value)
    except (ValueError, TypeError, OverflowError):
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise TraceError(f"line {number}: {name} is {value!r}, and must be a number of seconds")
    return seconds


def _until_end(fields: dict[str, Any], number: int) -> float:
    if "start" not in fields:
        raise TraceError(f"line {number}: there is no 'start'")
    seconds = _seconds(fields, "end", number) - _seconds(fields, "start", number)
    if seconds < 0:
        raise TraceError(f"line {number}: end is before start")
    return seconds


def _size(fields: dict[str, Any], name: str, number: int) -> int:
    try:
        return parse_computed_size(fields[name])
    except (ValueError, TypeError, OverflowError):
        raise TraceError(
            f"line {number}: {name} is {fields[name]!r}, and must be bytes or a size such as '50MB'"
        ) from None


def _text(fields: dict[str, Any], name: str, number: int) -> str:
    if not isinstance(fields[name], (str, int, float)):
        raise TraceError(f"line {number}: {name} is {fields[name]!r}, and must be text")
    return str(fields[name])


def _yes_or_no(fields: dict[str, Any], name: str, number: int) -> bool:
    try:
        return bool(_DECLARED["memsafe_pause"].parse(fields[name]))  # what may be said of a setting
    except ValueError:
        raise TraceError(f"line {number}: {name} is {fields[name]!r}, and must be yes or no") from None


def _work(fields: dict[str, Any], number: int) -> Work:
    peak, seconds = _size(fields, "peak", number), _seconds(fields, "seconds", number)
    rise = _seconds(fields, "rise", number) if "rise" in fields else seconds / 2
    kept = _size(fields, "kept", number) if "kept" in fields else 0
    if seconds > _LONGEST_SECONDS:
        raise TraceError(f"line {number}: it takes more than a year")
    if rise > seconds:
        raise TraceError(f"line {number}: rise is more than seconds")
    if kept > peak:
        raise TraceError(f"line {number}: kept is more than peak")
    return Work(
        _text(fields, "name", number),
        [(0.0, 0), (rise, peak), (seconds, peak), (seconds, kept)],
        declared=_size(fields, "reserved", number) if "reserved" in fields else None,
        label=_text(fields, "key", number) if "key" in fields else None,
        redeliverable=_yes_or_no(fields, "late", number) if "late" in fields else True,
    )


def replay(tasks: Sequence[tuple[float, Work]], terms: Terms, *, warm: bool = False) -> Machine:
    """Let tasks arrive at their times, and return the machine when all have ended.

    Its clock begins with the first arrival.

    Arguments:
        warm: Whether the pool knows from before what they need.
    """
    machine = Machine(terms)
    first = min((at for at, _ in tasks), default=0.0)
    for at, work in tasks:
        if warm:
            machine.learn(work)
        machine.arrive(work, at - first)
    machine.run()
    return machine


def table(machine: Machine) -> str:
    """Return what has happened, for people."""
    counts, works = machine.counts, machine.works
    done = [work for work in works if work.outcome == "done"]
    failed = [work for work in works if work.outcome == "failed"]
    waits = [(work.began - work.arrived, work) for work in works if work.began is not None]
    first = min((work.arrived for work in works), default=0.0)
    last = max((work.ended for work in works if work.ended is not None), default=first)
    rows = [
        ("limit", mib(machine.limit)),
        ("budget", mib(machine.budget.bytes)),
        ("tasks done", f"{len(done)} of {len(works) + machine.unarrived}"),
        ("tasks failed", f"{len(failed)}{_names(failed)}"),
        ("makespan", f"{last - first:.2f} s"),
        ("peak use", f"{mib(counts.peak)}, {counts.peak / machine.limit:.0%} of the limit"),
        ("children started", f"{counts.starts}"),
        ("waited for memory", f"{sum(work.held for work in works)} tasks"),
        ("children retired", f"{counts.retired}"),
        ("tasks paused", f"{counts.paused} times"),
        ("tasks killed", f"{counts.killed} times"),
        ("kernel kills", f"{counts.kernel_kills}"),
        ("tasks run again", f"{counts.redelivered} times"),
    ]
    if waits:
        longest, work = max(waits, key=lambda pair: pair[0])
        rows.append(("longest wait", f"{longest:.2f} s ({work.name}, arrived at {work.arrived:.2f} s)"))
    if machine.ended_by is not None:
        rows.append(("the worker ended", machine.ended_by))
    return "\n".join(f"{name:<18} {value}" for name, value in rows)


def _names(works: Sequence[Work]) -> str:
    names = sorted({work.name for work in works})
    return f" ({', '.join(names[:5])}{', ...' * (len(names) > 5)})" if names else ""  # noqa: PLR2004 - enough


def _bytes(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as '1GiB'") from None


def _setting(setting: Setting) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            return setting.parse(text)
        except (ValueError, TypeError, OverflowError):
            raise argparse.ArgumentTypeError(f"{text!r}: it must be {setting.accepted}") from None

    return parse


#: Options that are settings of the pool, and what is shown for their value.
_OPTIONS = {
    "--budget": ("memsafe_memory_budget", "SIZE"),
    "--overtake": ("memsafe_overtake_time", "SECONDS"),
    "--tries": ("memsafe_memory_tries", "NUMBER"),
    "--max-pause": ("memsafe_max_pause", "SECONDS"),
    "--idle-timeout": ("memsafe_idle_timeout", "SECONDS"),
    "--min-children": ("memsafe_min_children", "NUMBER"),
    "--max-child-growth": ("memsafe_max_child_growth", "SIZE"),
    "--max-child-age": ("memsafe_max_child_age", "SECONDS"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m memsafe_pool.simulate",
        description="Replay a trace of tasks, and tell what the pool would have done.",
    )
    parser.add_argument("trace", metavar="TRACE", help="JSON lines or CSV; - is standard input")
    parser.add_argument("--limit", type=_bytes, required=True, help="memory there is, such as 1GiB")
    parser.add_argument("-c", "--concurrency", type=int, default=cores.count(), help="most children")
    for option, (name, metavar) in _OPTIONS.items():
        setting = _DECLARED[name]
        parser.add_argument(
            option,
            type=_setting(setting),
            default=setting.parse(setting.default),
            metavar=metavar,
            help=f"as {name} (default: {setting.default})",
        )
    parser.add_argument("--no-pause", action="store_true", help="as memsafe_pause = False")
    parser.add_argument("--cores", type=int, default=cores.count(), help="of the machine (default: yours)")
    parser.add_argument(
        "--worker", type=_bytes, default=64 * _MIB, help="what the worker takes (default: 64MiB)"
    )
    parser.add_argument(
        "--child", type=_bytes, default=12 * _MIB, help="what each child takes (default: 12MiB)"
    )
    parser.add_argument(
        "--start",
        type=_setting(_DECLARED["memsafe_start_timeout"]),
        default=0.05,
        metavar="SECONDS",
        help="how long a child takes to start (default: 0.05)",
    )
    parser.add_argument("--warm", action="store_true", help="the pool has seen these tasks before")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if min(given.concurrency, given.cores) < 1:
        parser.error("-c and --cores must be at least 1")
    if given.start > _LONGEST_START_SECONDS:
        parser.error(f"--start must be at most {_LONGEST_START_SECONDS:g} seconds")
    if given.min_children > given.concurrency:
        parser.error(f"--min-children must be at most -c, which is {given.concurrency}")
    terms = Terms(
        limit=given.limit,
        bound=given.concurrency,
        budget=given.budget,
        cores=given.cores,
        pause=not given.no_pause,
        tries=given.tries,
        base=given.worker,
        child=given.child,
        start_seconds=given.start,
        others={
            "patience": given.overtake,
            "max_pause": given.max_pause,
            "idle_timeout": given.idle_timeout,
            "min_children": given.min_children,
            "rules": Rules(max_growth_bytes=given.max_child_growth, max_age=given.max_child_age),
        },
    )
    if given.worker + given.child > given.limit:
        parser.error(f"the worker and one child do not fit under a limit of {mib(given.limit)}")
    try:
        if given.trace == "-":
            tasks = read(sys.stdin)
        else:
            with open(given.trace, encoding="utf-8-sig") as lines:
                tasks = read(lines)
    except (OSError, UnicodeDecodeError, TraceError) as exc:
        parser.error(f"{given.trace}: {getattr(exc, 'strerror', None) or exc}")
    sys.stdout.write(table(replay(tasks, terms, warm=given.warm)) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
