"""The digests that a source's checksums file lists, in sha256sum's format."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from urllib.parse import quote, unquote

import pyarrow.fs as pafs

from forge_ray.config.data import Source
from forge_ray.data.read.lines import filesystem_of, open_file
from forge_ray.data.read.places import display_name, refuse_secrets, require_regular
from forge_ray.errors import DataError, NotFound
from forge_ray.store.home import expanded
from forge_ray.store.uris import require_storage


def checksums_of(source: Source, paths: list[str]) -> dict[str, str]:
    """Digests that the source's checksums file lists; every file of the source must be in it, and every listed one there."""
    if "://" in source.checksums:
        refuse_secrets(source.checksums)
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
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), start=1):  # a name may hold other line ends
        line = line.removesuffix("\r")
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
    sums = _in_form_of(paths, sums)
    unlisted = [path for path in paths if path not in sums]
    missing = [path for path in sums if path not in paths and not _is_there(path)]
    for what, files in (("has no line for", unlisted), ("lists what is not there:", missing)):
        if files:
            examples = ", ".join(display_name(file) for file in sorted(files)[:5])
            raise DataError(
                f"data.sources: {source.checksums!r} {what} {examples}{' …' if len(files) > 5 else ''} ({len(files)} files)",
                hint="restore the files, or write the checksums again if the change is meant",
            )
    return sums


def _in_form_of(paths: list[str], sums: dict[str, str]) -> dict[str, str]:
    """`sums` with the names of `paths` where the two differ in their Unicode form alone."""
    by_form = {unicodedata.normalize("NFC", unquote(path)): path for path in paths if path not in sums}
    return {by_form.get(unicodedata.normalize("NFC", unquote(path)), path): digest for path, digest in sums.items()}


def _beside(folder: str, options: str, name: str) -> str:
    if "://" in folder:
        return f"{folder}/{quote(name.removeprefix('./'))}" + (f"?{options}" if options else "")
    return str(Path(folder, name).absolute()) if ".." not in name else str(Path(folder, name).resolve())


def _is_there(path: str) -> bool:
    filesystem, inner = filesystem_of(path)
    return bool(filesystem.get_file_info(inner).type == pafs.FileType.File)
