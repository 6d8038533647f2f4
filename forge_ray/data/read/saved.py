"""Datasets that Hugging Face's `save_to_disk` wrote: which of their files hold the rows that a source asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from forge_ray.data.read.lines import open_file
from forge_ray.data.read.places import display_name, inside, is_file, require_regular
from forge_ray.data.read.splits import ALL, chosen
from forge_ray.errors import DataError, NotFound

DICT, STATE = "dataset_dict.json", "state.json"
AGAIN = "save the dataset again with save_to_disk"


def is_saved(folder: str) -> bool:
    """Whether `save_to_disk` wrote the folder. Other programs have files of these names too, with other keys."""
    return _splits(folder) is not None or _data_files(folder) is not None


def saved_files(folder: str, split: str, any_split: bool = False) -> list[str]:
    """Files of a Dataset or DatasetDict; of several splits those of `split`. Raises `DataError` where a split has to be
    chosen, unless `any_split`, and where the files do not say what holds the rows; `NotFound` where one of these is gone."""
    split = split or (ALL if any_split else "")
    if (splits := _splits(folder)) is None:
        return list(_rows_of(folder))
    splits = [_own(folder, name) for name in splits]
    if split != ALL and (split or len(splits) > 1):
        splits = [chosen(splits, split, folder)]
    return [path for name in splits for path in _rows_of(inside(folder, name))]


def _rows_of(folder: str) -> Iterator[str]:
    if (names := _data_files(folder)) is None:
        raise DataError(f"data.sources: {display_name(folder)!r} has no {STATE} that lists its files of rows", hint=AGAIN)
    for name in names:
        path = inside(folder, _own(folder, name))
        if not is_file(folder, name):
            raise NotFound(f"data.sources: {path!r} is missing, which state.json lists", hint="copy the whole folder again")
        yield path


def _splits(folder: str) -> list[str] | None:
    return _names(_value(folder, DICT, "splits"))


def _data_files(folder: str) -> list[str] | None:
    files = _value(folder, STATE, "_data_files")
    if not isinstance(files, list):
        return None
    return _names([file.get("filename") if isinstance(file, dict) else None for file in files])


def _names(value: Any) -> list[str] | None:
    return value if isinstance(value, list) and all(isinstance(name, str) for name in value) else None


def _value(folder: str, name: str, key: str) -> Any:
    """The value under a key of a JSON object; None where there is none."""
    if not is_file(folder, name):
        return None
    if "://" not in folder:
        require_regular(inside(folder, name), folder)
    with open_file(inside(folder, name)) as stream:
        try:
            value = json.loads(stream.read())
        except (ValueError, RecursionError):
            return None
    return value.get(key) if isinstance(value, dict) else None


def _own(folder: str, name: str) -> str:
    """A name that a saved dataset gives, which may come from elsewhere: of something in its own folder."""
    if not name or name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise DataError(f"data.sources: {folder!r} names {name!r}, which leads out of it", hint=AGAIN)
    return name
