"""Which files a run file's sources name: paths, globs, folders of saved datasets, URIs; and their formats."""

from __future__ import annotations

import glob
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow.fs as pafs

from forge_ray.config.data import DataConfig, Source
from forge_ray.data.read.lines import COMPRESSIONS, filesystem_of, is_inside, open_file, without_query
from forge_ray.errors import ConfigError, DataError, NotFound
from forge_ray.store.home import expanded
from forge_ray.store.uris import has_secret, require_storage, shown, why

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
}
UNCOMPRESSED = ("parquet", "arrow", "pdf", "docx")  # compressed inside, and read from several places at once
KINDS_OF_FILES = {
    0: "is a link to nothing",
    stat.S_IFIFO: "is a pipe, not a regular file",
    stat.S_IFSOCK: "is a socket, not a regular file",
    stat.S_IFCHR: "is a device, not a regular file",
    stat.S_IFBLK: "is a device, not a regular file",
}


@dataclass(frozen=True)
class ListedFile:
    """One file of a source. `name` is what the user wrote, for the record; `sha256` is from its checksums file, or ""."""

    path: str
    name: str
    format: str
    source: int
    sha256: str = ""
    folder: str = ""  # of the source, on a local file system


def expand(config: DataConfig) -> list[ListedFile]:
    """Every source file once, sorted; a file of two sources belongs to the first."""
    listed: dict[str, ListedFile] = {}
    for number, source in enumerate(config.sources):
        paths, folder = _matches(source)
        sums = _checked(source, paths) if source.checksums else {}
        for path in paths:
            if folder:
                require_regular(path, folder)
            item = ListedFile(path, _name(path), _format(path, source), number, sums.get(path, ""), folder)
            first = listed.setdefault(path, item)
            if not first.sha256:
                listed[path] = replace(first, sha256=item.sha256)
    return [listed[path] for path in sorted(listed)]


def _matches(source: Source) -> tuple[list[str], str]:
    """The files of a source, and its folder on a local file system, out of which no link may lead."""
    path = source.path
    if "://" in path:
        _refuse_secrets(path)
        require_storage(path, "data.sources")
    if path.startswith("file://"):
        path = unquote(path.removeprefix("file://"))
    paths = sorted(_remote(path) if "://" in path else _local(path))
    if not paths:
        hint = "globs are relative to the current folder"
        raise NotFound(f"data.sources: no file matches {shown(source.path)!r}", hint=hint)
    filesystem, inner = filesystem_of(paths[0])
    folder = "" if "://" in path else _folder(path)
    if len(paths) == 1 and filesystem.get_file_info(inner).type == pafs.FileType.Directory:  # globs match files only
        return list(_saved_dataset(paths[0])), folder and paths[0]
    return paths, folder


def _folder(path: str) -> str:
    """The folder of a local source: that of a file, or the one that a glob begins with."""
    whole = expanded(path)
    if not whole.exists():
        fixed = list(takewhile(lambda part: not glob.has_magic(part), whole.parts))
        return str(Path(*fixed).absolute())
    return str(whole.absolute().parent)


def require_regular(path: str, folder: str) -> None:
    """Refuse what is not a regular file of the folder: rows come from elsewhere, and a link among them from anywhere."""
    target = os.path.realpath(path)
    if not is_inside(path, folder):
        raise DataError(
            f"data.sources: {_name(path)!r} is a link to {target!r}, which is not in the folder of its source ({folder})",
            hint=f"name {target} itself as a source, or put a copy in place of the link",
        )
    kind = stat.S_IFMT(os.stat(path).st_mode) if os.path.exists(path) else 0
    if kind != stat.S_IFREG:
        what = KINDS_OF_FILES.get(kind, "is not a regular file")
        raise DataError(f"data.sources: {_name(path)!r} {what}", hint="name regular files, or match fewer files")


def _refuse_secrets(uri: str) -> None:
    if has_secret(uri):
        raise ConfigError(
            "data.sources: a URI carries a user name or password, and sources are recorded with the dataset",
            hint="set them in the environment, for S3 as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
        )


def _local(path: str) -> list[str]:
    whole = expanded(path)
    if whole.exists():  # a name that only looks like a glob
        return [str(whole.absolute())]
    matches = [Path(match).absolute() for match in glob.glob(str(whole), recursive=True)]
    return [str(match) for match in matches if not match.is_dir()]


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
    return [f"{base}/{quote(name)}{options}" for name in names if _fits(name.split("/"), pattern)]


