"""Which app a fresh interpreter imports."""

from __future__ import annotations

import sys

import click
import pytest

from memsafe_pool import fresh


class App:
    """What the command makes of its argument."""


@pytest.fixture
def found(monkeypatch):
    """Return what is found when a command with these arguments has parsed its own, perhaps others."""

    def found(argv, args=None, **option):
        names = []

        @click.group()
        @click.option("-A", "--app", envvar="THE_APP", **option)
        def command(app):
            names.append(fresh.find_app(App()))

        @command.command()
        @click.option("-c")
        def worker(c): ...

        monkeypatch.setattr(sys, "argv", ["celery", *argv])
        command.main(argv if args is None else args, standalone_mode=False)
        [name] = names
        return name and name.argument

    return found


class _Convert(click.ParamType):
    name = "app"

    def convert(self, value, param, ctx):
        return App()


CELERY_5_4 = {"type": _Convert()}


@pytest.mark.parametrize("option", [{}, CELERY_5_4], ids=["5.5", "5.4"])
@pytest.mark.parametrize(
    "arguments", [["-A", "shop.celery"], ["-Ashop.celery"], ["--app", "shop.celery"], ["--app=shop.celery"]]
)
def test_what_the_option_names(found, option, arguments):
    """Also where the command has replaced it by the app, as with Celery 5.4."""
    assert found([*arguments, "worker", "-c", "2"], **option) == "shop.celery"


@pytest.mark.parametrize("option", [{}, CELERY_5_4], ids=["5.5", "5.4"])
def test_what_the_environment_names(found, monkeypatch, option):
    """It is as good as the option."""
    monkeypatch.setenv("THE_APP", "shop.celery")
    assert found(["worker"], **option) == "shop.celery"


@pytest.mark.parametrize("argv", [["--mode", "x"], [], ["-A"]])
def test_arguments_that_are_not_the_command_s(found, argv):
    """A script that calls ``worker_main`` has its own."""
    assert found(argv, ["-A", "shop.celery", "worker"], **CELERY_5_4) is None
    assert found(argv, ["worker"], default=App(), **CELERY_5_4) is None
