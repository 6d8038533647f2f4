"""Resumable checkpoints: which one is used, and when. Verified before anything is read, and read as data alone: no code that
a file names is called. `saving` writes them.

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
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError, ForgeError, NotFound, PolicyError, StoreError, TrainingError
from forge_ray.records import FileEntry, canonical_json, digest
from forge_ray.store import paths
from forge_ray.store.files import MANIFEST, Store
from forge_ray.store.scratch import scratch_folder
from forge_ray.store.uses import marked
from forge_ray.train import validation
from forge_ray.train.context import Context, agree
from forge_ray.train.engine import TrainEngine
from forge_ray.train.job import TrainJob, identity_digest
from forge_ray.train.manifest_key import authentication, manifest_key, require_authentic

logger = logging.getLogger("forge_ray")
# scripts that DeepSpeed lays next to its files, in checkpoints of earlier versions: nothing here opens or runs them
NEVER_READ = frozenset({"zero_to_fp32.py", "zero_to_torch.py"})
SPACE_FACTOR = 1.2  # times the size of the last checkpoint must be free before one is written


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
    left_out: str = ""  # digest of the steps and rows that guards left out before this step
    order_key: str = ""  # what the order of samples follows from; "" before it was written down: the dataset's id
    initial_digest: str = ""  # of the adapter that is trained on; "": a new one, or every weight
    frozen_digest: str = ""  # of the version that the loss reads numbers of; "": none, or the model of the start


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint whose manifest is authentic and whose every byte is as that says: `files` in `folder`."""

    position: Position
    files: tuple[FileEntry, ...]
    folder: Path


IDENTITY = ("run", "config_digest", "dataset", "base_digest", "engine", "zero_stage")


def expected(job: TrainJob) -> Position:
    """What a checkpoint of this run must be of: the fields of `IDENTITY`, and nothing about where it is."""
    return Position(
        step=0,
        samples_seen=0,
        order_digest="",
        attempt=0,
        run=job.run,
        config_digest=identity_digest(job),
        dataset=job.dataset.id,
        base_digest=job.base.files_digest,
        engine=job.config.engine,
        zero_stage=job.config.zero_stage,
        world_size=0,
        order_key=job.dataset.splits["train"].rows_digest,
        initial_digest=job.initial.files_digest if job.initial else "",
        frozen_digest=job.frozen.version.files_digest if job.frozen else "",
    )


def why_no_space(store: Store, run: str) -> str:
    """Why a checkpoint as large as the newest one would not fit; "" where it does, or where nobody can tell."""
    free = store.free_bytes()
    for step in steps(store, run) if free is not None else []:
        try:
            size = sum(entry.size for entry in store.files(paths.checkpoint(run, step)))
        except (ForgeError, KeyError, TypeError, ValueError):
            continue
        needed = size * SPACE_FACTOR
        if free is not None and free < needed:
            return f"{free / 1e9:.2f} GB are free, a checkpoint of {size / 1e9:.2f} GB wants {needed / 1e9:.2f} GB"
        return ""
    return ""


def stands(store: Store, relative: str, position: Position) -> bool:
    """Whether this very checkpoint is published and whole."""
    if not store.exists(f"{relative}/{MANIFEST}"):
        return False
    try:
        standing, _ = verify(store, relative, position)
    except PolicyError:
        return False  # it is written again
    return standing is not None and (standing.position.order_digest, standing.position.world_size) == (
        position.order_digest,
        position.world_size,
    )


def manifest(store: Store, files: tuple[FileEntry, ...], position: Position) -> bytes:
    newest = next(iter(steps(store, position.run)), None)
    parent = "" if newest is None else f"{paths.step(newest)}:" + _digest_of(store, position.run, newest)
    return sealed(store, {"files": [entry.model_dump() for entry in files], "position": asdict(position), "parent": parent})


def sealed(store: Store, value: dict[str, Any]) -> bytes:
    """A manifest that says `value`, with its HMAC and a digest of both: what an accident changed is told by the digest, what
    somebody made anew by the HMAC."""
    value = value | {"hmac": authentication(store, value)}
    return canonical_json(value | {"digest": digest(value)})


