"""`forge reproduce · diff`: repeat a run, and compare two versions."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo, one_line
from forge_ray.cli.verbs import verb
from forge_ray.errors import EXIT_FAILED

if TYPE_CHECKING:
    from forge_ray.store.files import Store


@click.group()
def top() -> None:
    """Top-level verbs; `forge` registers them."""


@verb(top, "reproduce", "forge reproduce support@prod --rebuild-data")
@click.argument("reference", metavar="VERSION|RUN|ALIAS")
@click.option("--rebuild-data", is_flag=True, help="Also rebuild the dataset from its sources.")
@click.option("--keep", is_flag=True, help="Keep the second run, in work/reproduce.")
def reproduce(store: Store, as_json: bool, reference: str, rebuild_data: bool, keep: bool) -> Any:
    """Repeat a run from its records and compare the weights.

    Exit code 0: the weights are byte-identical; 1: they differ, and the report lists what differs."""
    from forge_ray.governance import reproduce as again

    report = again.reproduce(store, reference, rebuild_data, keep)
    if not as_json:
        echo("\n".join(map(one_line, again.describe(report))))
        if keep:
            echo(f"the second run: {store.place}/{report['folder']}")
    if report["verdict"] != "equal":
        if as_json:
            echo(json.dumps(report, ensure_ascii=False))
        sys.exit(EXIT_FAILED)
    return report


@verb(top, "diff", "forge diff mv_0123456789abcdef support@prod")
@click.argument("old", metavar="A")
@click.argument("new", metavar="B")
def diff(store: Store, as_json: bool, old: str, new: str) -> Any:
    """Compare two model versions: data, settings, code, results.

    A and B are ids, aliases or digests. Also compares environment, changed predictions on test rows and cost."""
    from forge_ray.governance import difference
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        differences = difference.diff(index, old, new)
    if not as_json:
        echo("\n".join(map(one_line, difference.describe(differences))))
    return differences


REPRODUCTION: tuple[click.Command, ...] = (top.commands["reproduce"], top.commands["diff"])
