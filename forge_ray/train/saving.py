"""Write a checkpoint while training goes on, and publish it in one rename.

1. Every rank copies its state; from here on the next step may run.
2. A thread per rank writes its files into `.tmp-<step>-<attempt>/`, syncs and hashes them, and leaves a list of its part.
3. When all parts are there, a thread of rank 0 joins them to MANIFEST.json and renames the folder.

Ranks learn of each other's progress by two numbers that ride along in a sum which every step takes anyway: no collective
runs in a thread, and none is added to a step.
"""

from __future__ import annotations

import copy
import logging
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import torch

from forge_ray.errors import ForgeError, TrainingError
from forge_ray.records import FileEntry, canonical_json
from forge_ray.store import paths
from forge_ray.store.files import MANIFEST, Store, fsync_dir, replace_dir, sha256_file, sync_tree
from forge_ray.store.scratch import scratch_folder
from forge_ray.train import attempts, checkpoint
from forge_ray.train.checkpoint import Position
from forge_ray.train.context import Context, agree, sum_over_ranks
from forge_ray.train.engine import TrainEngine

logger = logging.getLogger("forge_ray")


@dataclass(frozen=True)
class Saved:
    """A published checkpoint: its path in the store; or why there is none."""

    step: int
    path: str = ""
    problem: str = ""


