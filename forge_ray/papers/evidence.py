"""Evidence for three documents of the EU AI Act: each requirement, what is on record about it, and in which record.

Evidence, never a verdict. The points are those of Regulation (EU) 2024/1689 and of the AI Office's template of July 2025,
paraphrased: only the official text is binding.
"""

from __future__ import annotations

from dataclasses import dataclass

from forge_ray.config.method import objective
from forge_ray.papers.facts import BY_HAND, Facts
from forge_ray.papers.markdown import as_text, code, counts, flops, hours, plain, table
from forge_ray.papers.model_card import energy, general_rows, hardware, parameters, subject

TOKENS_SIZES = ((10**9, "less than 1 billion tokens"), (10**13, "1 billion to 10 trillion tokens"))


@dataclass(frozen=True)
class Row:
    """One requirement and the evidence for it; empty where nothing is on record. `source`: ids of the records."""

    point: str
    asked: str
    evidence: str = ""
    source: str = ""


def annex_xi(facts: Facts) -> bytes:
    rows = [
        Row("1(1)(a)", "tasks it is meant for; kinds of systems that it can be part of"),
        Row("1(1)(b)", "acceptable use"),
        Row("1(1)(c)", "date of release, ways of distribution", *_release(facts)),
        Row("1(1)(d)", "architecture, number of parameters", *_architecture(facts)),
        Row("1(1)(e)", "modality and format of inputs and outputs", *_modality(facts)),
        Row("1(1)(f)", "licence", plain(facts.version.licence), facts.version.id),
        Row("1(2)(a)", "technical means to integrate it", *_means(facts)),
        Row("1(2)(b)", "design of the training: method, settings, what is optimised", *_design(facts)),
        Row("1(2)(b)", "why these choices; assumptions"),
        Row("1(2)(c)", "training data: kind, provenance, number of data points", *_rows(facts)),
        Row("1(2)(c)", "data for testing and validation", *_held_out(facts)),
        Row("1(2)(c)", "how data was cleaned and filtered", *_curation(facts)),
        Row("1(2)(c)", "how data was obtained and chosen", *_obtained(facts)),
        Row("1(2)(c)", "measures against unsuitable sources; identifiable biases"),
        Row("1(2)(d)", "compute: FLOPs", *_flops(facts)),
        Row("1(2)(d)", "compute: training time", *_time(facts)),
        Row("1(2)(d)", "compute: hardware", *_hardware(facts)),
        Row("1(2)(e)", "energy, known or estimated", *_energy(facts)),
        Row("2(1)", "evaluation: strategies and results (models with systemic risk)", *_scores(facts)),
        Row("2(2)", "adversarial testing (models with systemic risk)", *_metrics(facts, "safety")),
        Row("2(3)", "architecture of the system (models with systemic risk)"),
    ]
    share = "" if facts.share is None else f" Here: {facts.share:.3g}."
    note = (
        "A modifier's part of these duties concerns the modification; whether it has any depends on the share of the"
        f" original model's training compute, see the model card.{share}\n"
    )
    return _paper(facts, "Annex XI", "documentation of a general-purpose model", rows, note)


