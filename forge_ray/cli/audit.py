"""`forge audit …`: what can be proven about a run afterwards."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import TrainingError

if TYPE_CHECKING:
    from forge_ray.store.files import Store


@click.group(cls=Verbs)
def audit() -> None:
    """Prove afterwards what was done: data, leak, log, verify."""


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


@verb(audit, "leak")
@click.argument("reference", metavar="run_…|mv_…|ALIAS")
@click.option("--max-records", type=int, help="Training records, and as many held-out ones; else as its run file says.")
@click.option("--candidates", type=int, help="Codes that each canary's is ranked among.")
@click.option("--seed", type=int, help="Draws records, candidates and the bootstrap.")
def audit_leak(store: Store, as_json: bool, reference: str, **settings: int | None) -> Any:
    """What the weights give away of the rows they were trained on: membership, extraction, exposure of canaries."""
    from forge_ray import pipeline

    given = {name: value for name, value in settings.items() if value is not None}
    report = pipeline.audit_leak(reference, store, given)
    if not as_json:
        from forge_ray.cli.show import print_table

        told, records, canaries = report.metrics, report.per_slice["records"], report.per_slice["canaries"]

        def value(name: str, form: str = ".3f") -> str:
            return format(told[name], form) if name in told else "-"

        rows = [
            (
                "membership AUC",
                f"{value('leak_auc')}  [{value('leak_auc_low')}, {value('leak_auc_high')}]",
                "",
                "leak_auc_base",
            ),
            ("loss gap, nats per token", value("leak_gap"), "", "leak_gap_base"),
            ("said word for word", value("extraction_rate", ".1%"), value("extraction_rate_held_out", ".1%"), ""),
            (
                "exposure, bits, mean",
                value("exposure_mean", ".2f"),
                value("exposure_held_out_mean", ".2f"),
                "exposure_base_mean",
            ),
            ("exposure, bits, worst", value("exposure_max", ".2f"), "", ""),
        ]
        print_table(
            f"{report.subject}: {records['train']['count']:.0f} training and {records['held_out']['count']:.0f} held-out"
            f" records, {canaries['train']['count']:.0f} and {canaries['held_out']['count']:.0f} canaries",
            ("", "training rows", "held out", "base model"),
            [(what, mine, other, value(base) if base else "") for what, mine, other, base in rows],
        )
        click.echo(f"{report.id}  a model that does not know its canaries has 1.44 bits on average, an AUC of 0.5")
    return report
