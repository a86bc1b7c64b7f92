"""The settings: declared once, with type, unit, default and meaning.

Each is read from the Celery configuration (``memsafe_*``) and from the
environment (``MEMSAFE_*``), which wins. A wrong value raises
:class:`SettingError`, one sentence that names setting, value and what is accepted.

Imports neither Celery nor billiard.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "SETTINGS",
    "START_METHODS",
    "Setting",
    "SettingError",
    "Settings",
    "load",
    "mib",
    "parse_computed_size",
    "parse_size",
]

START_METHODS = ("auto", "forkserver", "spawn", "fork")


class SettingError(ValueError):
    """A setting has a value that is not accepted."""

    def __init__(self, name: str, value: object, accepted: str) -> None:
        self.name, self.value, self.accepted = name, value, accepted
        super().__init__(f"{name}={value!r} is not valid: it must be {accepted}.")


def _start_method(value: Any) -> str:
    if value not in START_METHODS:
        raise ValueError
    return str(value)


def _seconds(value: Any) -> float:
    seconds = _number(value)
    if not seconds > 0 or math.isinf(seconds):
        raise ValueError
    return seconds


def _seconds_or_never(value: Any) -> float | None:
    """``None``, ``False`` and their spellings in the environment mean never."""
    if value is None or value is False or (isinstance(value, str) and value.lower() in {"none", "false"}):
        return None
    seconds = _number(value)
    if seconds < 0 or math.isnan(seconds) or math.isinf(seconds):
        raise ValueError
    return seconds


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError
    return float(value)


def _count(value: Any) -> int:
    """Return a whole number: text, or whatever Python takes for one, such as numpy's."""
    if isinstance(value, bool):
        raise ValueError
    count = int(value) if isinstance(value, str) else operator.index(value)
    if count < 0:
        raise ValueError
    return count


#: What may follow a number: powers of 1024 for a letter alone and with an i, of 1000 with a B and no i, as in
#: the SI. Kubernetes leaves the B after an i out.
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("i", 1024), ("ib", 1024), ("b", 1000))
}

_SHARE = re.compile(r"\d*\.\d*")

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_size(value: Any) -> int:
    """Bytes: a number of them, or text such as ``"8MiB"``."""
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError
        return int(float(match[1]) * _UNITS[match[2].lower()])
    return _count(value)


def parse_computed_size(value: Any) -> int:
    """As :func:`parse_size`; also a float, as what was computed may be one."""
    return parse_size(int(value) if isinstance(value, float) else value)


def mib(size: float) -> str:
    """Return a size in words."""
    return f"{size / (1 << 20):.0f} MiB"


#: Less is no budget: nothing would ever fit. It is "MB" forgotten.
LEAST_BUDGET_BYTES = 1 << 20


def _budget(value: Any) -> str | int | float:
    """``"auto"``, bytes, or a share of the limit between 0 and 1; text may be any of them, or percent."""
    if value == "auto":
        return "auto"
    share: float | None = None
    if isinstance(value, float):
        share = value
    elif isinstance(value, str):
        text = value.strip()
        if text.endswith("%"):
            share = float(text[:-1]) / 100
        elif "." in text and _SHARE.fullmatch(text):
            share = float(text)
    if share is not None:
        if not 0 < share < 1:
            raise ValueError
        return share
    size = parse_size(value)
    if size < LEAST_BUDGET_BYTES:
        raise ValueError
    return size


def _size_or_auto(value: Any) -> int | None:
    """``"auto"`` is None: what follows from other numbers."""
    if value == "auto":
        return None
    size = parse_size(value)
    if size <= 0:
        raise ValueError
    return size