class Saver:
    """One checkpoint at a time. `begin`, `advance` and `finish` are collective: every rank calls them equally often."""

    def __init__(
        self,
        engine: TrainEngine,
        store: Store,
        context: Context,
        keep: int,
        in_background: bool = True,
        keep_best: bool = False,
        origins: tuple[str, ...] = (),
    ) -> None:
        """`origins`: the versions that the run's weights depend on."""
        self.engine, self.store, self.context, self.keep, self.keep_best = engine, store, context, keep, keep_best
        self.in_background, self.origins = in_background, origins
        self._work: threading.Thread | None = None
        self._position: Position | None = None
        self._publishing = False
        self._done = False
        self._problem = ""
        self._fenced: TrainingError | None = None

    @property
    def written(self) -> float:
        """1 where this rank has written its part of a checkpoint."""
        return float(self._done and not self._publishing)

    @property
    def published(self) -> float:
        """1 on the first rank where it has published one."""
        return float(self._done and self._publishing)

    def begin(self, position: Position) -> Saved | None:
        """Copy the state and start to write it. A result only where nothing is to be written: no space, or it is there."""
        self._position = position
        relative = paths.checkpoint(position.run, position.step)
        standing, problem = agree(self._look(relative, position) if self.context.is_first else None, self.context)
        if standing or problem:
            if self.context.is_first and standing:
                checkpoint.retire(self.store, position.run, self.keep, self.keep_best)
            return Saved(position.step, relative if standing else "", problem)
        folder = self._folder(position)
        files: list[tuple[Path, Any]] = []
        keep = _copy if self.in_background else _as_it_is
        self.engine.save(folder, lambda state, path: files.append((Path(path), keep(state))))
        files.append((folder / f"rng-{self.context.rank:05d}.pt", checkpoint.rng_state()))
        self._start(lambda: self._write(position, folder, files), publishing=False)
        return None if self.in_background else self.finish()

    def advance(self, written: float, published: float) -> Saved | None:
        """One step further, if these sums over the ranks say that all are ready for it; the result when it is published."""
        if self._position and not self._publishing and written == self.context.world_size:
            self._publish_next(self._position)
        elif published:
            return self._close()
        return None

    def finish(self) -> Saved | None:
        """Wait for what is being written, on all ranks, and publish it."""
        if not self._work:
            return None
        while True:
            self._work.join()
            if saved := self.advance(*sum_over_ranks([self.written, self.published], self.context)):
                return saved

    def _look(self, relative: str, position: Position) -> tuple[bool, str]:
        if checkpoint.stands(self.store, relative, position):
            return True, ""  # written by an attempt before; these steps were done again
        return False, checkpoint.why_no_space(self.store, position.run)

    def _folder(self, position: Position) -> Path:
        folder = self.store.local(_aside(position)) if self.store.is_local else scratch_folder("save")
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _start(self, work: Callable[[], None], publishing: bool) -> None:
        self._done, self._publishing = False, publishing

        def run() -> None:
            try:
                work()
            except TrainingError as error:
                self._fenced = error
            except (OSError, RuntimeError, ForgeError) as error:  # torch's own writer says RuntimeError for a full disk
                self._problem = f"rank {self.context.rank}: {type(error).__name__}: {error}"
            self._done = True

        self._work = threading.Thread(target=run, name="forge-save", daemon=True)
        self._work.start()

    def _write(self, position: Position, folder: Path, files: list[tuple[Path, Any]]) -> None:
        """This rank's files, and the list of them; what goes wrong is put into the list, for rank 0 to find."""
        part: dict[str, Any] = {"files": [], "problem": ""}
        try:
            while files:
                path, state = files.pop(0)
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("wb") as stream:
                    torch.save(state, stream)
                del state
                fsync_dir(path)
                name = path.relative_to(folder).as_posix()
                entry = FileEntry(path=name, size=path.stat().st_size, sha256=sha256_file(path))
                if not self.store.is_local:
                    self._upload(path, paths.checkpoint(position.run, position.step, name))
                part["files"].append(entry.model_dump())
        except (OSError, RuntimeError) as error:
            part["problem"] = f"rank {self.context.rank}: {type(error).__name__}: {error}"
        if not self.store.is_local:
            shutil.rmtree(folder, ignore_errors=True)
        try:
            self.store.write(_part(position, self.context.rank), canonical_json(part))
        except (OSError, ForgeError):
            if not part["problem"]:
                raise  # rank 0 finds no list of this rank, which says the same

    def _upload(self, path: Path, relative: str) -> None:
        target = self.store.path(relative)
        self.store.filesystem.create_dir(target.rsplit("/", 1)[0], recursive=True)
        pafs.copy_files(str(path), target, destination_filesystem=self.store.filesystem)

    def _publish_next(self, position: Position) -> None:
        if self.context.is_first:
            self._start(lambda: self._publish(position), publishing=True)
        else:
            self._publishing, self._done = True, False

    def _publish(self, position: Position) -> None:
        parts = [self._read_part(position, rank) for rank in range(self.context.world_size)]
        self._problem = next((part["problem"] for part in parts if part["problem"]), "")
        if self._problem:
            return
        files = sorted((FileEntry.model_validate(entry) for part in parts for entry in part["files"]), key=lambda e: e.path)
        manifest = checkpoint.manifest(self.store, tuple(files), position)
        relative = paths.checkpoint(position.run, position.step)
        attempts.check_may_publish(self.store, position.run, position.dataset, *self.origins, number=position.attempt)
        if self.store.is_local:
            folder = self.store.local(_aside(position))
            shutil.rmtree(folder / PARTS)
            (folder / MANIFEST).write_bytes(manifest)
            sync_tree(folder)
            replace_dir(folder, self.store.local(relative))
        else:  # object stores have no rename: the manifest comes last
            self.store.write(f"{relative}/{MANIFEST}", manifest)
        checkpoint.retire(self.store, position.run, self.keep, self.keep_best)

    def _read_part(self, position: Position, rank: int) -> dict[str, Any]:
        try:
            part: dict[str, Any] = self.store.read_json(_part(position, rank))
        except ForgeError as error:
            return {"problem": f"rank {rank} could not say what it wrote: {error.message}", "files": []}
        return part

    def _close(self) -> Saved:
        assert self._position is not None
        position, outcome = self._position, (self._problem, self._fenced)
        problem, fenced = agree(outcome if self.context.is_first else None, self.context)
        if (problem or not self.store.is_local) and self.context.is_first:
            self.store.delete_dir(_aside(position))
        self._work, self._position, self._publishing, self._done, self._problem = None, None, False, False, ""
        if fenced:
            raise fenced
        path = "" if problem else paths.checkpoint(position.run, position.step)
        return Saved(position.step, path, problem)


PARTS = "parts"


def _aside(position: Position) -> str:
    return paths.checkpoints(position.run, f".tmp-{position.step:08d}-{position.attempt:06d}")


def _part(position: Position, rank: int) -> str:
    return f"{_aside(position)}/{PARTS}/{rank:05d}.json"


def _copy(state: Any) -> Any:
    """A deep copy whose tensors lie in main memory: the next step writes into the originals."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        copied = copy.copy(state)
        copied.update({key: _copy(value) for key, value in state.items()})
        return copied
    if isinstance(state, list | tuple) and type(state) in (list, tuple):
        return type(state)(_copy(value) for value in state)
    return state


def _as_it_is(state: Any) -> Any:
    return state
