"""A folder as a source: every file of a known kind under it, but for hidden ones and what other programs leave next to rows.

A folder may also be one dataset: that `save_to_disk` wrote, or a clone from Hugging Face's hub with Parquet files of splits.
A dataset that `save_to_disk` wrote below the folder is read as one. Links are followed where they stay in the folder; a file
that several names lead to is read once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pyarrow.fs as pafs

from forge_ray.data.read import dataset_card
from forge_ray.data.read.lines import filesystem_of, is_inside, without_query
from forge_ray.data.read.places import display_name, inside, require_regular
from forge_ray.data.read.saved import DICT, STATE, is_saved, saved_files
from forge_ray.data.read.splits import ALL, of_split, split_named
from forge_ray.data.read.table_formats import without_markers
from forge_ray.errors import DataError

KINDS_SHOWN = 12
INFO = "dataset_info.json"
INFOS = "dataset_infos.json"  # of the hub: a description of its dataset, no row
ROWS = ("jsonl", "json", "csv", "parquet", "arrow", "xlsx")
Kind = Callable[[str], str]  # path → the format that its name stands for, "" for none


def dataset_files(folder: str, split: str, any_split: bool, kind_of: Kind) -> list[str]:
    """Files of rows of a folder that is one dataset, of several splits those of `split`; none where it is another folder.
    Raises `DataError` where a split has to be chosen, unless `any_split`."""
    if is_saved(folder):
        return saved_files(folder, split, any_split)
    files = _hub_files(folder, kind_of)
    return of_split(files, split or (ALL if any_split else ""), folder) if files else []


def _hub_files(folder: str, kind_of: Kind) -> list[str]:
    """The Parquet files whose names tell a split, at most two folders deep, as the hub has them; none where there are other
    files of a known kind, but for those that describe the dataset."""
    start = len(without_query(folder).rstrip("/")) + 1
    files = []
    for path in without_markers(_listed(folder, kind_of)):
        name = without_query(path)[start:]
        if name.endswith(".parquet") and name.count("/") <= 2 and split_named(name):
            files.append(path)
        elif kind_of(path) and _name(path) not in (dataset_card.NAME, INFOS) and not _is_licence(path, kind_of):
            return []
    return sorted(files)


def descriptions(paths: list[str], kind_of: Kind) -> set[str]:
    """The files that describe rows in their folder or below it and are none, as a clone from the hub has them: a README.md
    that begins with YAML, a licence next to it, and dataset_infos.json."""
    with_rows: set[str] = set()
    for path in paths:
        if kind_of(path) in ROWS and _name(path) != INFOS:
            folder = _folder(path)
            while folder and folder not in with_rows:
                with_rows.add(folder)
                folder = _folder(folder)
    beside = [path for path in paths if _folder(path) in with_rows]
    cards = {path for path in beside if _name(path) == dataset_card.NAME and dataset_card.head_of(_folder(path)) is not None}
    folders = set(map(_folder, cards))
    licences = {path for path in beside if _folder(path) in folders and _is_licence(path, kind_of) and kind_of(path)}
    return cards | licences | {path for path in beside if _name(path) == INFOS}


def _is_licence(path: str, kind_of: Kind) -> bool:
    return _name(path).upper().startswith(("LICENSE", "LICENCE")) and kind_of(path) in ("", "text")


def _name(path: str) -> str:
    return without_query(path).rpartition("/")[2]


def _folder(path: str) -> str:
    """That of a file or folder, of a URI with its options; "" for none."""
    place = without_query(path)
    above = place.rpartition("/")[0]
    return above + path[len(place) :] if above and not above.endswith("/") else ""


def files_under(folder: str, split: str, any_split: bool, kind_of: Kind) -> list[str]:
    """Every file of a folder, sorted, of whatever kind; of saved datasets in it their data files alone."""
    paths = _listed(folder, kind_of)
    saved = _saved_folders(paths)
    saved = [place for place in saved if not any(_is_below(place, other) for other in saved)]
    others = [path for path in paths if not any(_is_below(path, place) for place in saved)]
    return sorted([*without_markers(others), *(path for place in saved for path in saved_files(place, split, any_split))])


def known_files(paths: list[str], folder: str, kind_of: Kind, remedies: dict[str, str]) -> list[str]:
    """Those of a known kind. Raises `DataError` where there is none, with the kinds that there are."""
    files = [path for path in paths if kind_of(path)]
    if not files:
        endings = counted(map(ending, paths))
        what = f"holds {listed(endings)}, and no file of a known kind" if endings else "holds no files"
        remedy = next((remedies[name.lstrip(".")] for name in endings if name.lstrip(".") in remedies), "")
        raise DataError(
            f"data.sources: the folder {display_name(folder)!r} {what}",
            hint=remedy or "give a folder with JSONL, CSV, Parquet, text or documents, or say which kind with `format:`",
        )
    return files


def contents(paths: list[str], folder: str, kind_of: Kind) -> Iterator[str]:
    """What is read of a folder, by kind, and what is not, by ending or name: a line each."""
    name = display_name(folder)
    described = descriptions(paths, kind_of)
    yield f"{name}: {listed(counted(kind for path in paths if path not in described and (kind := kind_of(path))))}"
    if described:
        yield f"{name}: not read, as it describes the dataset: {listed(counted(map(_name, described)))}"
    if unknown := counted(ending(path) for path in paths if not kind_of(path)):
        yield f"{name}: not read, of no known kind: {listed(unknown)}"


def _is_below(path: str, folder: str) -> bool:
    return without_query(path).startswith(f"{without_query(folder)}/")


def ending(path: str) -> str:
    """`.png` of a file's name, or the whole name where it has no ending."""
    name = _name(path)
    return Path(name).suffix.lower() or name


