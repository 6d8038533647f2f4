"""Resumable checkpoints: written aside, hashed, published in one rename, verified before anything is unpickled (level 3).

    runs/<id>/checkpoints/step-00000120/{engine files…, rng-00000.pt, MANIFEST.json}

The manifest holds the files with their sha256 and the position: step, samples seen, and digests of config, base and dataset.
Neither Ray nor DeepSpeed writes atomically or checks what it reads; whatever has no manifest that verifies does not exist.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import torch
import torch.distributed as dist

from forge_ray.errors import ForgeError, StoreError, TrainingError
from forge_ray.records import FileEntry, canonical_json
from forge_ray.store import MANIFEST, Store, hash_dir, replace_dir, sync_tree, verify_files
from forge_ray.train.context import Context, agree
from forge_ray.train.engine import TrainEngine

logger = logging.getLogger("forge_ray")


@dataclass(frozen=True)
class Position:
    """Where a run is, and what it is a run of. `samples_seen` is the whole state of the data."""

    step: int
    samples_seen: int
    run: str
    config_digest: str
    dataset: str
    base_digest: str
    engine: str
    zero_stage: int
    world_size: int


def folder_of(run: str) -> str:
    return f"runs/{run}/checkpoints"


def save(engine: TrainEngine, store: Store, position: Position, context: Context, keep: int) -> str:
    """Collective. Returns the path of the published checkpoint inside the store."""
    relative = f"{folder_of(position.run)}/step-{position.step:08d}"
    aside = agree(f"{folder_of(position.run)}/.tmp-{position.step:08d}-{os.getpid()}", context)
    folder = store.local(aside) if store.is_local else Path(tempfile.mkdtemp(prefix="forge-checkpoint-"))
    folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    engine.save(folder)
    torch.save(rng_state(), folder / f"rng-{context.rank:05d}.pt")
    dist.barrier()
    if store.is_local:
        if context.is_first:
            _write_manifest(folder, hash_dir(folder), position)
            sync_tree(folder)
            replace_dir(folder, store.local(relative))
    else:
        _upload(folder, store, relative, position, context)
    dist.barrier()
    if context.is_first:
        for old in steps(store, position.run)[keep:]:
            store.delete_dir(f"{folder_of(position.run)}/step-{old:08d}")
    return relative


def _write_manifest(folder: Path, files: tuple[FileEntry, ...], position: Position) -> None:
    (folder / MANIFEST).write_bytes(_manifest(files, position))


def _manifest(files: tuple[FileEntry, ...], position: Position) -> bytes:
    return canonical_json({"files": [entry.model_dump() for entry in files], "position": asdict(position)})


def _upload(folder: Path, store: Store, relative: str, position: Position, context: Context) -> None:
    """Object stores have no rename: every rank puts its files, and the manifest comes last."""
    mine = hash_dir(folder)
    for entry in mine:
        target = store.path(f"{relative}/{entry.path}")
        store.filesystem.create_dir(target.rsplit("/", 1)[0], recursive=True)
        pafs.copy_files(str(folder / entry.path), target, destination_filesystem=store.filesystem)
    parts: list[Any] = [None] * context.world_size
    dist.all_gather_object(parts, [entry.model_dump() for entry in mine])
    if context.is_first:
        files = {entry["path"]: FileEntry.model_validate(entry) for part in parts for entry in part}
        store.write(f"{relative}/{MANIFEST}", _manifest(tuple(files[path] for path in sorted(files)), position))
    shutil.rmtree(folder, ignore_errors=True)


def steps(store: Store, run: str) -> list[int]:
    """Steps of the published checkpoints, newest first."""
    paths = store.list(folder_of(run), recursive=True)
    published = (path.split("/")[-2] for path in paths if path.endswith("/" + MANIFEST))
    return sorted((int(name.removeprefix("step-")) for name in published if name.startswith("step-")), reverse=True)


def find(store: Store, run: str) -> Position | None:
    """The newest checkpoint that verifies; a torn or corrupted one is skipped with its reason in the log."""
    for step in steps(store, run):
        relative = f"{folder_of(run)}/step-{step:08d}"
        try:
            verify_files(store.fetch_dir(relative, verify=False), store.files(relative))
            return Position(**store.read_json(f"{relative}/{MANIFEST}")["position"])
        except (StoreError, KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
            reason = error.message if isinstance(error, ForgeError) else f"{type(error).__name__}: {error}"
            logger.warning("checkpoint %s is skipped: %s", relative, reason)
    return None


def restore(engine: TrainEngine, store: Store, expected: Position, context: Context) -> Position | None:
    """Collective: load the newest good checkpoint of the run, if there is one; returns its position."""
    found: Position | None = agree(find(store, expected.run) if context.is_first else None, context)
    if found is None:
        return None
    check_compatible(found, expected)
    folder = store.fetch_dir(f"{folder_of(found.run)}/step-{found.step:08d}", verify=not store.is_local)
    engine.load(folder)
    rng = folder / f"rng-{context.rank:05d}.pt"
    if rng.is_file():  # absent for the ranks that a larger world has more
        set_rng_state(torch.load(rng, weights_only=True))
    dist.barrier()
    return found


def check_compatible(found: Position, expected: Position) -> None:
    """Resume is a contract: raise rather than continue another run's state."""
    for name in ("config_digest", "dataset", "base_digest", "engine", "zero_stage"):
        if getattr(found, name) != getattr(expected, name):
            raise TrainingError(
                f"checkpoint at step {found.step} of {found.run} has {name}={getattr(found, name)!r},"
                f" this run has {getattr(expected, name)!r}",
                hint="the run folder holds another run's checkpoint: move it away",
            )
    if found.world_size != expected.world_size and found.zero_stage > 0:
        raise TrainingError(
            f"checkpoint at step {found.step} was written by {found.world_size} workers at ZeRO stage {found.zero_stage},"
            f" which cannot be loaded by {expected.world_size}",
            hint=f"set train.scaling.num_workers={found.world_size}; stage 0 resumes on any number",
        )


def rng_state() -> dict[str, Any]:
    """Python, numpy, torch and every device: DeepSpeed saves none of them."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def seed_all(seed: int, rank: int) -> None:
    """Each rank its own stream (dropout), all from one seed."""
    random.seed(seed * 1_000_003 + rank)
    np.random.seed((seed * 1_000_003 + rank) % 2**32)
    torch.manual_seed(seed * 1_000_003 + rank)
