"""A dataset that is not prepared: as large as somebody says, or as the files of its rows let one expect (`forge plan`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from forge_ray.config.run import RunConfig
from forge_ray.data.read.lines import filesystem_of
from forge_ray.data.read.sources import expand
from forge_ray.records import SplitStats

BYTES_PER_TOKEN = 4  # of rows as they lie in their files, names of columns included: English text has 4 to 5


@dataclass(frozen=True)
class Stated:
    """Every row is full, and every token of it is trained. `id`: what the numbers follow from, in place of a dataset's."""

    sequence_length: int
    splits: dict[str, SplitStats]
    id: str = ""

    @classmethod
    def of(cls, rows: int, sequence_length: int, assumption: str = "") -> Stated:
        tokens = rows * sequence_length
        train = SplitStats(
            num_records=rows,
            num_rows=rows,
            num_tokens=tokens,
            num_trained_tokens=tokens,
            rows_digest="",
            block_rows=1,
            shard_rows=(),
        )
        return cls(sequence_length, {"train": train}, assumption)


def stated(config: RunConfig, num_rows: int) -> Stated | None:
    """`num_rows` packed rows; 0: what the sizes of the sources let expect, where `base_model` is a folder of shapes alone,
    which has no tokenizer to count with, and None elsewhere. Raises `NotFound` for sources that match no file."""
    length = config.data.sequence_length
    if num_rows:
        return Stated.of(num_rows, length, f"{num_rows} rows, as stated")
    if not has_shapes_alone(Path(config.base_model)):
        return None
    num_bytes = sum(_size(file.path) for file in expand(config.data))
    share = 1 - config.data.splits.validation - config.data.splits.test
    rows = max(1, math.ceil(num_bytes * share / BYTES_PER_TOKEN / length))
    assumed = f"about: {num_bytes:,} bytes of sources, {BYTES_PER_TOKEN} a token; `--rows N` states the number"
    return Stated.of(rows, length, assumed)


def has_shapes_alone(folder: Path) -> bool:
    """Whether a folder has a model's configuration, and neither weights nor a tokenizer."""
    if not (folder / "config.json").is_file():
        return False
    return not any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "tokenizer*", "tekken.json"))


def _size(path: str) -> int:
    filesystem, inner = filesystem_of(path)
    return int(filesystem.get_file_info(inner).size or 0)
