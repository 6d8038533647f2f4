"""Folders whose files are not their rows: tables with a log of versions, and what other programs leave next to rows."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote

import pyarrow.fs as pafs

from forge_ray.data.read.documents import require_package
from forge_ray.data.read.limited import NotRead, OverLimit, read_value
from forge_ray.data.read.lines import filesystem_of, without_query
from forge_ray.data.read.places import display_name
from forge_ray.errors import DataError, NotFound

DELTA = "_delta_log"
LOGS = {DELTA: "a Delta table", ".hoodie": "a Hudi table"}
EXPORT = "export the version that you mean as Parquet (Spark: spark.read.table(…).write.parquet(…)), and name its files"
ICEBERG = "metadata"
# left by Spark, Databricks, Hadoop, macOS and Windows: never rows
MARKERS = (
    "_SUCCESS", "_SUCCESS.*", "_metadata", "_common_metadata", "_committed_*", "_started_*", "*.crc", ".DS_Store", "._*",
    "Thumbs.db", "desktop.ini",
)  # fmt: skip
WORK_FOLDERS = ("_temporary", "_delta_log", ".hoodie", "__MACOSX")
PARENTS = 3  # above the folder of a file, in which the log of its table may lie


@dataclass(frozen=True)
class DeltaFiles:
    """One version of a table: its name, and for each of its files the values of the columns that it is partitioned by."""

    version: str
    constants: dict[str, dict[str, Any]]


def without_markers(paths: Iterable[str]) -> list[str]:
    """The files that a glob matched, without those that other programs leave next to rows."""
    return [path for path in paths if not _is_marker(without_query(path))]


def _is_marker(path: str) -> bool:
    *folders, name = path.split("/")
    return any(fnmatchcase(name, marker) for marker in MARKERS) or any(folder in WORK_FOLDERS for folder in folders)


def refuse_tables(paths: Sequence[str]) -> None:
    """`DataError` where a path is a table of versions or one of its files: rows that were deleted lie among them."""
    folders: dict[str, PurePosixPath] = {}
    filesystem: pafs.FileSystem | None = None
    for path in paths:
        if without_query(path).endswith(".metadata.json"):
            _refuse(path, "the metadata of an Iceberg table")
        filesystem, inner = filesystem_of(path)
        place = PurePosixPath(inner)
        above = place.parents if isinstance(filesystem, pafs.LocalFileSystem) else place.parents[:1]  # each is a request
        for folder in [*([place] if len(paths) == 1 else []), *list(above)[: PARENTS + 1]]:
            if folder.name:
                folders.setdefault(str(folder), folder)
    if filesystem is None:
        return
    logs = [(str(folder / log), str(folder), what) for folder in folders.values() for log, what in LOGS.items()]
    logs += [(str(folder / ICEBERG), str(folder), "") for folder in folders.values()]
    try:
        infos = filesystem.get_file_info([log for log, _, _ in logs])
    except OSError:  # of a bucket, more may be hidden than the rows
        return
    for info, (log, folder_name, what) in zip(infos, logs, strict=True):
        if info.type != pafs.FileType.Directory:
            continue
        if what:
            _refuse(folder_name, what)
        files = filesystem.get_file_info(pafs.FileSelector(log))
        if any(file.path.endswith(".metadata.json") for file in files):
            _refuse(folder_name, "an Iceberg table")


def _refuse(path: str, what: str) -> None:
    place = display_name(unquote(path))
    by_folder = f"name the folder {place!r} itself, or " if what == LOGS[DELTA] and "://" not in path else ""
    raise DataError(
        f"data.sources: {place!r} is {what}, whose files also hold rows that were deleted or replaced",
        hint=f"{by_folder}{EXPORT}",
    )


def is_delta_table(path: str) -> bool:
    """Whether a path is the folder of a Delta table on a local file system."""
    return "://" not in path and PurePosixPath(path).name != DELTA and os.path.isdir(os.path.join(path, DELTA))


def delta_table(folder: str) -> DeltaFiles:
    """The files of the current version of a Delta table; raises `DataError` where they alone are not its rows."""
    place = display_name(folder)
    require_package("deltalake", f"{place!r} is a Delta table", "tables")
    log = os.path.join(folder, DELTA)
    size = sum(
        entry.stat(follow_symlinks=False).st_size for entry in os.scandir(log) if entry.is_file(follow_symlinks=False)
    )
    try:
        answer = read_value({"kind": "delta", "path": folder, "size": size})
    except (NotRead, OverLimit) as error:
        raise DataError(f"data.sources: the log of the Delta table {place!r} cannot be read: {error}", hint=EXPORT) from None
    if problem := answer.get("problem"):
        raise DataError(f"data.sources: the Delta table {place!r} {problem}", hint=EXPORT)
    files = {os.path.join(folder, path): values for path, values in answer["files"]}
    if missing := next((path for path in files if not os.path.lexists(path)), ""):
        raise NotFound(
            f"data.sources: {display_name(missing)!r} is missing, which the log of the Delta table {place!r} lists",
            hint="copy the whole folder of the table again",
        )
    return DeltaFiles(f"delta {answer['version']}", files)
