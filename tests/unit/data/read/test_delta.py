"""Delta tables: the rows of their current version and no others, or a refusal by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from forge_ray.config.base import parse
from forge_ray.config.data import DataConfig
from forge_ray.data.build.settings import input_digest
from forge_ray.data.read import documents
from forge_ray.data.read.ingest import IndexedFile, index_listed
from forge_ray.data.read.readers import read_raw
from forge_ray.data.read.sources import expand
from forge_ray.errors import DataError, NotFound

pytestmark = pytest.mark.unit
ROWS = [{"prompt": f"q{number}", "completion": f"a{number}"} for number in range(4)]


def config(path: Path, **more: Any) -> DataConfig:
    return parse(DataConfig, {"sources": [{"path": str(path), **more}]})


def indexed(path: Path, **more: Any) -> list[IndexedFile]:
    return [index_listed(file) for file in expand(config(path, **more))]


def rows(path: Path) -> list[Any]:
    raws = [raw for file in indexed(path) for chunk in file.chunks for raw in read_raw(chunk, 1 << 20)]
    return sorted((raw.reason or raw.value for raw in raws), key=str)


def write(path: Path, values: list[dict[str, Any]], **more: Any) -> Path:
    write_deltalake(str(path), pa.Table.from_pylist(values), **more)
    return path


def with_log(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The table with each action of its first log entry changed."""
    (entry,) = sorted((path / "_delta_log").glob("*.json"))
    actions = [json.loads(line) for line in entry.read_text().splitlines()]
    for action in actions:
        change(action)
    entry.write_text("".join(json.dumps(action) + "\n" for action in actions))
    return path


def with_feature(name: str) -> Callable[[dict[str, Any]], None]:
    def change(action: dict[str, Any]) -> None:
        if "protocol" in action:
            own = {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": [name], "writerFeatures": [name]}
            action["protocol"] = own

    return change


def test_the_rows_of_the_current_version_are_read(tmp_path: Path) -> None:
    table = write(tmp_path / "table", ROWS[:2])
    write(table, ROWS[2:], mode="append")
    assert rows(table) == ROWS
    DeltaTable(str(table)).delete("prompt = 'q1'")
    assert len(list(table.glob("*.parquet"))) == 3  # the file with the deleted row is still there
    assert rows(table) == [ROWS[0], *ROWS[2:]]
    assert {file.version for file in indexed(table)} == {"delta 2"}
    write(table, [{"prompt": "q4", "completion": "a4", "licence": "MIT"}], mode="append", schema_mode="merge")
    assert rows(table) == [ROWS[0], *ROWS[2:], {"prompt": "q4", "completion": "a4", "licence": "MIT"}]


def test_columns_of_partitions_are_columns_of_the_rows(tmp_path: Path) -> None:
    values = [ROWS[0] | {"lang": "d e/%", "day": 1}, ROWS[1] | {"lang": "en", "day": None}]
    table = write(tmp_path / "table", values, partition_by=["lang", "day"])
    assert rows(table) == [values[0], {"prompt": "q1", "completion": "a1", "lang": "en"}]
    one = indexed(write(tmp_path / "a", [ROWS[0] | {"lang": "de"}], partition_by=["lang"]))
    two = indexed(write(tmp_path / "b", [ROWS[0] | {"lang": "en"}], partition_by=["lang"]))
    assert one[0].sha256 == two[0].sha256  # the file does not hold the column
    assert one[0].chunks[0].key != two[0].chunks[0].key
    settings = config(tmp_path / "a")
    assert len({input_digest(settings, files, "tokenizer", "") for files in (one, two)}) == 2


def test_deletion_vectors_are_refused_where_there_are_any(tmp_path: Path) -> None:
    table = with_log(write(tmp_path / "table", ROWS), with_feature("deletionVectors"))
    assert rows(table) == ROWS
    vector = {
        "storageType": "u",
        "pathOrInlineDv": "ab^-aqEH.-t@S}K{vb[*k^",
        "offset": 4,
        "sizeInBytes": 40,
        "cardinality": 1,
    }
    with_log(table, lambda action: action.get("add", {}).update(deletionVector=vector))
    with pytest.raises(DataError, match="marks rows of its files as deleted") as error:
        rows(table)
    assert error.value.hint.startswith("export the version that you mean as Parquet")


def mapped(action: dict[str, Any]) -> None:
    with_feature("columnMapping")(action)
    if "metaData" in action:
        action["metaData"]["configuration"] = {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "2"}
        schema = json.loads(action["metaData"]["schemaString"])
        for number, field in enumerate(schema["fields"], start=1):
            field["metadata"] = {"delta.columnMapping.id": number, "delta.columnMapping.physicalName": f"col-{number}"}
        action["metaData"]["schemaString"] = json.dumps(schema)


def outside(action: dict[str, Any]) -> None:
    if "add" in action:
        action["add"]["path"] = "../secret.parquet"


def elsewhere(action: dict[str, Any]) -> None:
    if "add" in action:
        action["add"]["path"] = "file:///etc/secret.parquet"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (mapped, "maps its columns to other names in its files"),
        (with_feature("variantType"), "(needs variantType to be read|log .* cannot be read: )"),
        (with_feature("unheardOf"), "log of the Delta table .* cannot be read: .*unheardOf"),
        (outside, r"names the file '\.\./secret\.parquet', which is not in its folder"),
        (elsewhere, "names the file 'file:///etc/secret.parquet', which is not in its folder"),
    ],
    ids=range(5),
)
def test_a_table_whose_files_are_not_its_rows_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    with pytest.raises(DataError, match=reason) as error:
        rows(with_log(write(tmp_path / "table", ROWS), change))
    assert error.value.hint


def test_a_log_that_is_none_is_refused(tmp_path: Path) -> None:
    table = write(tmp_path / "table", ROWS)
    (entry,) = (table / "_delta_log").glob("*.json")
    for data in (b"", b"{", b"[" * 100_000, b'{"protocol": 1}\n'):
        entry.write_bytes(data)
        with pytest.raises(DataError, match=r"the log of the Delta table .* cannot be read"):
            rows(table)


def test_files_that_are_gone_and_links_are_named(tmp_path: Path) -> None:
    table = write(tmp_path / "table", ROWS)
    (file,) = table.glob("*.parquet")
    file.rename(tmp_path / "moved")
    with pytest.raises(NotFound, match="is missing, which the log of the Delta table"):
        rows(table)
    file.symlink_to(tmp_path / "moved")
    with pytest.raises(DataError, match=r"is a link to .* which is not in the folder of its source"):
        rows(table)


def test_a_split_and_a_missing_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write(tmp_path / "table", ROWS)
    with pytest.raises(DataError, match="is a Delta table, which has no splits"):
        indexed(table, split="train")
    monkeypatch.setattr(documents.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="is a Delta table, which needs the package 'deltalake'") as error:
        indexed(table)
    assert error.value.hint == "pip install 'forge-ray[tables]' on every node"
