"""The divergence from a teacher of whom the likeliest tokens are kept: its value, its gradient, its edges."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from forge_ray.train import loss as loss_module
from forge_ray.train.divergence import divergence_and_loss
from forge_ray.train.loss import IGNORED

pytestmark = pytest.mark.numerics
POSITIONS, VOCABULARY = 7, 23


def teacher(k: int, temperature: float, spread: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """(log q over the vocabulary, ids and log q of the k likeliest)."""
    logits = spread * torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(1))
    logps = (logits / temperature).log_softmax(-1)
    values, ids = logps.topk(k, dim=1)
    return logps, ids, values


def expected(logits: Tensor, logps: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """KL(q || p) of two distributions over the k tokens and the rest, in fp64."""
    kept = torch.zeros_like(logps, dtype=torch.bool).scatter(1, ids, True)
    p, q = (logits.double() / temperature).softmax(-1), logps.double().exp()
    total = torch.where(kept, q * (q.log() - p.log()), 0).sum(1)
    if ids.shape[1] < VOCABULARY:
        q_rest, p_rest = (torch.where(kept, 0, values).sum(1) for values in (q, p))
        total = total + q_rest * (q_rest.log() - p_rest.log())
    return total


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 4, VOCABULARY])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_value_and_gradient(monkeypatch: pytest.MonkeyPatch, k: int, temperature: float, chunk: int) -> None:
    """Both losses with weights of their own for each position, in chunks of one position and in one."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", chunk)
    logps, ids, values = teacher(k, temperature)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(POSITIONS, VOCABULARY, generator=generator, requires_grad=True)
    targets = torch.randint(0, VOCABULARY, (POSITIONS,), generator=generator)
    targets[2] = IGNORED
    counted = targets != IGNORED
    weights = torch.rand(2, POSITIONS, generator=generator)
    soft = expected(logits, logps, ids, temperature).where(counted, 0)
    hard = torch.nn.functional.cross_entropy(logits, targets.clamp(min=0), reduction="none").where(counted, 0)
    (gradient,) = torch.autograd.grad((weights[0] * soft).sum() + (weights[1] * hard).sum(), logits)
    own = logits.detach().clone().requires_grad_()
    divergences, losses = divergence_and_loss(own.clone(), targets, ids, values, temperature)
    assert torch.allclose(divergences.double(), soft, atol=1e-5)
    assert torch.allclose(losses, hard, atol=1e-5)
    ((weights[0] * divergences).sum() + (weights[1] * losses).sum()).backward()
    assert own.grad is not None
    assert torch.allclose(own.grad, gradient, atol=1e-5)


def test_all_tokens_give_the_whole_divergence_and_fewer_give_less() -> None:
    logits = torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(3))
    targets = torch.zeros(POSITIONS, dtype=torch.long)
    whole = torch.nn.functional.kl_div(logits.log_softmax(-1), teacher(1, 1.0)[0], log_target=True, reduction="none").sum(1)
    before = torch.zeros(POSITIONS)
    for k in (1, 2, 8, VOCABULARY):
        _, ids, values = teacher(k, 1.0)
        divergences, _ = divergence_and_loss(logits.clone(), targets, ids, values, 1.0)
        assert (divergences >= before - 1e-5).all()
        before = divergences
    assert torch.allclose(before, whole, atol=1e-5)


def test_teacher_that_is_the_student_gives_nothing() -> None:
    logps, ids, values = teacher(5, 1.0)
    own = logps.clone().requires_grad_()
    divergences, _ = divergence_and_loss(own.clone(), torch.zeros(POSITIONS, dtype=torch.long), ids, values, 1.0)
    divergences.sum().backward()
    assert own.grad is not None
    assert divergences.abs().max() < 1e-6
    assert own.grad.abs().max() < 1e-6


def test_certain_student_and_certain_teacher_stay_finite() -> None:
    """Probabilities below what fp32 holds, on either side, beyond the kept tokens."""
    ids = torch.tensor([[0, 1]])
    for student, certain in ((-300.0, 0.5), (0.0, 1.0)):
        logits = torch.full((1, VOCABULARY), student)
        logits[0, :2] = 0.0
        own = logits.requires_grad_()
        values = torch.tensor([[certain, 1e-30]]).log()
        divergences, _ = divergence_and_loss(own.clone(), torch.tensor([0]), ids, values, 1.0)
        divergences.sum().backward()
        assert own.grad is not None
        assert torch.isfinite(divergences).all()
        assert torch.isfinite(own.grad).all()


def test_bf16_logits_are_widened_a_few_at_a_time() -> None:
    _, ids, values = teacher(4, 1.0)
    logits = torch.randn(POSITIONS, VOCABULARY, generator=torch.Generator().manual_seed(4)).bfloat16()
    targets = torch.zeros(POSITIONS, dtype=torch.long)
    own = logits.clone().requires_grad_()
    divergences, _ = divergence_and_loss(own.clone(), targets, ids, values, 1.0)
    exact, _ = divergence_and_loss(logits.float(), targets, ids, values, 1.0)
    divergences.sum().backward()
    assert divergences.dtype == torch.float32
    assert own.grad is not None
    assert own.grad.dtype == torch.bfloat16
    assert torch.equal(divergences, exact)
