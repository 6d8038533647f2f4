"""Folders whose files are not their rows: tables with a log of versions, and what other programs leave next to rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from urllib.parse import unquote

import pyarrow.fs as pafs

from forge_ray.data.read.lines import filesystem_of, without_query
from forge_ray.data.read.places import display_name
from forge_ray.errors import DataError

LOGS = {"_delta_log": "a Delta table", ".hoodie": "a Hudi table"}
ICEBERG = "metadata"
# left by Spark, Databricks, Hadoop, macOS and Windows: never rows
MARKERS = (
    "_SUCCESS", "_SUCCESS.*", "_metadata", "_common_metadata", "_committed_*", "_started_*", "*.crc", ".DS_Store", "._*",
    "Thumbs.db", "desktop.ini",
)  # fmt: skip
WORK_FOLDERS = ("_temporary", "_delta_log", ".hoodie", "__MACOSX")
PARENTS = 3  # above the folder of a file, in which the log of its table may lie


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
    raise DataError(
        f"data.sources: {display_name(unquote(path))!r} is {what}, whose files also hold rows that were deleted or replaced",
        hint="export the version that you mean as Parquet (Spark: spark.read.table(…).write.parquet(…)), and name its files",
    )
