"""`forge audit …`: what can be proven about a run afterwards (level 6)."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from forge_ray.errors import TrainingError
from forge_ray.verbs import Verbs, verb

if TYPE_CHECKING:
    from forge_ray.store import Store


@click.group(cls=Verbs)
def audit() -> None:
    """Prove afterwards what was done: data, log, verify."""


@verb(audit, "data")
@click.argument("run", metavar="run_…")
@click.option("--step", "shown", type=int, multiple=True, metavar="N", help="List the records of this step (from 1).")
def audit_data(store: Store, as_json: bool, run: str, shown: tuple[int, ...]) -> Any:
    """Which rows each step used: recomputed from the dataset, compared with what the workers wrote down."""
    from forge_ray.errors import ConfigError
    from forge_ray.progress import stage
    from forge_ray.train import audit as auditing

    facts = auditing.facts_of(store, run)
    for step in shown:
        if not 1 <= step <= facts.num_steps:
            raise ConfigError(f"--step {step}: {run} has the steps 1 to {facts.num_steps}", hint="steps count from 1")
    with stage("audit") as it:
        found = auditing.audit(facts, it.update)
        it.done(f"{run}  {found.steps_compared} of {found.num_steps} steps compared")
    steps = {str(step): auditing.records_of(facts.rows, facts.order, step) for step in shown}
    if not as_json:
        click.echo(
            f"{run}: {found.num_steps} steps took {found.samples_seen:,} rows of the {found.num_rows:,} in {found.dataset}"
        )
        for times, count in found.times_used.items():
            click.echo(f"  {count:,} rows {times} times")
        for number, used in steps.items():
            click.echo(f"step {number}")
            for item in used:
                click.echo(f"  lane {item['lane']}: row {item['row']}: {' '.join(item['records'])}")
        for problem in found.problems[:20]:
            click.echo(f"  {problem}")
        if not found.problems:
            click.echo("every step was given the rows of its order")
    if found.problems:
        raise TrainingError(
            f"{run} did not use the rows that it says: {found.problems[0]} ({len(found.problems)} problems)",
            hint="do not release what it trained; compare the store with a backup",
        )
    return asdict(found) | {"steps": steps}
