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

from forge_ray.data.build.pack import Document, pack
from forge_ray.data.dataset.stream import COLUMNS, model_inputs
from forge_ray.errors import ConfigError
from forge_ray.train import attention
from forge_ray.train import loss as loss_module
from forge_ray.train.loss import IGNORED, target_logps, token_logps, trained_targets

pytestmark = pytest.mark.numerics


@pytest.fixture
def model(tiny_model_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(
        tiny_model_dir, dtype=torch.float32, attn_implementation=attention.register()
    ).train()


def batch_of(chosen: list[Document], length: int) -> dict[str, Tensor]:
    rows = pack(chosen, length, 0)
    arrays = {name: np.stack([getattr(row, name) for row in rows]) for name in COLUMNS}
    return {name: torch.from_numpy(value) for name, value in model_inputs(arrays).items()}


def loss_of(model: Any, batch: dict[str, Tensor], **inputs: Any) -> tuple[Tensor, Tensor]:
    """(sum over the trained tokens, their number), as supervised fine-tuning computes it, but for `inputs`."""

    def forward(**arguments: Any) -> Any:
        return model(**arguments | inputs)

    logps, _ = token_logps(forward, batch)
    return -logps.sum(), torch.count_nonzero(batch["loss_mask"][:, 1:])


def gradients_of(model: Any, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def some_documents() -> list[Document]:
    """Three, each with trained tokens."""
    return documents(3, 9)[1:4]


def test_packed_row_equals_its_documents_alone(model: LlamaForCausalLM) -> None:
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


def test_loss_differs_without_document_isolation(model: LlamaForCausalLM) -> None:
    chosen = some_documents()
    batch = batch_of(chosen, sum(len(document.ids) for document in chosen) + 5)
    right = float(loss_of(model, batch)[0].detach())
    wrong = loss_of(model, batch, **attention.bounds(torch.tensor([0, batch["input_ids"].shape[1]])))[0]
    assert abs(float(wrong.detach()) - right) > 1e-3 * right  # a hundred times the tolerance above


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_attention_matches_transformers_per_document(window: int | None, softcap: float | None) -> None:
    """Gemma's eager attention knows windows (as masks) and caps; grouped heads too."""
    from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward

    torch.manual_seed(0)
    sizes, module = [5, 1, 9], torch.nn.Identity()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    query, key, value = (torch.randn(1, heads, sum(sizes), 8, requires_grad=True) for heads in (4, 2, 2))
    places = torch.cat([torch.arange(size) for size in sizes])
    distance = places[:, None] - places[None, :]
    same = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    seen = (same[:, None] == same[None, :]) & (distance >= 0) & (distance < (window or 99))
    mask = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, float("-inf"))
    expected, _ = eager_attention_forward(module, query, key, value, mask, scaling=0.3, softcap=softcap)  # type: ignore[arg-type]
    expected_gradients = torch.autograd.grad(expected.square().sum(), (query, key, value))
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    actual, _ = attention.document_attention(
        module, query, key, value, None, **options, **attention.bounds(attention.edges(places))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for gradient, want in zip(
        torch.autograd.grad(actual.square().sum(), (query, key, value)), expected_gradients, strict=True
    ):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5)


def test_layers_that_mix_documents_are_refused(model: LlamaForCausalLM) -> None:
    attention.refuse_unknown(model)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ConfigError, match="LlamaForCausalLM has linear_attention") as caught:
        attention.refuse_unknown(model)
    assert "full or sliding-window" in caught.value.hint
    with pytest.raises(ConfigError, match="sinks"):
        attention.document_attention(model, *[torch.zeros(1, 1, 1, 4)] * 3, None, s_aux=torch.zeros(1))


@pytest.mark.parametrize("rows", [1, 3])
def test_loss_from_trained_positions_equals_loss_from_all_logits(model: LlamaForCausalLM, rows: int) -> None:
    """Also with several rows, whose trained positions differ, and with a row that trains nothing."""
    packed_rows = pack(documents(4, 30), SEQUENCE_LENGTH, 0)[:rows]
    if rows > 1:
        packed_rows[1].loss_mask[:] = 0
    arrays = {name: np.stack([getattr(row, name) for row in packed_rows]) for name in COLUMNS}
    batch = {name: torch.from_numpy(value) for name, value in model_inputs(arrays).items()}
    loss, count = loss_of(model, batch)

    model.set_attn_implementation("sdpa")
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    labels = batch["input_ids"].masked_fill(batch["loss_mask"] == 0, -100)[:, 1:]
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    assert float(count) == int(batch["loss_mask"].sum()) > 0
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for gradient, expected_gradient in zip(gradients_of(model, loss), gradients_of(model, expected), strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-5 * float(expected_gradient.abs().max()))


def test_micro_batch_without_trained_tokens_has_zero_loss_and_gradients(model: LlamaForCausalLM) -> None:
    batch = batch_of([Document("rec", [11, 12, 13, 14], [0, 0, 0, 0])], SEQUENCE_LENGTH)
    loss, count = loss_of(model, batch)
    assert (float(loss.detach()), float(count)) == (0.0, 0.0)
    assert all(not gradient.any() for gradient in gradients_of(model, loss))


def test_first_token_of_a_document_is_never_a_target() -> None:
    rows = pack([Document("a", [1, 2, 3], [1, 1, 1]), Document("b", [4, 5], [1, 1])], 6, 0)
    assert [row.loss_mask.tolist() for row in rows] == [[0, 1, 1, 0, 1, 0]]


def test_cross_entropy_by_hand() -> None:
    kept, targets = trained_targets(torch.tensor([[3, 1, 0], [2, 2, 3]]), torch.tensor([[0, 1, 1], [1, 0, 1]]))
    assert (kept.tolist(), targets.tolist()) == ([0, 1, 4], [1, 0, 3])
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 0.0]])
    logps = target_logps(logits, torch.tensor([1, 0, IGNORED]))
    assert logps.tolist() == pytest.approx([-np.log(4), -np.log(1 + 3 * np.exp(-2)), 0.0], rel=1e-6)


def test_log_probabilities_come_with_the_positions_of_their_tokens(model: LlamaForCausalLM) -> None:
    """Row by row, and 0 where nothing is trained."""
    batch = batch_of(some_documents(), SEQUENCE_LENGTH)
    logps, positions = token_logps(model, batch)
    assert positions.tolist() == torch.nonzero(batch["loss_mask"].flatten()).flatten().tolist()
    assert (logps < 0).all()
    logps, positions = token_logps(model, batch | {"loss_mask": torch.zeros_like(batch["loss_mask"])})
    assert (logps.tolist(), positions.tolist()) == ([0.0], [0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_matches_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several chunks, the last one smaller."""
    monkeypatch.setitem(loss_module.CHUNK_BYTES, "cpu", 4 * 50 * 4)
    torch.manual_seed(0)
    source, targets = torch.randn(10, 50), torch.randint(0, 50, (10,))
    one, other = (source.to(dtype).requires_grad_() for _ in range(2))
    loss = -target_logps(one * 1, targets).sum()
    expected = F.cross_entropy(other.float(), targets, reduction="sum")
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    (loss / 7).backward()
    (expected / 7).backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-7)
