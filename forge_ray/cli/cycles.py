"""`forge cycles`: the training cycles that led to a version, as a table and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import ConfigError

if TYPE_CHECKING:
    from forge_ray.governance.cycles import Cycle
    from forge_ray.store.files import Store

SHOWN = ("exact_match", "loss")


@click.group(cls=Verbs)
def top() -> None:
    """Top-level verbs; `forge` registers them."""


@verb(top, "cycles", "forge cycles support@prod --out cycles.png")
@click.argument("reference", metavar="VERSION|ALIAS")
@click.option("--out", metavar="FILE.png", help="Also draw scores and rows of the cycles to this file.")
def cycles(store: Store, as_json: bool, reference: str, out: str | None) -> Any:
    """List the training cycles that led to a version.

    For each, oldest first: rows against the cycle before, changed settings, scores, gate, approvals, and when it served."""
    from forge_ray.governance import cycles as links
    from forge_ray.store.catalog import Catalog

    if out and Path(out).suffix.lower() != ".png":
        raise ConfigError(f"--out {out} is not the name of a PNG file", hint="for example --out cycles.png")
    with Catalog.read_only(store) as index:
        chain = links.cycles(index, reference)
    if out:
        try:
            links.plot(chain, Path(out))
        except OSError as error:
            raise ConfigError(
                f"{out} cannot be written: {error.strerror}", hint="give a file in a folder that exists"
            ) from error
    if not as_json:
        _print(chain)
        if out:
            echo(f"drawn: {out}")
    return {"cycles": [cycle.to_json() for cycle in chain], "out": out or ""}


def _print(chain: list[Cycle]) -> None:
    from forge_ray.cli.show import print_table
    from forge_ray.governance.cycles import newest_scores
    from forge_ray.governance.difference import lines

    header = (
        "",
        "version",
        "date",
        "from",
        "rows",
        "+",
        "−",
        "≠",
        *(name.replace("_", " ") for name in SHOWN),
        "gate",
        "served",
    )
    table = []
    for cycle in chain:
        counts = cycle.rows or {}
        scores = newest_scores(cycle)
        table.append(
            (
                str(cycle.number),
                cycle.version,
                cycle.at[:10],
                cycle.how,
                "" if cycle.num_records is None else str(cycle.num_records),
                *(str(counts[what]) if what in counts else "" for what in ("added", "removed", "changed")),
                *(f"{scores[name]:.3f}" if name in scores else "" for name in SHOWN),
                cycle.status,
                ", ".join(dict.fromkeys(one["alias"] for one in cycle.aliases)),
            )
        )
    print_table("Cycles", header, table)
    for cycle in chain:
        more = [f"settings: {line}" for line in lines(cycle.settings)]
        more += [f"rows not compared: {cycle.problem}"] if cycle.problem else []
        more += [f"gate: {reason}" for reason in cycle.reasons]
        more += [_approval(one) for one in cycle.approvals]
        more += [f"{one['alias']}: {_period(one)}" for one in cycle.aliases]
        more += [f"endpoint {one['name']} ({one['deployment']}): {one['state']}" for one in cycle.deployments]
        if more:
            echo(f"cycle {cycle.number}, {cycle.version}, from {cycle.started_from}")
            echo("\n".join(f"  {line}" for line in more))


def _approval(one: dict[str, Any]) -> str:
    holds = "" if one["holds"] else " (the signature does not hold)"
    return f"{one['decision']} by {one['who'] or 'nobody who signed'} for {one['alias']} on {one['at'][:10]}{holds}"


def _period(one: dict[str, Any]) -> str:
    return f"since {one['since'][:19]}" + (f" until {one['until'][:19]}" if one["until"] else "")


CYCLES: tuple[click.Command, ...] = (top.commands["cycles"],)
