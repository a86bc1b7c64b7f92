"""The ``celery`` command's plug-in: makes ``--pool memsafe_pool:Pool`` and ``-P memsafe`` work.

Celery's ``--pool`` takes only names it knows. This module is loaded by every ``celery``
command before arguments are parsed; on import it adds the short name and lets the option
take ``module:Class``. So it must stay light: it imports nothing of the pool itself.
"""

from __future__ import annotations

import os
from typing import Any

import click
from celery import concurrency
from celery.bin import worker
from celery.bin.base import CeleryCommand

__all__ = ["memsafe"]

POOL = "memsafe_pool.prefork:Pool"


class _PoolOption(worker.WorkersPool):  # type: ignore[misc]
    """The ``--pool`` option, for any pool that can be imported."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and ":" in value:
            try:
                pool = concurrency.get_implementation(value)
            except (ImportError, AttributeError, ValueError) as exc:
                self.fail(f"{value!r} can not be imported as a pool: {exc}", param, ctx)
            if not isinstance(pool, type):
                self.fail(f"{value!r} is no pool class; name one as module:Class", param, ctx)
            return pool
        return super().convert(value, param, ctx)


def _install() -> None:
    concurrency.ALIASES["memsafe"] = POOL
    for param in worker.worker.params:
        if isinstance(param.type, worker.WorkersPool):
            param.type = _PoolOption()


_install()


@click.group(cls=click.Group, invoke_without_command=True)
@click.pass_context
def memsafe(ctx: click.Context) -> None:
    """Memory-safe worker pool: its settings."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


@memsafe.command(cls=CeleryCommand)
@click.pass_context
def settings(ctx: click.Context) -> None:
    """Show the pool's settings, where each value is from, and whether they are accepted."""
    from memsafe_pool import settings as declared

    config = ctx.obj.app.conf
    try:
        values = declared.load(config, os.environ)
    except declared.SettingError as exc:
        raise click.ClickException(str(exc)) from None
    for setting in declared.SETTINGS:
        name = setting.name
        if name.upper() in os.environ:
            origin = "environment"
        else:
            origin = "configuration" if name in config else "default"
        click.echo(f"{name} = {getattr(values, name.removeprefix('memsafe_'))!r}  ({origin})")
        click.echo(f"    {setting.meaning} It must be {setting.accepted}.")
