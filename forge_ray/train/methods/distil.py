"""Distillation: a student learns a frozen teacher's distribution over the next token (arXiv:1503.02531). Left out:
divergences other than the forward KL, and answers of the student's own (arXiv:2306.13649).

    loss = hard_weight * -log p(token) + (1 - hard_weight) * t^2 * KL(q || p)      per trained token, divided as `sft`'s

q and p are softmax(logits / t) of teacher and student, t the temperature; t^2 keeps the size of the gradients (section 2.1
there). Of q the k likeliest tokens are kept, the others count as one (`divergence.py`). They are made once for a dataset
(`reference.py`), so no second model is in memory while the student learns.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from forge_ray.config.distil import Distil
from forge_ray.data.dataset.stream import Rows
from forge_ray.train.divergence import divergence_and_loss
from forge_ray.train.loss import CHUNK_BYTES, IGNORED, trained_logits
from forge_ray.train.measure import Measure, RowValues
from forge_ray.train.method import Batch, Column, Forward, Method, Sums
from forge_ray.train.methods.sft import weight
from forge_ray.train.reference import Reference


def distil(config: Distil, teacher: Reference) -> Method:
    columns = (
        Column("teacher_ids", "token", read=partial(read_column, teacher, config.k, "ids")),
        Column("teacher_logps", "token", blank=0.0, read=partial(read_column, teacher, config.k, "logps")),
    )
    return Method(loss=partial(loss, config), weight=weight, columns=columns, prepare=teacher.prepare)


def loss(config: Distil, forward: Forward, batch: Batch) -> Sums:
    logits_KV, targets_K, kept_K = trained_logits(forward, batch)
    ids_Kk, logps_Kk = (batch[name].flatten(0, 1)[kept_K] for name in ("teacher_ids", "teacher_logps"))
    divergences_K, losses_K = divergence_and_loss(logits_KV, targets_K, ids_Kk.long(), logps_Kk, config.temperature)
    hard, soft = losses_K.sum(), divergences_K.sum()
    total = config.hard_weight * hard + (1 - config.hard_weight) * config.temperature**2 * soft
    return Sums(total, {"hard_loss": hard, "teacher_kl": soft})


def likeliest(k: int, temperature: float, num_tokens: int) -> Measure:
    """Of each trained token of a row, the k likeliest tokens and their log probabilities at the position before it, where
    the model predicts it. `num_tokens`: ids that count."""
    types = {"positions": pa.int32(), "ids": pa.int32(), "logps": pa.float32()}
    compute = partial(_likeliest, k, temperature, num_tokens)
    return Measure(("likeliest", k, temperature, num_tokens), types, 1, compute, partial(_apart, k))


def _likeliest(k: int, temperature: float, num_tokens: int, forward: Forward, batch: Batch) -> RowValues:
    logits_KV, targets_K, kept_K = trained_logits(forward, batch)
    num_trained = int((targets_K != IGNORED).sum())  # of a row without any, one position stands there
    num_rows = max(1, CHUNK_BYTES["cuda" if logits_KV.is_cuda else "cpu"] // (4 * num_tokens))
    ids, logps = [], []
    for start in range(0, num_trained, num_rows):
        wide = logits_KV[start : start + num_rows, :num_tokens].float() / temperature
        values, tokens = wide.topk(k, dim=1)
        ids.append(tokens.int())
        logps.append(values - torch.logsumexp(wide, dim=1, keepdim=True))
    flat = {"positions": kept_K[:num_trained].int()}
    for name, parts in (("ids", ids), ("logps", logps)):
        flat[name] = torch.cat(parts).flatten() if parts else flat["positions"]
    return {name: values.cpu().numpy() for name, values in flat.items()}


def read_column(teacher: Reference, k: int, name: str, rows: Rows, numbers: list[int]) -> npt.NDArray[np.generic]:
    """[B, T, k]: int32 ids or fp32 log probabilities of the teacher's likeliest tokens; 0 where the next token is not
    trained."""
    kind = np.int32 if name == "ids" else np.float32
    filled = np.zeros((len(numbers), rows.sequence_length, k), kind)
    for lane, values in enumerate(teacher.read(rows, numbers)):
        filled[lane, values["positions"]] = values[name].reshape(-1, k)
    return filled


def _apart(k: int, kept: RowValues, again: RowValues) -> tuple[float, float]:
    """A token that only one of the two has is compared with the other's least likely one: close to it where both were about
    as likely."""
    if not np.array_equal(kept["positions"], again["positions"]) or len(kept["ids"]) != len(again["ids"]):
        return float("inf"), 1.0
    largest = 0.0
    for one, other in ((kept, again), (again, kept)):
        for place in range(len(one["positions"])):
            part = slice(place * k, (place + 1) * k)
            ids, logps = other["ids"][part], other["logps"][part]
            order = np.argsort(ids)
            nearest = order[np.searchsorted(ids[order], one["ids"][part]).clip(max=k - 1)]
            expected = np.where(ids[nearest] == one["ids"][part], logps[nearest], logps.min())
            largest = max(largest, float(np.abs(one["logps"][part] - expected).max()))
    return largest, 1.0
