"""What the folder of a run says of it, for a run that has no record yet (no torch)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from forge_ray.config.base import config_digest, resolved
from forge_ray.config.run import RunConfig
from forge_ray.errors import ForgeError
from forge_ray.records import hex_of
from forge_ray.store import paths
from forge_ray.store.files import MANIFEST, Store

MICRO_BATCH = "micro-batch.json"
CONFIG = "config-"  # begins the name of the run file as resolved; one file for each that led to this run


def write_config(store: Store, run: str, config: RunConfig) -> None:
    """The run file as resolved; what is written already stays."""
    text = json.dumps(resolved(config), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    store.write_once(paths.run(run, f"{CONFIG}{hex_of(config_digest(config))[:16]}.json"), text.encode())


def config_path(store: Store, run: str) -> str | None:
    """Where the resolved run file lies, the first by name; None where the run has not started."""
    names = (path for path in store.list(paths.run(run)) if path.rsplit("/", 1)[-1].startswith(CONFIG))
    return next(names, None)


def config_of(store: Store, run: str) -> dict[str, Any]:
    """The resolved run file; empty where the run has not started."""
    path = config_path(store, run)
    config: dict[str, Any] = store.read_json(path) if path else {}
    return config


def keep_micro_batch(store: Store, run: str, size: int) -> int:
    """Packed rows per forward pass that the run begins with (`train.micro_batch_size=auto`), or those that it began with."""
    store.create(paths.run(run, MICRO_BATCH), json.dumps({"micro_batch_size": size}).encode())
    return micro_batch_of(store, run)


def micro_batch_of(store: Store, run: str) -> int:
    """What `keep_micro_batch` wrote; 0 where the run file states the number, or the run has not started."""
    path = paths.run(run, MICRO_BATCH)
    return int(store.read_json(path)["micro_batch_size"]) if store.exists(path) else 0


def positions(store: Store, run: str) -> Iterator[dict[str, Any]]:
    """The positions that the published checkpoints hold, newest first, without those that cannot be read."""
    manifests = [path for path in store.list(paths.checkpoints(run), recursive=True) if path.endswith(f"/{MANIFEST}")]
    for path in reversed(manifests):
        try:
            yield store.read_json(path)["position"]
        except (ForgeError, LookupError, TypeError):
            continue