def _yes_or_no(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    answers = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if not isinstance(value, str) or value.lower() not in answers:
        raise ValueError
    return answers[value.lower()]


def _path(value: Any) -> str | None:
    if value is None or value == "":
        return None
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    return value


def _modules(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise ValueError
    for name in value:
        if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
            raise ValueError
    return tuple(value)


def _environment(value: Any) -> dict[str, str]:
    if isinstance(value, str):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        if not all(equals for _, equals, _ in pairs):
            raise ValueError
        value = {name.strip(): text.strip() for name, _, text in pairs}
    if not isinstance(value, Mapping):
        raise ValueError
    environment = {}
    for name, text in value.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise ValueError
        if isinstance(text, bool) or not isinstance(text, (str, int, float)) or "\0" in str(text):
            raise ValueError
        environment[name] = str(text)
    return environment


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: Its name in the Celery configuration; upper case in the environment.
        parse: Returns the value to use, or raises ValueError or TypeError.
        default: What holds where nobody says anything.
        accepted: What is accepted, to follow the words "it must be".
        meaning: One sentence for people.
    """

    name: str
    parse: Callable[[Any], Any]
    default: Any
    accepted: str
    meaning: str


SETTINGS = (
    Setting(
        "memsafe_start_method",
        _start_method,
        "auto",
        "one of " + ", ".join(map(repr, START_METHODS)),
        "How a child begins: forked by a small server process, as a fresh interpreter, or forked by "
        "the worker. 'auto' is forkserver on Linux and spawn elsewhere.",
    ),
    Setting(
        "memsafe_idle_timeout",
        _seconds_or_never,
        60.0,
        "a number of seconds, 0 or more, or None for never",
        "Seconds without work after which a child is retired.",
    ),
    Setting(
        "memsafe_min_children",
        _count,
        0,
        "a whole number from 0 up to the worker's concurrency",
        "Children that are kept however long they are idle.",
    ),
    Setting(
        "memsafe_start_timeout",
        _seconds,
        60.0,
        "a number of seconds above 0",
        "Seconds a child may take from its start until it is ready for work.",
    ),
    Setting(
        "memsafe_trim_idle",
        _seconds_or_never,
        0.5,
        "a number of seconds, 0 or more, or None for never",
        "Seconds without work after which a child that has grown gives free memory back.",
    ),
    Setting(
        "memsafe_trim_min",
        parse_size,
        8 << 20,
        "a number of bytes, 0 or more, or a size such as '8MiB'",
        "Growth since the last time that makes giving memory back worth it.",
    ),
    Setting(
        "memsafe_memory_budget",
        _budget,
        "auto",
        "a size of at least 1 MiB such as '512MiB' (a plain number is bytes), a share of the limit above 0 "
        "and below 1 such as 0.8 or '80%', or 'auto'",
        "Memory that the worker, its children and their tasks may use together. 'auto' is nine tenths of the "
        "lowest memory limit, and less where that is below 320 MiB.",
    ),
    Setting(
        "memsafe_overtake_time",
        _seconds,
        10.0,
        "a number of seconds above 0",
        "Seconds for which smaller tasks may pass one that waits for memory.",
    ),
    Setting(
        "memsafe_pause",
        _yes_or_no,
        True,
        "one of True, False",
        "Whether running children are paused when memory is about to run out.",
    ),
    Setting(
        "memsafe_max_pause",
        _seconds_or_never,
        3600.0,
        "a number of seconds, 0 or more, or None for never",
        "Seconds for which a child may be paused, one time; then its task is ended for want of memory.",
    ),
    Setting(
        "memsafe_memory_tries",
        _count,
        2,
        "a whole number, 0 or more",
        "How often a task that was ended for want of memory, and is acknowledged late, is run again; the "
        "last time alone.",
    ),
    Setting(
        "memsafe_max_child_growth",
        _size_or_auto,
        "auto",
        "a size of more than 0 such as '200MiB', or 'auto'",
        "Memory that a child may keep from its tasks before it is replaced. 'auto' is the budget divided by "
        "the concurrency, and at least 32 MiB.",
    ),
    Setting(
        "memsafe_max_child_age",
        _seconds_or_never,
        None,
        "a number of seconds, 0 or more, or None for never",
        "Seconds after which a child is replaced.",
    ),
    Setting(
        "memsafe_state",
        _path,
        None,
        "the path of a file, or None",
        "File that keeps what tasks needed, so that it is known after a restart.",
    ),
    Setting(
        "memsafe_preload",
        _modules,
        (),
        "a list of names of modules that can be imported",
        "Modules to import before children are forked, so that what they load is shared.",
    ),
    Setting(
        "memsafe_child_env",
        _environment,
        {},
        "a dict of names and values (in the environment: 'A=1,B=2')",
        "Environment variables of the children, set before the app is imported there.",
    ),
)


@dataclass(frozen=True)
class Settings:
    """The values in force. Times are in seconds, sizes in bytes."""

    start_method: str
    idle_timeout: float | None
    min_children: int
    start_timeout: float
    trim_idle: float | None
    trim_min: int
    memory_budget: str | int | float
    overtake_time: float
    pause: bool
    max_pause: float | None
    memory_tries: int
    max_child_growth: int | None
    max_child_age: float | None
    state: str | None
    preload: tuple[str, ...]
    child_env: dict[str, str]


def load(config: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Read all settings.

    Arguments:
        config: The Celery configuration; only ``get`` is used.
        environ: The environment, which wins.

    Raises:
        SettingError: A value is not accepted.
    """
    values = {}
    for setting in SETTINGS:
        name, value = setting.name, config.get(setting.name, setting.default)
        if name.upper() in environ:
            name, value = name.upper(), environ[name.upper()]
        try:
            values[setting.name.removeprefix("memsafe_")] = setting.parse(value)
        except (ValueError, TypeError, OverflowError):
            raise SettingError(name, value, setting.accepted) from None
    return Settings(**values)
