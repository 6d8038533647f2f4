"""Before a classifier is trained: whether its targets are those of the dataset's rows."""

from __future__ import annotations

import sys

from forge_ray.config.classify import Classify, Target, class_names, columns_of
from forge_ray.config.train import TrainConfig
from forge_ray.data.dataset.labels import LabelCounts, count_labels
from forge_ray.data.dataset.version import find_record
from forge_ray.errors import DataError
from forge_ray.progress import visible
from forge_ray.records import DatasetManifest
from forge_ray.store.files import Store

SHOWN = 12


def report_labels(store: Store, train: TrainConfig, manifest: DatasetManifest) -> None:
    """Print how many training documents each label has, and what no target reads. Raises `DataError` with the first row of a
    label that is in no target, where a label has no training row, or where no document has a label."""
    if not isinstance(train.method, Classify):
        return
    for split in ("train", "validation"):
        counts = count_labels(store, manifest, split, train.targets) if split in manifest.splits else None
        if counts and counts.unreadable:
            record, reason = counts.unreadable
            row = find_record(store, manifest, record)
            raise DataError(
                f"{visible(str(row['file']))} line {row['line']}, {record} of {manifest.id}: {visible(reason)}"
                f" ({counts.num_unreadable} of {counts.num_documents} {split} rows have such labels)",
                hint="add it to train.method.targets, correct the rows, or drop them with a rule of data.curate",
            )
        if counts and split == "train" and counts.num_documents:
            _judge(train, manifest, counts)


def _judge(train: TrainConfig, manifest: DatasetManifest, counts: LabelCounts) -> None:
    names = class_names(train.targets)
    unused = [name for name, count in zip(names, counts.positive.tolist(), strict=True) if not count]
    if unused:
        raise DataError(
            f"no training row of {manifest.id} has the label {unused[0]!r}"
            + (f", nor {len(unused) - 1} others of train.method.targets" if len(unused) > 1 else ""),
            hint="remove it from train.method.targets, or add rows; a label is never learned without one",
        )
    for line in label_lines(train.targets, counts):
        print(f"  labels    {visible(line)}", file=sys.stderr, flush=True)


def label_lines(targets: tuple[Target, ...], counts: LabelCounts) -> list[str]:
    """For a person."""
    names = class_names(targets)
    order = sorted(range(len(names)), key=lambda number: -int(counts.positive[number]))
    listed = [f"{names[number]} {counts.positive[number]}" for number in order]
    more = f", and {len(listed) - SHOWN} more down to {listed[-1]}" if len(listed) > SHOWN else ""
    lines = [f"of {counts.num_documents} training rows: {', '.join(listed[:SHOWN])}{more}"]
    for target, columns in zip(targets, columns_of(targets), strict=True):
        missing = counts.num_documents - int(counts.positive[columns.start] + counts.negative[columns.start])
        if missing and len(targets) > 1:
            lines.append(f"{missing} rows have no label of {target.name}, which is not trained on them")
    if counts.unlabelled:
        lines.append(f"{counts.unlabelled} rows have a label of no target, and are not trained")
    for name, count in counts.other.items():
        lines.append(f"{count} rows have a label of {name}, which no target reads")
    return lines
