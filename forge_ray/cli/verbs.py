"""What all verbs share: --store, --json, a run file with overrides, exit codes."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.ends import report
from forge_ray.cli.terminal import echo, is_unread
from forge_ray.machine.offline import set_offline_switches
from forge_ray.machine.quiet import quiet_libraries
from forge_ray.store.home import settle

if TYPE_CHECKING:
    from forge_ray.config.run import RunConfig


PASSED_ON = (click.ClickException, click.exceptions.Exit, click.Abort)  # click's own, about usage
EXAMPLE = "\b\nExample:\n  "  # \b: click keeps the lines as they are


class Verbs(click.Group):
    """A group whose help lists verbs in the order of their definition, not alphabetically. `sections`: title → verbs that
    the help lists under it."""

    def __init__(self, *arguments: Any, sections: Mapping[str, Sequence[str]] | None = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.sections = sections

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, self.commands))
        for title, names in (self.sections or {"Commands": tuple(self.commands)}).items():
            lines = [(name, self.commands[name].get_short_help_str(formatter.width - width - 6)) for name in names]
            with formatter.section(title):
                formatter.write_dl([(name.ljust(width), line) for name, line in lines])


def verb(group: click.Group, name: str, example: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command with --store and --json; its function returns what --json prints, after printing for people otherwise.
    `example` is a whole command line, shown at the end of its help."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def command(store: str | None, as_json: bool, **arguments: Any) -> None:
            set_offline_switches()
            quiet_libraries()
            try:
                settle()
                from forge_ray.machine.cluster import open_store

                result = function(store=open_store(store), as_json=as_json, **arguments)
            except PASSED_ON:
                raise
            except (Exception, KeyboardInterrupt) as error:
                if isinstance(error, BrokenPipeError) and is_unread():
                    raise  # click ends quietly: whoever read the output, such as `head`, has enough
                sys.exit(report(error, as_json))
            else:
                if as_json:
                    from forge_ray.cli.job import as_json as plain

                    echo(json.dumps(plain(result), ensure_ascii=False))

        command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(command)
        store_help = "Folder or URI of the store. Default: FORGE_STORE, else .forge."
        command = click.option("--store", metavar="URI", help=store_help)(command)
        return group.command(name, epilog=EXAMPLE + example)(command)

    return wrap


def run_file(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds the argument RUN.yaml and --set, and passes the run file as `config`."""

    @functools.wraps(function)
    def command(file: str, overrides: tuple[str, ...], **arguments: Any) -> Any:
        return function(config=load_run_file(file, overrides), **arguments)

    command = click.option(
        "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting, e.g. train.seed=1. Repeatable."
    )(command)
    return click.argument("file", metavar="RUN.yaml")(command)


def load_run_file(file: str, overrides: tuple[str, ...]) -> RunConfig:
    from forge_ray.config.base import load
    from forge_ray.config.run import RunConfig

    return load(RunConfig, file, overrides)
