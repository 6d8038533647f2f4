"""Log-probabilities of continuations: one prefill of the prompt, then padded batches on its expanded cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from forge_ray.inference.engine import Score

MAX_ROWS = 64  # continuations per forward pass: bounds the copies of the prompt's cache


@torch.inference_mode()
def score_continuations(
    model: PreTrainedModel, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]
) -> list[Score]:
    """Sum of fp32 log-softmax over each continuation's tokens, given `prompt_ids` before it."""
    scores: list[Score] = []
    prompt = torch.tensor([list(prompt_ids)], device=model.device)
    for start in range(0, len(continuations), MAX_ROWS):
        # A new prefill per batch: the cache of the last one was overwritten. Label sets fit into one.
        prefill = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        first = torch.log_softmax(prefill.logits[0, -1].float(), dim=-1)
        rows = [list(ids) for ids in continuations[start : start + MAX_ROWS]]
        sums = [float(first[ids[0]]) if ids else 0.0 for ids in rows]
        if max(len(ids) for ids in rows) > 1:
            for row, rest in enumerate(_score_rest(model, prefill.past_key_values, len(prompt_ids), rows)):
                sums[row] += rest
        scores.extend(Score(total, len(ids)) for total, ids in zip(sums, rows, strict=True))
    return scores


def _score_rest(model: PreTrainedModel, cache: object, num_prompt: int, rows: list[list[int]]) -> list[float]:
    """Log-probability of each row's tokens after its first; pads stand right of the tokens and are never seen by them."""
    width = max(len(ids) for ids in rows) - 1
    device = model.device
    inputs = torch.tensor([(ids[:-1] + [0] * width)[:width] for ids in rows], device=device)
    targets = torch.tensor([(ids[1:] + [0] * width)[:width] for ids in rows], device=device)
    lengths = torch.tensor([max(len(ids) - 1, 0) for ids in rows], device=device)
    cache.batch_repeat_interleave(len(rows))  # type: ignore[attr-defined]
    real = torch.arange(width, device=device) < lengths[:, None]
    output = model(
        input_ids=inputs,
        past_key_values=cache,
        attention_mask=torch.cat([torch.ones(len(rows), num_prompt, dtype=torch.bool, device=device), real], dim=1).long(),
        position_ids=torch.arange(num_prompt, num_prompt + width, device=device).expand(len(rows), width),
    )
    logprobs = torch.log_softmax(output.logits.float(), dim=-1).gather(-1, targets[..., None])[..., 0]
    return [float(total) for total in (logprobs.double() * real).sum(dim=1)]
