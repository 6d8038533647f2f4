"""One training worker of a numerics test."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from dataclasses import replace
from typing import Any

KILLED = 23
Faults = dict[str, dict[int, int]]


def main(
    jobs: list[dict[str, Any]],
    rank: int,
    ranks: int,
    port: int,
    kill_at: int,
    kill_in: str,
    log: str,
    faults: Faults,
    method: str,
) -> None:
    """The process: told its rank by the environment, as torchrun would tell it; its output goes to `log`."""
    stream = open(log, "w", buffering=1)  # noqa: SIM115  (open until the process ends)
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    logging.basicConfig(stream=sys.stderr, force=True)
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    from forge_ray.train import loop, metrics, validating

    # drawing takes longer than such a run; test_training.py has a run in this process, which draws its curve
    metrics.plot = lambda *_: None
    if method:
        loop.method_of = validating.method_of = importlib.import_module(method).method_of
    if kill_at:
        _die_at(kill_at, kill_in)
    armed: Faults = {}
    if faults:
        _break(armed, rank)
    for job in jobs:
        armed |= {kind: dict(places) for kind, places in faults.items()}
        try:
            loop.train_loop(job)
        except ArithmeticError:
            os._exit(KILLED)


def _break(faults: Faults, rank: int) -> None:
    """`{"nan": {step: times}}`: so many computations of that step have no finite loss. `{"raise": {row: 0}}`: that row
    fails, always. `{"rise": {step: times}}`: the loss is a hundred times as large, its gradient too."""
    from forge_ray.train import guards, loop, method, methods, step

    kept, run_passes, broken = guards.AttemptGuards.blaming, step.Steps.passes, {"step": 0, "nan": False}

    def passes(self: Any, rows: Any, *options: Any) -> Any:
        left = faults.get("nan", {}).get(rows.step, 0)
        if left:
            faults["nan"][rows.step] = left - 1
        broken.update(step=rows.step, nan=left > 0)
        return run_passes(self, rows, *options)

    def method_of(job: Any) -> method.Method:
        whole = methods.method_of(job)

        def loss(forward: Any, batch: Any) -> method.Sums:
            sums = whole.loss(forward, batch)
            factor = float("nan") if broken["nan"] and rank == 0 else 1.0
            factor *= 100.0 if broken["step"] in faults.get("rise", {}) else 1.0
            return replace(sums, loss=sums.loss * factor) if factor != 1.0 else sums

        return replace(whole, loss=loss)

    def blaming(self: Any, step: int, rows: list[int]) -> Any:
        context = kept(self, step, rows)
        if hit := set(rows) & set(faults.get("raise", {})) - set(self.left_out.rows):
            with context:
                raise ArithmeticError(f"no such token in row {sorted(hit)[0]}")
        return context

    loop.method_of, step.Steps.passes, guards.AttemptGuards.blaming = method_of, passes, blaming


def _die_at(step: int, when: str) -> None:
    """The power fails: in step `step`, computed and not yet on record (`append`), or when its checkpoint is (`report`)."""
    from forge_ray.train import launch, metrics

    module = metrics if when == "append" else launch
    keep = getattr(module, when)

    def die(*values: Any) -> None:
        if any(isinstance(value, dict) and value["step"] == step for value in values):
            os._exit(KILLED)
        keep(*values)

    setattr(module, when, die)
