"""What a columnar file says of its columns: the names of classes, JSON in a column, which nulls mean something."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.config.base import parse
from forge_ray.config.data import DataConfig
from forge_ray.data.build.settings import input_digest
from forge_ray.data.read.ingest import expand, index_file, index_listed
from forge_ray.data.read.readers import read_raw
from forge_ray.data.record.schema import parse_record
from forge_ray.errors import DataError

pytestmark = pytest.mark.unit


def read(path: Path, format: str) -> list[Any]:
    indexed = index_file(str(path), path.name, format)
    return [raw.reason or raw.value for chunk in indexed.chunks for raw in read_raw(chunk, 1 << 20)]


def written(dataset: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    dataset.to_parquet(folder / "rows.parquet")
    dataset.save_to_disk(folder / "saved")
    return [(folder / "rows.parquet", "parquet"), *((path, "arrow") for path in (folder / "saved").glob("*.arrow"))]


def test_classes_are_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import ClassLabel, Dataset, Features, List, Value

    features = Features(
        {
            "text": Value("string"),
            "label": ClassLabel(names=["billing", "shipping"]),
            "labels": {"mood": ClassLabel(names=["calm", "angry"])},
            "tags": List(ClassLabel(names=["late", "lost"])),
            "number": Value("int64"),
        }
    )
    rows = {"text": ["a", "b"], "label": [1, -1], "labels": [{"mood": 0}, None], "tags": [[0, 1], []], "number": [0, 1]}
    files = written(Dataset.from_dict(rows, features=features), tmp_path, monkeypatch)
    assert len(files) == 2
    for path, format in files:
        first, second = read(path, format)
        expected = {"text": "a", "label": "shipping", "labels": {"mood": "calm"}, "tags": ["late", "lost"], "number": 0}
        assert first == expected
        assert second == {"text": "b", "tags": [], "number": 1}
        assert parse_record({"text": "a", "label": first["label"]}).messages[1]["content"] == "shipping"


def test_a_class_without_a_name_is_refused(tmp_path: Path) -> None:
    metadata = {"huggingface": '{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}}}'}
    table = pa.table({"text": ["x", "y"], "label": [1, 2]}).replace_schema_metadata(metadata)
    pq.write_table(table, tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet", "parquet") == [
        {"text": "x", "label": "b"},
        "`label` has 2 classes, and the row is of class 2",
    ]


@pytest.mark.parametrize("metadata", [b"", b"{", b"[1]", b'{"info": null}', b'{"info": {"features": [[[1]]]}}'])
def test_metadata_of_any_form_harms_no_row(tmp_path: Path, metadata: bytes) -> None:
    rows = [{"text": "x", "label": 1, "deep": {"a": [1]}}]
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": metadata}), tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet", "parquet") == rows


def test_columns_of_json_are_their_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, Features, Json, List, Value

    call = {"name": Value("string"), "arguments": Json()}
    features = Features({"n": Value("int64"), "calls": List(call), "free": Json()})
    rows = [
        {"n": 1, "calls": [{"name": "a", "arguments": {"b": None, "a": [1, None]}}], "free": {"x": None}},
        {"n": 2, "calls": [{"name": "b", "arguments": {}}], "free": None},
    ]
    for path, format in written(Dataset.from_list(rows, features=features), tmp_path, monkeypatch):
        assert read(path, format) == [rows[0], {key: item for key, item in rows[1].items() if item is not None}]
    bad = pa.table({"free": pa.array(["{}", "{", None]).cast(pa.json_())})
    pq.write_table(bad, tmp_path / "bad.parquet")
    assert read(tmp_path / "bad.parquet", "parquet") == [{"free": {}}, "not JSON", {}]


def test_nulls_survive_where_they_can_and_are_said_to_be_lost_elsewhere(tmp_path: Path) -> None:
    table = pa.table(
        {
            "map": pa.array([[("a", None), ("b", 1)]], pa.map_(pa.string(), pa.int64())),
            "calls": pa.array([[{"arguments": {"a": None, "b": 1}}]]),
            "text": pa.array(['{"a": null}']),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    for name in ("parquet", "arrow"):
        path = tmp_path / f"rows.{name}"
        assert read(path, name) == [{"map": {"a": None, "b": 1}, "calls": [{"arguments": {"b": 1}}], "text": '{"a": null}'}]
        (note,) = index_file(str(path), path.name, name).notes
        assert note.startswith("`calls.arguments` is a struct, in which a null cannot be told from an absent key")


def test_dictionaries_keep_the_names_of_other_columns(tmp_path: Path) -> None:
    metadata = {"huggingface": '{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["a", "b"]}}}}'}
    table = pa.table({"text": pa.array(["x", "y"]).dictionary_encode(), "label": [0, 1]}).replace_schema_metadata(metadata)
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    assert read(tmp_path / "rows.arrow", "arrow") == [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]


CARD = """---
license: mit
configs:
- config_name: mood
  data_files:
  - {split: train, path: mood/train-*}
dataset_info:
- config_name: mood
  features:
  - {name: text, dtype: string}
  - name: label
    dtype: {class_label: {names: {'0': calm, '1': angry}}}
  - {name: tags, sequence: {class_label: {names: {'0': late, '1': lost}}}}
  - name: more
    struct:
    - {name: topic, dtype: {class_label: {names: [billing, shipping]}}}
