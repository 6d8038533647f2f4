"""`forge audit …`: verify the rows a run used, measure memorisation, verify the audit log."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import TrainingError

if TYPE_CHECKING:
    from forge_ray.store.files import Store

SAMPLED_ROWS = 8  # of which the reference model's log probabilities are computed again
TOLERANCE = 0.02  # of the largest of them: another machine adds in another order


@click.group(cls=Verbs)
def audit() -> None:
    """Audit training data, memorisation and the audit log."""


@verb(audit, "data", "forge audit data run_0123456789abcdef --step 1")
@click.argument("run", metavar="run_…")
@click.option(
    "--step",
    "steps_to_list",
    type=int,
    multiple=True,
    metavar="N",
    help="List the records of this step (counted from 1). Repeatable.",
)
def audit_data(store: Store, as_json: bool, run: str, steps_to_list: tuple[int, ...]) -> Any:
    """Verify which rows each training step used.

    The order is recomputed from the dataset and compared with what the workers recorded."""
    from forge_ray.errors import ConfigError
    from forge_ray.progress import stage
    from forge_ray.train import audit as auditing

    facts = auditing.facts_of(store, run)
    for step in steps_to_list:
        if not 1 <= step <= facts.num_steps:
            raise ConfigError(f"--step {step}: {run} has the steps 1 to {facts.num_steps}", hint="steps count from 1")
    with stage("audit") as it:
        report = auditing.audit(facts, it.update)
        it.done(f"{run}  {report.steps_compared} of {report.num_steps} steps compared")
    problems, kept = list(report.problems), _reference_difference(store, run, facts.method)
    drift = kept if isinstance(kept, tuple) else None
    if drift and drift[0] > TOLERANCE * max(1.0, drift[1]):
        problems.append(
            f"the kept log probabilities of the reference model differ by {drift[0]:.3g} nats from computed ones"
        )
    steps = {str(step): auditing.records_of(facts.rows, facts.order, step) for step in steps_to_list}
    if not as_json:
        echo(
            f"{run}: {report.num_steps} steps took {report.samples_seen:,} rows"
            f" of the {report.num_rows:,} in {report.dataset}"
        )
        for times, count in report.times_used.items():
            echo(f"  {count:,} rows {times} times")
        for number, used in steps.items():
            echo(f"step {number}")
            for item in used:
                echo(f"  lane {item['lane']}: row {item['row']}: {' '.join(item['records'])}")
        if drift:
            echo(f"reference model: {SAMPLED_ROWS} rows computed again, largest difference {drift[0]:.3g} nats")
        if isinstance(kept, str):
            echo(f"reference model: {kept}")
        for problem in problems[:20]:
            echo(f"  {problem}")
        if not report.problems:
            echo("every step used the rows of its order")
    if problems:
        raise TrainingError(
            f"{run} did not train on the recorded rows: {problems[0]} ({len(problems)} problems)",
            hint="do not release what it trained; compare the store with a backup",
        )
    more: dict[str, Any] = {"reference": {"rows": SAMPLED_ROWS, "largest_difference": drift[0]}} if drift else {}
    more |= {"reference": {"rows": 0, "why": kept}} if isinstance(kept, str) else {}
    return asdict(report) | {"problems": problems, "steps": steps, **more}


def _reference_difference(store: Store, run: str, method: Any) -> tuple[float, float] | str | None:
    """Of a run that compares with a reference model or a teacher, how far the kept numbers are from computed ones, or why
    they are not computed; None for others."""
    from forge_ray.config.base import parse
    from forge_ray.config.distil import Distil
    from forge_ray.config.method import Preference
    from forge_ray.config.train import TrainConfig

    parsed = parse(TrainConfig, {"method": method}).method
    if not isinstance(parsed, Distil) and not (isinstance(parsed, Preference) and parsed.has_reference):
        return None
    from forge_ray.errors import ConfigError, NotFound
    from forge_ray.store import paths
    from forge_ray.store.catalog import Catalog
    from forge_ray.train.job import job_of
    from forge_ray.train.methods import reference_of

    try:
        with Catalog.read_only(store) as catalog:
            reference = reference_of(job_of(catalog, run))
    except (ConfigError, NotFound) as error:
        return f"not computed again: {error.message}"
    if reference is None or reference.is_quantised:
        return "not computed again, for its base was kept in 4 bits (adapter.quantize=nf4), which needs the GPU"
    if not store.is_published(reference.folder):
        return (
            f"not compared: {reference.folder} is not kept (an erasure removed it, or an earlier release named it otherwise)"
        )
    absent = [version.id for version in reference.versions if not store.is_published(paths.model(version.id))]
    if absent:
        return f"not computed again, for the files of {absent[0]} are not in this store"
    return reference.difference(SAMPLED_ROWS)


@verb(audit, "leak", "forge audit leak support@prod")
@click.argument("reference", metavar="run_…|mv_…|ALIAS")
@click.option(
    "--max-records", type=int, help="Training records to test, and as many held-out ones. Default: the run file's setting."
)
@click.option("--candidates", type=int, help="Random codes that each canary's code is ranked against.")
@click.option("--seed", type=int, help="Seed for drawing records, candidates and bootstrap samples.")
def audit_leak(store: Store, as_json: bool, reference: str, **settings: int | None) -> Any:
    """Measure what the weights reveal about their training rows.

    Covers membership inference, verbatim extraction and exposure of canaries."""
    from forge_ray.evaluate import reports
    from forge_ray.store.catalog import Catalog

    overrides = {name: value for name, value in settings.items() if value is not None}
    with Catalog.open(store) as catalog:
        report = reports.audit_leak_of(catalog, reference, overrides)
    if not as_json:
        from forge_ray.cli.show import print_table

        metrics, records, canaries = report.metrics, report.per_slice["records"], report.per_slice["canaries"]

        def value(name: str, form: str = ".3f") -> str:
            return format(metrics[name], form) if name in metrics else "-"

        rows = [
            (
                "membership AUC",
                f"{value('leak_auc')}  [{value('leak_auc_low')}, {value('leak_auc_high')}]",
                "",
                "leak_auc_base",
            ),
            ("loss gap, nats per token", value("leak_gap"), "", "leak_gap_base"),
            ("reproduced word for word", value("extraction_rate", ".1%"), value("extraction_rate_held_out", ".1%"), ""),
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
            [(what, trained, held_out, value(base) if base else "") for what, trained, held_out, base in rows],
        )
        echo(f"{report.id}  without memorisation the mean exposure is 1.44 bits and the AUC 0.5")
    return report
