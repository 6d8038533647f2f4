"""Training on judged answers. Pairs (y preferred, z rejected, prompt x), of which both documents stand in one packed row, or
single answers with a verdict. Left out: divergences other than the reverse KL.

r(y) = log p(y|x) - log p_reference(y|x), summed over the answer's tokens; mean(·) is per token of the answer; s = sigmoid.
Losses are per pair, and divided by the pairs of the whole step.

    dpo      -log s(b d), d = r(y) - r(z); with label smoothing e: (1-e) and e of both directions (arXiv:2305.18290, eq. 7)
    robust   ((1-e) (-log s(b d)) - e (-log s(-b d))) / (1 - 2e)                              (arXiv:2403.00409, eq. 8)
    ipo      (mean r(y) - mean r(z) - 1/(2b))^2                                               (arXiv:2310.12036, eq. 17)
    hinge    max(0, 1 - b d)                                                                  (arXiv:2305.10425, eq. 4)
    offset   -log s(b d - a f(margin)), f the log or the margin itself                         (arXiv:2402.10571, eq. 5)
    simpo    -log s(b (mean log p(y) - mean log p(z)) - gamma)                                (arXiv:2405.14734, eq. 6)
    orpo     -mean log p(y) - b log s(log odds(y) - log odds(z)), odds of mean log p           (arXiv:2403.07691, eq. 6, 7)
    kto      1 - s(b (r(y) - z0)) of a good answer, s(b (r(y) - z0)) of a bad one             (arXiv:2402.01306, eq. 8);
             z0 = max(0, mean r of the step's answers, each put to another prompt of its row): `train/mismatched.py`
    apo_zero the same with z0 = 0                                                             (arXiv:2408.06266, eq. 7)

`sft_weight` w adds -w mean log p(y) (arXiv:2404.19733, eq. 1). TRL 1.16 takes that mean over all tokens of a batch and not
of each answer, and ORPO's first term over the prompt too; `tests/numerics/test_trl_losses.py` compares the rest with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from forge_ray.config.method import OF_ANSWERS, Preference
from forge_ray.data.dataset.stream import Rows
from forge_ray.data.dataset.version import find_record
from forge_ray.errors import DataError, NotFound
from forge_ray.records import DatasetManifest
from forge_ray.store.files import Store
from forge_ray.train.loss import segment_sums, token_logps
from forge_ray.train.measure import by_segment
from forge_ray.train.method import STEP_MEAN, Batch, Column, Forward, Method, Sums
from forge_ray.train.mismatched import change_of_moved, moved_logps
from forge_ray.train.reference import Reference, read_document_logps
from forge_ray.train.shared_prompt import shared_prompts

DIVISORS = {"good_reward": "good_share", "bad_reward": "bad_share"}


def preference(config: Preference, reference: Reference | None) -> Method:
    """`reference`: of the kinds that compare with one."""
    columns = tuple(column for column in (_reference_logps(reference), _grades(config)) if column)
    if config.kind in OF_ANSWERS:
        method = Method(partial(judged_loss, config), num_documents, columns, divisors=DIVISORS)
        if config.kind == "kto" and reference:
            method = replace(method, columns=(*columns, moved_logps(reference)), step_mean=change_of_moved)
    else:
        method = Method(partial(pair_loss, config), num_pairs, columns)
    if reference and reference.job.frozen:
        return replace(method, prepare=reference.prepare)
    return replace(method, begin=reference.begin) if reference else method


def num_documents(batch: Batch) -> Tensor:
    """Documents of a batch: int64 []. Segments are numbered from 1 in each row."""
    return batch["segment_ids"].amax(dim=1).sum()


def num_pairs(batch: Batch) -> Tensor:
    return num_documents(batch) // 2


def pair_loss(config: Preference, forward: Forward, batch: Batch) -> Sums:
    logps_K, positions_K = token_logps(forward, batch, shared_prompts(batch))
    logps_BS, lengths_BS = segment_sums(logps_K, positions_K, batch)
    is_pair_BP = lengths_BS[:, 1::2] > 0
    chosen, rejected = (logps_BS[:, half::2][is_pair_BP] for half in (0, 1))  # [P] from here on
    chosen_len, rejected_len = (lengths_BS[:, half::2][is_pair_BP].float() for half in (0, 1))
    chosen_rate, rejected_rate = chosen / chosen_len, rejected / rejected_len
    chosen_ratio, rejected_ratio = chosen, rejected
    if config.has_reference:
        start_BS = batch["reference_logps"][:, : logps_BS.shape[1]]
        chosen_ratio = chosen - start_BS[:, 0::2][is_pair_BP]
        rejected_ratio = rejected - start_BS[:, 1::2][is_pair_BP]
    delta, beta, smoothing = chosen_ratio - rejected_ratio, config.beta, config.label_smoothing
    better = delta if config.has_reference else chosen_rate - rejected_rate
    match config.kind:
        case "dpo":
            losses = -(1 - smoothing) * F.logsigmoid(beta * delta) - smoothing * F.logsigmoid(-beta * delta)
        case "robust":
            losses = -(1 - smoothing) * F.logsigmoid(beta * delta) + smoothing * F.logsigmoid(-beta * delta)
            losses = losses / (1 - 2 * smoothing)
        case "ipo":
            losses = (chosen_ratio / chosen_len - rejected_ratio / rejected_len - 1 / (2 * beta)) ** 2
        case "hinge":
            losses = torch.relu(1 - beta * delta)
        case "offset":
            margins = batch["grades"][:, : logps_BS.shape[1]][:, 0::2][is_pair_BP]
            offsets = config.offset_weight * (margins.log() if config.offset_scale == "log" else margins)
            losses = -F.logsigmoid(beta * delta - offsets)
        case "simpo":
            difference = beta * (chosen_rate - rejected_rate) - config.gamma
            losses = -(1 - smoothing) * F.logsigmoid(difference) - smoothing * F.logsigmoid(-difference)
        case _:  # orpo
            odds = chosen_rate - rejected_rate - (_log1mexp(chosen_rate) - _log1mexp(rejected_rate))
            losses = -chosen_rate - beta * F.logsigmoid(odds)
    losses = losses - config.sft_weight * chosen_rate
    sums = {
        "pair_accuracy": (better > 0).sum(),
        "reward_margin": beta * better.sum(),
        "chosen_logps": chosen.sum(),
        "rejected_logps": rejected.sum(),
    }
    if config.has_reference:
        sums["chosen_drift"] = (chosen_ratio / chosen_len).sum()
    return Sums(losses.sum() + 0 * logps_K.sum(), sums)


def judged_loss(config: Preference, forward: Forward, batch: Batch) -> Sums:
    logps_K, positions_K = token_logps(forward, batch)
    logps_BS, lengths_BS = segment_sums(logps_K, positions_K, batch)
    is_document = lengths_BS > 0
    rewards = config.beta * (logps_BS - batch["reference_logps"][:, : logps_BS.shape[1]])[is_document]
    good = batch["grades"][:, : logps_BS.shape[1]][is_document] > 0
    reference_point = batch[STEP_MEAN].clamp(min=0.0) if config.kind == "kto" else rewards.new_zeros([])
    gains = rewards - config.beta * reference_point
    losses = torch.where(good, config.good_weight * torch.sigmoid(-gains), config.bad_weight * torch.sigmoid(gains))
    sums = {
        "good_reward": rewards[good].sum(),
        "bad_reward": rewards[~good].sum(),
        "good_share": good.sum(),
        "bad_share": (~good).sum(),
        "verdict_accuracy": ((gains > 0) == good).sum(),
    }
    if config.kind == "kto":
        sums["reference_point"] = reference_point * len(rewards)
    return Sums(losses.sum() + 0 * logps_K.sum(), sums)


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) of x < 0, exact near 0 and far from it (Maechler 2012, "Accurately computing log(1 - exp(-|a|))")."""
    values = values.clamp(max=-1e-7)
    return torch.where(values > -0.6931472, torch.log(-torch.expm1(values)), torch.log1p(-torch.exp(values)))


