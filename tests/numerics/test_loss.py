"""Packed equals unpacked, and logits at the kept positions are all that the loss needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SEQUENCE_LENGTH, documents
from torch import Tensor
from transformers import LlamaForCausalLM

from forge_ray.data.pack import Document, pack
from forge_ray.data.stream import COLUMNS, model_inputs
from forge_ray.train.loss import kept_positions, token_cross_entropy

pytestmark = pytest.mark.numerics


@pytest.fixture
def model(tiny_model_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32, attn_implementation="sdpa").train()


def batch_of(chosen: list[Document], length: int) -> dict[str, Tensor]:
    rows = pack(chosen, length, 0)
    arrays = {name: np.stack([getattr(row, name) for row in rows]) for name in COLUMNS}
    return {name: torch.from_numpy(value) for name, value in model_inputs(arrays).items()}


def loss_of(model: Any, batch: dict[str, Tensor], **inputs: Any) -> tuple[Tensor, Tensor]:
    """As the recipe computes it."""
    kept = kept_positions(batch["loss_mask"])
    given = {"position_ids": batch["position_ids"]} | inputs
    logits = model(input_ids=batch["input_ids"], logits_to_keep=kept, use_cache=False, **given).logits
    return token_cross_entropy(logits, batch["input_ids"], batch["loss_mask"], kept)


def gradients_of(model: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def some_documents() -> list[Document]:
    """Three, each with trained tokens."""
    return documents(3, 9)[1:4]


def test_a_packed_row_equals_its_documents_alone(model: LlamaForCausalLM) -> None:
    chosen = some_documents()
    length = sum(len(document.ids) for document in chosen) + 5
    batch = batch_of(chosen, length)
    assert batch["input_ids"].shape == (1, length)
    assert int((batch["segment_ids"] == 0).sum()) == 5  # right padding
    packed, count = loss_of(model, batch)

    alone = [loss_of(model, batch_of([document], len(document.ids))) for document in chosen]
    assert float(count) == sum(float(number) for _, number in alone)
    assert float(packed.detach()) == pytest.approx(sum(float(loss.detach()) for loss, _ in alone), rel=1e-5)

    separate = [gradients_of(model, loss) for loss, _ in alone]
    for index, gradient in enumerate(gradients_of(model, packed)):
        expected = sum(gradients[index] for gradients in separate)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("leak", ["no position ids", "an attention mask beside them"])
def test_control_without_isolation_the_loss_differs(model: LlamaForCausalLM, leak: str) -> None:
    chosen = some_documents()
    batch = batch_of(chosen, sum(len(document.ids) for document in chosen) + 5)
    right = float(loss_of(model, batch)[0].detach())
    if leak == "no position ids":
        wrong = loss_of(model, batch, position_ids=None)[0]
    else:
        wrong = loss_of(model, batch, attention_mask=(batch["segment_ids"] > 0).long())[0]
    assert abs(float(wrong.detach()) - right) > 1e-3 * right  # a hundred times the tolerance above


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_at_kept_positions_give_the_loss_of_all_logits(model: LlamaForCausalLM, rows: int) -> None:
    """Also with several rows, whose trained positions differ, and with a row that trains nothing."""
    made = pack(documents(4, 30), SEQUENCE_LENGTH, 0)[:rows]
    if rows > 1:
        made[1].loss_mask[:] = 0
    arrays = {name: np.stack([getattr(row, name) for row in made]) for name in COLUMNS}
    batch = {name: torch.from_numpy(value) for name, value in model_inputs(arrays).items()}
    loss, count = loss_of(model, batch)

    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    labels = batch["input_ids"].masked_fill(batch["loss_mask"] == 0, -100)[:, 1:]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    assert float(count) == int(batch["loss_mask"].sum()) > 0
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for gradient, wanted in zip(gradients_of(model, loss), gradients_of(model, expected), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_a_micro_batch_without_a_trained_token_has_loss_and_gradients_of_zero(model: LlamaForCausalLM) -> None:
    batch = batch_of([Document("rec", [11, 12, 13, 14], [0, 0, 0, 0])], SEQUENCE_LENGTH)
    loss, count = loss_of(model, batch)
    assert (float(loss.detach()), float(count)) == (0.0, 0.0)
    assert all(not gradient.any() for gradient in gradients_of(model, loss))


def test_the_first_token_of_a_document_is_never_a_target() -> None:
    rows = pack([Document("a", [1, 2, 3], [1, 1, 1]), Document("b", [4, 5], [1, 1])], 6, 0)
    assert [row.loss_mask.tolist() for row in rows] == [[0, 1, 1, 0, 1, 0]]


def test_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]]])
    ids, mask = torch.tensor([[3, 1, 0]]), torch.tensor([[0, 1, 1]])
    kept = kept_positions(mask)
    assert kept.tolist() == [0, 1]
    loss, count = token_cross_entropy(logits, ids, mask, kept)
    assert float(count) == 2
    assert float(loss) == pytest.approx(np.log(4) + np.log(1 + 3 * np.exp(-2)), rel=1e-6)
