"""Log probabilities of continuations: prompts of like length in one pass, then their continuations on the expanded cache.

Shapes: P prompts of a group, the longest of L tokens; R continuations of more than one token, the longest of W + 1; V
vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from forge_ray.inference.engine import Question, Score

MAX_ROWS = 64  # continuations of a group: bounds the copies of the prompts' caches
LONG = 8  # tokens from which continuations of all sizes share a pass
MAX_TOKENS = 2048  # of a group's prompts, and of its continuations: bounds its logits, and little is gained beyond


@dataclass(frozen=True)
class _Asked:
    """Continuations of one prompt. `place`: (number of the question, number of its first continuation)."""

    prompt: list[int]
    rows: list[list[int]]
    place: tuple[int, int]

    @property
    def width(self) -> int:
        return max(map(len, self.rows))


@torch.inference_mode()
def score_questions(model: PreTrainedModel, questions: Sequence[Question]) -> list[list[Score]]:
    """Of each question (prompt, continuations), the sum of fp32 log-softmax over each continuation's tokens."""
    scores: list[list[Score]] = [[Score(0.0, 0)] * len(continuations) for _, continuations in questions]
    for group in _groups(questions):
        for asked, sums in zip(group, _sums(model, group), strict=True):
            question, first = asked.place
            of_rows = [Score(total, len(ids)) for total, ids in zip(sums, asked.rows, strict=True)]
            scores[question][first : first + len(of_rows)] = of_rows
    return scores


def _groups(questions: Sequence[Question]) -> Iterator[list[_Asked]]:
    """What is asked together: few prompts of like length, with at most `MAX_ROWS` continuations."""
    parts = [
        _Asked(list(prompt), [list(ids) for ids in continuations[first : first + MAX_ROWS]], (number, first))
        for number, (prompt, continuations) in enumerate(questions)
        for first in range(0, len(continuations), MAX_ROWS)
    ]
    group: list[_Asked] = []
    for part in sorted(parts, key=lambda part: (len(part.prompt), part.width)):
        num_rows = sum(len(one.rows) for one in (*group, part))
        prompts, width = (len(group) + 1) * len(part.prompt), max(one.width for one in (*group, part))
        if group and (num_rows > MAX_ROWS or prompts > MAX_TOKENS or num_rows * width > MAX_TOKENS):
            yield group
            group = []
        group.append(part)
    if group:
        yield group


def _sums(model: PreTrainedModel, group: Sequence[_Asked]) -> list[list[float]]:
    """Of each prompt's continuations. Prompts are padded on the left, so that what follows them is as far away as it is."""
    longest = max(len(asked.prompt) for asked in group)
    inputs = torch.tensor([[0] * (longest - len(a.prompt)) + a.prompt for a in group], device=model.device)
    lengths_P = torch.tensor([len(asked.prompt) for asked in group], device=model.device)
    places_L = torch.arange(longest, device=model.device)
    seen_PL = places_L >= longest - lengths_P[:, None]
    is_padded = not bool(seen_PL.all())
    prefill = model(
        input_ids=inputs,
        attention_mask=seen_PL.long() if is_padded else None,
        position_ids=(places_L - (longest - lengths_P[:, None])).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    first_PV = torch.log_softmax(prefill.logits[:, -1].float(), dim=-1)
    sums = [[float(first_PV[number, ids[0]]) if ids else 0.0 for ids in a.rows] for number, a in enumerate(group)]
    by_size: dict[int, list[tuple[int, int]]] = {}
    for number, asked in enumerate(group):
        for row, ids in enumerate(asked.rows):
            by_size.setdefault(min(len(ids), LONG), []).append((number, row))
    longer = [places for size, places in by_size.items() if size > 1]
    for turn, places in enumerate(longer, start=1):  # few sizes where continuations are labels: nothing is padded
        owner_R = torch.tensor([number for number, _ in places], device=model.device)
        cache = prefill.past_key_values if turn == len(longer) else copy.deepcopy(prefill.past_key_values)
        cache.batch_select_indices(owner_R)
        rows = [group[number].rows[row] for number, row in places]
        rests = _rests(model, cache, seen_PL[owner_R], lengths_P[owner_R], rows)
        for (number, row), rest in zip(places, rests, strict=True):
            sums[number][row] += rest
    return sums


def _rests(model: PreTrainedModel, cache: object, seen_RL: Tensor, lengths_R: Tensor, rows: list[list[int]]) -> list[float]:
    """Log probability of each row's tokens after its first; pads stand right of the tokens and are never seen by them."""
    width = max(len(ids) for ids in rows) - 1
    device = model.device
    inputs = torch.tensor([(ids[:-1] + [0] * width)[:width] for ids in rows], device=device)
    targets = torch.tensor([(ids[1:] + [0] * width)[:width] for ids in rows], device=device)
    places_W = torch.arange(width, device=device)
    real_RW = places_W < torch.tensor([len(ids) - 1 for ids in rows], device=device)[:, None]
    output = model(
        input_ids=inputs,
        past_key_values=cache,
        attention_mask=torch.cat([seen_RL, real_RW], dim=1).long(),
        position_ids=lengths_R[:, None] + places_W,
    )
    logits = output.logits.float()
    logprobs = logits.gather(-1, targets[..., None])[..., 0] - logits.logsumexp(dim=-1)
    return [float(total) for total in (logprobs.double() * real_RW).sum(dim=1)]
