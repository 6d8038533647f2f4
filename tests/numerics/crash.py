"""Saves a checkpoint once per crash point: before each call that changes a file, the process dies, or the disk is full.

Run by test_commit.py in a process of its own, for it forks: `python crash.py FOLDER die|full`. Prints a line per point.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from forge_ray.store import paths
from forge_ray.store.files import MANIFEST, Store
from forge_ray.train import checkpoint, saving
from forge_ray.train.context import Context, join

RUN = "run_crash"
START = checkpoint.Position(0, 0, "", 1, RUN, "sha256:c", "ds_a", "sha256:b", "torch", 0, 1)
CRASHED = 9
CHANGES = {"open", "os.rename", "os.mkdir", "os.link", "os.remove", "os.rmdir", "shutil.rmtree", "crash.write"}


class Engine:
    """Has a state that tells its step, in two files."""

    loads_anywhere = True

    def __init__(self, step: int) -> None:
        self.step = step

    def save(self, folder: Path, write: Any) -> None:
        for number in range(2):
            write(content(self.step, number), folder / f"part-{number}.bin")


def save_in_pieces(state: Any, stream: Any) -> None:
    """In place of `torch.save`: a crash point before each piece."""
    for piece in state if isinstance(state, list) else [repr(sorted(state)).encode()]:
        sys.audit("crash.write", stream.name)
        stream.write(piece)


def content(step: int, number: int) -> list[bytes]:
    return [f"step {step} part {number} piece {piece};".encode() * 50 for piece in range(3)]


def position(step: int) -> checkpoint.Position:
    return replace(START, step=step, samples_seen=4 * step, order_digest=f"sha256:{step}")


def save(folder: Path, step: int) -> saving.Saved:
    context = Context(0, 1, 0, torch.device("cpu"), False)
    saver = saving.Saver(Engine(step), Store(str(folder)), context, keep=2)  # type: ignore[arg-type]
    saved = saver.begin(position(step)) or saver.finish()
    assert saved
    return saved


def in_a_child(folder: Path, step: int, point: int, way: str) -> tuple[int, int]:
    """Exit code of a process that saves; and how many crash points it passed. `point` -1: nothing happens to it."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        join(use_gpu=False, num_threads=1, under_ray=False)
        passed = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal passed
            if event not in CHANGES or not str(arguments[0]).startswith(str(folder)):
                return
            if event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
            passed += 1
            if passed == point:
                if way == "die":
                    os._exit(CRASHED)
                raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))

        saving.torch.save = save_in_pieces  # type: ignore[assignment]
        sys.addaudithook(hook)
        saved = save(folder, step)
        os.write(writer, json.dumps(passed).encode())
        os._exit(0 if saved.path else 1)
    os.close(writer)
    _, status = os.waitpid(child, 0)
    passed = int(os.read(reader, 64) or b"0")
    os.close(reader)
    return os.waitstatus_to_exitcode(status), passed


def newest(folder: Path) -> int:
    """The step that a resume would take; its bytes are those of that step."""
    latest = checkpoint.find(Store(str(folder)), START)
    if latest is None:
        return 0
    at = folder / paths.checkpoints(RUN) / f"step-{latest.step:08d}"
    for number in range(2):
        assert (at / f"part-{number}.bin").read_bytes() == b"".join(content(latest.step, number)), at
    assert latest.order_digest == f"sha256:{latest.step}"
    return latest.step


def main(scratch: Path, way: str) -> None:
    whole = scratch / "whole"
    assert [in_a_child(whole, step, -1, way)[0] for step in (2, 4)] == [0, 0]
    _, points = in_a_child(shutil.copytree(whole, scratch / "count"), 6, -1, way)
    for point in range(1, points + 1):
        folder = shutil.copytree(whole, scratch / f"{way}-{point}")
        code, _ = in_a_child(folder, 6, point, way)
        kept = newest(folder)
        published = (folder / paths.checkpoints(RUN) / "step-00000006" / MANIFEST).is_file()
        again, _ = in_a_child(folder, 6, -1, way)
        outcome = {"point": point, "code": code, "kept": kept, "published": published, "again": again}
        outcome |= {"then": newest(folder), "steps": checkpoint.steps(Store(str(folder)), RUN)}
        print(json.dumps(outcome), flush=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
