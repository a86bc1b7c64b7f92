"""The settings: declared once, with type, unit, default and meaning.

Each is read from the Celery configuration (``memsafe_*``) and from the
environment (``MEMSAFE_*``), which wins. A wrong value raises
:class:`SettingError`, one sentence that names setting, value and what is accepted.

Imports neither Celery nor billiard.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["SETTINGS", "START_METHODS", "Setting", "SettingError", "Settings", "load"]

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
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError
    count = int(value)
    if count < 0:
        raise ValueError
    return count


#: What may follow a number: powers of 1024 with an i, of 1000 without, as in the SI.
_UNITS = {"": 1, "b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("ib", 1024), ("b", 1000))
}

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def _size(value: Any) -> int:
    """Bytes: a number of them, or text such as ``"8MiB"``."""
    if isinstance(value, str):
        match = _SIZE.fullmatch(value.strip())
        if match is None or match[2].lower() not in _UNITS:
            raise ValueError
        return int(float(match[1]) * _UNITS[match[2].lower()])
    return _count(value)


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
        _size,
        8 << 20,
        "a number of bytes, 0 or more, or a size such as '8MiB'",
        "Growth since the last time that makes giving memory back worth it.",
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