def annex_iv(facts: Facts) -> bytes:
    rows = [
        Row("1(a)", "intended purpose, provider"),
        Row("1(a)", "version and its relation to earlier ones", *_version(facts)),
        Row("1(b)", "other systems that it works with", *_endpoints(facts)),
        Row("1(c)", "versions of the software", *_software(facts)),
        Row("1(d)", "forms in which it is put into service", *_release(facts)),
        Row("1(e)", "hardware that it is meant to run on"),
        Row("1(g), (h)", "interface of the deployer; instructions for use"),
        Row("2(a)", "steps of the development; models of third parties that were used", *_steps(facts)),
        Row("2(b)", "what the system is designed to optimise; settings", *_design(facts)),
        Row("2(b)", "rationale and assumptions; trade-offs"),
        Row("2(c)", "compute used to develop, train, test", *_flops(facts)),
        Row("2(c)", "hardware it was trained on", *_hardware(facts)),
        Row("2(d)", "training data: provenance, scope, main properties", *_rows(facts)),
        Row("2(d)", "how data was obtained, chosen, labelled", *_obtained(facts)),
        Row("2(d)", "cleaning", *_curation(facts)),
        Row("2(e)", "human oversight: who decided before release", *_approvals(facts)),
        Row("2(e)", "human oversight: measures in use"),
        Row("2(f)", "changes that are planned beforehand"),
        Row("2(g)", "test data, metrics, results", *_scores(facts)),
        Row("2(g)", "test reports, dated", *_reports(facts)),
        Row("2(g)", "who signed the test reports", *_signers(facts)),
        Row("2(h)", "cybersecurity: integrity of data and weights", *_integrity(facts)),
        Row("2(h)", "cybersecurity: rows that the weights give away", *_metrics(facts, "leak", "extraction", "exposure")),
        Row("2(h)", "cybersecurity: answers to hostile prompts", *_metrics(facts, "safety")),
        Row("3", "capabilities and limits, accuracy for groups", *_groups(facts)),
        Row("3", "foreseeable unintended outcomes; risks to fundamental rights"),
        Row("4", "why these metrics fit"),
        Row("5", "risk management"),
        Row("6", "changes during the life of the system", *_changes(facts)),
        Row("7", "standards that were applied"),
        Row("8", "declaration of conformity"),
        Row("9", "monitoring after it is put into service"),
    ]
    note = "Annex IV asks about an AI system; what is on record here is about the model in it.\n"
    return _paper(facts, "Annex IV", "documentation of a high-risk system", rows, note)


def training_content_summary(facts: Facts) -> bytes:
    sources, where = _sources(facts)
    rows = [
        Row("1.1", "provider"),
        Row("1.2", "model, its version", f"{plain(facts.version.name)}, {facts.version.id}", facts.version.id),
        Row("1.2", "models that it was made from", *_ancestors(facts)),
        Row("1.2", "date of being placed on the market"),
        Row("1.3", "modalities of the training data", *_kinds(facts)),
        Row("1.3", "size of the training data", *_size(facts)),
        Row("1.3", "latest date of the data"),
        Row("2.1", "public datasets"),
        Row("2.2", "datasets of third parties, licensed or not"),
        Row("2.3", "data crawled from the web: crawlers, period, domains"),
        Row("2.4", "data of users"),
        Row("2.5", "synthetic data, and the models that made it"),
        Row("2.6", "files that were read, by whatever way they came", sources, where),
        Row("2.6", "licences that the rows or their sources state", *_licences(facts)),
        Row("3.1", "reservations of rights (text and data mining)"),
        Row("3.2", "removal of unlawful content"),
        Row("3.3", "other processing", *_curation(facts)),
    ]
    note = (
        "Which of the kinds 2.1 to 2.5 a file belongs to is known to whoever brought it. Rows of the base model's own"
        " training are not in this store: ask its provider.\n"
    )
    return _paper(facts, "the training-content summary", "Article 53(1)(d)", rows, note)


def _paper(facts: Facts, name: str, about: str, rows: list[Row], note: str) -> bytes:
    num_answered = sum(bool(row.evidence) for row in rows)
    cells = [(row.point, row.asked, row.evidence or BY_HAND, row.source if row.evidence else "–") for row in rows]
    parts = [
        f"# Evidence for {name}: {plain(facts.version.name)} · {facts.version.id}\n",
        f"About {about}. {num_answered} of {len(rows)} rows have something on record; the others wait for a person. This"
        " paper gathers evidence and judges nothing. Points are those of the official text, in other words: the text"
        " binds.\n",
        table(("point", "what is asked", "evidence", "from"), cells),
        note,
    ]
    return "\n".join(parts).encode()


