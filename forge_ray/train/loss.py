"""Pure tensor maths of the losses: log probabilities of trained tokens, and the balance of routers.

Shapes: B rows, T tokens, N = B T tokens of a pass, K trained positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from forge_ray.train import attention
from forge_ray.train.attention import SharedPrompts

IGNORED = -1  # a target that adds nothing
CHUNK_BYTES = {"cpu": 4 << 20, "cuda": 256 << 20}  # of fp32 logits at a time: what a cache holds; what launches are worth


def token_logps(
    forward: Callable[..., Any], batch: dict[str, Tensor], shared: SharedPrompts | None = None
) -> tuple[Tensor, Tensor]:
    """(log p of every trained token, fp32 [K]; the flat position row * T + t of each of them, int64 [K]).

    The rows of a pass go through the model laid end to end. `batch`: `input_ids`, `position_ids` (0 where a document begins)
    and `loss_mask`, [B, T] each. Nothing of a document reaches another one: that is up to the attention, which
    `model.load_for_training` sets (`attention.py`). Logits are computed where the next token is trained and nowhere else. A
    pass without a trained token gives one log p of 0, at position 0. A slice of a pass (`sequence_parallel.py`) brings
    `edges`, and one token more than it has positions; positions then count within the slice. `shared`: tokens that are not
    computed again.
    """
    logits, targets, kept = trained_logits(forward, batch, shared)
    return target_logps(logits, targets), (kept + 1).where(targets != IGNORED, 0)


def trained_logits(
    forward: Callable[..., Any], batch: dict[str, Tensor], shared: SharedPrompts | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits [K, V] where the next token is trained, that token [K], the flat position of the logits [K]). Of a pass
    without a trained token, one position whose token is `IGNORED`."""
    kept, targets = trained_targets(batch["input_ids"], batch["loss_mask"])
    positions = batch["position_ids"].reshape(1, -1)
    edges = batch["edges"] if "edges" in batch else attention.edges(positions[0])
    ids = batch["input_ids"].reshape(1, -1)[:, : positions.shape[1]]
    output = forward(
        input_ids=ids[:, shared.tokens_M] if shared else ids,
        position_ids=positions[:, shared.tokens_M] if shared else positions,
        logits_to_keep=shared.places_N[kept] if shared else kept,
        use_cache=False,
        **attention.bounds(edges, shared),
    )
    return output.logits[0], targets, kept


def trained_targets(input_ids_BT: Tensor, loss_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(positions in the N tokens whose *next* token is trained, those next tokens): int64 [K] each.

    Never empty: a pass without a trained token still takes part in every collective, with one position that is ignored.
    """
    mask = loss_mask_BT.clone()
    mask[:, 0] = 0  # the first token of a row follows none
    kept = torch.nonzero(mask.flatten()).flatten() - 1
    if not len(kept):
        return torch.zeros_like(input_ids_BT[0, :1]), torch.full_like(input_ids_BT[0, :1], IGNORED)
    return kept, input_ids_BT.flatten()[kept + 1]


def segment_sums(values_K: Tensor, positions_K: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Sums and numbers of a pass's trained tokens by segment, [B, S] fp32 and int64; S is the most segments of a row, made
    even. `positions_K` as `token_logps` gives them; differentiable in the values."""
    segment_ids_BT = batch["segment_ids"]
    num_rows, length = segment_ids_BT.shape
    num_segments = 1 + int(segment_ids_BT.max()) + int(segment_ids_BT.max()) % 2  # and segment 0, of padding
    places_K = positions_K // length * num_segments + segment_ids_BT.flatten()[positions_K]
    trained_K = batch["loss_mask"].flatten()[positions_K]
    empty = torch.zeros(num_rows * num_segments, dtype=values_K.dtype, device=values_K.device)
    sums = empty.index_add(0, places_K, values_K).view(num_rows, -1)[:, 1:]
    counts = trained_K.new_zeros(num_rows * num_segments).index_add(0, places_K, trained_K).view(num_rows, -1)[:, 1:]
    return sums, counts


def target_logps(logits_KV: Tensor, targets_K: Tensor) -> Tensor:
    """log p(target), fp32 [K], 0 where the target is `IGNORED`. The gradient takes the place of the logits."""
    losses: Tensor = _CrossEntropy.apply(logits_KV, targets_K)  # type: ignore[no-untyped-call]
    return -losses


class _CrossEntropy(torch.autograd.Function):
    """[K] fp32. A few rows at a time are widened to fp32: bf16 logits are never held in fp32 as a whole, and no gradient of
    their size is allocated. One backward per forward."""

    @staticmethod
    def forward(context: Any, logits: Tensor, targets: Tensor) -> Tensor:
        context.rows = max(1, CHUNK_BYTES["cuda" if logits.is_cuda else "cpu"] // (4 * logits.shape[1]))
        losses, norms = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
        counted = targets != IGNORED
        for start in range(0, len(logits), context.rows):
            part = slice(start, start + context.rows)
            wide = logits[part].float()
            norms[part] = torch.logsumexp(wide, dim=1)
            losses[part] = norms[part] - wide.gather(1, targets[part, None].clamp(min=0))[:, 0]
        context.save_for_backward(logits, targets, norms)
        return losses.where(counted, 0.0)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets, norms = context.saved_tensors
        scale = gradients[0].where(targets != IGNORED, 0.0)
        for start in range(0, len(logits), context.rows):
            part = slice(start, start + context.rows)
            wide = logits[part].float().sub_(norms[part, None]).exp_()
            wide.scatter_add_(1, targets[part, None].clamp(min=0), wide.new_full((len(wide), 1), -1.0))
            logits[part] = wide.mul_(scale[part, None])
        return logits, None


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
