"""Pure tensor maths of the losses (level 3). Each returns `(loss_sum, num_tokens)`; the scale is applied once, outside.

Shapes: B rows, T tokens, K kept positions, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kept_positions(loss_mask_BT: Tensor) -> Tensor:
    """int64 [K]: positions whose *next* token is trained in any row. Logits are computed there and nowhere else.

    Never empty: a micro-batch without a trained token still takes part in every collective.
    """
    kept = torch.nonzero(loss_mask_BT[:, 1:].any(dim=0)).flatten()
    return kept if len(kept) else torch.zeros(1, dtype=torch.long, device=loss_mask_BT.device)


def token_cross_entropy(
    logits_BKV: Tensor, input_ids_BT: Tensor, loss_mask_BT: Tensor, kept_K: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum of -log p(next token) over the trained tokens, in fp32, and how many there are."""
    targets_BK = input_ids_BT[:, kept_K + 1]
    mask_BK = loss_mask_BT[:, kept_K + 1].float()
    losses_BK = F.cross_entropy(logits_BKV.float().flatten(0, 1), targets_BK.flatten(), reduction="none")
    mask = mask_BK.flatten()
    return (losses_BK * mask).sum(), mask.sum()
