"""The folder that a submitted job takes along, compared with the files that its run file names, before anything is sent."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from forge_ray.config.run import RunConfig
from forge_ray.data.read.sources import expand
from forge_ray.errors import ConfigError
from forge_ray.evaluate.general import place_of
from forge_ray.machine.ray_internals import ignore_file_of, package_limit, packaged_files

ZIP_ENTRY = 300  # bytes around a file in Ray's archive, which is not compressed: two headers with its name
SHARED = "put such files on the folder that all nodes share, and give their whole paths or URIs"
NAMED = 3  # files in a message


def require_complete(config: RunConfig, excludes: Sequence[str], folder: Path) -> None:
    """Raise `ConfigError` where a file that `config` names by a relative path would not be sent with `folder`, and where the
    folder is larger than a cluster accepts. Paths are relative to `folder`, the current one."""
    sizes = packaged_files(folder, excludes)
    missing = [(setting, path) for setting, path in _named(config) if _inside(path, folder) not in sizes]
    if missing:
        texts = [f"{_inside(path, folder) or path} ({_reason(path, folder)})" for _, path in missing[:NAMED]]
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise ConfigError(
            f"{missing[0][0]}: the job would not have {', '.join(texts)}{more}: it gets a copy of the current folder",
            hint=f"{SHARED}; RAY_RUNTIME_ENV_IGNORE_GITIGNORE=1 sends what .gitignore leaves out, up to"
            f" {package_limit() >> 20} MiB in all",
        )
    total, limit = sum(sizes.values()) + ZIP_ENTRY * len(sizes), package_limit()
    if total > limit:
        parts = Counter[str]()
        for path, size in sizes.items():
            parts[path.partition("/")[0]] += size
        largest = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in parts.most_common(NAMED))
        raise ConfigError(
            f"the current folder would be sent with {total / 2**20:.0f} MiB in {len(sizes)} files, and a cluster accepts"
            f" {limit >> 20} MiB; the largest are {largest}",
            hint=f"list what the job does not read in a file .rayignore (written like .gitignore); as for rows, {SHARED}",
        )


def _named(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Setting and absolute path of every file that the run file names by a relative path. Raises as `forge data prepare`
    does where a source matches no file."""
    sources = tuple(source for source in config.data.sources if _is_relative(source.path))
    for source in sources:
        if source.checksums and _is_relative(source.checksums):
            yield "data.sources.checksums", os.path.abspath(source.checksums)
    if sources:
        yield from (("data.sources", item.path) for item in expand(config.data.model_copy(update={"sources": sources})))
    if config.data.subject and _is_relative(config.data.subject.key_file):
        yield "data.subject.key_file", os.path.abspath(config.data.subject.key_file)
    yield from (("eval.safety", os.path.abspath(path)) for path in config.eval.safety if _is_relative(path))
    yield from (("eval.metrics", os.path.abspath(one.file)) for one in config.eval.metrics if _is_relative(one.file))
    if _is_relative(config.eval.json_schema):
        yield "eval.json_schema", os.path.abspath(config.eval.json_schema)
    if config.eval.general:
        yield from (("eval.general.rows", os.path.abspath(path)) for path in _files(place_of(config.eval.general)))
    for rule in config.data.curate:
        for place in getattr(rule, "against", ()):  # a dataset version matches no file
            yield from (("data.curate.against", os.path.abspath(path)) for path in _files(place))
    yield from (("base_model", os.path.abspath(path)) for path in _files(config.base_model))


def _files(place: str) -> list[str]:
    if not _is_relative(place):
        return []
    if os.path.isdir(place):
        return [str(path) for path in Path(place).rglob("*") if path.is_file()]
    return [place] if os.path.isfile(place) else [path for path in glob.glob(place, recursive=True) if os.path.isfile(path)]


def _is_relative(path: str) -> bool:
    return bool(path) and "://" not in path and not os.path.isabs(os.path.expanduser(path))


def _inside(path: str, folder: Path) -> str:
    """The path relative to the folder; "" outside of it."""
    relative = os.path.relpath(path, folder)
    return "" if relative.split(os.sep)[0] == os.pardir else Path(relative).as_posix()


def _reason(path: str, folder: Path) -> str:
    if not (inside := _inside(path, folder)):
        return "outside the current folder"
    if ignore_file := ignore_file_of(folder, inside):
        return f"left out by {ignore_file}"
    return "in a folder that is never sent" if os.path.exists(path) else "not there"
