"""Supervised fine-tuning: cross entropy of the tokens that the loss mask names. On plain text, where it names all of them,
the same is continued pre-training.

Divided by the trained tokens of the whole step and not of each pass, so that the result depends neither on the micro-batch
nor on the number of workers.
"""

from __future__ import annotations

from torch import Tensor

from forge_ray.train.loss import token_logps
from forge_ray.train.method import Batch, Forward, Method, Sums


def sft() -> Method:
    return Method(loss=loss, weight=weight)


def weight(batch: Batch) -> Tensor:
    """Trained tokens: int64 []."""
    return batch["loss_mask"].sum()


def loss(forward: Forward, batch: Batch) -> Sums:
    logps_K, _ = token_logps(forward, batch)
    return Sums(-logps_K.sum())
