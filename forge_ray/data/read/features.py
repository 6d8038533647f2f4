"""What a columnar file says of its columns, and what it means for a value: names of classes, JSON in a column, nulls.

Hugging Face's `datasets` writes its features into the schema's metadata: a `ClassLabel` is stored as a number and means a
name, a `Json` column is stored as text and means its value. In a struct, which has the keys of all rows, null is a key
that the row does not have; in a map and in JSON it is a null.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from forge_ray.data.read.strict_json import Reject, loads

Decode = Callable[[Any], Any]
OPAQUE = ("arguments", "parameters")  # objects of any form, in which a null has a meaning


def row_decoder(schema: pa.Schema, columns: str = "") -> Decode:
    """From a row as Arrow gives it (`to_pylist`) to what it means; the function raises `Reject`.

    `columns` is JSON of what is known of the columns from elsewhere: `labels`, features of columns that hold classes, used
    where the schema names none; `constants`, values that all rows have.
    """
    from_elsewhere = json.loads(columns) if columns else {}
    own, labels = features_of(schema.metadata or {}), from_elsewhere.get("labels", {})
    decode = _struct(list(schema), own | {name: label for name, label in labels.items() if not _classes(own.get(name))})
    if constants := from_elsewhere.get("constants"):
        return lambda row: constants | decode(row)
    return decode


def conflict(own: dict[str, Any], labels: dict[str, Any]) -> str:
    """The column whose classes have other names in a file than elsewhere; "" for none."""
    both = ((name, _classes(own.get(name)), _classes(label)) for name, label in labels.items())
    return next((name for name, first, second in both if first and first != second), "")


def features_of(metadata: dict[bytes, bytes]) -> dict[str, Any]:
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _classes(feature: Any, place: str = "") -> dict[str, Any]:
    """Names of classes by the place of their column in a feature."""
    if isinstance(feature, list):
        return _classes(feature[0], place) if feature else {}
    if not isinstance(feature, dict):
        return {}
    if feature.get("_type") == "ClassLabel":
        return {place: feature["names"]} if feature.get("names") else {}
    if "_type" in feature:
        return _classes(feature.get("feature"), place)
    return {key: names for name, inner in feature.items() for key, names in _classes(inner, f"{place}.{name}").items()}


def _decoder(name: str, kind: pa.DataType, feature: Any) -> Decode | None:
    """None where a value means itself."""
    tag = feature.get("_type") if isinstance(feature, dict) else None
    if isinstance(kind, pa.BaseExtensionType):
        return loads if kind.extension_name == "arrow.json" else _decoder(name, kind.storage_type, feature)
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _decoder(name, kind.value_type, feature)
    if tag == "Json" and (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return loads
    if tag == "ClassLabel" and pa.types.is_integer(kind) and isinstance(feature.get("names"), list):
        return _class_name(name, feature["names"])
    if pa.types.is_struct(kind):
        return _struct([kind.field(number) for number in range(kind.num_fields)], feature)
    if pa.types.is_map(kind):
        return _map(_decoder(name, kind.item_type, None))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = feature.get("feature") if tag else feature[0] if isinstance(feature, list) and feature else None
        return _list(_decoder(name, kind.value_type, inner))
    return None


def _struct(fields: list[pa.Field], feature: Any) -> Decode:
    inner = feature if isinstance(feature, dict) else {}
    if inner.get("_type") == "Sequence":  # of objects, which an older `datasets` stores as an object of lists
        inner = {key: [item] for key, item in inner["feature"].items()} if isinstance(inner.get("feature"), dict) else {}
    decoders = {
        field.name: decode for field in fields if (decode := _decoder(field.name, field.type, inner.get(field.name)))
    }

    def decoded(value: dict[str, Any]) -> dict[str, Any]:
        row = {}
        for key, item in value.items():
            if item is not None and key in decoders:
                item = decoders[key](item)
            if item is not None:
                row[key] = item
        return row

    return decoded


def _list(decode: Decode | None) -> Decode | None:
    if decode is None:
        return None
    return lambda values: [item if item is None else decode(item) for item in values]


def _map(decode: Decode | None) -> Decode | None:
    if decode is None:
        return None
    return lambda values: {key: item if item is None else decode(item) for key, item in values.items()}


def _class_name(column: str, names: list[Any]) -> Decode:
    def name_of(number: int) -> Any:
        if number == -1:  # how `datasets` writes a row without a label
            return None
        if not 0 <= number < len(names):
            raise Reject(f"`{column}` has {len(names)} classes, and the row is of class {number}")
        return names[number]

    return name_of


def lossy_columns(schema: pa.Schema) -> Iterator[str]:
    """Dotted names of the columns that hold objects of any form as a struct, where a real null is lost."""

    def walk(path: str, name: str, kind: pa.DataType) -> Iterator[str]:
        if pa.types.is_struct(kind):
            if name in OPAQUE and kind.num_fields:
                yield path
                return
            for number in range(kind.num_fields):
                field = kind.field(number)
                yield from walk(f"{path}.{field.name}", field.name, field.type)
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            yield from walk(path, name, kind.value_type)

    for field in schema:
        yield from walk(field.name, field.name, field.type)
