"""Forward KL divergence of a language model from a teacher of whom only the k likeliest tokens are kept.

Shapes: K trained positions, V vocabulary, k tokens of the teacher.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forge_ray.train.loss import CHUNK_BYTES, IGNORED

ROUNDING = 1e-6  # of a sum of probabilities in fp32: less than this beyond the k tokens is nothing
TINY = torch.finfo(torch.float32).tiny


def divergence_and_loss(
    logits_KV: Tensor, targets_K: Tensor, ids_Kk: Tensor, logps_Kk: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """(KL(teacher || student), -log p(target)), nats, fp32 [K] each, 0 where the target is `IGNORED`. The gradient takes the
    place of the logits.

    With p = softmax(z / temperature) of the student, q the teacher's at the same temperature (`logps_Kk`: log q of its
    tokens `ids_Kk`, int64), and everything beyond these tokens as one, whose probabilities are what is left:

        KL = sum over i of q_i (log q_i - log p_i) + q_rest (log q_rest - log p_rest)

    which is at most the divergence over the whole vocabulary (data processing inequality), and equal to it for k = V. Its
    gradient by z_j is (p_j - q_j) / temperature for the k tokens, p_j (1 - q_rest / p_rest) / temperature for the others.
    """
    losses: tuple[Tensor, Tensor] = _Divergence.apply(logits_KV, targets_K, ids_Kk, logps_Kk, temperature)  # type: ignore[no-untyped-call]
    return losses


class _Divergence(torch.autograd.Function):
    """As `loss._CrossEntropy`: a few rows at a time in fp32, one backward per forward."""

    @staticmethod
    def forward(
        context: Any, logits: Tensor, targets: Tensor, ids: Tensor, logps: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        context.rows = max(1, CHUNK_BYTES["cuda" if logits.is_cuda else "cpu"] // (4 * logits.shape[1]))
        context.temperature = temperature
        divergences, losses, norms, tempered, ratios = torch.empty(
            (5, len(logits)), dtype=torch.float32, device=logits.device
        )
        for start in range(0, len(logits), context.rows):
            part = slice(start, start + context.rows)
            wide = logits[part].to(torch.float32, copy=True)
            target = wide.gather(1, targets[part, None].clamp(min=0))[:, 0]
            if temperature != 1:
                norms[part] = torch.logsumexp(wide, dim=1)
                wide.div_(temperature)
            own, peak = wide.gather(1, ids[part]), wide.amax(dim=1, keepdim=True)
            wide.sub_(peak).exp_()
            top = wide.gather(1, ids[part]).sum(dim=1)
            rest = wide.scatter_(1, ids[part], 0.0).sum(dim=1)
            tempered[part] = peak[:, 0] + (top + rest).log()
            if temperature == 1:
                norms[part] = tempered[part]
            losses[part] = norms[part] - target
            q = logps[part].exp()
            q_rest = _rest(q)
            p_rest = (rest / (top + rest)).clamp(min=TINY)
            ratios[part] = q_rest / p_rest
            beyond = torch.where(q_rest > 0, q_rest * (q_rest.clamp(min=TINY).log() - p_rest.log()), 0.0)
            divergences[part] = (q * (logps[part] - own + tempered[part, None])).sum(dim=1) + beyond
        context.save_for_backward(logits, targets, ids, logps, norms, tempered, ratios)
        counted = targets != IGNORED
        return divergences.where(counted, 0.0), losses.where(counted, 0.0)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, targets, ids, logps, norms, tempered, ratios = context.saved_tensors
        counted, temperature = targets != IGNORED, context.temperature
        soft, hard = gradients[0].where(counted, 0.0) / temperature, gradients[1].where(counted, 0.0)
        for start in range(0, len(logits), context.rows):
            part = slice(start, start + context.rows)
            wide, soft_1, hard_1 = logits[part].float(), soft[part, None], hard[part, None]
            p = wide.div(temperature).sub_(tempered[part, None]).exp_()
            top = p.gather(1, ids[part])
            of_rest, of_top = soft_1 * (1 - ratios[part, None]), soft_1 * (top - logps[part].exp())
            if temperature == 1:  # one softmax serves both
                p.mul_(of_rest + hard_1).scatter_(1, ids[part], of_top + hard_1 * top)
            else:
                p.mul_(of_rest).scatter_(1, ids[part], of_top)
                p.add_(wide.sub_(norms[part, None]).exp_().mul_(hard_1))
            p.scatter_add_(1, targets[part, None].clamp(min=0), -hard_1)
            logits[part] = p
        return logits, None, None, None, None


def _rest(q_Kk: Tensor) -> Tensor:
    """The teacher's probability beyond its k tokens: [K]."""
    rest_K = 1 - q_Kk.sum(dim=1)
    return rest_K.where(rest_K > ROUNDING, 0.0)
