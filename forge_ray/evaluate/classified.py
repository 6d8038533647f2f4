"""Held-out rows through a classifier (`inference/classifier.py`): its items, and temperatures.

Logits are divided by a temperature for each target, which makes the validation rows likeliest (C. Guo et al., "On
Calibration of Modern Neural Networks", arXiv:1706.04599, section 4.2). No prediction changes by it. Without validation rows,
or where they are the rows that are evaluated, it is 1, and the report has no `temperature`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from forge_ray.config.base import SettingError
from forge_ray.config.classify import Target, class_names, columns_of, normalise
from forge_ray.config.data import DataConfig
from forge_ray.config.release import EvalConfig
from forge_ray.config.thresholds import Goal, goals_of
from forge_ray.data.dataset.labels import ABSENT, Values, by_target, values_of, written
from forge_ray.data.record.schema import DataRecord, Reject
from forge_ray.data.tokens.labels import label_document
from forge_ray.data.tokens.template import Encoded
from forge_ray.errors import ConfigError, DataError
from forge_ray.evaluate.class_thresholds import Thresholds, chosen, measured
from forge_ray.evaluate.examples import UNPOSED, Example, HeldOutRows, held_out
from forge_ray.evaluate.publish import ScoredRows
from forge_ray.evaluate.scoring_files import ScoringFiles
from forge_ray.evaluate.summary import OTHER
from forge_ray.inference.classifier import Classifier, Logits, logits_of, probabilities
from forge_ray.records import DatasetManifest
from forge_ray.store.files import Store

UNLABELLED = "a text without a label"
NO_TARGET = "a row without a label of any target"
MANY_VALIDATION_ROWS = 2000  # temperatures are single numbers: more rows change them little
LARGEST, SMALLEST, ROUNDS = 20.0, 0.05, 60  # of 1 / temperature


def score_classified(
    manifest: DatasetManifest, chats: Sequence[Example], classifier: Classifier, temperatures: Mapping[str, float]
) -> Iterator[dict[str, Any]]:
    """One item per example (`class_measures.py`); one that cannot be read, or has a label of no target, is an item with
    `left_out`."""
    posed, documents = [], []
    for example in chats:
        document = _document(classifier, manifest, example)
        if isinstance(document, Reject):
            yield {"record": example.record, "left_out": f"{UNPOSED}{document}"}
            continue
        values: Values | None = None
        try:
            values = values_of(classifier.targets, example.answer)
        except Reject as reason:
            if len(classifier.targets) > 1 or classifier.targets[0].loss == "multi":
                yield {"record": example.record, "left_out": f"a label of no target: {reason}"}
                continue
        if values is not None and (values == ABSENT).all():
            yield {"record": example.record, "left_out": NO_TARGET}
            continue
        posed.append((example, values))
        documents.append(document)
    by_number = dict(logits_of(classifier, [document.ids for document in documents]))
    for number, (example, values) in enumerate(posed):
        yield _item(classifier.targets, example, values, by_number[number], temperatures)


def classify_rows(
    store: Store,
    manifest: DatasetManifest,
    held: HeldOutRows,
    classifier: Classifier,
    config: EvalConfig,
    files: ScoringFiles,
) -> Generator[dict[str, Any], None, ScoredRows]:
    """Yields `{"done", "total"}` on the way; returns what was scored. Raises `ConfigError` for settings that ask for
    text."""
    asked: dict[str, Any] = {"safety": files.prompts, "metrics": files.functions, "json_schema": files.schema}
    asked |= {"general": config.general, "kl": config.kl}
    if texts := [name for name, is_set in asked.items() if is_set]:
        raise ConfigError(f"eval.{texts[0]} asks for text, and a classifier writes none", hint=f"remove eval.{texts[0]}")
    only = classifier.targets[0] if len(classifier.targets) == 1 else None
    labels = tuple(map(normalise, only.labels)) if only and only.loss == "single" else ()
    fit = fitted(store, manifest, classifier, config)
    items: list[dict[str, Any]] = []
    left_out = Counter(held.left_out) + Counter({UNLABELLED: len(held.texts)})
    for item in score_classified(manifest, held.chats, classifier, fit.temperatures):
        if "left_out" in item:
            left_out[item["left_out"]] += 1
        else:
            items.append(item)
            yield {"done": len(items), "total": len(held.chats)}
    at = _at_thresholds(fit.thresholds, classifier.targets, items) if items and fit.thresholds.values else {}
    scored = ScoredRows(items, labels, [], None, left_out)
    return replace(scored, temperatures=fit.temperatures, thresholds=fit.thresholds, at_thresholds=at)


def _document(classifier: Classifier, manifest: DatasetManifest, example: Example) -> Encoded | Reject:
    content = {"messages": [*example.messages, example.turn], "tools": example.tools}
    config = DataConfig.model_validate(manifest.config) if manifest.config else None
    overlong, reasoning = (config.overlong, config.reasoning) if config else ("reject", "train")
    document = label_document(classifier.tokenizer, DataRecord(content), manifest.sequence_length, overlong, reasoning)
    return document if isinstance(document, Reject) else document[0]


@dataclass(frozen=True)
class Fitted:
    """What the validation rows say of a classifier: a temperature for each target, and the thresholds asked for."""

    temperatures: Mapping[str, float] = field(default_factory=dict)
    thresholds: Thresholds = field(default_factory=Thresholds)


def fitted(store: Store, manifest: DatasetManifest, classifier: Classifier, config: EvalConfig) -> Fitted:
    """Fitted on the validation rows; empty where there are none to fit on. Raises `DataError` where thresholds are asked for
    and no row has a label."""
    logits, truth = _validation(store, manifest, classifier, config)
    if not len(logits):
        if config.thresholds:
            raise DataError(
                f"eval.thresholds are fitted on validation rows, and {manifest.id} has none with a label",
                hint="raise data.splits.validation, or remove eval.thresholds",
            )
        return Fitted()
    temperatures, shares = {}, np.zeros(logits.shape)
    for target, columns in zip(classifier.targets, columns_of(classifier.targets), strict=True):
        has = truth[:, columns.start] != ABSENT
        if has.any():
            temperatures[target.name] = temperature_of(target, logits[has][:, columns], truth[has][:, columns])
        shares[:, columns] = probabilities(target, logits[:, columns], temperatures.get(target.name, 1.0))
    names = class_names(classifier.targets)
    return Fitted(temperatures, chosen(_goals(config, names), names, shares, truth))


def _goals(config: EvalConfig, names: tuple[str, ...]) -> dict[str, Goal]:
    try:
        return goals_of(config.thresholds, names)
    except SettingError as error:
        raise ConfigError(str(error), hint=error.hint) from None


def _validation(
    store: Store, manifest: DatasetManifest, classifier: Classifier, config: EvalConfig
) -> tuple[Logits, Logits]:
    """(logits, values) [n, C] of the validation rows, which are not those that are evaluated; n may be 0."""
    nothing = np.zeros((0, len(class_names(classifier.targets))))
    if config.split == "validation" or not ("validation" in manifest.splits and manifest.splits["validation"].num_records):
        return nothing, nothing
    others = EvalConfig(split="validation", max_examples=MANY_VALIDATION_ROWS)
    try:
        chats = held_out(store, manifest, others).chats
    except DataError:  # plain texts alone
        return nothing, nothing
    documents, values = [], []
    for example in chats:
        document = _document(classifier, manifest, example)
        try:
            labels = values_of(classifier.targets, example.answer)
        except Reject:
            continue
        if not isinstance(document, Reject):
            documents.append(document.ids)
            values.append(labels)
    if not documents:
        return nothing, nothing
    by_number = dict(logits_of(classifier, documents))
    return np.array([by_number[number] for number in range(len(documents))]), np.array(values, np.float64)


def _at_thresholds(
    thresholds: Thresholds, targets: tuple[Target, ...], items: Sequence[dict[str, Any]]
) -> dict[str, dict[str, float]]:
    """What the thresholds come to on the evaluated rows, by label."""
    names = class_names(targets)
    shares = np.array([[item["probabilities"][name] for name in names] for item in items])
    truth = np.array([[name in item["true"] for name in names] for item in items], np.float64)
    for target, columns in zip(targets, columns_of(targets), strict=True):
        truth[[item["targets"][target.name] is None for item in items], columns] = ABSENT
    return measured(thresholds.values, names, shares, truth)


def temperature_of(target: Target, logits: Logits, truth: Logits) -> float:
    """The temperature that makes `truth` likeliest, [n, C] each: the loss is convex in its inverse, so that a golden-section
    search finds the only minimum."""
    golden = (5**0.5 - 1) / 2

    def loss(inverse: float) -> float:
        scaled = logits * inverse
        if target.loss == "multi":
            return float((np.logaddexp(0, scaled) - truth * scaled).sum())
        return float((np.logaddexp.reduce(scaled, axis=1) - (truth * scaled).sum(axis=1)).sum())

    low, high = SMALLEST, LARGEST
    for _ in range(ROUNDS):
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if loss(left) < loss(right) else (left, high)
    return 2 / (low + high)


def _item(
    targets: tuple[Target, ...], example: Example, values: Values | None, logits: Logits, temperatures: Mapping[str, float]
) -> dict[str, Any]:
    """A row whose label was never trained has no value: no prediction is right."""
    unknown = "" if values is not None else by_target(targets, example.answer)[targets[0].name]
    values = np.zeros(len(logits), np.int8) if values is None else values
    predicted, shares = np.zeros(len(values), np.int8), np.zeros(len(values))
    by_name: dict[str, dict[str, Any] | None] = {}
    for target, columns in zip(targets, columns_of(targets), strict=True):
        temperature = temperatures.get(target.name, 1.0)
        raw, scaled = probabilities(target, logits[columns]), probabilities(target, logits[columns], temperature)
        shares[columns] = scaled
        if target.loss == "multi":
            predicted[columns] = logits[columns] > 0
        else:
            predicted[columns.start + int(logits[columns].argmax())] = 1
        if values[columns.start] == ABSENT:
            predicted[columns] = ABSENT
            by_name[target.name] = None
            continue
        chosen, truth = predicted[columns] == 1, values[columns] == 1
        is_multi = target.loss == "multi"
        by_name[target.name] = {
            "reference": unknown or written((target,), values[columns]),
            "prediction": written((target,), predicted[columns]),
            "confidence": (np.where(chosen, scaled, 1 - scaled) if is_multi else scaled[chosen]).tolist(),
            "raw_confidence": (np.where(chosen, raw, 1 - raw) if is_multi else raw[chosen]).tolist(),
            "right": (chosen == truth).tolist() if is_multi else [bool((chosen == truth).all())],
        }
    names = class_names(targets)
    prediction = written(targets, predicted)
    return {
        "record": example.record,
        "source": example.source,
        "reference": unknown or written(targets, values),
        "prediction": prediction,
        **({"likeliest": normalise(prediction)} if len(targets) == 1 and targets[0].loss == "single" else {}),
        "true": [OTHER] if unknown else [name for name, value in zip(names, values.tolist(), strict=True) if value == 1],
        "predicted": [name for name, value in zip(names, predicted.tolist(), strict=True) if value == 1],
        "probabilities": dict(zip(names, shares.tolist(), strict=True)),
        "targets": by_name,
    }
