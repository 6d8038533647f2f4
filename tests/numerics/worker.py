"""One training worker of a numerics test."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

KILLED = 23


def main(jobs: list[dict[str, Any]], rank: int, ranks: int, port: int, kill_at: int, kill_in: str, log: str) -> None:
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
    from forge_ray.recipes import sft

    if kill_at:
        _die_at(kill_at, kill_in)
    for job in jobs:
        sft.train_loop(job)


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
