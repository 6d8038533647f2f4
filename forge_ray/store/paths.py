"""Where things lie in a store, spelt once: paths relative to its root, as pure functions of ids.

Where a function takes `names`, they are what lies below its folder: `run("run_1", "metrics.jsonl")`. What else a folder
holds is the matter of the module that writes it, as long as no other one reads it.
"""

from __future__ import annotations

RECORDS, EVENTS, AUDIT, SIGNATURES, TOMBSTONES = "records", "events", "audit", "signatures", "tombstones"
INDEX_FILE, MLFLOW_FILE = "catalog.sqlite", "mlflow.db"
CHECKPOINT_KEY = "keys/checkpoints.key"
STEP = "step-"
ENDPOINTS = "endpoints"  # in the work area


def _below(*names: str) -> str:
    return "/".join(names)


# ---------------------------------------------------------------- facts


def of_kind(kind: str) -> str:
    """The folder of all records of a kind (`Record.kind`)."""
    return _below(RECORDS, kind)


def record(kind: str, identifier: str) -> str:
    return _below(RECORDS, kind, f"{identifier}.json")


def event(name: str) -> str:
    return _below(EVENTS, name)


def audit(*names: str) -> str:
    return _below(AUDIT, *names)


def signatures(identifier: str, *names: str) -> str:
    """Envelopes beside the record of that id."""
    return _below(SIGNATURES, identifier, *names)


def erasure(*names: str) -> str:
    """Certificate and lists of an erasure are in a folder of its id; `<er>.json` is of versions without `tombstone`."""
    return _below("erasures", *names)


def tombstone(*names: str) -> str:
    """Tombstones, in files that are written once: `<er>-<digest>.json`."""
    return _below(TOMBSTONES, *names)


def environment(digest: str) -> str:
    """Of a lock, by its digest with or without `sha256:`."""
    return _below("environments", f"{digest.removeprefix('sha256:')}.json")


# ---------------------------------------------------------------- datasets


def dataset(*names: str) -> str:
    """The folder of a dataset version; without an id, that of all."""
    return _below("datasets", *names)


def records(identifier: str, split: str) -> str:
    """The folder of a split's records in a dataset version."""
    return dataset(identifier, "records", split)


def packed(identifier: str, split: str) -> str:
    """The folder of a split's packed rows."""
    return dataset(identifier, "packed", split)


def shard(identifier: str, split: str, number: int) -> str:
    return _below(packed(identifier, split), f"shard-{number:05d}.parquet")


def index(identifier: str, *names: str) -> str:
    """Which blocks of a dataset version hold which record; derived."""
    return _below("index", identifier, *names)


def card(identifier: str, *names: str) -> str:
    return _below("cards", identifier, *names)


def reference(identifier: str, *names: str) -> str:
    """What frozen models make of the packed rows of a dataset version; derived."""
    return _below("references", identifier, *names)


def image(digest: str) -> str:
    """Of an image that records name, by its digest with or without `sha256:`."""
    return _below("images", digest.removeprefix("sha256:"))


def work(*names: str) -> str:
    """What may be removed: finished pieces of dataset builds, reproductions that run, leases of endpoints."""
    return _below("work", *names)


def endpoint(deployment: str) -> str:
    """The lease of an endpoint, which its coordinator renews."""
    return work(ENDPOINTS, f"{deployment}.json")


# ---------------------------------------------------------------- runs


def run(*names: str) -> str:
    """The folder of a run; without an id, that of all."""
    return _below("runs", *names)


def result(identifier: str) -> str:
    return run(identifier, "result.json")


def export(identifier: str, *names: str) -> str:
    """The weights that a run ends with."""
    return run(identifier, "export", *names)


def checkpoints(identifier: str, *names: str) -> str:
    return run(identifier, "checkpoints", *names)


def step(number: int) -> str:
    """The name of whatever belongs to a step; names sort by number."""
    return f"{STEP}{number:08d}"


def checkpoint(identifier: str, number: int, *names: str) -> str:
    return checkpoints(identifier, step(number), *names)


def attempt(identifier: str, number: int) -> str:
    return run(identifier, "attempts", f"{number:06d}.json")


def incident(identifier: str, number: int) -> str:
    return run(identifier, "incidents", f"{number:06d}.json")


def validation(identifier: str, number: int) -> str:
    """The validation of a step."""
    return run(identifier, "validations", f"{number:08d}.json")


# ---------------------------------------------------------------- models, reports, use


def model(identifier: str, *names: str) -> str:
    return _below("models", identifier, *names)


def report(identifier: str, *names: str) -> str:
    return _below("evals", identifier, *names)


def items(identifier: str) -> str:
    """Every answer of an evaluation."""
    return report(identifier, "items.jsonl")


def answers(*names: str) -> str:
    """Prompts and answers that endpoints keep, in batches per day and replica: `answers(day, name)`."""
    return _below("answers", *names)


def usage(*names: str) -> str:
    """Lines per day and replica: `usage(day, name)`."""
    return _below("usage", *names)
