"""The differences between two model versions: data, settings, code, environment, scores, cost.

Everything is read from records and from the files that the stages wrote; files that are missing are reported as missing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from forge_ray.data.dataset import compare
from forge_ray.data.dataset.version import SPLITS
from forge_ray.errors import ForgeError
from forge_ray.evaluate.items import items_of
from forge_ray.evaluate.measures import is_right
from forge_ray.machine import environment
from forge_ray.records import DatasetManifest, EvalReport, ModelVersion, RunRecord
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.resolve import resolve
from forge_ray.train import run_folder

SHOWN = 10
HARDWARE = "hardware."
DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28,}\b")  # a terminal shows its start
SETS = ("cpu_flags", "gpus")  # of these only the entries that one side lacks are shown
COSTS = ("tokens", "trained_tokens", "seconds", "tokens_per_s", "peak_bytes", "mfu")


def changes(old: Any, new: Any, path: str = "") -> dict[str, list[Any]]:
    """Dotted path → [old, new] of every leaf that differs; None where a side has no value. Lists are leaves, except lists of
    sections of equal length, whose items are compared by position."""
    if _sections(old) and _sections(new) and len(old) == len(new):
        old, new = ({str(number): item for number, item in enumerate(value)} for value in (old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        differences: dict[str, list[Any]] = {}
        for key in sorted(old.keys() | new.keys()):
            differences |= changes(old.get(key), new.get(key), f"{path}.{key}" if path else key)
        return differences
    return {} if old == new else {path: [old, new]}


def _sections(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, dict) for item in value)


def locks(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[Any]]:
    """`changes` of two environment locks: packages by version, or by the digest of their RECORD where only that differs."""
    if not old or not new:
        return {} if old == new else {"lock": ["kept" if side else "not kept" for side in (old, new)]}
    packages = {
        f"packages.{name}": [_package(old["packages"].get(name), bare), _package(new["packages"].get(name), bare)]
        for name in sorted(old["packages"].keys() | new["packages"].keys())
        if old["packages"].get(name) != new["packages"].get(name)
        for bare in [_versions(old, name) != _versions(new, name)]
    }
    rest = changes({**old, "packages": 0}, {**new, "packages": 0})
    for key, (before, after) in rest.items():
        if key.rpartition(".")[2] in SETS:
            rest[key] = [sorted(set(before) - set(after)), sorted(set(after) - set(before))]
    return packages | rest


def _versions(lock: dict[str, Any], name: str) -> str:
    return str(lock["packages"].get(name, {}).get("version", ""))


def _package(package: dict[str, str] | None, bare: bool) -> str | None:
    if package is None:
        return None
    return package["version"] if bare else f"{package['version']} (RECORD {package['record'][:12] or 'absent'})"


def environments(old_store: Store, old: RunRecord, new_store: Store, new: RunRecord) -> dict[str, Any]:
    """The differences between the `environment` and the `hardware` of two runs, each by dotted path."""
    sides = environment.read(old_store, old.environment_digest), environment.read(new_store, new.environment_digest)
    differences = locks(*sides)
    if not all(sides):  # trained before locks were kept: the record lists a few versions
        differences |= {f"packages.{name}": pair for name, pair in changes(old.environment, new.environment).items()}
    others = {key: pair for key, pair in differences.items() if not key.startswith(HARDWARE)}
    hardware = {key.removeprefix(HARDWARE): pair for key, pair in differences.items() if key not in others}
    if len(_machines(old)) > 1 or len(_machines(new)) > 1:
        others |= changes({"machines": _machines(old)}, {"machines": _machines(new)})
    return ({"environment": others} if others else {}) | ({"hardware": hardware} if hardware else {})


def _machines(record: RunRecord) -> list[str]:
    """Digests of the locks of all machines of the last attempt."""
    return sorted(record.attempts[-1].get("environments", ())) if record.attempts else []


def lines(differences: dict[str, Any]) -> list[str]:
    """One line of text for each difference, such as `environment packages.torch: 2.12 → 2.13`."""
    texts = []
    for name, value in differences.items():
        pairs = {"": value} if isinstance(value, list) else value
        for key, pair in pairs.items():
            head = f"{name} {key}".strip()
            words = [_word(side) for side in pair]
            if words[0] == words[1]:  # they differ only in digits that are not shown
                words = [str(side) for side in pair]
            texts.append(f"{head}: {words[0]} → {words[1]}")
    return texts


def _word(value: Any) -> str:
    if value is None or value == [] or value == "":
        return "–"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return " ".join(value)
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.6g}"
    return DIGEST.sub(r"\1…", value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---------------------------------------------------------------- two versions


@dataclass(frozen=True)
class Side:
    """A version with its run, dataset and reports; None where there is none, or the store has no record of it."""

    version: ModelVersion
    run: RunRecord | None
    dataset: DatasetManifest | None
    reports: tuple[EvalReport, ...]

    @classmethod
    def of(cls, catalog: Catalog, reference: str) -> Side:
        version = catalog.model(resolve(catalog, reference))
        run = catalog.get_as(RunRecord, version.run) if version.run and catalog.has(version.run) else None
        name = run.dataset if run else version.dataset
        dataset = catalog.get_as(DatasetManifest, name) if name and catalog.has(name) else None
        reports = [report for report in catalog.all(EvalReport) if report.subject_digest == version.files_digest]
        return cls(version, run, dataset, tuple(reports))


def diff(catalog: Catalog, old: str, new: str) -> dict[str, Any]:
    """The differences between two model versions (ids, aliases or digests), by section; equal sections are empty."""
    before, after = Side.of(catalog, old), Side.of(catalog, new)
    store = catalog.store
    environment_changes: dict[str, Any] = {}
    if before.run and after.run:
        environment_changes = environments(store, before.run, store, after.run)
    return {
        "versions": [_head(side) for side in (before, after)],
        "same_weights": before.version.files_digest == after.version.files_digest,
        "data": _data(store, before, after),
        "config": _configs(store, before, after),
        "code": changes(_code(before), _code(after)),
        "environment": environment_changes.get("environment", {}),
        "hardware": environment_changes.get("hardware", {}),
        "evaluation": _evaluations(store, before, after),
        "gate": changes(_gate(before), _gate(after)),
        "cost": changes(_cost(store, before), _cost(store, after)),
        "size": changes(_size(before), _size(after)),
    }


def _head(side: Side) -> dict[str, Any]:
    version = side.version
    return {
        "id": version.id,
        "name": version.name,
        "status": version.status,
        "weights": version.weights,
        "created_at": version.created_at,
        "files_digest": version.files_digest,
        "base_model": version.base_model,
        "run": version.run,
        "dataset": side.dataset.id if side.dataset else "",
        "source": version.source,
    }


def _configs(store: Store, before: Side, after: Side) -> dict[str, list[Any]]:
    old, new = _config(store, before), _config(store, after)
    if not old or not new:  # one was imported: compared with nothing every setting would differ
        return changes({"run": before.version.run or None}, {"run": after.version.run or None})
    return changes(old, new)


def _config(store: Store, side: Side) -> dict[str, Any]:
    """The resolved run file; for a candidate of an unfinished run, read from the run's folder."""
    if side.run:
        return side.run.config
    return run_folder.config_of(store, side.version.run) if side.version.run else {}


