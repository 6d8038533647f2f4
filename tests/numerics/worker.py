"""One training worker of a numerics test; forked from a process that has imported this module."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

from forge_ray.train.zero import prepare_environment

prepare_environment()
os.environ.pop("LOCAL_RANK", None)

import deepspeed  # noqa: F401  (imported before the fork, for speed)
import peft  # noqa: F401
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401
from transformers.integrations.deepspeed import HfDeepSpeedConfig  # noqa: F401

from forge_ray.recipes import sft
from forge_ray.train import metrics

KILLED = 23


def main(jobs: list[dict[str, Any]], rank: int, ranks: int, port: int, kill_at: int, log: str) -> None:
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
    if kill_at:
        _die_at(kill_at)
    for job in jobs:
        sft.train_loop(job)


def _die_at(step: int) -> None:
    """The power fails after step `step` was computed and before it is on record."""
    keep = metrics.append

    def append(folder: Any, values: dict[str, Any]) -> None:
        if values["step"] == step:
            os._exit(KILLED)
        keep(folder, values)

    metrics.append = append