def _release(facts: Facts) -> tuple[str, str]:
    names = [f"alias {plain(alias)}" for alias in facts.aliases]
    names += [f"endpoint {plain(deployment.name)}, {deployment.created_at[:10]}" for deployment in facts.deployments]
    text = f"{facts.version.status} on {facts.version.created_at[:10]}; {', '.join(names) or 'no alias, no endpoint'}"
    return text, _ids(facts.version.id, *(deployment.id for deployment in facts.deployments))


def _architecture(facts: Facts) -> tuple[str, str]:
    config = facts.architecture
    if not config and not facts.parameters:
        return "", ""
    shape = ", ".join(
        f"{as_text(config[key])} {word}"
        for key, word in (("num_hidden_layers", "layers"), ("hidden_size", "wide"), ("vocab_size", "tokens known"))
        if key in config
    )
    kind = plain(str((config.get("architectures") or ["architecture not recorded"])[0]))
    return f"{kind}{f': {shape}' if shape else ''}; parameters: {parameters(facts)}", _ids(*facts.parameters)


def _modality(facts: Facts) -> tuple[str, str]:
    if not facts.architecture:
        return "", ""
    sees = " (its base can see images)" if "vision_config" in facts.architecture else ""
    context = as_text(facts.architecture.get("max_position_embeddings"))
    return f"text in, text out{sees}; context of {context} tokens", _ids(facts.chain[-1].id)


def _means(facts: Facts) -> tuple[str, str]:
    kind = "PEFT adapter" if facts.version.weights == "adapter" else "Hugging Face folder"
    served = "served through an OpenAI-compatible endpoint (docs/reference/serving-api.md)"
    return f"{kind}, safetensors; {served}", facts.version.id


def _design(facts: Facts) -> tuple[str, str]:
    if not facts.training:
        return "", ""
    run = facts.training.run
    train = run.config.get("train", {})
    adapter = train.get("adapter") or {}
    trained = f"{adapter.get('method')} r={adapter.get('r')}" if adapter else "all weights"
    rate = train.get("optimizer", {}).get("lr")
    method = train.get("method")
    sft_weight = method.get("sft_weight", 0.0) if isinstance(method, dict) else 0.0
    text = (
        f"{run.method}, {trained}: {objective(run.method, sft_weight)}, {run.num_steps:,} steps of"
        f" {as_text(train.get('global_batch'))} rows,"
        f" learning rate {as_text(rate)}, seed {run.seed}; all settings {code(run.config_digest)}"
    )
    return text, run.id


def _rows(facts: Facts) -> tuple[str, str]:
    dataset = facts.dataset
    if not dataset or "train" not in dataset.splits:
        return "", ""
    split = dataset.splits["train"]
    text = (
        f"{split.num_records:,} records, {split.num_tokens:,} tokens ({split.num_trained_tokens:,} trained);"
        f" kinds of all splits: {counts(dataset.kinds)}; source files: {len(dataset.sources):,}, each with its sha256"
    )
    return text, dataset.id


def _held_out(facts: Facts) -> tuple[str, str]:
    dataset = facts.dataset
    if not dataset:
        return "", ""
    held = {name: split.num_records for name, split in dataset.splits.items() if name != "train"}
    return (f"records held out by a hash of their content: {counts(held)}", dataset.id) if held else ("", "")


def _curation(facts: Facts) -> tuple[str, str]:
    dataset = facts.dataset
    if not dataset:
        return "", ""
    steps = [f"{s.rule}: {s.before:,} → {s.after:,} records, {s.changed:,} masked" for s in dataset.curation]
    base = f"rows rejected: {counts(dataset.rejects)}; exact duplicates: {dataset.num_duplicates:,}"
    return "; ".join([base, *steps] if steps else [base, "no rule of data.curate"]), dataset.id


def _obtained(facts: Facts) -> tuple[str, str]:
    return "", ""  # files and their hashes are on record, how they were obtained is not