def _code(side: Side) -> dict[str, Any]:
    return {"digest": side.run.code_digest, "commit": side.run.code_commit} if side.run else {}


def _gate(side: Side) -> dict[str, Any]:
    return {"status": side.version.status, "reasons": list(side.version.reasons)}


def _size(side: Side) -> dict[str, Any]:
    files = side.version.files
    return {"bytes": sum(entry.size for entry in files), "files": len(files), "weights": side.version.weights}


def _cost(store: Store, side: Side) -> dict[str, Any]:
    """The cost of the version's run; figures that are not on record are left out."""
    from forge_ray.papers.compute import of_run

    if side.run is None:
        return {}
    cost: dict[str, Any] = {name: side.run.metrics[name] for name in COSTS if name in side.run.metrics}
    spent = of_run(store, side.run, side.dataset)
    more = {"steps": side.run.num_steps, "worker_hours": spent.worker_hours, "flops": spent.flops}
    return cost | {name: value for name, value in more.items() if value is not None}


# ---------------------------------------------------------------- data


def _data(store: Store, before: Side, after: Side) -> dict[str, Any]:
    old, new = before.dataset, after.dataset
    if old is None or new is None or old.id == new.id:
        return changes({"dataset": old.id if old else None}, {"dataset": new.id if new else None})
    differences: dict[str, Any] = {
        "dataset": [old.id, new.id],
        "counts": changes(_counts(old), _counts(new)),
        "rules": changes({"rules": _rules(old)}, {"rules": _rules(new)}).get("rules", []),
    }
    missing = [manifest.id for manifest in (old, new) if not store.is_published(paths.dataset(manifest.id))]
    if missing:
        return differences | {"problem": f"records not compared: {', '.join(missing)} is no longer in the store"}
    return differences | compare.by_split(store, old, new)


