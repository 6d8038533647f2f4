"""The model card: Markdown with Hugging Face's front matter."""

from __future__ import annotations

from typing import Any

import yaml

from forge_ray.evaluate.items import split_of, splits_of
from forge_ray.models.class_head import is_classifier
from forge_ray.models.shrink import LAYERS
from forge_ray.papers.compute import FORMULA, GPAI_FLOPS, THIRD, THIRD_SOURCE
from forge_ray.papers.facts import BY_HAND, NOT_RECORDED, Facts, spdx
from forge_ray.papers.markdown import as_text, code, counts, flops, hours, plain, table
from forge_ray.records import EvalReport, ModelVersion

WORST = 10  # classes shown
SHOWN_INCIDENTS = 20


def model_card(facts: Facts, library: str = "") -> bytes:
    """`library`: what opens the weights, where it is not the one that follows from their kind."""
    version = facts.version
    sections = [
        f"---\n{_front_matter(facts, library)}---\n",
        f"# {plain(version.name)} · {version.id}\n",
        _summary(facts),
        table(("", ""), _glance(facts)),
        "## Use\n",
        f"Intended use, users and uses out of scope: {BY_HAND}.\n",
        table(("alias or endpoint", "since", "what"), _uses(facts)),
        "## Training data\n",
        *_data(facts),
        "## Training\n",
        _training(facts),
        "## Evaluation\n",
        *_evaluation(facts),
        "## Gate\n",
        _gate(facts),
        "## Compute and energy\n",
        compute_table(facts),
        "## Limits\n",
        f"Known limits, biases and risks beyond the scores above: {BY_HAND}.\n",
        "## Records\n",
        table(("record", "kind", "written (UTC)"), [(r.id, r.kind, r.created_at[:19]) for r in facts.records]),
    ]
    if facts.missing:
        sections.append(f"Named by a record, but not in this store: {', '.join(facts.missing)}.\n")
    return "\n".join(sections).encode()


def _task(version: ModelVersion) -> str:
    """By the hub's name."""
    return "text-classification" if is_classifier(version) else "text-generation"


def _front_matter(facts: Facts, library: str) -> str:
    version, base = facts.version, facts.base
    licence = spdx(version.licence).lower()
    value: dict[str, Any] = {"license": licence or "other"}
    if not licence:
        value["license_name"] = version.licence
    value |= {
        "library_name": library or ("peft" if version.weights == "adapter" else "transformers"),
        "pipeline_tag": _task(version),
        "model_name": version.name,
    }
    if base:
        value |= {"base_model": base.id, "base_model_relation": "adapter" if version.weights == "adapter" else "finetune"}
    if facts.dataset:
        value["datasets"] = [facts.dataset.id]
    value["tags"] = [tag for tag in ("forge-ray", version.id, version.run) if tag]
    results = [
        {
            "task": {"type": _task(version)},
            "dataset": {"name": _dataset_name(facts, dataset), "type": dataset, "split": split},
            "metrics": metrics,
        }
        for report in facts.own_evals
        for dataset, split in dict.fromkeys(splits_of(report))
        if (metrics := _metrics(report, (dataset, split)))
    ]
    if results:
        value["model-index"] = [{"name": version.name, "results": results}]
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _metrics(report: EvalReport, rows: tuple[str, str]) -> list[dict[str, Any]]:
    """The scores of one of the report's splits."""
    return [{"type": name, "value": score} for name, score in report.metrics.items() if split_of(report, name) == rows]


def _dataset_name(facts: Facts, identifier: str) -> str:
    return next((dataset.name for dataset in facts.datasets if dataset.id == identifier), identifier)


def _summary(facts: Facts) -> str:
    version, base, training = facts.version, facts.base, facts.training
    if version.status == "imported" and version.source.startswith(LAYERS):
        return f"A base model that this store made of another one: {plain(version.source)}. No gate has judged it.\n"
    if version.status == "imported" or not base:
        return f"A base model, imported from {code(version.source)}.\n"
    if version.status == "merged":
        return f"A base model that this store made of its own versions: {code(version.source)}. No gate has judged it.\n"
    what = "An adapter on" if version.weights == "adapter" else "Weights trained from"
    rows = f" on {facts.rows:,} records of {facts.dataset.id}" if facts.dataset and facts.rows is not None else ""
    how = f" ({training.run.method}, {training.run.num_steps:,} steps)" if training else ""
    initial = training.run.initial_adapter if training else ""
    begun = f" The run trained the adapter of {initial} on." if initial else ""
    return f"{what} {plain(base.name)} ({base.id}), trained{rows}{how}.{begun}{_distilled(facts)}\n"