def _reference_logps(reference: Reference | None) -> Column | None:
    read = partial(read_document_logps, reference) if reference else None
    return Column("reference_logps", "segment", blank=0.0, read=read) if reference else None


def _grades(config: Preference) -> Column | None:
    if config.kind not in ("offset", *OF_ANSWERS):
        return None
    return Column("grades", "segment", blank=1.0, read=partial(read_grades, config))


def refuse_ungraded(config: Preference, store: Store, manifest: DatasetManifest) -> None:
    """Raises `DataError` where a row that the method can come to has no margin that it can use, or where all judged answers
    of the training rows are good, or all bad; reads that column alone."""
    counts = dict.fromkeys((True, False), 0)
    for split in {"offset": ("train", "validation"), "kto": ("train",), "apo_zero": ("train",)}.get(config.kind, ()):
        if (stats := manifest.splits.get(split)) and stats.num_rows:
            rows = Rows.of(store, manifest, split)
            for start in range(0, rows.num_rows, rows.block_rows):
                numbers = list(range(start, min(start + rows.block_rows, rows.num_rows)))
                read_grades(config, rows, numbers, partial(_unusable, store, manifest))
                for is_good in (True, False) if config.kind in OF_ANSWERS else ():
                    counts[is_good] += sum((grade > 0) == is_good for row in rows.grades(numbers) for grade in row)
    if config.kind in OF_ANSWERS and not all(counts.values()):
        raise DataError(
            f"{manifest.id} has {counts[True]} training answers judged good and {counts[False]} judged bad:"
            f" train.method.kind={config.kind} needs both, for with one alone it moves every answer the same way",
            hint="add rows with the other label; or fine-tune on the good answers: leave out train.method, and give them as"
            " chats",
        )


def _unusable(store: Store, manifest: DatasetManifest, record: str) -> str:
    """What a pair's row has as its margin, where that is no number."""
    try:
        return str(find_record(store, manifest, record)["content"].get("unusable_margin", ""))
    except NotFound:
        return ""


def read_grades(
    config: Preference, rows: Rows, numbers: list[int], unusable: Callable[[str], str] = lambda record: ""
) -> npt.NDArray[np.float32]:
    """[B, S] fp32: 1 or -1 of each judged answer, or the margin of its pair. Raises `DataError` where a margin is missing,
    is no finite number of fp32, or has no log. `unusable`: of a record, its margin that is no number."""
    grades = by_segment(rows.grades(numbers), 1.0)
    bad = ~np.isfinite(grades) | ((grades <= 0) & (config.kind == "offset") & (config.offset_scale == "log"))
    if bad.any():
        lane, segment = np.argwhere(bad)[0].tolist()
        record, value = rows.records(numbers)[lane][segment], grades[lane, segment]
        if np.isnan(value):
            text = unusable(record)
            margin = f"a margin that is not a finite number ({text})" if text else "no margin"
        else:
            margin = (
                f"the margin {value:g}" if np.isfinite(value) else f"a margin beyond fp32 ({np.finfo(np.float32).max:.1e})"
            )
        raise DataError(
            f"{record} has {margin}: train.method.kind=offset needs one on every pair, and offset_scale=log one above 0",
            hint="correct the row's `margin` (or data.sources.mapping.margin) or leave the row out, or use kind: dpo",
        )
    return grades
