"""A prompt that both answers of a pair have is computed once, and loss and gradients stay those of two documents."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from forge_ray.config.base import parse
from forge_ray.config.method import Preference
from forge_ray.train import attention
from forge_ray.train.loss import segment_sums, token_logps
from forge_ray.train.measure import document_logps
from forge_ray.train.methods.preference import pair_loss
from forge_ray.train.methods.reward import loss as reward_loss
from forge_ray.train.moe import Balance
from forge_ray.train.neftune import add_noise
from forge_ray.train.shared_prompt import shared_prompts

pytestmark = pytest.mark.numerics
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "attn_implementation": "documents",
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "windows": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=3)),
    "windows and caps": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=4, attn_logit_softcapping=2.0)),
    "experts": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, output_router_logits=False)
    ),
}
P, Q = [5, 6, 7, 8, 9, 10], [11, 12, 13]
# By row, pairs of (prompt that both have, what the preferred answer adds, what the rejected one adds)
ROWS = [
    [(P, [20], [21, 22]), (Q, [23, 24, 25, 26], [27])],
    [([], [14, 15], [16, 17, 18]), ([*P, *Q], [28, 29], [30, 29]), ([*Q, *Q], [31], [32])],
    [],
]
LENGTH = 44


def batch_of(rows: list[list[tuple[list[int], list[int], list[int]]]]) -> dict[str, Tensor]:
    """Packed rows; answers are trained, as are none of the tokens of a prompt."""
    columns: dict[str, list[list[int]]] = {
        name: [] for name in ("input_ids", "position_ids", "segment_ids", "loss_mask", "grades")
    }
    for row in rows:
        ids, positions, segments, mask = [], [], [], []
        for number, (prompt, answer) in enumerate((prompt, answer) for prompt, *both in row for answer in both):
            document = [*prompt, *answer]
            ids += document
            positions += range(len(document))
            segments += [number + 1] * len(document)
            mask += [0] * max(len(prompt), 1) + [1] * (len(document) - max(len(prompt), 1))
        rest = LENGTH - len(ids)
        columns["input_ids"].append(ids + [0] * rest)
        columns["position_ids"].append([*positions, *range(rest)])
        columns["segment_ids"].append(segments + [0] * rest)
        columns["loss_mask"].append(mask + [0] * rest)
        columns["grades"].append([0] * 6)
    batch = {name: torch.tensor(values) for name, values in columns.items()}
    reference = torch.randn(len(rows), 6, generator=torch.Generator().manual_seed(3))
    return batch | {"reference_logps": reference}


def opened(name: str) -> Any:
    attention.register()
    torch.manual_seed(1)
    return MODELS[name]().train()


def counting(model: Any, lengths: list[int]) -> Any:
    def forward(**inputs: Any) -> Any:
        lengths.append(inputs["input_ids"].shape[1])
        return model(**inputs)

    return forward


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    weights = list(model.parameters())
    return [
        torch.zeros_like(weight) if gradient is None else gradient
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True)
    ]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1e-2, float(other.abs().max())))


def test_what_is_left_out_is_the_second_copy_of_each_prompt() -> None:
    batch = batch_of(ROWS)
    shared = shared_prompts(batch)
    assert shared is not None
    ids, segments = batch["input_ids"].flatten(), batch["segment_ids"].flatten()
    positions = batch["position_ids"].flatten()
    # of each pair in turn; the third one has no prompt
    assert len(ids) - len(shared.tokens_M) == 6 + 3 + 0 + 9 + 6
    for name in (ids, positions):
        assert torch.equal(name[shared.tokens_M][shared.places_N], name)
    left_out = sorted({*range(len(ids))} - set(shared.tokens_M.tolist()))
    assert all(int(segments[token]) % 2 == 0 and int(segments[token]) for token in left_out)
    assert sum(sum(sizes) for sizes in shared.sizes) == len(shared.tokens_M)
    assert [sizes for sizes in shared.sizes if sizes[0]] == [(6, 1, 2), (3, 4, 1), (9, 2, 2), (6, 1, 1)]


def test_nothing_is_shared_by_documents_that_are_no_pair_or_begin_differently() -> None:
    assert shared_prompts(batch_of([[([], [14, 15], [16, 17])]])) is None
    assert shared_prompts(batch_of([[]])) is None
    batch = batch_of([[(P, [20], [21])]])
    moved = batch | {"segment_ids": batch["segment_ids"] + (batch["segment_ids"] > 0)}
    assert shared_prompts(moved) is None  # documents 2 and 3 belong to different pairs
    rows = batch_of([[(P, [20], [21])]])["input_ids"][0, :14].reshape(2, 7)  # the halves of a pair in two rows
    whole = torch.ones_like(rows)
    apart = {"input_ids": rows, "position_ids": torch.arange(7).expand(2, 7), "segment_ids": whole, "loss_mask": whole}
    assert shared_prompts(apart) is None


def test_answers_that_begin_alike_share_that_too_and_equal_ones_keep_their_last_token() -> None:
    alike = shared_prompts(batch_of([[(P, [20, 21, 22], [20, 21, 23, 24])]]))
    assert alike is not None
    assert alike.sizes[0] == (8, 1, 2)
    equal = shared_prompts(batch_of([[(P, [20, 21], [20, 21])]]))
    assert equal is not None
    assert equal.sizes[0] == (7, 1, 1)
    prefix = shared_prompts(batch_of([[(P, [20], [20, 21, 22])]]))
    assert prefix is not None
    assert prefix.sizes[0] == (6, 1, 3)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_log_probabilities_and_gradients_are_those_of_whole_documents(name: str) -> None:
    model, batch, lengths = opened(name), batch_of([*ROWS, [(P, [20, 21, 22], [20, 21, 23, 24])]]), []
    forward = counting(model, lengths)
    whole, at = token_logps(forward, batch)
    once, at_once = token_logps(forward, batch, shared_prompts(batch))
    assert lengths == [4 * LENGTH, 4 * LENGTH - (6 + 3 + 9 + 6) - 8]
    assert torch.equal(at, at_once)
    torch.testing.assert_close(once, whole, rtol=1e-5, atol=1e-5)
    weights = torch.randn(len(whole), generator=torch.Generator().manual_seed(2))
    assert_same(gradients(model, (once * weights).sum()), gradients(model, (whole * weights).sum()))


@pytest.mark.parametrize("kind", ["dpo", "simpo", "orpo"])
def test_losses_of_pairs_read_each_prompt_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, lengths = opened("llama"), batch_of(ROWS), []
    config, forward = parse(Preference, {"kind": kind}), counting(model, lengths)
    once = pair_loss(config, forward, batch)
    monkeypatch.setattr("forge_ray.train.methods.preference.shared_prompts", lambda _: None)
    whole = pair_loss(config, forward, batch)
    assert lengths == [3 * LENGTH - 24, 3 * LENGTH]
    assert once.fetch()[0] == pytest.approx(whole.fetch()[0], rel=1e-5)
    assert once.fetch()[1] == pytest.approx(whole.fetch()[1], rel=1e-4)
    assert_same(gradients(model, once.loss), gradients(model, whole.loss))


def test_rewards_of_pairs_read_each_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch, lengths = opened("llama"), batch_of(ROWS), []

    def forward(**inputs: Any) -> Any:
        """The first logit in the place of a head of one number."""
        return SimpleNamespace(logits=counting(model, lengths)(**inputs).logits[..., :1])

    once = reward_loss(0, forward, batch)
    monkeypatch.setattr("forge_ray.train.methods.reward.shared_prompts", lambda _: None)
    whole = reward_loss(0, forward, batch)
    assert lengths == [3 * LENGTH - 24, 3 * LENGTH]
    assert once.fetch()[0] == pytest.approx(whole.fetch()[0], rel=1e-5)
    assert_same(gradients(model, once.loss), gradients(model, whole.loss))


def test_the_reference_reads_each_prompt_once_where_rows_hold_pairs() -> None:
    model, batch, lengths = opened("llama"), batch_of(ROWS[1:2]), []
    forward = counting(model, lengths)
    with torch.no_grad():
        once, whole = (document_logps(in_pairs).compute(forward, batch)["logps"] for in_pairs in (True, False))
    assert lengths == [LENGTH - 15, LENGTH]
    assert once == pytest.approx(whole, rel=1e-5)
    expected, _ = segment_sums(*token_logps(model, batch), batch)
    assert once == pytest.approx(expected[0].detach().numpy(), rel=1e-5)


def test_routers_count_a_token_that_stands_for_two_twice() -> None:
    model, batch = opened("experts"), batch_of(ROWS)
    balance, used = Balance(model, 1.0), batch["segment_ids"] > 0
    values = []
    for shared in (None, shared_prompts(batch)):
        token_logps(model, batch, shared)
        loss = balance.loss(used, torch.tensor(7.0))
        values.append((float(loss.detach()), gradients(model, loss)))
    assert values[1][0] == pytest.approx(values[0][0], rel=1e-5)
    assert_same(values[1][1], values[0][1])


def test_noise_on_embeddings_is_scaled_by_the_length_of_the_document() -> None:
    model, batch = opened("llama"), batch_of(ROWS)
    shared = shared_prompts(batch)
    assert shared is not None
    scales: list[Tensor] = []
    embedding = model.get_input_embeddings()
    torch.nn.init.zeros_(embedding.weight)
    add_noise(model, 5.0)
    embedding.register_forward_hook(lambda _m, _i, output: scales.append(output.detach()[0].abs().amax(dim=1)))
    token_logps(model, batch, shared)
    bounds = attention.edges(batch["position_ids"].flatten())
    lengths = bounds.diff().repeat_interleave(bounds.diff())[shared.tokens_M]
    bound = 5.0 / (lengths * SIZES["hidden_size"]).float().sqrt()
    assert len(scales[0]) == len(shared.tokens_M)
    assert (scales[0] <= bound * (1 + 1e-5)).all()
    assert (scales[0] > 0.6 * bound).all()


def test_a_kernel_that_takes_whole_documents_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's path hands to its kernel, with a kernel of this test: attention of each document by itself."""
    batch = batch_of(ROWS)
    shared = shared_prompts(batch)
    assert shared is not None
    edges = attention.edges(batch["position_ids"].flatten())

    def kernel(query: Tensor, key: Tensor, value: Tensor, edges: Tensor, *_: Any) -> Tensor:
        parts = [
            F.scaled_dot_product_attention(*(x[:, :, begin:end] for x in (query, key, value)), is_causal=True)
            for begin, end in pairwise(edges.tolist())
        ]
        return torch.cat(parts, dim=2).transpose(1, 2)

    query, key, value = (torch.randn(1, 2, len(shared.tokens_M), 8, requires_grad=True) for _ in range(3))
    options = attention.bounds(edges, shared)
    here, _ = attention.document_attention(torch.nn.Identity(), query, key, value, None, **options)
    monkeypatch.setattr(attention, "_varlen", kernel)
    there = attention.whole_documents(query, key, value, edges, options["max_length_q"], None, None, shared)
    torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(there.square().sum(), (query, key, value), retain_graph=True),
        torch.autograd.grad(here.square().sum(), (query, key, value)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
