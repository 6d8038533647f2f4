"""Prompts and answers that endpoints keep where `deploy.keep_answers` says so.

    answers/<last day>/<replica>-<n>.jsonl     one answer a line, in batches that are written once

The folder says on which day (YYYY-MM-DD, UTC) a batch is kept for the last time, whatever a later run file says; where all
of them together are too large, those with the nearest last day go first. Folders and files are for their owner alone, also
in a store that a group shares; on an object store its own policy decides. No replica writes a batch again, so that a line
that was erased stays away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from forge_ray.errors import NotFound
from forge_ray.records import Frozen
from forge_ray.store import paths
from forge_ray.store.files import Store

PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600


class KeptChoice(Frozen):
    """One answer, as a message in OpenAI's words, and why it ended."""

    message: dict[str, Any]
    finish_reason: str


class KeptAnswer(Frozen):
    """One request and everything that was answered. `id`: what the response names itself (`chatcmpl-…`, `resp_…`);
    `messages` and `tools` in OpenAI's words, as the model's template saw them; `user`: the request's own field; `at`: when
    the answer ended, in UTC."""

    id: str
    request_id: str
    at: str
    deployment: str
    key: str
    model: str
    model_version: str
    user: str
    metadata: dict[str, str]
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    choices: tuple[KeptChoice, ...]


def batches(store: Store) -> list[str]:
    """Every batch, the nearest last day first."""
    return [path for path in store.list(paths.answers(), recursive=True) if path.endswith(".jsonl")]


def read_batch(store: Store, path: str) -> list[str]:
    """The lines of a batch; none where it was removed meanwhile."""
    try:
        return [line.decode() for line in store.read(path).splitlines()]  # of bytes: U+2028 in an answer ends no line
    except NotFound:
        return []


def write_batch(store: Store, path: str, lines: list[str]) -> None:
    """Publish a batch, for its owner alone from the first byte on: its folder is made private before."""
    if store.is_local:
        for folder in (paths.answers(), path.rpartition("/")[0]):
            place = store.local(folder)
            place.mkdir(parents=True, exist_ok=True)
            place.chmod(PRIVATE_FOLDER)
    store.write(path, "".join(line + "\n" for line in lines).encode())
    if store.is_local:
        store.local(path).chmod(PRIVATE_FILE)


def kept_answers(store: Store) -> Iterator[KeptAnswer]:
    """Every answer that is kept."""
    for path in batches(store):
        for line in read_batch(store, path):
            yield KeptAnswer.model_validate_json(line)


def remove_lines(store: Store, removes: Callable[[KeptAnswer], bool]) -> int:
    """Take answers out of their batches; a batch without any other is deleted. Returns how many."""
    num_removed = 0
    for path in batches(store):
        lines = read_batch(store, path)
        kept = [line for line in lines if not removes(KeptAnswer.model_validate_json(line))]
        if len(kept) == len(lines):
            continue
        num_removed += len(lines) - len(kept)
        if kept:
            write_batch(store, path, kept)
        else:
            store.delete(path)
    return num_removed


def last_day(path: str) -> str:
    """The last day, YYYY-MM-DD, on which a batch is kept."""
    return path.split("/")[1]


def remove_old(store: Store, today: str, max_bytes: int | None = None) -> dict[str, int]:
    """Delete batches whose last day is over, then those with the nearest one until the rest fits into `max_bytes`. Returns
    the number of answers by reason: `days`, `size`."""
    removed = {"days": 0, "size": 0}
    rest = []
    for path in batches(store):
        if last_day(path) < today:
            removed["days"] += _delete(store, path)
        else:
            rest.append((path, max(0, store.size(path))))
    size = sum(one for _, one in rest)
    for path, one in rest:
        if max_bytes is None or size <= max_bytes:
            break
        removed["size"] += _delete(store, path)
        size -= one
    return removed


def _delete(store: Store, path: str) -> int:
    num_lines = len(read_batch(store, path))
    store.delete(path)
    return num_lines
