"""A prompt that both answers of a pair have is computed once.

The state of a token follows from the tokens before it. So where the second document of a pair begins as the first one does,
its states are those that the first one has: these tokens are left out of the pass, and what comes behind them attends to the
first document's. Loss and gradients are those of two documents, but for the rounding of sums.

Shapes: B rows, T tokens, N = B T tokens of a pass, M of them computed.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from forge_ray.train.attention import SharedPrompts, edges


def shared_prompts(batch: dict[str, Tensor]) -> SharedPrompts | None:
    """Of a batch whose documents come in pairs, [B, T] each of `input_ids`, `position_ids` and `segment_ids`; None where no
    pair begins alike. Each document keeps at least its last token."""
    device, (_, length) = batch["input_ids"].device, batch["input_ids"].shape
    columns_N3 = torch.stack([batch[name].flatten() for name in ("input_ids", "position_ids", "segment_ids")], dim=1)
    ids_N, positions_N, segments_N = columns_N3.cpu().unbind(dim=1)  # the device is waited for once
    ids, bounds = ids_N.tolist(), edges(positions_N).tolist()
    numbers = segments_N[bounds[:-1]].tolist()
    left_out: list[tuple[int, int, int]] = []  # (first token, how many, the same tokens of the first document)
    sizes: list[tuple[int, int, int]] = []
    documents = list(zip(pairwise(bounds), numbers, strict=True))
    while documents:
        (begin, end), number = documents.pop(0)
        if not (documents and number % 2 and documents[0][1] == number + 1 and end % length):
            sizes.append((0, end - begin, 0))
            continue
        (_, last), _ = documents.pop(0)
        shared = _same(ids[begin:end], ids[end:last])
        left_out.append((end, shared, begin))
        sizes.append((shared, end - begin - shared, last - end - shared))
    if not any(shared for _, shared, _ in left_out):
        return None
    is_computed, source = torch.ones(len(ids), dtype=torch.bool), torch.arange(len(ids))
    for begin, shared, first in left_out:
        is_computed[begin : begin + shared] = False
        source[begin : begin + shared] = torch.arange(first, first + shared)
    places = (is_computed.cumsum(0) - 1)[source]
    return SharedPrompts(torch.nonzero(is_computed).flatten().to(device), places.to(device), tuple(sizes))


def _same(first: list[int], second: list[int]) -> int:
    """How many tokens both begin with, less than either has."""
    most = min(len(first), len(second)) - 1
    return next((place for place in range(most) if first[place] != second[place]), most)