def _counts(manifest: DatasetManifest) -> dict[str, Any]:
    splits = {
        name: split.model_dump(include={"num_records", "num_rows", "num_tokens"}) for name, split in manifest.splits.items()
    }
    return {
        **splits,
        "duplicates": manifest.num_duplicates,
        "rejected": manifest.rejects,
        "sources": {source.path: source.sha256 for source in manifest.sources},
    }


def _rules(manifest: DatasetManifest) -> list[str]:
    return [f"{step.rule}: {step.before} → {step.after}" for step in manifest.curation]


# ---------------------------------------------------------------- evaluation


def _evaluations(store: Store, before: Side, after: Side) -> list[dict[str, Any]]:
    """Comparisons of the reports on the same split of the same dataset; where there are none, of the newest of each side."""
    olds, news = ({(r.dataset, r.split, "leak" in r.config): r for r in side.reports} for side in (before, after))
    shared = [(olds[key], news[key]) for key in olds if key in news]
    if not any(not is_leak for _, _, is_leak in olds.keys() & news.keys()):
        newest = [[r for r in side.reports if "leak" not in r.config][-1:] for side in (before, after)]
        shared += list(zip(*newest, strict=False))
    return [_evaluation(store, old, new) for old, new in shared]


def _evaluation(store: Store, old: EvalReport, new: EvalReport) -> dict[str, Any]:
    comparison: dict[str, Any] = {
        "reports": [old.id, new.id],
        "dataset": [old.dataset, new.dataset],
        "split": [old.split, new.split],
        "settings": changes(old.config, new.config),
        "metrics": {name: [old.metrics.get(name), new.metrics.get(name)] for name in sorted({*old.metrics, *new.metrics})},
        "num_examples": [old.num_examples, new.num_examples],
        "costs": changes(old.costs, new.costs),
    }
    if "leak" in old.config:  # items of a leak audit are neither right nor wrong
        return comparison
    try:
        before, after = _items(store, old), _items(store, new)
    except ForgeError as error:
        return comparison | {"problem": f"items not compared: {error.message}"}
    shared = sorted(before.keys() & after.keys())
    flips: dict[str, list[dict[str, Any]]] = {"right_to_wrong": [], "wrong_to_right": []}
    for record in shared:
        one, two = before[record], after[record]
        if is_right(one) != is_right(two):
            flip = {"record": record, "reference": one["reference"], "was": one["prediction"], "is": two["prediction"]}
            flips["right_to_wrong" if is_right(one) else "wrong_to_right"].append(flip)
    if len(shared) < max(len(before), len(after)):
        comparison["problem"] = (
            f"not the same items: {len(before)} and {len(after)}, of which {len(shared)} are common; metrics are of all,"
            " flips of the common ones"
        )
    right = [sum(is_right(items[record]) for record in shared) for items in (before, after)]
    return comparison | {"num_common": len(shared), "right": right, **flips}


