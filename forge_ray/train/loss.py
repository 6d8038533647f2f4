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


def load_balance(logits_NE: Tensor, chosen_NK: Tensor, used_N: Tensor) -> Tensor:
    """E * sum over experts of f_e P_e (Switch Transformer, arXiv:2101.03961, equations 4 to 6, for K experts a token).

    f_e is the share of the used tokens' choices that fell on e, P_e the mean of its probability; 1 when all experts are used
    alike, E / K when K of them take everything. Differentiable through P. N tokens, E experts, K chosen.
    """
    used = used_N.to(torch.float32)
    count = used.sum().clamp(min=1.0)
    picked_NE = torch.zeros_like(logits_NE, dtype=torch.float32).scatter_(1, chosen_NK, 1.0)
    share_E = (picked_NE * used[:, None]).sum(dim=0) / (count * chosen_NK.shape[1])
    probability_E = (logits_NE.float().softmax(dim=-1) * used[:, None]).sum(dim=0) / count
    return logits_NE.shape[1] * (share_E * probability_E).sum()
