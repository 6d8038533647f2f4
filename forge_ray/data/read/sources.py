"""Which files a run file's sources name: paths, globs, folders of saved datasets, URIs; and their formats."""

from __future__ import annotations

import glob
import json
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow.fs as pafs

from forge_ray.config.data import DataConfig, Source
from forge_ray.config.encodings import UTF_8
from forge_ray.data.read.checksums import checksums_of
from forge_ray.data.read.dataset_card import class_labels
from forge_ray.data.read.first_bytes import ENCODED
from forge_ray.data.read.folders import ROWS, contents, dataset_files, descriptions, files_under, known_files
from forge_ray.data.read.lines import COMPRESSIONS, filesystem_of, without_query
from forge_ray.data.read.places import display_name, refuse_secrets, require_regular
from forge_ray.data.read.splits import ALL, of_split
from forge_ray.data.read.table_formats import DeltaFiles, delta_table, is_delta_table, refuse_tables, without_markers
from forge_ray.data.read.unmatched import hint_for, in_other_form
from forge_ray.errors import ConfigError, DataError, NotFound
from forge_ray.store.home import expanded
from forge_ray.store.uris import require_storage, shown, why

TEXT = (
    "txt text md markdown rst adoc org tex log xml json5 yaml yml toml ini cfg conf properties"
    " py pyi java c h cc cpp cxx hpp hh go rs js mjs jsx ts tsx vue svelte css scss less sql sh bash zsh ps1 bat"
    " cs fs vb rb php pl pm lua r jl m mm swift kt kts scala clj ex exs erl hs ml dart groovy gradle proto thrift graphql"
    " tf cmake mk f f90 cob cbl abap asm s vhd sv cu"
)
ENDINGS = {
    **dict.fromkeys(TEXT.split(), "text"),
    **dict.fromkeys(("jsonl", "ndjson"), "jsonl"),
    "json": "json",
    **dict.fromkeys(("parquet", "pq"), "parquet"),
    **dict.fromkeys(("csv", "tsv"), "csv"),
    **dict.fromkeys(("arrow", "feather", "ipc"), "arrow"),
    **dict.fromkeys(("html", "htm", "xhtml"), "html"),
    "pdf": "pdf",
    "docx": "docx",
    **dict.fromkeys(("xlsx", "xlsm"), "xlsx"),
}
# What people bring that is not read, and what to do about it
REMEDIES = {
    **dict.fromkeys(
        ("xls", "xlsb", "ods", "numbers"), "save it as XLSX, or each of its sheets as CSV UTF-8, and name those"
    ),
    **dict.fromkeys(("avro", "orc"), "convert it to Parquet"),
    **dict.fromkeys(("zip", "tar", "tgz", "7z", "rar", "lz4", "br"), "unpack it, and name the files in it"),
    **dict.fromkeys(("pkl", "pickle", "pt", "npy", "npz"), "reading it could run code: export it as JSONL or Parquet"),
    **dict.fromkeys(("db", "sqlite", "sqlite3", "mdb"), "export its tables as CSV or JSONL"),
}
UNCOMPRESSED = ("parquet", "arrow", "pdf", "docx", "xlsx")  # compressed inside, and read from several places at once


NO_TABLE = DeltaFiles("", {})


@dataclass(frozen=True)
class ListedFile:
    """One file of a source. `name` is what the user wrote, for the record; `sha256` is from its checksums file, or ""."""

    path: str
    name: str
    format: str
    source: int
    sha256: str = ""
    folder: str = ""  # of the source, on a local file system
    encoding: str = UTF_8
    sheet: str = ""  # of a workbook
    columns: str = ""  # JSON of what is known of its columns from elsewhere: `features.row_decoder`
    version: str = ""  # of the table that it is of


