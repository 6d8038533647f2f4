"""`forge reproduce · diff`: the same run again, and what distinguishes two versions."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.verbs import verb
from forge_ray.errors import EXIT_FAILED

if TYPE_CHECKING:
    from forge_ray.store.files import Store


@click.group()
def top() -> None:
    """Holds the verbs that `forge` itself takes."""


@verb(top, "reproduce")
@click.argument("reference", metavar="VERSION|RUN|ALIAS")
@click.option("--rebuild-data", is_flag=True, help="Build the dataset from its sources once more, too.")
@click.option("--keep", is_flag=True, help="Leave the second run where it was computed, in work/reproduce.")
def reproduce(store: Store, as_json: bool, reference: str, rebuild_data: bool, keep: bool) -> Any:
    """Train again from the records alone; exit 0: the weights are the same bytes, exit 1: it says what differs."""
    from forge_ray.governance import reproduce as again

    found = again.reproduce(store, reference, rebuild_data, keep)
    if not as_json:
        click.echo("\n".join(again.told(found)))
        if keep:
            click.echo(f"the second run: {store.place}/{found['folder']}")
    if found["verdict"] != "equal":
        if as_json:
            click.echo(json.dumps(found, ensure_ascii=False))
        sys.exit(EXIT_FAILED)
    return found


@verb(top, "diff")
@click.argument("old", metavar="A")
@click.argument("new", metavar="B")
def diff(store: Store, as_json: bool, old: str, new: str) -> Any:
    """Two model versions (ids, aliases, digests): data, settings, code, environment, flipped test items, cost."""
    from forge_ray.governance import difference
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        found = difference.diff(index, old, new)
    if not as_json:
        click.echo("\n".join(difference.told(found)))
    return found


REPRODUCTION: tuple[click.Command, ...] = (top.commands["reproduce"], top.commands["diff"])
