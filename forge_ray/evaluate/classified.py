"""Held-out rows through a classifier: batched forward passes of transformers' own class, and temperatures.

Logits are divided by a temperature for each target, which makes the validation rows likeliest (C. Guo et al., "On
Calibration of Modern Neural Networks", arXiv:1706.04599, section 4.2). No prediction changes by it. Without validation rows,
or where they are the rows that are evaluated, it is 1, and the report has no `temperature`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from forge_ray.config.classify import Target, class_names, columns_of, normalise
from forge_ray.config.data import DataConfig
from forge_ray.config.release import EvalConfig
from forge_ray.data.dataset.labels import ABSENT, Values, by_target, values_of, written
from forge_ray.data.record.schema import DataRecord, Reject
from forge_ray.data.tokens.labels import label_document
from forge_ray.data.tokens.template import ChatTokenizer, Encoded
from forge_ray.errors import ConfigError, DataError
from forge_ray.evaluate.examples import UNPOSED, Example, HeldOutRows, held_out
from forge_ray.evaluate.publish import ScoredRows
from forge_ray.evaluate.scoring_files import ScoringFiles
from forge_ray.evaluate.summary import OTHER
from forge_ray.machine.hardware import resolve_precision
from forge_ray.records import DatasetManifest
from forge_ray.store.files import Store

Logits = npt.NDArray[np.float64]
UNLABELLED = "a text without a label"
NO_TARGET = "a row without a label of any target"
MANY_VALIDATION_ROWS = 2000  # temperatures are single numbers: more rows change them little
LARGEST, SMALLEST, ROUNDS = 20.0, 0.05, 60  # of 1 / temperature


@dataclass(frozen=True)
class Classifier:
    """A model with a head over the labels of `targets`, on its device."""

    model: Any
    tokenizer: ChatTokenizer
    targets: tuple[Target, ...]
    max_batch_tokens: int


def open_classifier(
    folder: Path, adapter: Path | None, targets: tuple[Target, ...], tokenizer: ChatTokenizer, config: EvalConfig
) -> Classifier:
    import torch

    from forge_ray.inference.load import DTYPES
    from forge_ray.models.architecture import Head, open_model

    use_gpu = config.gpus > 0
    model = open_model(folder, DTYPES[resolve_precision(config.engine.precision, use_gpu)], head=Head(targets))
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
    model.config.get_text_config().pad_token_id = tokenizer.pad_id
    device = torch.device("cuda" if use_gpu else "cpu")
    return Classifier(model.to(device).eval(), tokenizer, targets, config.engine.max_batch_tokens)


def logits_of(classifier: Classifier, documents: Sequence[Encoded]) -> Iterator[tuple[int, Logits]]:
    """(number of a document, its logits [C]) in the order of lengths; as many in a pass as `max_batch_tokens` allows."""
    import torch

    order = sorted(range(len(documents)), key=lambda number: len(documents[number].ids))
    device, start = next(classifier.model.parameters()).device, 0
    while start < len(order):
        end = start + 1
        while end < len(order) and len(documents[order[end]].ids) * (end + 1 - start) <= classifier.max_batch_tokens:
            end += 1
        ids = [documents[number].ids for number in order[start:end]]
        padded = np.full((len(ids), len(ids[-1])), classifier.tokenizer.pad_id, np.int64)
        mask = np.zeros(padded.shape, np.int64)
        for row, own in enumerate(ids):
            padded[row, : len(own)], mask[row, : len(own)] = own, 1
        with torch.no_grad():
            inputs = {"input_ids": torch.from_numpy(padded), "attention_mask": torch.from_numpy(mask)}
            output = classifier.model(**{name: value.to(device) for name, value in inputs.items()})
        yield from zip(order[start:end], output.logits.double().cpu().numpy(), strict=True)
        start = end


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
    by_number = dict(logits_of(classifier, documents))
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
    asked = {"safety": files.prompts, "metrics": files.functions, "json_schema": files.schema, "general": config.general}
    if texts := [name for name, is_set in asked.items() if is_set]:
        raise ConfigError(f"eval.{texts[0]} asks for text, and a classifier writes none", hint=f"remove eval.{texts[0]}")
    only = classifier.targets[0] if len(classifier.targets) == 1 else None
    labels = tuple(map(normalise, only.labels)) if only and only.loss == "single" else ()
    temperatures, items = fitted(store, manifest, classifier, config), []
    left_out = Counter(held.left_out) + Counter({UNLABELLED: len(held.texts)})
    for item in score_classified(manifest, held.chats, classifier, temperatures):
        if "left_out" in item:
            left_out[item["left_out"]] += 1
        else:
            items.append(item)
            yield {"done": len(items), "total": len(held.chats)}
    return ScoredRows(items, labels, [], None, left_out, temperatures=temperatures)


def _document(classifier: Classifier, manifest: DatasetManifest, example: Example) -> Encoded | Reject:
    content = {"messages": [*example.messages, example.turn], "tools": example.tools}
    config = DataConfig.model_validate(manifest.config) if manifest.config else None
    overlong, reasoning = (config.overlong, config.reasoning) if config else ("reject", "train")
    document = label_document(classifier.tokenizer, DataRecord(content), manifest.sequence_length, overlong, reasoning)
    return document if isinstance(document, Reject) else document[0]


def fitted(store: Store, manifest: DatasetManifest, classifier: Classifier, config: EvalConfig) -> dict[str, float]:
    """The temperature of each target, fitted on the validation rows; {} where there are none to fit on."""
    if config.split == "validation" or not ("validation" in manifest.splits and manifest.splits["validation"].num_records):
        return {}
    others = EvalConfig(split="validation", max_examples=MANY_VALIDATION_ROWS)
    try:
        chats = held_out(store, manifest, others).chats
    except DataError:  # plain texts alone
        return {}
    documents, values = [], []
    for example in chats:
        document = _document(classifier, manifest, example)
        try:
            labels = values_of(classifier.targets, example.answer)
        except Reject:
            continue
        if not isinstance(document, Reject):
            documents.append(document)
            values.append(labels)
    if not documents:
        return {}
    by_number = dict(logits_of(classifier, documents))
    logits = np.array([by_number[number] for number in range(len(documents))])
    temperatures = {}
    for target, columns in zip(classifier.targets, columns_of(classifier.targets), strict=True):
        has = [number for number, labels in enumerate(values) if labels[columns.start] != ABSENT]
        if has:
            truth = np.array([values[number][columns] for number in has], np.float64)
            temperatures[target.name] = temperature_of(target, logits[has][:, columns], truth)
    return temperatures


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


def probabilities(target: Target, logits: Logits, temperature: float = 1.0) -> Logits:
    """[C] of logits [C]."""
    scaled = logits / temperature
    if target.loss == "multi":
        independent: Logits = np.exp(-np.logaddexp(0, -scaled))
        return independent
    shares: Logits = np.exp(scaled - np.logaddexp.reduce(scaled))
    return shares


def _item(
    targets: tuple[Target, ...], example: Example, values: Values | None, logits: Logits, temperatures: Mapping[str, float]
) -> dict[str, Any]:
    """A row whose label was never trained has no value: no prediction is right."""
    unknown = "" if values is not None else by_target(targets, example.answer)[targets[0].name]
    values = np.zeros(len(logits), np.int8) if values is None else values
    predicted, by_name, shares = np.zeros(len(values), np.int8), {}, np.zeros(len(values))
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
