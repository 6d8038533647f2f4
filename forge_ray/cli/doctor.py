"""`forge doctor`: what is open, what leaves, what is missing, each with the command that mends it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import EXIT_FAILED

if TYPE_CHECKING:
    from forge_ray.store.files import Store


@click.group(cls=Verbs)
def top() -> None:
    """Holds the verb that `forge` itself takes."""


@verb(top, "doctor")
@click.option("--address", default="", help="A cluster to look at too, e.g. auto or HEAD:6379: the clocks of its nodes.")
def doctor(store: Store, as_json: bool, address: str) -> Any:
    """Tokens, TLS, ports, file modes, switches, versions, system, memory, disk, compiler, store. Exit 1 when any fails."""
    from forge_ray.doctor.examine import examine, lines
    from forge_ray.doctor.finding import Surroundings

    findings = list(examine(store, Surroundings(), address))
    failed = sum(finding.status == "fail" for finding in findings)
    result = {"failed": failed, "findings": [asdict(finding) for finding in findings]}
    if not as_json:
        click.echo("\n".join(lines(findings)))
    if failed:
        if as_json:
            click.echo(json.dumps(result, ensure_ascii=False))
        sys.exit(EXIT_FAILED)
    return result


DOCTOR: tuple[click.Command, ...] = (top.commands["doctor"],)