def _sources(facts: Facts) -> tuple[str, str]:
    dataset = facts.dataset
    if not dataset:
        return "", ""
    listed = [f"{code(s.path)} ({s.num_records:,} records, sha256 {s.sha256[:16]}…)" for s in dataset.sources[:50]]
    more = len(dataset.sources) - len(listed)
    return ", ".join(listed) + (f", {more:,} more in the record" if more else ""), dataset.id


def _licences(facts: Facts) -> tuple[str, str]:
    dataset = facts.dataset
    if not dataset:
        return "", ""
    by_licence: dict[str, int] = {}
    for source in dataset.mixture:
        for licence, count in source.licences.items():
            by_licence[licence] = by_licence.get(licence, 0) + count
    return (counts(by_licence), dataset.id) if any(by_licence) else ("", "")


def _kinds(facts: Facts) -> tuple[str, str]:
    if not facts.dataset or not facts.dataset.kinds or not facts.architecture or "vision_config" in facts.architecture:
        return "", ""  # a vision-language model may have been trained on images, which the manifest does not count
    return f"text: {counts(facts.dataset.kinds)}", facts.dataset.id


def _size(facts: Facts) -> tuple[str, str]:
    dataset = facts.dataset
    if not dataset or "train" not in dataset.splits:
        return "", ""
    tokens = dataset.splits["train"].num_tokens
    band = next((name for limit, name in TOKENS_SIZES if tokens < limit), "more than 10 trillion tokens")
    return f"{tokens:,} tokens: {band}", dataset.id


def _flops(facts: Facts) -> tuple[str, str]:
    if facts.flops is None:
        return "", ""
    share = "" if facts.share is None else f"; {facts.share:.3g} of the base model's {flops(facts.base_flops)} (stated)"
    return f"{flops(facts.flops)}, estimated; formula in the model card{share}", _runs(facts)


def _time(facts: Facts) -> tuple[str, str]:
    if not facts.training or facts.training.compute.seconds is None:
        return "", ""
    compute = facts.training.compute
    began = f"began {facts.training.started_at[:19]}, " if facts.training.started_at else ""
    device = f", {compute.device_hours[1]:.3g} {compute.device_hours[0]} h" if compute.device_hours else ""
    return (
        f"{began}steps took {hours((compute.seconds or 0.0) / 3600)}; workers {hours(compute.worker_hours)}{device}",
        _runs(facts),
    )


def _energy(facts: Facts) -> tuple[str, str]:
    return ("", "") if facts.energy_kwh is None else (energy(facts), _runs(facts))


def _scores(facts: Facts) -> tuple[str, str]:
    reports = [
        f"{report.num_examples:,} examples ({report.split} of {report.dataset}{general_rows(report)}),"
        f" {subject(facts, report)}: "
        + ", ".join(f"{plain(name)} {as_text(value)}" for name, value in report.metrics.items())
        for report in facts.evals
        if report.metrics
    ]
    return "; ".join(reports), _ids(*(report.id for report in facts.evals))


def _metrics(facts: Facts, *kinds: str) -> tuple[str, str]:
    """The scores whose names start with one of `kinds`."""
    scores = {
        report.id: ", ".join(
            f"{plain(name)} {as_text(value)}" for name, value in report.metrics.items() if name.startswith(kinds)
        )
        for report in facts.own_evals
    }
    return "; ".join(text for text in scores.values() if text), _ids(*(name for name, text in scores.items() if text))


def _hardware(facts: Facts) -> tuple[str, str]:
    if not facts.training or not facts.training.run.hardware:
        return "", ""
    sizes = ", ".join(str(size) for size in facts.training.compute.world_sizes)
    return f"{hardware(facts)}; workers: {sizes or 'number not recorded'}", facts.training.run.id


def _reports(facts: Facts) -> tuple[str, str]:
    dated = ", ".join(f"{report.id} of {report.created_at[:10]}" for report in facts.own_evals)
    return dated, _ids(*(report.id for report in facts.own_evals))


