"""The settings of a build: what decides its records, its packed rows, and the version that it makes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from forge_ray.config.base import resolved
from forge_ray.config.data import DataConfig
from forge_ray.data.dataset.version import FORMAT, tokenizer_digest
from forge_ray.data.read.ingest import IndexedFile
from forge_ray.data.tokens.equality import Proof
from forge_ray.data.tokens.fast import versions
from forge_ray.records import ModelVersion, digest
from forge_ray.store.files import Store

Progress = Callable[[float, float, str], None]


def silent(done: float, total: float, text: str) -> None:
    """No one watches."""


ENCODING = 3  # how files become rows and rows tokens: what an older one made of the same files is made again


@dataclass(frozen=True)
class BuildSpec:
    """One build of a dataset version: of which files, with whose tokenizer, in which store. All its stages share it."""

    name: str
    config: DataConfig
    base: ModelVersion
    store: Store
    sources: list[IndexedFile]
    tombstones: str  # their name at the start of the build; "" where there are none
    progress: Progress = silent
    mark: str = ""  # gone from the work area where another command has emptied it: `work.mark`
    proof: Proof | None = None  # of the fast encoder; None where nobody asks for one

    @property
    def input_digest(self) -> str:
        return input_digest(self.config, self.sources, tokenizer_digest(self.base), self.tombstones)

    @cached_property
    def row_settings(self) -> str:
        """What decides whether and how a row becomes tokens, but for its source's own settings (`source_settings`)."""
        value = settings_of(self.config)
        for key in ("sources", "block_rows", "max_invalid_fraction"):
            value.pop(key)
        return digest([FORMAT, ENCODING, value, tokenizer_digest(self.base), *filter(None, [self.tombstones])])

    @property
    def left(self) -> str | None:
        """Characters whose texts the fast encoder leaves to the reference; None where it is not used."""
        return None if self.proof is None or self.proof.difference else self.proof.left

    @property
    def token_settings(self) -> str:
        """What names pieces that hold tokens. Another encoder makes the same ones, unless it has an error; then none of its
        pieces may be taken for one of the reference's."""
        return self.row_settings if self.left is None else digest([self.row_settings, versions(), self.left])


@dataclass(frozen=True)
class Segment:
    """The per-record rules first..last-1 of the run file, up to a rule over all records (`barrier`), or to the end."""

    first: int
    last: int
    barrier: int | None
    indexes: dict[int, str] = field(default_factory=dict)  # rule → work file that it needs
    tombstones: str = ""  # their name; "" where there are none
    mark: str = ""  # of the build
    left: str | None = None  # as in `BuildSpec`


def segments(config: DataConfig) -> Iterator[Segment]:
    """The rules of the run file, cut behind each rule that looks at all records at once."""
    first = 0
    for number, rule in enumerate(config.curate):
        if rule.rule in ("exact_duplicates", "near_duplicates"):
            yield Segment(first, number, number)
            first = number + 1
    yield Segment(first, len(config.curate), None)


def input_digest(config: DataConfig, sources: list[IndexedFile], tokenizer: str, tombstones: str) -> str:
    """What decides a dataset, known before it is built. `tombstones` is their name, "" where there are none."""
    files = sorted((source.source, source.sha256, *filter(None, [source.columns])) for source in sources)
    return digest([FORMAT, ENCODING, settings_of(config), files, tokenizer, *filter(None, [tombstones])])


def settings_of(config: DataConfig) -> dict[str, Any]:
    """The settings without places: where a source lies and what it is called change no record."""
    value = resolved(config)
    for source in value["sources"]:
        for key in ("path", "name", "checksums"):
            source.pop(key)
    return value


def source_settings(config: DataConfig, number: int) -> dict[str, Any]:
    """What a source adds; how often its records are used is decided after they were read."""
    value: dict[str, Any] = settings_of(config)["sources"][number]
    return {key: item for key, item in value.items() if key not in ("epochs", "weight")}