- config_name: other
  features:
  - name: label
    dtype: {class_label: {names: {'0': good, '1': bad}}}
---
# A dataset
"""
LABELLED = {"text": "a", "label": 1, "tags": [1, 0], "more": {"topic": 0}}
NAMED = {"text": "a", "label": "angry", "tags": ["lost", "late"], "more": {"topic": "billing"}}


def hub(folder: Path, card: str, place: str = "mood", metadata: dict[str, str] | None = None) -> Path:
    (folder / place).mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(card)
    table = pa.Table.from_pylist([LABELLED]).replace_schema_metadata(metadata or {})
    pq.write_table(table, folder / place / "train-00000-of-00001.parquet")
    return folder


def listed(path: Path) -> list[Any]:
    (file,) = expand(parse(DataConfig, {"sources": [{"path": str(path)}]}))
    return [raw.reason or raw.value for chunk in index_listed(file).chunks for raw in read_raw(chunk, 1 << 20)]


@pytest.mark.parametrize(
    "metadata", [None, {"huggingface": '{"info": {"features": {"label": {"_type": "Value", "dtype": "int64"}}}}'}]
)
def test_names_of_classes_that_stand_in_the_readme_alone_are_read(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    folder = hub(tmp_path, CARD, metadata=metadata)
    for path in (folder, folder / "mood", folder / "mood" / "train-00000-of-00001.parquet", folder / "*" / "*.parquet"):
        assert listed(path) == [NAMED]
    by_folder = hub(tmp_path / "b", CARD.replace("path: mood/train-*", "path: elsewhere/*"))
    assert listed(by_folder) == [NAMED]
    one = hub(tmp_path / "c", CARD.partition("- config_name: other")[0] + "---\n", "data")
    assert listed(one) == [NAMED]
    for card in ("---\nlicense: mit\n---\n", "---\ndataset_info: {features: []}\n---\n", "---\nclass_label: x\n---\n"):
        assert listed(hub(tmp_path / "d", card)) == [LABELLED]  # the nearest head counts
    for card in ("# no head", ""):
        assert listed(hub(tmp_path / "d", card)) == [NAMED]
        assert listed(hub(tmp_path / "d" / "e" / "f" / "g", card)) == [LABELLED]
        shutil.rmtree(tmp_path / "d" / "e")


@pytest.mark.parametrize("name", ["[mood]", "{a: b}", "3", "null"])
def test_names_of_configurations_that_are_not_text_are_no_names(tmp_path: Path, name: str) -> None:
    one = CARD.partition("- config_name: other")[0] + "---\n"
    assert "config_name: mood" in one
    assert listed(hub(tmp_path / "a", one.replace("config_name: mood", f"config_name: {name}"))) == [NAMED]
    with pytest.raises(DataError, match="has configurations with other classes"):
        listed(hub(tmp_path / "b", CARD.replace("config_name: mood", f"config_name: {name}"), "data"))
    unnamed = CARD.replace("- config_name: mood\n  ", "- ")
    assert unnamed.count("config_name: mood") < CARD.count("config_name: mood")
    assert listed(hub(tmp_path / "c", unnamed)) == [NAMED]


def test_names_in_the_readme_decide_the_version(tmp_path: Path) -> None:
    folder = hub(tmp_path, CARD)
    config = parse(DataConfig, {"sources": [{"path": str(folder)}]})
    digests, keys = set(), set()
    for card in (CARD, CARD.replace("angry", "furious"), "# none"):
        (folder / "README.md").write_text(card)
        indexed = [index_listed(file) for file in expand(config)]
        digests.add(input_digest(config, indexed, "tokenizer", ""))
        keys.add(indexed[0].chunks[0].key)
    assert (len(digests), len(keys)) == (3, 3)


@pytest.mark.parametrize(
    ("card", "place", "error"),
    [
        (
            CARD,
            "data",
            "has configurations with other classes, and does not say which one 'data/train-00000-of-00001.parquet' is of",
        ),
        (CARD.replace("'1': angry", "'2': angry"), "mood", "are not clear: its numbers are not 0, 1, 2 and so on"),
        (CARD.replace("calm", "no"), "mood", "are not clear: a name is not text: write it in quotes"),
        (CARD.replace("license: mit", "license: [mit"), "mood", "names classes and cannot be read"),
        (
            CARD.replace("license: mit", "a: &a [x]\n" + "b: [" + "*a, " * 40 + "]"),
            "mood",
            "names classes and cannot be read",
        ),
    ],
    ids=range(5),
)
def test_names_that_are_not_clear_are_refused(tmp_path: Path, card: str, place: str, error: str) -> None:
    with pytest.raises(DataError, match=re.escape(error)) as refused:
        listed(hub(tmp_path, card, place))
    assert refused.value.hint


def test_names_that_contradict_the_file_are_refused(tmp_path: Path) -> None:
    names = '{"info": {"features": {"label": {"_type": "ClassLabel", "names": ["calm", "%s"]}}}}'
    assert listed(hub(tmp_path / "a", CARD, metadata={"huggingface": names % "angry"})) == [NAMED]
    with pytest.raises(DataError, match=r"the classes of `label` have other names in .* than in the README\.md"):
        listed(hub(tmp_path / "b", CARD, metadata={"huggingface": names % "furious"}))