def expand(config: DataConfig, any_split: bool = False) -> list[ListedFile]:
    """Every source file once, sorted; a file of two sources belongs to the first. With `any_split` files of several splits
    are taken together where the source chooses none."""
    listed: dict[str, ListedFile] = {}
    cards: dict[str, Any] = {}
    for number, source in enumerate(config.sources):
        paths, folder, table = _matches(source, any_split)
        sums = checksums_of(source, paths) if source.checksums else {}
        for path in paths:
            if folder:
                require_regular(path, folder)
            format = _format(path, source)
            _refuse_unused(source, format, path)
            labels = class_labels(path, cards) if format == "parquet" else {}
            columns = {"labels": labels, "constants": table.constants.get(path, {})}
            item = ListedFile(
                path,
                display_name(path),
                format,
                number,
                sums.get(path, ""),
                folder,
                source.encoding,
                source.sheet,
                json.dumps({key: value for key, value in columns.items() if value}, sort_keys=True)
                if any(columns.values())
                else "",
                table.version,
            )
            first = listed.setdefault(path, item)
            if not first.sha256:
                listed[path] = replace(first, sha256=item.sha256)
    return [listed[path] for path in sorted(listed)]


def _matches(source: Source, any_split: bool) -> tuple[list[str], str, DeltaFiles]:
    """The files of a source; its folder on a local file system, out of which no link may lead; and the table that it is."""
    path = _place(source)
    paths = _paths(path)
    if not paths:
        hint = "globs are relative to the bucket or server" if "://" in path else hint_for(path)
        raise NotFound(f"data.sources: no file matches {shown(source.path)!r}", hint=hint)
    if len(paths) == 1 and is_delta_table(paths[0]):
        if source.split:
            raise DataError(
                f"data.sources: {display_name(paths[0])!r} is a Delta table, which has no splits", hint="remove `split`"
            )
        table = delta_table(paths[0])
        return list(table.constants), paths[0], table
    refuse_tables(paths)
    return *_files_of(source, path, paths, any_split), NO_TABLE


def _files_of(source: Source, path: str, paths: list[str], any_split: bool) -> tuple[list[str], str]:
    folder = "" if "://" in path else _folder(path)
    if len(paths) == 1 and _is_folder(paths[0]):  # globs match files only
        return _of_folder(paths[0], source, any_split), folder and paths[0]
    if len(paths) == 1 and not source.split:
        return paths, folder
    return _of_split(paths, source, any_split), folder


def _of_split(paths: list[str], source: Source, any_split: bool) -> list[str]:
    """Of files of rows those of the source's split, and all files that are not rows."""
    rows = [file for file in paths if _kind(file) in ROWS] if source.format == "auto" else paths
    kept = set(of_split(rows, source.split or (ALL if any_split else ""), source.path))
    kept |= set(paths) - set(rows)
    return [file for file in paths if file in kept]


def _place(source: Source) -> str:
    """The path or URI of a source; one of a local file is a path. Raises `ConfigError` for a URI that may not be opened."""
    path = source.path
    if "://" in path:
        refuse_secrets(path)
        require_storage(path, "data.sources")
    return unquote(path.removeprefix("file://")) if path.startswith("file://") else path


def _paths(path: str) -> list[str]:
    return sorted(_remote(path) if "://" in path else _local(path))


def _is_folder(path: str) -> bool:
    filesystem, inner = filesystem_of(path)
    return bool(filesystem.get_file_info(inner).type == pafs.FileType.Directory)


def _of_folder(folder: str, source: Source, any_split: bool) -> list[str]:
    """The files of a saved dataset; of another folder those of a known kind, or with `format:` every file."""
    if files := dataset_files(folder, source.split, any_split, _kind):
        return files
    files = files_under(folder, source.split, any_split, _kind)
    if source.format == "auto" or not files:
        described = descriptions(files, _kind)
        files = known_files([file for file in files if file not in described], folder, _kind, REMEDIES)
    refuse_tables(files)
    return _of_split(files, source, any_split)


def folder_lines(config: DataConfig) -> list[str]:
    """What is read of each folder that is a source and neither one dataset nor a table, and what is not: a line each."""
    lines: list[str] = []
    for source in config.sources:
        paths = _paths(_place(source))
        is_folder = len(paths) == 1 and source.format == "auto" and _is_folder(paths[0]) and not is_delta_table(paths[0])
        if is_folder and not dataset_files(paths[0], source.split, True, _kind):
            lines += contents(files_under(paths[0], source.split, True, _kind), paths[0], _kind)
    return lines


def _kind(path: str) -> str:
    return _ending(path)[0]


