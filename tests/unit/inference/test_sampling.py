"""The repetition penalty and min-p, against transformers' own."""

from __future__ import annotations

import pytest
import torch
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor

from forge_ray.errors import EngineError
from forge_ray.inference.engine import GenerationRequest
from forge_ray.inference.sampling import Drawing, check_drawing, draw_one

pytestmark = pytest.mark.unit

VOCAB = 50


def request(**more: float) -> GenerationRequest:
    return GenerationRequest(prompt_ids=(3, 7, 3), max_new_tokens=40, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("penalty", [0.5, 1.3, 5.0])
def test_repetition_penalty_counts_prompt_and_answer_once(penalty: float) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1)) * 3
    drawing = Drawing(request(repetition_penalty=penalty), seed=0)
    assert not drawing.is_argmax
    reference, ids = RepetitionPenaltyLogitsProcessor(penalty), [3, 7, 3]
    for position in range(40):
        expected = int(reference(torch.tensor([ids]), logits.clone()[None])[0].argmax())
        assert draw_one(logits, drawing, position) == expected
        ids.append(expected)
    assert len(set(ids)) > 3 or penalty < 1


def test_no_penalty_changes_nothing() -> None:
    assert Drawing(request(), seed=0).is_argmax
    assert Drawing(request(min_p=0.5), seed=0).is_argmax  # greedy: the best token stays


@pytest.mark.parametrize("min_p", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_min_p_keeps_the_tokens_that_it_should(min_p: float, temperature: float) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(2)) * 2
    kept = MinPLogitsWarper(min_p)(torch.tensor([[0]]), (logits / temperature)[None])[0].isfinite()
    asked = request(min_p=min_p, temperature=temperature)
    drawn = {draw_one(logits, Drawing(asked, seed=seed), 0) for seed in range(3000)}
    allowed = set(kept.nonzero().flatten().tolist())
    assert drawn <= allowed
    likely = torch.softmax((logits / temperature).masked_fill(~kept, -torch.inf), -1) > 0.005
    assert set(likely.nonzero().flatten().tolist()) <= drawn


@pytest.mark.parametrize(
    "wrong", [{"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"repetition_penalty": float("inf")}]
)
def test_values_without_a_meaning_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(EngineError, match=r"min_p|must be finite"):
        check_drawing(request(**wrong))