def _signers(facts: Facts) -> tuple[str, str]:
    signed = {report.id: facts.signatures[report.id] for report in facts.own_evals if report.id in facts.signatures}
    return "; ".join(f"{name}: {plain(', '.join(keys))}" for name, keys in signed.items()), _ids(*signed)


def _approvals(facts: Facts) -> tuple[str, str]:
    decisions = [
        f"{plain(a.decision)} by {plain(a.who)}, {a.at[:10]}{f' for {plain(a.alias)}' if a.alias else ''}"
        f"{'' if a.holds else ' (the signature does not hold)'}{f': {plain(a.why)}' if a.why else ''}"
        for a in facts.approvals
    ]
    return "; ".join(decisions), facts.version.id


def _groups(facts: Facts) -> tuple[str, str]:
    own = next((report for report in facts.own_evals if report.per_class), None)
    if own is None:
        return "", ""
    lowest, scores = min(own.per_class.items(), key=lambda item: (item[1].get("f1", 0.0), item[0]))
    figures = ", ".join(f"{name} {as_text(value)}" for name, value in scores.items())
    return f"{len(own.per_class)} classes; the lowest is {plain(lowest)} ({figures}); all in the bill of materials", own.id


def _version(facts: Facts) -> tuple[str, str]:
    return f"{facts.version.id}; {_line(facts)}", _ids(*(version.id for version in facts.chain))


def _line(facts: Facts) -> str:
    return " ← ".join(f"{plain(version.name)} ({version.id})" for version in facts.chain)


def _ancestors(facts: Facts) -> tuple[str, str]:
    names = [f"{plain(v.name)} ({v.id}), {plain(v.licence)}, {code(v.source)}" for v in facts.chain[1:]]
    names += [f"{plain(v.name)} ({v.id}), {plain(v.licence)}, as teacher or reference" for v in facts.frozen]
    return ", ".join(names), _ids(*(version.id for version in (*facts.chain[1:], *facts.frozen)))


def _endpoints(facts: Facts) -> tuple[str, str]:
    names = [f"{plain(deployment.name)} serves {plain(deployment.model)}" for deployment in facts.deployments]
    return ", ".join(names), _ids(*(deployment.id for deployment in facts.deployments))


def _software(facts: Facts) -> tuple[str, str]:
    if not facts.training:
        return "", ""
    versions = ", ".join(f"{name} {value}" for name, value in sorted(facts.training.run.environment.items()))
    return f"{versions}; code {code(facts.training.run.code_digest)}" if versions else "", facts.training.run.id


def _steps(facts: Facts) -> tuple[str, str]:
    if not facts.training:
        return "", ""
    return f"import → prepare → train → evaluate → gate; {_line(facts)}", _ids(facts.version.id, facts.training.run.id)


def _integrity(facts: Facts) -> tuple[str, str]:
    text = f"sha256 of {len(facts.version.files)} weight files ({code(facts.version.files_digest)})"
    if facts.training:
        text += f", of the order of samples ({code(facts.training.run.order_digest)})"
    if facts.version.log_head:
        text += f"; audit log at release: {code(facts.version.log_head)}"
    if signers := facts.signatures.get(facts.version.id):
        text += f"; signed by {plain(', '.join(signers))}"
    return f"{text}; ids are hashes of content", _ids(facts.version.id, _runs(facts))


def _changes(facts: Facts) -> tuple[str, str]:
    changes = []
    for event in facts.events:
        state = event.data.get("state") or event.data.get("decision")
        what = f"alias {plain(event.subject)} points at it" if event.kind == "alias" else f"{event.kind} {event.subject}"
        changes.append(f"{event.at[:19]} {what}{f': {plain(str(state))}' if state else ''}")
    return "; ".join(changes), facts.version.id


def _runs(facts: Facts) -> str:
    return _ids(*(training.run.id for training in facts.trainings))


def _ids(*names: str) -> str:
    return ", ".join(dict.fromkeys(name for name in names if name))
