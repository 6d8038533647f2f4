"""The frame of every verb: --store, --json, a run file with overrides, honest exit codes."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from forge_ray.errors import ForgeError
from forge_ray.machine.offline import set_offline_switches
from forge_ray.machine.quiet import quiet_libraries

if TYPE_CHECKING:
    from forge_ray.config.run import RunConfig


class Verbs(click.Group):
    """Verbs in the order of the data flow, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def verb(group: click.Group, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command with --store and --json; its function returns what --json prints, after printing for people otherwise."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(store: str | None, as_json: bool, **arguments: Any) -> None:
            set_offline_switches()
            quiet_libraries()
            try:
                from forge_ray.machine.cluster import open_store

                result = function(store=open_store(store), as_json=as_json, **arguments)
            except ForgeError as error:
                _fail(error, as_json)
            else:
                if as_json:
                    from forge_ray.cli.job import as_json as plain

                    click.echo(json.dumps(plain(result), ensure_ascii=False))

        command = click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")(command)
        store_help = "Folder or URI of the store; else FORGE_STORE, else .forge."
        command = click.option("--store", metavar="URI", help=store_help)(command)
        return group.command(name)(command)

    return wrap


def _fail(error: ForgeError, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"error": {"code": error.code, "message": error.message, "hint": error.hint}}))
    click.secho(f"error: {error.message}", fg="red", err=True)
    if error.hint:
        click.echo(f"hint: {error.hint}", err=True)
    sys.exit(error.exit_code)


def run_file(function: Callable[..., Any]) -> Callable[..., Any]:
    """RUN.yaml and its overrides, as `config`."""

    @functools.wraps(function)
    def command(file: str, overrides: tuple[str, ...], **arguments: Any) -> Any:
        return function(config=load_run_file(file, overrides), **arguments)

    command = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override, e.g. train.seed=1.")(
        command
    )
    return click.argument("file", metavar="RUN.yaml")(command)


def load_run_file(file: str, overrides: tuple[str, ...]) -> RunConfig:
    from forge_ray.config.base import load
    from forge_ray.config.run import RunConfig

    return load(RunConfig, file, overrides)