def _distilled(facts: Facts) -> str:
    """Of whom the weights, or those that they start from, are a distillate."""
    named = {version.id: version for version in facts.frozen}
    parts = ""
    for run in (training.run for training in facts.trainings if training.run.frozen_model):
        frozen = named.get(run.frozen_model)
        who = f"{plain(frozen.name)} ({frozen.id}, licence {plain(frozen.licence)})" if frozen else run.frozen_model
        if run.method == "distil":
            own = "It is" if run.id == facts.version.run else f"What {run.id} made, from which it comes, is"
            parts += f" {own} a distillate of {who}: a student that learned this teacher's distributions."
        else:
            parts += f" Its answers were compared with those of {who}."
    return parts


def _glance(facts: Facts) -> list[tuple[str, str]]:
    version, origin = facts.version, facts.origin
    kinds = facts.architecture.get("architectures") or [NOT_RECORDED]
    return [
        ("status", version.status + (f": {plain('; '.join(version.reasons))}" if version.reasons else "")),
        ("weights", f"{version.weights}, {len(version.files)} files, {sum(f.size for f in version.files):,} bytes"),
        ("digest of the files", code(version.files_digest)),
        ("parameters", parameters(facts)),
        ("architecture", plain(str(kinds[0]))),
        ("context", as_text(facts.architecture.get("max_position_embeddings"))),
        ("licence", plain(version.licence)),
        ("base model", f"{plain(origin.name)} ({origin.id}), {plain(origin.licence)}, from {code(origin.source)}"),
        *(
            (
                "teacher" if training.run.method == "distil" else "reference",
                f"{plain(frozen.name)} ({frozen.id}), {plain(frozen.licence)}",
            )
            for training in facts.trainings
            for frozen in facts.frozen
            if training.run.frozen_model == frozen.id
        ),
        ("on record since", f"{version.created_at[:19]} UTC"),
        ("signed by", plain(", ".join(facts.signatures.get(version.id, ()))) or NOT_RECORDED),
    ]


def parameters(facts: Facts) -> str:
    counted = [f"{count:,} of {identifier}" for identifier, count in facts.parameters.items()]
    return ", ".join(counted) + " (counted in the weight files)" if counted else NOT_RECORDED


def _uses(facts: Facts) -> list[tuple[str, str, str]]:
    moved = {event.subject: event.at for event in facts.events if event.kind == "alias"}
    rows = [(f"alias {plain(alias)}", moved.get(alias, "")[:19], "answers for it now") for alias in facts.aliases]
    for deployment in facts.deployments:
        states = [event for event in facts.events if event.subject == deployment.id]
        state = str(states[-1].data.get("state", NOT_RECORDED)) if states else NOT_RECORDED
        name = f"endpoint {plain(deployment.name)} ({deployment.id})"
        rows.append((name, deployment.created_at[:19], f"last state: {plain(state)}"))
    return rows


def _data(facts: Facts) -> list[str]:
    dataset = facts.dataset
    if dataset is None:
        return [f"{NOT_RECORDED}: {'no dataset in the chain' if not facts.version.run else ', '.join(facts.missing)}.\n"]
    splits = [
        (name, f"{s.num_records:,}", f"{s.num_tokens:,}", f"{s.num_trained_tokens:,}", code(s.rows_digest))
        for name, s in dataset.splits.items()
    ]
    sources = [
        (code(s.name), f"{s.num_records:,}", counts(s.licences), f"{s.epochs:g}", f"{s.num_tokens:,}")
        for s in dataset.mixture
    ]
    parts = [
        f"{plain(dataset.name)} ({dataset.id}), built {dataset.created_at[:19]} UTC. Records: {counts(dataset.kinds)}."
        f" {dataset.num_duplicates:,} exact duplicates left out; rows rejected: {counts(dataset.rejects)}.\n",
        table(("split", "records", "tokens", "trained tokens", "digest of the rows"), splits),
        table(("source", "records", "licences", "epochs", "training tokens"), sources),
    ]
    if dataset.curation:
        rules = [
            (c.rule, f"{c.before:,}", f"{c.after:,}", f"{c.changed:,}", counts(c.found), counts(c.reasons))
            for c in dataset.curation
        ]
        parts.append(table(("rule", "before", "after", "masked", "found", "dropped for"), rules))
    else:
        parts.append("No rule of `data.curate` was applied.\n")
    return parts


