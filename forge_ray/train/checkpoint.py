"""Resumable checkpoints: written aside, hashed, published in one rename, verified before anything is unpickled (level 3).

    runs/<id>/checkpoints/step-00000120/{engine files…, rng-00000.pt, MANIFEST.json}

The manifest holds the files with their sha256 and the position: step, samples seen, the digest of their order, digests of
config, base and dataset, the attempt that wrote it; then its parent's digest and its own. Neither Ray nor DeepSpeed writes
atomically or checks what it reads; whatever has no manifest that verifies does not exist.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import torch
import torch.distributed as dist

from forge_ray.errors import ForgeError, StoreError, TrainingError
from forge_ray.records import FileEntry, canonical_json, digest
from forge_ray.store import MANIFEST, Store, hash_dir, replace_dir, sync_tree, verify_files
from forge_ray.train import attempts
from forge_ray.train.context import Context, agree
from forge_ray.train.engine import TrainEngine

logger = logging.getLogger("forge_ray")
ROOM = 1.2  # times the size of the last checkpoint must be free before one is written


@dataclass(frozen=True)
class Position:
    """Where a run is, and what it is a run of. `samples_seen` is the whole state of the data; `order_digest` the chain
    over the rows used so far (`Order.link`)."""

    step: int
    samples_seen: int
    order_digest: str
    attempt: int
    run: str
    config_digest: str
    dataset: str
    base_digest: str
    engine: str
    zero_stage: int
    world_size: int


IDENTITY = ("run", "config_digest", "dataset", "base_digest", "engine", "zero_stage")


@dataclass(frozen=True)
class Saved:
    """A published checkpoint: its path in the store; or why there is none."""

    path: str = ""
    problem: str = ""


def folder_of(run: str) -> str:
    return f"runs/{run}/checkpoints"


def save(engine: TrainEngine, store: Store, position: Position, context: Context, keep: int) -> Saved:
    """Collective. A checkpoint that cannot be written (no room, a failing disk) costs none of those before, nor the run:
    the problem is returned. Raises `TrainingError` when a younger attempt of the run has started."""
    relative = f"{folder_of(position.run)}/step-{position.step:08d}"
    if problem := agree(_no_room(store, position.run) if context.is_first else "", context):
        return Saved(problem=problem)
    if agree(context.is_first and _stands(store, relative, position), context):
        if context.is_first:
            _retire(store, position.run, keep)
        return Saved(relative)  # written by an attempt before; these steps were done again
    aside = f"{folder_of(position.run)}/.tmp-{position.step:08d}-{position.attempt:06d}"
    folder = store.local(aside) if store.is_local else Path(tempfile.mkdtemp(prefix="forge-checkpoint-"))

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        engine.save(folder)
        torch.save(rng_state(), folder / f"rng-{context.rank:05d}.pt")

    def publish() -> None:
        if not context.is_first:
            return
        (folder / MANIFEST).write_bytes(_manifest(store, hash_dir(folder), position))
        sync_tree(folder)
        attempts.check_newest(store, position.run, position.attempt)
        replace_dir(folder, store.local(relative))

    steps_of = (write, publish) if store.is_local else (write, lambda: _upload(folder, store, relative, position, context))
    for step in steps_of:
        if problem := _tried(step, context):
            shutil.rmtree(folder, ignore_errors=True)
            return Saved(problem=problem)
    if context.is_first:
        _retire(store, position.run, keep)
    return Saved(relative)


def _tried(step: Callable[[], None], context: Context) -> str:
    """Collective: do it on every rank; what went wrong on the disk of one is known to all. A fence stops all of them."""
    problem, fenced = "", ""
    try:
        step()
    except TrainingError as error:
        fenced = f"{error.message}\n{error.hint}"
    except (OSError, RuntimeError, StoreError) as error:  # torch's own writer says RuntimeError for a full disk
        problem = f"rank {context.rank}: {type(error).__name__}: {error}"
    found: list[Any] = [None] * context.world_size
    dist.all_gather_object(found, (problem, fenced))
    for _, text in found:
        if text:
            message, _, hint = text.partition("\n")
            raise TrainingError(message, hint=hint)
    return next((text for text, _ in found if text), "")


def _no_room(store: Store, run: str) -> str:
    free = store.free_bytes()
    if free is None:
        return ""
    for step in steps(store, run):
        try:
            size = sum(entry.size for entry in store.files(f"{folder_of(run)}/step-{step:08d}"))
        except (ForgeError, KeyError, TypeError, ValueError):
            continue
        if free < size * ROOM:
            return f"{free / 1e9:.2f} GB are free, a checkpoint of {size / 1e9:.2f} GB wants {size * ROOM / 1e9:.2f} GB"
        return ""
    return ""


def _stands(store: Store, relative: str, position: Position) -> bool:
    """Whether this very checkpoint is published and whole."""
    if not store.exists(f"{relative}/{MANIFEST}"):
        return False
    found, _ = _verified(store, relative, position)
    return found is not None and (found.order_digest, found.world_size) == (position.order_digest, position.world_size)


def _manifest(store: Store, files: tuple[FileEntry, ...], position: Position) -> bytes:
    newest = next(iter(steps(store, position.run)), None)
    parent = "" if newest is None else f"step-{newest:08d}:" + _digest_of(store, position.run, newest)
    value = {"files": [entry.model_dump() for entry in files], "position": asdict(position), "parent": parent}
    return canonical_json(value | {"digest": digest(value)})


def _digest_of(store: Store, run: str, step: int) -> str:
    try:
        return str(store.read_json(f"{folder_of(run)}/step-{step:08d}/{MANIFEST}").get("digest", ""))
    except (ForgeError, AttributeError):
        return ""


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
        attempts.check_newest(store, position.run, position.attempt)
        files = {entry["path"]: FileEntry.model_validate(entry) for part in parts for entry in part}
        listed = tuple(files[path] for path in sorted(files))
        store.write(f"{relative}/{MANIFEST}", _manifest(store, listed, position))
    shutil.rmtree(folder, ignore_errors=True)


def _retire(store: Store, run: str, keep: int) -> None:
    """Remove what lies behind the newest `keep` checkpoints that are whole; a broken one does not count as one of them."""
    whole = 0
    for step in steps(store, run):
        relative = f"{folder_of(run)}/step-{step:08d}"
        if whole >= keep:
            store.delete_dir(relative)
        elif _sizes_hold(store, relative):
            whole += 1


def _sizes_hold(store: Store, relative: str) -> bool:
    try:
        files = store.files(relative)
    except (ForgeError, KeyError, TypeError, ValueError):
        return False
    found = store.filesystem.get_file_info([store.path(f"{relative}/{entry.path}") for entry in files])
    return [info.size for info in found] == [entry.size for entry in files]


def steps(store: Store, run: str) -> list[int]:
    """Steps of the published checkpoints, newest first."""
    paths = store.list(folder_of(run), recursive=True)
    published = (path.split("/")[-2] for path in paths if path.endswith("/" + MANIFEST))
    names = (name.removeprefix("step-") for name in published if name.startswith("step-"))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def find(store: Store, expected: Position) -> Position | None:
    """The newest checkpoint of this run that verifies; one that is torn, corrupted or another's is skipped, with the reason
    in the log."""
    for step in steps(store, expected.run):
        relative = f"{folder_of(expected.run)}/step-{step:08d}"
        found, reason = _verified(store, relative, expected)
        if found is not None and found.step == step:
            return found
        logger.warning("checkpoint %s is skipped: %s", relative, reason or f"it is of step {found.step if found else None}")
    return None


def _verified(store: Store, relative: str, expected: Position) -> tuple[Position | None, str]:
    """The position of a checkpoint whose every byte is as its manifest says; else the reason why it is not used."""
    try:
        manifest = store.read_json(f"{relative}/{MANIFEST}")
        stated = manifest.pop("digest")
        if digest(manifest) != stated:
            return None, "its manifest was changed after it was written"
        found = Position(**manifest["position"])
        for name in IDENTITY:
            if getattr(found, name) != getattr(expected, name):
                return None, f"it has {name}={getattr(found, name)!r}, this run has {getattr(expected, name)!r}"
        verify_files(store.fetch_dir(relative, verify=False), store.files(relative))
    except (StoreError, OSError, KeyError, TypeError, AttributeError, ValueError, json.JSONDecodeError) as error:
        return None, error.message if isinstance(error, ForgeError) else f"{type(error).__name__}: {error}"
    return found, ""


def restore(engine: TrainEngine, store: Store, expected: Position, context: Context) -> Position | None:
    """Collective: load the newest good checkpoint of the run, if there is one; returns its position."""
    found: Position | None = agree(find(store, expected) if context.is_first else None, context)
    if found is None:
        return None
    check_world_size(found, expected.world_size)
    folder = store.fetch_dir(f"{folder_of(found.run)}/step-{found.step:08d}", verify=not store.is_local)
    engine.load(folder)
    rng = folder / f"rng-{context.rank:05d}.pt"
    if rng.is_file():  # absent for the ranks that a larger world has more
        set_rng_state(torch.load(rng, weights_only=True))
    dist.barrier()
    return found


def sweep(store: Store, run: str) -> None:
    """Remove what attempts before this one left half-written."""
    if store.is_local and (folder := store.local(folder_of(run))).is_dir():
        for path in folder.iterdir():
            if path.name.startswith((".tmp-", ".old-")):
                shutil.rmtree(path, ignore_errors=True)


def check_world_size(found: Position, world_size: int) -> None:
    if found.world_size != world_size and found.zero_stage > 0:
        raise TrainingError(
            f"checkpoint at step {found.step} was written by {found.world_size} workers at ZeRO stage {found.zero_stage},"
            f" which cannot be loaded by {world_size}",
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
