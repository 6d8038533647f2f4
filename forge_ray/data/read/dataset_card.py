"""Names of classes that stand in a dataset's README.md alone, as Hugging Face's hub has it: YAML between two lines of `---`.

A `ClassLabel` column of a Parquet file is numbers. Its names are in the file's own metadata, or only in the README.md.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase
from typing import Any

from forge_ray.config.yaml_text import MAX_BYTES, read_yaml
from forge_ray.data.read.lines import open_file, without_query
from forge_ray.data.read.places import display_name, inside, is_file
from forge_ray.errors import DataError

NAME = "README.md"
ABOVE = 2  # folders above that of a file in which its README.md may lie
HEAD = re.compile(r"---[ \t]*\r?\n(.*?)^---[ \t]*$", re.S | re.M)
FIX = "write the names into the README.md as Hugging Face's `datasets` does, or remove its `dataset_info`"


def class_labels(path: str, cards: dict[str, Any]) -> dict[str, Any]:
    """Features by column, of those columns of a file that hold classes; raises `DataError` where the names are not clear.
    `cards` keeps what was read, by folder."""
    folder, _, name = without_query(path).rpartition("/")
    options = path[len(without_query(path)) :]
    for _ in range(ABOVE + 1):
        if not folder or folder.endswith(":/"):
            break
        if folder + options not in cards:
            cards[folder + options] = _card(folder + options)
        card = cards[folder + options]
        if card is not None:
            return _labels_of(card, name, f"{display_name(folder)}/{NAME}")
        folder, _, parent = folder.rpartition("/")
        name = f"{parent}/{name}"
    return {}


def head_of(folder: str) -> str | None:
    """The YAML with which the README.md in a folder begins; None where there is none."""
    if not is_file(folder, NAME):
        return None
    with open_file(inside(folder, NAME)) as stream:
        head = HEAD.match(stream.read(MAX_BYTES).decode("utf-8-sig", "replace"))
    return None if head is None else head[1]


def _card(folder: str) -> dict[str, Any] | None:
    """The head of the README.md in a folder, empty where it names no classes; None where there is none."""
    head = head_of(folder)
    if head is None or "class_label" not in head:
        return None if head is None else {}
    try:
        card = read_yaml(head)
    except ValueError as error:
        raise DataError(
            f"data.sources: the head of {display_name(folder)}/{NAME} names classes and cannot be read: {error}",
            hint=FIX,
        ) from None
    return card if isinstance(card, dict) else {}


def _labels_of(card: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    info = card.get("dataset_info")
    infos = [one for one in (info if isinstance(info, list) else [info]) if isinstance(one, dict)]
    chosen = _configs_with(card.get("configs"), name)
    own = [info for info in infos if _config_name(info) in chosen]
    own = own or [info for info in infos if info.get("config_name") in name.split("/")[:-1]] or infos
    try:
        labels = [_struct(info.get("features")) or {} for info in own]
    except ValueError as error:
        raise DataError(f"data.sources: the names of classes in {place!r} are not clear: {error}", hint=FIX) from None
    for one in labels[1:]:
        if one != labels[0]:
            raise DataError(
                f"data.sources: {place!r} has configurations with other classes, and does not say which one {name!r} is of",
                hint="say so in its `configs`, with the `data_files` of each",
            )
    return labels[0] if labels else {}


def _config_name(config: dict[str, Any]) -> str:
    """The name of a configuration, `default` where it has none, as `datasets` has it; "" for what is not text."""
    name = config.get("config_name", "default")
    return name if isinstance(name, str) else ""


def _configs_with(configs: Any, name: str) -> set[str]:
    """The names of the configurations whose files match."""
    chosen = set()
    for config in configs if isinstance(configs, list) else []:
        files = config.get("data_files") if isinstance(config, dict) else None
        patterns: list[Any] = []
        for item in files if isinstance(files, list) else [files]:
            path = item.get("path") if isinstance(item, dict) else item
            patterns += path if isinstance(path, list) else [path]
        if any(isinstance(pattern, str) and fnmatchcase(name, pattern) for pattern in patterns):
            chosen.add(_config_name(config))
    return chosen - {""}


def _struct(fields: Any) -> dict[str, Any] | None:
    """Those of a list of fields that hold classes, in the form that `datasets` writes into a file."""
    labels = {}
    for field in fields if isinstance(fields, list) else []:
        if isinstance(field, dict) and isinstance(field.get("name"), str) and (label := _feature(field)) is not None:
            labels[field["name"]] = label
    return labels or None


def _feature(value: Any) -> Any:
    if isinstance(value, list):
        return _struct(value)
    if not isinstance(value, dict):
        return None
    if "class_label" in value:
        return {"_type": "ClassLabel", "names": _names(value["class_label"])}
    if "struct" in value:
        return _struct(value["struct"])
    if isinstance(value.get("dtype"), dict):
        return _feature(value["dtype"])
    for kind in ("sequence", "list"):
        if kind in value and (inner := _feature(value[kind])) is not None:
            is_objects = kind == "sequence" and isinstance(value[kind], list)
            return {"_type": "Sequence", "feature": inner} if is_objects else [inner]
    return None


def _names(value: Any) -> list[str]:
    names = value.get("names") if isinstance(value, dict) else None
    if isinstance(names, dict):
        by_number = {int(number): name for number, name in names.items() if str(number).isdecimal()}
        if sorted(by_number) != list(range(len(names))):
            raise ValueError("its numbers are not 0, 1, 2 and so on")
        names = [by_number[number] for number in range(len(by_number))]
    if not isinstance(names, list) or any(isinstance(name, bool) or not isinstance(name, (str, int)) for name in names):
        raise ValueError("a name is not text: write it in quotes")
    return [str(name) for name in names]