def _items(store: Store, report: EvalReport) -> dict[str, dict[str, Any]]:
    """Those that end in a text: right or wrong."""
    return {item["record"]: item for item in items_of(store, report) if "kind" not in item}


# ---------------------------------------------------------------- for a terminal


def describe(differences: dict[str, Any]) -> list[str]:
    """The differences as lines of text, by section; equal sections are listed in the last line."""
    heads = [f"{side['id']}  {side['name']} ({side['status']}, {side['weights']})" for side in differences["versions"]]
    text_lines = [f"{heads[0]}  →  {heads[1]}"]
    if differences["same_weights"]:
        text_lines.append("the weights are the same bytes")
    equal = []
    for name in ("data", "config", "code", "environment", "hardware", "evaluation", "gate", "cost", "size"):
        value = differences[name]
        if not value:
            equal.append(name)
            continue
        text_lines += ["", name]
        match name:
            case "data":
                text_lines += _describe_data(value)
            case "evaluation":
                text_lines += [line for report in value for line in _describe_evaluation(report)]
            case _:
                text_lines += [f"  {line}" for line in lines({"": value})]
    return [*text_lines, "", f"equal: {', '.join(equal)}"] if equal else text_lines


def _describe_data(value: dict[str, Any]) -> list[str]:
    text_lines = [f"  dataset: {_word(value['dataset'][0])} → {_word(value['dataset'][1])}"]
    for split in SPLITS:
        if counts := value.get("splits", {}).get(split):
            text_lines.append(
                f"  {split}: {counts['common']} records in both, {counts['only_old']} only in the first,"
                f" {counts['only_new']} only in the second"
            )
    if value.get("moved"):
        text_lines.append(f"  {value['moved']} records are in another split")
    text_lines += [f"  {line}" for line in lines({"": value.get("counts", {})})]
    if rules := value.get("rules"):
        text_lines.append(f"  rules: {'; '.join(rules[0]) or '–'} → {'; '.join(rules[1]) or '–'}")
    text_lines += [f"  {value['problem']}"] if "problem" in value else []
    if "splits" in value:
        text_lines.append(f"  the records: forge data diff {' '.join(value['dataset'])}")
    return text_lines


def _describe_evaluation(report: dict[str, Any]) -> list[str]:
    places = {f"{split} of {dataset}" for split, dataset in zip(report["split"], report["dataset"], strict=True)}
    text_lines = [f"  {' and '.join(sorted(places))}: {report['num_examples'][0]} and {report['num_examples'][1]} items"]
    for name, (old, new) in report["metrics"].items():
        pair = ["–" if value is None else f"{value:.4g}" for value in (old, new)]
        text_lines.append(f"    {name}: {pair[0]} → {pair[1]}")
    text_lines += [f"    {line}" for line in lines({"settings": report["settings"], "costs": report["costs"]})]
    if "problem" in report:
        text_lines.append(f"    {report['problem']}")
    if "num_common" not in report:
        return text_lines
    text_lines.append(f"    of {report['num_common']} common items {report['right'][0]} → {report['right'][1]} are right")
    for kind, word in (("right_to_wrong", "right → wrong"), ("wrong_to_right", "wrong → right")):
        flips = report[kind]
        if flips:
            more = f", the first {SHOWN}" if len(flips) > SHOWN else ""
            text_lines.append(f"    {word}: {len(flips)}{more}")
        for flip in flips[:SHOWN]:
            texts = [json.dumps(flip[key], ensure_ascii=False)[:60] for key in ("reference", "was", "is")]
            text_lines.append(f"      {flip['record']}  wants {texts[0]}: {texts[1]} → {texts[2]}")
    return text_lines