def _refuse_unused(source: Source, format: str, path: str) -> None:
    """`DataError` where the source has a setting that a file of it cannot follow."""
    for setting, is_unused in (
        ("encoding", source.encoding != UTF_8 and format not in ENCODED),
        ("sheet", bool(source.sheet) and format != "xlsx"),
    ):
        if is_unused:
            raise DataError(
                f"data.sources: {display_name(path)!r} is {format}, which has no `{setting}`",
                hint=f"give the files that have one a source of their own, with `{setting}`",
            )


def _folder(path: str) -> str:
    """The folder of a local source: that of a file, or the one that a glob begins with."""
    whole = expanded(path)
    if not whole.exists():
        whole = Path(in_other_form(whole) or whole)
    if not whole.exists():
        fixed = list(takewhile(lambda part: not glob.has_magic(part), whole.parts))
        return str(Path(*fixed).absolute())
    return str(whole.absolute().parent)


def _local(path: str) -> list[str]:
    whole = expanded(path)
    if whole.exists():  # a name that only looks like a glob
        return [str(whole.absolute())]
    matches = glob.glob(str(whole), recursive=True)
    if not matches and (other := in_other_form(whole)):
        return _local(other)
    files = [Path(match).absolute() for match in matches]
    return without_markers(str(file) for file in files if not file.is_dir())


def _remote(uri: str) -> list[str]:
    """Matches of a URI; of `?`, the one before the options (`?region=…`) is no sign of a glob."""
    place, options = re.fullmatch(r"(.*?)(\?[a-z_]+=.*)?", uri, re.S).groups("")  # type: ignore[union-attr]
    scheme, rest = place.split("://", 1)
    parts = rest.split("/")
    fixed = next((number for number, part in enumerate(parts) if re.search(r"[*?\[]", part)), len(parts))
    base = f"{scheme}://{'/'.join(parts[:fixed])}"
    try:
        filesystem, root = filesystem_of(base + options)
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"data.sources: {shown(uri)!r} cannot be opened: {why(error, uri)}",
            hint="write spaces and other special letters of a URI as %20",
        ) from None
    if isinstance(filesystem, pafs.LocalFileSystem):
        raise ConfigError(f"data.sources: {shown(uri)!r} is a local file", hint="write its path, or file:///path")
    if fixed == len(parts):
        return [] if filesystem.get_file_info(root).type == pafs.FileType.NotFound else [uri]
    pattern = parts[fixed:]
    selector = pafs.FileSelector(root, recursive=len(pattern) > 1 or "**" in pattern, allow_not_found=True)
    root = root.rstrip("/")
    names = [info.path[len(root) + 1 :] for info in filesystem.get_file_info(selector) if info.type == pafs.FileType.File]
    base = base.rstrip("/")
    return without_markers(f"{base}/{quote(name)}{options}" for name in names if _fits(name.split("/"), pattern))


def _fits(parts: list[str], pattern: list[str]) -> bool:
    """As `glob` does it: `**` is any number of folders, and a leading dot is matched by a dot only."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or bool(parts and parts[0][:1] != "." and _fits(parts[1:], pattern))
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatchcase(parts[0], unquote(pattern[0])) and _fits(parts[1:], pattern[1:])


def _ending(path: str) -> tuple[str, str, str]:
    """The format that the ending of a file's name stands for, "" for none; the ending; and that of a compression."""
    file = without_query(path).rpartition("/")[2].lower()
    stem, dot, last = file.rpartition(".")
    compression = dot + last if dot + last in COMPRESSIONS else ""
    ending = stem.rpartition(".")[2] if compression else last
    return ENDINGS.get(ending, ""), ending, compression


def _format(path: str, source: Source) -> str:
    by_name, ending, compression = _ending(path)
    format = source.format if source.format != "auto" else by_name
    if not format:
        remedy = "say which with `format:`, for example `format: jsonl`, or match fewer files"
        raise DataError(
            f"data.sources: the ending of {path!r} is that of no known format", hint=REMEDIES.get(ending, remedy)
        )
    if compression and format in UNCOMPRESSED:
        raise DataError(
            f"data.sources: {path!r} is {format} in {compression}; only JSONL, JSON, CSV, text and HTML are read compressed",
            hint=f"unpack it: {format} files are compressed already",
        )
    return format
