"""A dataset of labels on Ray Data: prompts alone, each with the label of its row, and ids that the labels decide."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge_ray.config.base import parse
from forge_ray.config.data import DataConfig
from forge_ray.config.train import TrainConfig
from forge_ray.data.build.build import build, index_sources
from forge_ray.data.dataset.labels import count_labels, label_texts
from forge_ray.data.dataset.stream import Rows
from forge_ray.data.dataset.version import read_records
from forge_ray.errors import DataError
from forge_ray.records import DatasetManifest
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train.labels import report_labels

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
LABELS = ("even", "odd")


def built(store: Store, folder: Path, flip: int = -1) -> DatasetManifest:
    rows = [{"text": f"number {n} " + "and so on " * (n % 5), "label": LABELS[(n + (n == flip)) % 2]} for n in range(80)]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"text": "a text without a label"}]))
    splits = {"validation": 0.1, "test": 0.2}
    values = {"sources": [{"path": str(path)}], "form": "labels", "sequence_length": 128, "splits": splits}
    config = parse(DataConfig, values | {"max_invalid_fraction": 0.05})
    with Catalog.open(store) as catalog:
        base = catalog.model("tiny")
    return build("labels", config, base, store, index_sources(config))


def test_each_document_has_the_label_of_its_row(store: Store, tmp_path: Path) -> None:
    manifest = built(store, tmp_path)
    assert manifest.kinds == {"chat": 80}
    assert sum(manifest.rejects.values()) == 1
    num_documents = 0
    for split, stats in manifest.splits.items():
        answers = {row["record"]: row["content"]["messages"][-1]["content"] for row in read_records(store, manifest, split)}
        pairs = list(label_texts(store, manifest, split))
        assert dict(pairs) == answers
        rows = Rows.of(store, manifest, split)
        numbers = list(range(stats.num_rows))
        assert [text for of_row in rows.labels(numbers) for text in of_row] == [text for _, text in pairs]
        assert int(rows.take(numbers)["loss_mask"].sum()) == len(pairs)  # one position a document
        num_documents += len(pairs)
    assert num_documents == 80


def test_a_changed_label_makes_another_dataset(store: Store, tmp_path: Path) -> None:
    assert built(store, tmp_path).id != built(store, tmp_path, flip=7).id
    assert built(store, tmp_path).id == built(store, tmp_path).id


def test_a_label_in_no_target_is_refused_with_its_line(store: Store, tmp_path: Path) -> None:
    manifest = built(store, tmp_path)
    train = parse(TrainConfig, {"method": {"kind": "classify", "targets": [{"labels": ["even", "uneven"]}]}})
    with pytest.raises(DataError, match=r"rows.jsonl line \d+, rec_\w+ of ds_\w+: 'odd' is not a label of target label"):
        report_labels(store, train, manifest)
    counts = count_labels(store, manifest, "train", train.targets)
    assert counts.num_unreadable == counts.num_documents - counts.positive[0]