def counted(names: Iterable[str]) -> dict[str, int]:
    """How often each occurs, the most frequent first."""
    return dict(sorted(Counter(names).items(), key=lambda item: (-item[1], item[0])))


def listed(counts: dict[str, int]) -> str:
    more = len(counts) - KINDS_SHOWN
    parts = [f"{number} {name}" for name, number in list(counts.items())[:KINDS_SHOWN]]
    return ", ".join([*parts, f"{more} more kinds"] if more > 0 else parts)


def _listed(folder: str, kind_of: Kind) -> list[str]:
    return _remote(folder) if "://" in folder else _local(folder, kind_of)


def _local(folder: str, kind_of: Kind) -> list[str]:
    entered, files = {os.path.realpath(folder)}, []
    waiting = [folder.rstrip("/") or "/"]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                if entry.name.startswith("."):
                    continue
                if not entry.is_dir():
                    files.append(entry.path)
                    continue
                if entry.is_symlink() and not is_inside(entry.path, folder):
                    require_regular(entry.path, folder)  # says where it leads
                if (real := os.path.realpath(entry.path)) not in entered:
                    entered.add(real)
                    waiting.append(entry.path)
    by_file: dict[str, str] = {}  # of several names of a file the one that says its kind, and rather no link
    for path in sorted(files, key=lambda one: (not kind_of(one), os.path.islink(one), one)):
        by_file.setdefault(os.path.realpath(path), path)
    return list(by_file.values())


def _remote(folder: str) -> list[str]:
    filesystem, root = filesystem_of(folder)
    root = root.rstrip("/")
    infos = filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
    names = [info.path[len(root) + 1 :] for info in infos if info.type == pafs.FileType.File]
    return [inside(folder, name) for name in names if not any(part.startswith(".") for part in name.split("/"))]


def _saved_folders(paths: Iterable[str]) -> list[str]:
    """The folders of saved datasets, by the files that `save_to_disk` writes next to the data."""
    by_folder: dict[str, set[str]] = {}
    for path in paths:
        by_folder.setdefault(_folder(path), set()).add(_name(path))
    marked = (folder for folder, names in by_folder.items() if DICT in names or names >= {STATE, INFO})
    return sorted(folder for folder in marked if is_saved(folder))