def _digest_of(store: Store, run: str, step: int) -> str:
    try:
        return str(store.read_json(paths.checkpoint(run, step, MANIFEST)).get("digest", ""))
    except (ForgeError, AttributeError):
        return ""


def retire(store: Store, run: str, keep: int, keep_best: bool = False) -> None:
    """Remove what lies behind the newest `keep` checkpoints that are whole; a broken one does not count as one of them. What
    a validation still has to read stays too, with `keep_best` the one that validated best, and what another process has
    marked as in use: a later call removes that."""
    whole, stay, in_use = 0, validation.protected(store, run, keep_best), marked(store)
    for step in steps(store, run):
        relative = paths.checkpoint(run, step)
        if whole >= keep and (step in stay or relative in in_use):
            continue
        if whole >= keep:
            store.delete_dir(relative)
        elif _sizes_hold(store, relative):
            whole += 1


def _sizes_hold(store: Store, relative: str) -> bool:
    try:
        files = store.files(relative)
    except (ForgeError, KeyError, TypeError, ValueError):
        return False
    infos = store.filesystem.get_file_info([store.path(f"{relative}/{entry.path}") for entry in files])
    return [info.size for info in infos] == [entry.size for entry in files]


def steps(store: Store, run: str) -> list[int]:
    """Steps of the published checkpoints, newest first."""
    files = store.list(paths.checkpoints(run), recursive=True)
    published = (path.split("/")[-2] for path in files if path.endswith("/" + MANIFEST))
    names = (name.removeprefix(paths.STEP) for name in published if name.startswith(paths.STEP))
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def require_step(store: Store, run: str, step: int) -> None:
    """Raise `NotFound`, with the checkpoints that there are, where the run has none of `step`."""
    if step not in (published := steps(store, run)):
        listed = ", ".join(map(str, published)) or "none"
        raise NotFound(f"{run} has no checkpoint of step {step}", hint=f"its checkpoints: {listed}")


def find(store: Store, expected: Position, left_out: Callable[[int], str] | None = lambda step: "") -> Position | None:
    """The position of the `newest_whole` checkpoint."""
    checkpoint = newest_whole(store, expected, left_out)
    return checkpoint.position if checkpoint else None


def newest_whole(store: Store, expected: Position, left_out: Callable[[int], str] | None) -> Checkpoint | None:
    """The newest checkpoint of this run that verifies; one that is torn, corrupted or another's is skipped, with the reason
    in the log. So is one of a timeline that was given up: what was left out by its step differs from `left_out(step)`
    (None: any will do). Raises `PolicyError` where a whole one is not authentic: no accident makes such a manifest."""
    for step in steps(store, expected.run):
        relative = paths.checkpoint(expected.run, step)
        checkpoint, reason = verify(store, relative, expected)
        if checkpoint is not None and checkpoint.position.step != step:
            reason = f"it is of step {checkpoint.position.step}"
        elif checkpoint is not None and left_out and checkpoint.position.left_out != left_out(step):
            reason = "it holds steps that were left out later"
        elif checkpoint is not None:
            return checkpoint
        logger.warning("checkpoint %s is skipped: %s", relative, reason)
    return None


def _read_manifest(store: Store, relative: str) -> tuple[dict[str, Any], Any]:
    """What a manifest says, and its HMAC (None where it has none). Raises `StoreError` where its digest is another one."""
    manifest = dict(store.read_json(f"{relative}/{MANIFEST}"))
    stated = manifest.pop("digest")
    if digest(manifest) != stated:
        raise StoreError("its manifest was changed after it was written", hint=f"remove {relative}")
    tag = manifest.pop("hmac", None)
    return manifest, tag


