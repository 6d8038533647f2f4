"""One training worker of a numerics test."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

KILLED = 23
Faults = dict[str, dict[int, int]]


def main(
    jobs: list[dict[str, Any]], rank: int, ranks: int, port: int, kill_at: int, kill_in: str, log: str, faults: Faults
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
    from forge_ray.train import loop

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
    from forge_ray.train import loop

    compute, update, at = loop._loss, loop.Passes.run, {"step": 0, "rows": []}

    def passes(self: Any) -> float:
        at["step"] = self.step
        left = faults.get("nan", {}).get(self.step, 0)
        if left:
            faults["nan"][self.step] = left - 1
        at["nan"] = left > 0
        return update(self)

    def loss(batch: Any, engine: Any) -> Any:
        found, number = compute(batch, engine)
        if at["nan"] and rank == 0:
            found = found * float("nan")
        if at["step"] in faults.get("rise", {}):
            found = found * 100
        return found, number

    def blaming(self: Any, step: int, rows: list[int]) -> Any:
        context = kept(self, step, rows)
        if hit := set(rows) & set(faults.get("raise", {})) - set(self.left_out.rows):
            with context:
                raise ArithmeticError(f"no such token in row {sorted(hit)[0]}")
        return context

    from forge_ray.train import guards

    kept = guards.AttemptGuards.blaming
    loop._loss, loop.Passes.run, guards.AttemptGuards.blaming = loss, passes, blaming


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
