"""`forge doctor`: checks of security, machine and store, each with the command that fixes a problem."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import EXIT_FAILED

if TYPE_CHECKING:
    from forge_ray.store.files import Store


@click.group(cls=Verbs)
def top() -> None:
    """Top-level verbs; `forge` registers them."""


@verb(top, "doctor", "forge doctor --address auto")
@click.option("--address", default="", help="Also check the clocks of this cluster's nodes, e.g. auto or HEAD:6379.")
def doctor(store: Store, as_json: bool, address: str) -> Any:
    """Check security, versions, hardware, disk and store.

    Checks tokens, TLS, listening addresses, file permissions, telemetry settings, versions, memory, disk,
    compiler and store, and prints a fix for each problem. Exit code 1 if any check fails."""
    from forge_ray.doctor.examine import examine, lines
    from forge_ray.doctor.finding import Surroundings

    findings = list(examine(store, Surroundings(), address))
    failed = sum(finding.status == "fail" for finding in findings)
    result = {"failed": failed, "findings": [asdict(finding) for finding in findings]}
    if not as_json:
        echo("\n".join(lines(findings)))
    if failed:
        if as_json:
            echo(json.dumps(result, ensure_ascii=False))
        sys.exit(EXIT_FAILED)
    return result


DOCTOR: tuple[click.Command, ...] = (top.commands["doctor"],)