def _fits(parts: list[str], pattern: list[str]) -> bool:
    """As `glob` does it: `**` is any number of folders, and a leading dot is matched by a dot only."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return _fits(parts, pattern[1:]) or bool(parts and parts[0][:1] != "." and _fits(parts[1:], pattern))
    if not parts or (parts[0].startswith(".") and not pattern[0].startswith(".")):
        return False
    return fnmatchcase(parts[0], unquote(pattern[0])) and _fits(parts[1:], pattern[1:])


def _saved_dataset(folder: str) -> Iterator[str]:
    """Files of a Dataset or DatasetDict that Hugging Face's `save_to_disk` wrote."""
    if _exists(folder, "state.json"):
        for file in _json(folder, "state.json")["_data_files"]:
            path = _inside(folder, _own(folder, file["filename"]))
            if not _exists(folder, file["filename"]):
                raise NotFound(
                    f"data.sources: {path!r} is missing, which state.json lists", hint="copy the whole folder again"
                )
            yield path
    elif _exists(folder, "dataset_dict.json"):
        for split in _json(folder, "dataset_dict.json")["splits"]:
            yield from _saved_dataset(_inside(folder, _own(folder, split)))
    else:
        raise DataError(
            f"data.sources: {folder!r} is a folder, and holds no dataset that `save_to_disk` wrote",
            hint=f"name its files, for example {folder.rstrip('/')}/**/*.jsonl",
        )


def _json(folder: str, name: str) -> dict[str, Any]:
    if "://" not in folder:
        require_regular(_inside(folder, name), folder)
    with open_file(_inside(folder, name)) as stream:
        value: dict[str, Any] = json.loads(stream.read())
    return value


def _inside(folder: str, name: str) -> str:
    """The path of a file in a folder, which may be a URI with options."""
    place, mark, options = folder.partition("?") if "://" in folder else (folder, "", "")
    return f"{place.rstrip('/')}/{quote(name) if '://' in folder else name}{mark}{options}"


def _own(folder: str, name: str) -> str:
    """A name that a saved dataset gives, which may come from elsewhere: of something in its own folder."""
    if not name or name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
        raise DataError(
            f"data.sources: {folder!r} names {name!r}, which leads out of it",
            hint="save the dataset again with save_to_disk",
        )
    return name


def _exists(folder: str, name: str) -> bool:
    filesystem, inner = filesystem_of(_inside(folder, name))
    return bool(filesystem.get_file_info(inner).type == pafs.FileType.File)


def _name(path: str) -> str:
    return path.removeprefix(str(Path.cwd()) + "/")


def _format(path: str, source: Source) -> str:
    file = without_query(path).rpartition("/")[2].lower()
    stem, dot, last = file.rpartition(".")
    compressed = dot + last in COMPRESSIONS
    ending = stem.rpartition(".")[2] if compressed else last
    format = source.format if source.format != "auto" else ENDINGS.get(ending, "")
    if not format:
        raise DataError(
            f"data.sources: the ending of {path!r} is that of no known format",
            hint="say which with `format:`, for example `format: jsonl`, or match fewer files",
        )
    if compressed and format in UNCOMPRESSED:
        raise DataError(
            f"data.sources: {path!r} is {format} in {dot + last}; only JSONL, JSON, CSV, text and HTML are read compressed",
            hint=f"unpack it: {format} files are compressed already",
        )
    return format


def _checked(source: Source, paths: list[str]) -> dict[str, str]:
    """Digests that the source's checksums file lists; every file of the source must be in it, and every listed one there."""
    if "://" in source.checksums:
        _refuse_secrets(source.checksums)
        require_storage(source.checksums, "data.sources.checksums")
    where = source.checksums.removeprefix("file://")
    where = where if "://" in where else str(expanded(where).absolute())
    if "://" not in where and os.path.lexists(where):
        require_regular(where, str(Path(where).parent))
    try:
        with open_file(where) as stream:
            text = stream.read().decode()
    except FileNotFoundError:
        raise NotFound(
            f"data.sources: no checksums file {source.checksums!r}", hint="write it: sha256sum * > SHA256SUMS"
        ) from None
    folder, _, options = where.partition("?") if "://" in where else (where, "", "")
    folder = folder.rpartition("/")[0]
    sums: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        listed = re.fullmatch(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)", line)
        if listed is None:
            if line.strip():
                raise DataError(
                    f"data.sources: line {number} of {source.checksums!r} is not a sha256 and a file name: {line[:80]!r}",
                    hint="write it with sha256sum, not with another digest",
                )
            continue
        escaped, digest, name = listed.groups()
        if escaped:  # sha256sum's own way of writing a newline in a name
            name = name.replace("\\n", "\n").replace("\\\\", "\\")
        sums[_beside(folder, options, name)] = digest.lower()
    unlisted = [path for path in paths if path not in sums]
    missing = [path for path in sums if path not in paths and not _is_there(path)]
    for what, files in (("has no line for", unlisted), ("lists what is not there:", missing)):
        if files:
            examples = ", ".join(_name(file) for file in sorted(files)[:5])
            raise DataError(
                f"data.sources: {source.checksums!r} {what} {examples}{' …' if len(files) > 5 else ''} ({len(files)} files)",
                hint="restore the files, or write the checksums again if the change is meant",
            )
    return sums


def _beside(folder: str, options: str, name: str) -> str:
    if "://" in folder:
        return f"{folder}/{quote(name.removeprefix('./'))}" + (f"?{options}" if options else "")
    return str(Path(folder, name).absolute()) if ".." not in name else str(Path(folder, name).resolve())


def _is_there(path: str) -> bool:
    filesystem, inner = filesystem_of(path)
    return bool(filesystem.get_file_info(inner).type == pafs.FileType.File)