def _training(facts: Facts) -> str:
    if not facts.training:
        return f"{NOT_RECORDED}: no run made this version, or its record is not in this store.\n"
    run = facts.training.run
    settings = run.config.get("train", {})
    optimizer, adapter = settings.get("optimizer", {}), settings.get("adapter") or {}
    incidents = [f"{incident['kind']} at step {incident['step']}" for incident in run.incidents[:SHOWN_INCIDENTS]]
    more = len(run.incidents) - len(incidents)
    rows = [
        ("run", f"{run.id}, code {code(run.code_digest)}, settings {code(run.config_digest)}"),
        ("method", run.method + (f", {adapter.get('method')} r={adapter.get('r')}" if adapter else "")),
        ("steps", f"{run.num_steps:,}, {run.samples_seen:,} packed rows, seed {run.seed}"),
        ("learning rate", as_text(optimizer.get("lr"))),
        ("batch", f"{as_text(settings.get('global_batch'))} rows a step"),
        ("precision", as_text(settings.get("precision"))),
        ("trained weights", as_text(run.adapter.get("trained")) if adapter else "all"),
        ("exported step", "the last" if not run.export_step else as_text(run.export_step)),
        ("stopped early", plain(str(run.stopped_early["why"])) if run.stopped_early else "no"),
        ("starts", ", ".join(f"step {a['first_step']} on {a['world_size']} workers" for a in run.attempts) or NOT_RECORDED),
        ("incidents", plain(", ".join(incidents) + (f", {more} more" if more > 0 else "")) or "none"),
        ("order of samples", code(run.order_digest)),
        (
            "loss at the end",
            f"{as_text(run.metrics.get('loss'))} (validation {as_text(run.metrics.get('validation_loss'))})",
        ),
        ("code's commit", as_text(run.code_commit)),
        ("hardware", hardware(facts)),
        ("environment lock", code(run.environment_digest)),
        ("environment", ", ".join(f"{name} {value}" for name, value in sorted(run.environment.items())) or NOT_RECORDED),
    ]
    return table(("", ""), rows)


def _evaluation(facts: Facts) -> list[str]:
    """A table of scores for each set of metrics, so that a leak audit has its own; then the worst classes and slices."""
    if not facts.evals:
        return [f"{NOT_RECORDED}: no report names this version.\n"]
    groups: dict[tuple[str, ...], list[EvalReport]] = {}
    for report in facts.evals:
        groups.setdefault(tuple(report.metrics), []).append(report)
    parts = []
    for reports in groups.values():
        rows = [("examples", *(f"{r.num_examples:,}, {r.split} of {r.dataset}{general_rows(r)}" for r in reports))]
        names = dict.fromkeys(name for r in reports for name in (*r.metrics, *r.costs, *r.undefined))
        rows += [(plain(name), *(_score(r, name) for r in reports)) for name in names]
        parts.append(table(("", *(f"{subject(facts, r)} · {r.id}" for r in reports)), rows))
    for report in facts.own_evals:
        for kind, scores_by_name in ({"class": report.per_class} | report.per_slice).items():
            parts += _worst(report, kind, scores_by_name)
    return parts


def _score(report: EvalReport, name: str) -> str:
    value = report.metrics.get(name, report.costs.get(name))
    return as_text(value) if value is not None else "no finite number" if name in report.undefined else "–"


