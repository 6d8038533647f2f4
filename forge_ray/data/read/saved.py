"""Folders of Hugging Face datasets: which of their files hold the rows that a source asks for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow.fs as pafs

from forge_ray.data.read.lines import filesystem_of, open_file
from forge_ray.data.read.places import inside, is_file, require_regular
from forge_ray.data.read.splits import ALL, chosen, of_split, split_named
from forge_ray.errors import DataError, NotFound


def dataset_files(folder: str, split: str, any_split: bool = False) -> list[str]:
    """Files of a Dataset or DatasetDict that Hugging Face's `save_to_disk` wrote, or of a dataset of its hub; of several
    splits those of `split`; none where the folder is neither. Raises `DataError` where a split has to be chosen, unless
    `any_split`."""
    split = split or (ALL if any_split else "")
    if is_file(folder, "dataset_dict.json"):
        splits = [_own(folder, name) for name in _json(folder, "dataset_dict.json")["splits"]]
        if split != ALL and (split or len(splits) > 1):
            splits = [chosen(splits, split, folder)]
        return [path for name in splits for path in _saved_files(inside(folder, name))]
    if is_file(folder, "state.json"):
        return list(_saved_files(folder))
    files = _hub_files(folder)
    return of_split(files, split, folder) if files else []


def _hub_files(folder: str) -> list[str]:
    """The Parquet files whose names tell a split, at most two folders deep, as the hub has them."""
    filesystem, inner = filesystem_of(folder)
    files = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    names = [info.path.removeprefix(inner).lstrip("/") for info in files if info.type == pafs.FileType.File]
    named = [name for name in names if name.endswith(".parquet") and name.count("/") <= 2 and split_named(name)]
    return sorted(inside(folder, name) for name in named)


def _saved_files(folder: str) -> Iterator[str]:
    for file in _json(folder, "state.json")["_data_files"]:
        path = inside(folder, _own(folder, file["filename"]))
        if not is_file(folder, file["filename"]):
            raise NotFound(f"data.sources: {path!r} is missing, which state.json lists", hint="copy the whole folder again")
        yield path


def _json(folder: str, name: str) -> dict[str, Any]:
    if "://" not in folder:
        require_regular(inside(folder, name), folder)
    with open_file(inside(folder, name)) as stream:
        value: dict[str, Any] = json.loads(stream.read())
    return value


def _own(folder: str, name: str) -> str:
    """A name that a saved dataset gives, which may come from elsewhere: of something in its own folder."""
    if not name or name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise DataError(
            f"data.sources: {folder!r} names {name!r}, which leads out of it",
            hint="save the dataset again with save_to_disk",
        )
    return name