def verify(store: Store, relative: str, expected: Position) -> tuple[Checkpoint | None, str]:
    """A checkpoint whose every byte is as its manifest says; else the reason why it is not used. Raises `PolicyError` for a
    manifest that is whole and not authentic."""
    try:
        manifest, tag = _read_manifest(store, relative)
        require_authentic(store, relative, manifest, tag)
        position = Position(**manifest["position"])
        for name in IDENTITY:
            if getattr(position, name) != getattr(expected, name):
                return None, f"it has {name}={getattr(position, name)!r}, this run has {getattr(expected, name)!r}"
        files = tuple(FileEntry.model_validate(entry) for entry in manifest["files"])
        folder = store.fetch_dir(relative, files=files, tolerated=NEVER_READ)
    except (PolicyError, ConfigError):  # an OSError and a ValueError too
        raise
    except (StoreError, OSError, KeyError, TypeError, AttributeError, ValueError, json.JSONDecodeError) as error:
        return None, error.message if isinstance(error, ForgeError) else f"{type(error).__name__}: {error}"
    return Checkpoint(position, files, folder), ""


def authenticate(store: Store, run: str) -> list[int]:
    """Add an HMAC to each manifest of a run that has none, if every byte is as it says; returns their steps. Whoever calls
    this answers for what the files hold."""
    added = []
    for step in reversed(steps(store, run)):
        relative = paths.checkpoint(run, step)
        manifest, tag = _read_manifest(store, relative)
        if tag is None:
            store.fetch_dir(relative, tolerated=NEVER_READ)
            store.write(f"{relative}/{MANIFEST}", sealed(store, manifest))
            added.append(step)
    return added


def restore(
    engine: TrainEngine, store: Store, expected: Position, context: Context, left_out: Callable[[int], str]
) -> Position | None:
    """Collective: load the newest good checkpoint of the run, if there is one; returns its position. One that another number
    of workers wrote is resharded. The first rank alone needs the key: it tells the others which files the manifest lists."""
    if context.is_first:
        manifest_key(store)  # before a step is done whose checkpoint could not be written
    newest = newest_whole(store, expected, left_out) if context.is_first else None
    agreed: tuple[Position, tuple[FileEntry, ...]] | None = agree(newest and (newest.position, newest.files), context)
    if agreed is None:
        return None
    position, files = agreed
    relative = paths.checkpoint(position.run, position.step)
    folder = store.fetch_dir(relative, verify=not store.is_local, files=files, tolerated=NEVER_READ)
    if position.world_size == context.world_size or engine.loads_anywhere:
        engine.load(folder)
    else:
        _reshard(engine, store, folder, position, context)
    rng = folder / f"rng-{context.rank:05d}.pt"
    if rng.is_file():  # absent for the ranks that a larger world has more
        set_rng_state(torch.load(rng, weights_only=True))
    dist.barrier()
    return position


def _reshard(engine: TrainEngine, store: Store, folder: Path, position: Position, context: Context) -> None:
    """Through a copy that no number of workers is part of: once where all of them see it, else once per rank."""
    aside = store.local(paths.checkpoints(position.run, f".tmp-reshard-{position.step:08d}")) if store.is_local else None
    target = aside or scratch_folder("reshard")
    problem = ""
    try:
        if context.is_first or not aside:
            logger.info("step %d: from %d to %d workers", position.step, position.world_size, context.world_size)
            shutil.rmtree(target, ignore_errors=True)
            engine.reshard(folder, target)
    except (OSError, ForgeError) as error:
        problem = str(error)
    problems: list[Any] = [None] * context.world_size
    dist.all_gather_object(problems, problem)
    if first_problem := next(filter(None, problems), ""):
        raise TrainingError(
            f"the checkpoint of step {position.step}, written by {position.world_size} workers, could not be converted for"
            f" {context.world_size}: {first_problem}",
            hint=f"resume it with train.scaling.num_workers={position.world_size}",
        )
    engine.load(target, resharded=True)
    dist.barrier()
    if context.is_first or not aside:
        shutil.rmtree(target, ignore_errors=True)


def sweep(store: Store, run: str) -> None:
    """Remove what attempts before this one left half-written."""
    if store.is_local and (folder := store.local(paths.checkpoints(run))).is_dir():
        for path in folder.iterdir():
            if path.name.startswith((".tmp-", ".old-")):
                shutil.rmtree(path, ignore_errors=True)


def tidy(store: Store, run: str, config: TrainConfig) -> None:
    """Of a run that has ended, keep what its run file says: validations that ended after the last checkpoint was written
    held more, and what failed attempts left half-written is of no use."""
    sweep(store, run)
    retire(store, run, config.checkpoint.keep, config.keeps_best)


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
