"""Which split a file belongs to, by its name, as Hugging Face's hub lays out a dataset: training on the test split of one's
own data must be a decision."""

from __future__ import annotations

import re
from collections.abc import Iterable

from forge_ray.data.read.lines import without_query
from forge_ray.data.read.places import display_name
from forge_ray.errors import DataError

TRAIN = ("train", "training")
HELD_OUT = ("test", "testing", "valid", "validation", "val", "dev", "eval", "evaluation")
ALL = "all"
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


def split_named(path: str) -> str:
    """The split that a file's name, or else that of its folder, tells: `train-00000-of-00002.parquet`, `chats_test.jsonl`,
    `validation/0000.parquet`; "" where neither does."""
    folder, _, file = without_query(path).rpartition("/")
    stem = file.partition(".")[0]
    shard = SHARD.fullmatch(stem)
    name = shard[1] if shard else stem
    words = re.split(r"[-_ ]+", name.lower())
    if shard and any(word in TRAIN + HELD_OUT for word in words):
        return name
    for word in (words[0], words[-1]):
        if word in TRAIN + HELD_OUT:
            return word
    parent = folder.rpartition("/")[2]
    return parent if parent.lower() in TRAIN + HELD_OUT else ""


def is_held_out(split: str) -> bool:
    return any(word in HELD_OUT for word in re.split(r"[-_ ]+", split.lower()))


def of_split(paths: list[str], split: str, place: str) -> list[str]:
    """The files of the split that a source asks for; all of them where they are not those of several splits."""
    by_split: dict[str, list[str]] = {}
    for path in paths:
        by_split.setdefault(split_named(path), []).append(path)
    named = sorted(name for name in by_split if name)
    if split == ALL or (not split and (len(named) < 2 or not any(map(is_held_out, named)))):
        return paths
    return by_split[chosen(named, split, place)]


def chosen(splits: Iterable[str], split: str, place: str) -> str:
    """`split`, if it is one of `splits`; else `DataError` with the list."""
    names = list(splits)
    if split in names and split:
        return split
    listed = ", ".join(names) or "none"
    if split:
        raise DataError(
            f"data.sources: {display_name(place)!r} has no split {split!r}",
            hint=f"its splits are: {listed}; or `split: all`",
        )
    first = next((name for name in names if not is_held_out(name)), names[0])
    raise DataError(
        f"data.sources: {display_name(place)!r} holds several splits ({listed}), and would be trained on as a whole",
        hint=f"choose one with `split: {first}`, or take all of them with `split: all`",
    )