def _worst(report: EvalReport, kind: str, scores_by_name: dict[str, dict[str, float]]) -> list[str]:
    if not scores_by_name:
        return []
    ranked = sorted(scores_by_name.items(), key=lambda item: (item[1].get("f1", item[1].get("exact_match", 0.0)), item[0]))
    columns = list(dict.fromkeys(key for _, scores in ranked for key in scores))
    rows = [(plain(name), *(as_text(scores.get(key)) for key in columns)) for name, scores in ranked[:WORST]]
    which = f"the {WORST} lowest of {len(ranked):,}" if len(ranked) > WORST else "lowest first"
    return [f"{report.id} by {plain(kind)}, {which}:\n", table((plain(kind), *columns), rows)]


def general_rows(report: EvalReport) -> str:
    """How many general rows of which dataset version a report is of, to append; "" where it has none."""
    return f"; {report.num_general:,} general rows, {splits_of(report)[1][1]} of {report.general}" if report.general else ""


def subject(facts: Facts, report: EvalReport) -> str:
    return "this version" if report in facts.own_evals else report.evaluated


def _gate(facts: Facts) -> str:
    training = facts.training
    gate = training.run.config.get("release", {}).get("gate", {}) if training else {}
    rules = [
        f"{plain(name)} {' and '.join(f'{bound} {value:g}' for bound, value in limits.items() if value is not None)}"
        for name, limits in gate.get("thresholds", {}).items()
    ]
    rules += [
        f"{plain(rule['metric'])} better than {plain(rule['incumbent'])} by {rule['margin']:g}"
        for rule in gate.get("better_than", [])
    ]
    verdict = facts.version.status + (f": {plain('; '.join(facts.version.reasons))}" if facts.version.reasons else "")
    if facts.version.checks:
        rows = [
            (plain(c.name), as_text(c.value), as_text(c.bound), "passed" if c.passed else "failed", plain(c.reason) or "–")
            for c in facts.version.checks
        ]
        return f"Verdict on record: {verdict}.\n\n{table(('check', 'value', 'bound', '', 'why'), rows)}"
    asked = "; ".join(rules) or f"no rule ({NOT_RECORDED})"
    return f"Asked by the run file: {asked}. Verdict on record: {verdict}.\n"


def hardware(facts: Facts) -> str:
    """The hardware of the first worker of the last start."""
    machine = facts.training.run.hardware if facts.training else {}
    names = machine.get("gpus") or [machine.get("cpu")]
    return plain(", ".join(str(name) for name in names if name)) or NOT_RECORDED


def compute_table(facts: Facts) -> str:
    """Compute of each run of the chain and in total, with the formula and a third of the base model's compute for
    comparison."""
    rows = []
    for training in facts.trainings:
        compute = training.compute
        device = compute.device_hours
        rows.append(
            (
                training.run.id,
                as_text(compute.tokens),
                as_text(compute.trained_tokens),
                flops(compute.flops),
                hours(None if compute.seconds is None else compute.seconds / 3600),
                hours(compute.worker_hours),
                f"{device[1]:.3g} {device[0]} h" if device else NOT_RECORDED,
            )
        )
    parts = [
        table(("run", "tokens", "trained tokens", "estimate", "wall time of steps", "workers", "devices"), rows),
        table(
            ("all runs up to this version", ""),
            [
                ("training compute, estimated", flops(facts.flops)),
                ("worker hours", hours(facts.worker_hours)),
                ("energy", energy(facts)),
                ("training compute of the base model", flops(facts.base_flops) + (" (stated)" if facts.base_flops else "")),
                ("share of the base model's", NOT_RECORDED if facts.share is None else f"{facts.share:.3g}"),
                ("a third of the base model's", flops(facts.base_flops and facts.base_flops * THIRD)),
                ("a third of 10^23, where the base model's is not known", flops(GPAI_FLOPS * THIRD)),
            ],
        ),
        f"{FORMULA} Not in it: what activation checkpointing computes twice, steps done again after a failure, start-up,"
        " the pass of a reference model, validation, evaluation.\n",
        f"The line of a third: {THIRD_SOURCE}. Which side of it a model is on is not judged here.\n",
    ]
    return "\n".join(parts)


def energy(facts: Facts) -> str:
    if facts.energy_kwh is None:
        return f"{NOT_RECORDED} (no meter was read; state the watts of a worker with --power-w)"
    return f"{facts.energy_kwh:.3g} kWh, estimated from stated power: {facts.power_w:g} W per worker; not measured"
