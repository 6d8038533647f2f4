"""The KL divergence to the model that a run started from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from forge_ray.config.base import load, parse
from forge_ray.config.release import EvalConfig
from forge_ray.config.run import RunConfig
from forge_ray.data.tokens.chat import load_tokenizer_dir
from forge_ray.errors import ConfigError
from forge_ray.evaluate.examples import Example, answer_ids
from forge_ray.evaluate.kl import kl_nats, score_kl
from forge_ray.evaluate.measures import statistics

pytestmark = pytest.mark.unit
RUN = Path(__file__).parents[2] / "e2e" / "run.yaml"
CHATS = tuple(
    Example(f"rec_{number}", ({"role": "user", "content": question},), None, answer)
    for number, (question, answer) in enumerate(
        [("What colour is the sky?", "blue"), ("And grass?", "green it is"), ("a", "b")]
    )
)


def test_sum_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(600, 11, generator=generator) for _ in range(2))  # more than a chunk
    p, q = (logits.double().softmax(-1)[:-1] for logits in (ours, theirs))
    assert kl_nats(ours, theirs) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-6)
    assert kl_nats(ours, ours) == 0.0


@pytest.fixture(scope="module")
def adapted(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(an adapter that changes something, the same added to the weights)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    folder, merged = (tmp_path_factory.mktemp(name) for name in ("adapter", "merged"))
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model_dir), LoraConfig(r=4, target_modules="all-linear")
    )
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    model.merge_and_unload().save_pretrained(merged)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(merged)
    return folder, merged


def test_adapter_and_merged_weights_are_as_far_from_the_start(tiny_model_dir: Path, adapted: tuple[Path, Path]) -> None:
    adapter, merged = adapted
    config = parse(EvalConfig, {"kl": {}, "engine": {"precision": "fp32"}})
    tokenizer, start = load_tokenizer_dir(tiny_model_dir), (tiny_model_dir, None)
    switched_off = list(score_kl((tiny_model_dir, adapter), start, tokenizer, CHATS, config))
    two_models = list(score_kl((merged, None), start, tokenizer, CHATS, config))
    for one, other, chat in zip(switched_off, two_models, CHATS, strict=True):
        assert one["kl_tokens"] == len(answer_ids(tokenizer, chat, chat.turn))
        assert one["kl"] == pytest.approx(other["kl"], rel=1e-3)
        assert one["kl"] > 0.01
    assert [item["kl"] for item in score_kl((tiny_model_dir, None), start, tokenizer, CHATS, config)] == [0.0] * 3
    few = parse(EvalConfig, {"kl": {"max_examples": 2}, "engine": {"precision": "fp32"}})
    assert len(list(score_kl((tiny_model_dir, adapter), start, tokenizer, CHATS, few))) == 2


def test_positions_are_those_that_predict_the_answer(tiny_model_dir: Path, adapted: tuple[Path, Path]) -> None:
    from transformers import AutoModelForCausalLM

    tokenizer, merged = load_tokenizer_dir(tiny_model_dir), adapted[1]
    config = parse(EvalConfig, {"kl": {}, "engine": {"precision": "fp32"}})
    (item,) = score_kl((merged, None), (tiny_model_dir, None), tokenizer, CHATS[:1], config)
    prompt = list(tokenizer.prompt_ids(list(CHATS[0].messages), None))
    answer = answer_ids(tokenizer, CHATS[0], CHATS[0].turn)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (merged, tiny_model_dir)]
    with torch.no_grad():
        logps = [model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1) for model in models]
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    total = sum(float((logps[0][place].exp() * (logps[0][place] - logps[1][place])).sum()) for place in places)
    assert item["kl"] == pytest.approx(total, rel=1e-4)


def test_metric_is_per_token_over_the_rows_that_have_it() -> None:
    item = {"source": "", "reference": "a", "prediction": "a", "logprob": -1.0, "num_tokens": 2}
    items = [{**item, "kl": 1.0, "kl_tokens": 2}, {**item, "kl": 4.0, "kl_tokens": 8}, item]
    assert math.isclose(statistics(items, ()).get("kl").value, 0.5)  # type: ignore[union-attr]
    assert "kl" not in statistics([item], ())


@pytest.mark.parametrize(
    ("gate", "reason"),
    [
        ("{thresholds: {kl: {max: 1}}}", "release.gate judges kl, but eval.kl is not set"),
        ("{no_worse_than: [{metric: kl}]}", "release.gate judges kl, but eval.kl is not set"),
    ],
)
def test_gate_needs_the_measurement(gate: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(RunConfig, RUN, (f"release.gate={gate}", "deploy=null"))


def test_gate_compares_kl_with_no_other_model() -> None:
    with pytest.raises(ConfigError, match=r"release\.gate compares kl with another model's"):
        load(RunConfig, RUN, ("eval.kl={}", "release.gate={better_than: [{metric: kl}]}", "deploy=null"))
