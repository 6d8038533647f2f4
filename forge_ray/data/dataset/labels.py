"""Labels of documents (`data.form: labels`): texts in the packed rows, numbers for the targets that a run trains.

A text is a label; several labels of a `multi` target with `, ` between them; or a JSON object of them by target. A dataset
does not say which labels there are: the same one trains heads over other targets, or over fewer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from forge_ray.config.classify import BETWEEN, NO_LABEL, Target, columns_of
from forge_ray.data.dataset.version import listed
from forge_ray.data.record.schema import Reject
from forge_ray.records import DatasetManifest
from forge_ray.store.files import Store

ABSENT = -1  # of a target that a document has no label of
Values = npt.NDArray[np.int8]


def values_of(targets: tuple[Target, ...], text: str) -> Values:
    """Per label of all targets 1 where it holds, 0 where it does not, `ABSENT` where its target has no label: int8 [C].
    Raises `Reject` for a label that is in no target."""
    named = by_target(targets, text)
    values = np.full(sum(len(target.labels) for target in targets), ABSENT, np.int8)
    for target, columns in zip(targets, columns_of(targets), strict=True):
        if target.name not in named:
            continue
        labels = labels_in(target, named[target.name])
        if unknown := [label for label in labels if label not in target.labels]:
            raise Reject(f"{unknown[0]!r} is not a label of target {target.name}")
        values[columns] = [label in labels for label in target.labels]
    return values


def by_target(targets: tuple[Target, ...], text: str) -> dict[str, str]:
    """Name of a target → what the text says of it, other names included. A plain text is of the only target, or of the only
    one that has this label. Raises `Reject` where that does not say which."""
    try:
        value = json.loads(text) if text.startswith("{") else None
    except ValueError:
        value = None
    if isinstance(value, dict):
        return {name: item if isinstance(item, str) else json.dumps(item) for name, item in value.items()}
    fitting = [target.name for target in targets if len(targets) == 1 or text in target.labels]
    if len(fitting) != 1:
        raise Reject(f"{text!r} is a label of {' and '.join(fitting) or 'no target'}, and names none")
    return {fitting[0]: text}


def labels_in(target: Target, text: str) -> list[str]:
    """The labels that a row's text names; none of them need be one of the target's."""
    if target.loss == "single":
        return [text]
    return [] if text == NO_LABEL else text.split(BETWEEN)


def written(targets: tuple[Target, ...], values: Values) -> str:
    """The text of some values, as a row would have it: labels in the target's order, targets in theirs."""
    texts = {}
    for target, columns in zip(targets, columns_of(targets), strict=True):
        own = values[columns]
        if own[0] != ABSENT:
            labels = [label for label, value in zip(target.labels, own.tolist(), strict=True) if value]
            texts[target.name] = BETWEEN.join(labels) or NO_LABEL
    return next(iter(texts.values()), "") if len(targets) == 1 else json.dumps(texts, ensure_ascii=False)


def label_texts(store: Store, manifest: DatasetManifest, split: str) -> Iterator[tuple[str, str]]:
    """(record, label text) of every packed document of a split."""
    for path in listed(store, manifest, f"packed/{split}"):
        table = pq.read_table(store.path(path), filesystem=store.filesystem, columns=["records", "labels"])
        records, texts = (table.column(name).combine_chunks().flatten().to_pylist() for name in ("records", "labels"))
        yield from zip(records, texts, strict=True)


@dataclass(frozen=True)
class LabelCounts:
    """Of a split's documents. `unlabelled`: with no label of any target; `other`: names that rows give labels of and no
    target has; `unreadable`: the first document with a label that is in no target, and how many are like it."""

    positive: npt.NDArray[np.int64]  # [C]
    negative: npt.NDArray[np.int64]  # [C]
    num_documents: int
    unlabelled: int
    other: dict[str, int]
    num_unreadable: int
    unreadable: tuple[str, str] | None  # record, reason


def count_labels(store: Store, manifest: DatasetManifest, split: str, targets: tuple[Target, ...]) -> LabelCounts:
    """Each distinct text is read once."""
    texts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for record, text in label_texts(store, manifest, split):
        texts[text] += 1
        first.setdefault(text, record)
    num_classes = sum(len(target.labels) for target in targets)
    positive, negative = np.zeros(num_classes, np.int64), np.zeros(num_classes, np.int64)
    unlabelled, num_unreadable, unreadable, other = 0, 0, None, Counter[str]()
    names = {target.name for target in targets}
    for text, count in texts.items():
        try:
            values = values_of(targets, text)
        except Reject as reason:
            num_unreadable += count
            unreadable = unreadable or (first[text], str(reason))
            continue
        positive += count * (values == 1)
        negative += count * (values == 0)
        unlabelled += count * bool((values == ABSENT).all())
        other.update(dict.fromkeys(by_target(targets, text).keys() - names, count))
    return LabelCounts(
        positive, negative, texts.total(), unlabelled, dict(sorted(other.items())), num_unreadable, unreadable
    )
