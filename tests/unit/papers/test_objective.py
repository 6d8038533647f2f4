"""What documents and curves say that a run minimised."""

from __future__ import annotations

import pytest

from forge_ray.config.method import OF_PAIRS, loss_name, objective

pytestmark = pytest.mark.unit


def test_cross_entropy_is_said_of_supervised_training_alone() -> None:
    assert objective("sft", 0.0) == "cross-entropy of the trained tokens"
    assert loss_name("sft") == "loss per trained token (nats)"
    for kind in OF_PAIRS:
        assert objective(kind, 0.0) == f"{kind} loss of pairs of a preferred and a rejected answer"
        assert loss_name(kind) == f"{kind} loss per pair"
    assert objective("apo_zero", 0.0) == "apo_zero loss of single answers, judged good or bad"
    assert loss_name("apo_zero") == "apo_zero loss per answer"
    assert objective("dpo", 0.5).endswith("plus 0.5 times the preferred answer's cross-entropy per token")
