"""What every engine must do: plain functions of an engine and a reference, called by the tests of each engine.

The reference is transformers' own `generate` and PEFT in fp32 on the tiny model, whose argmax is clear. Adapters `A`,
`B` and `C` (ranks 4, 8 and 16, each with another kind of scale) are loaded before the first check.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from forge_ray.errors import EngineError
from forge_ray.inference.engine import Engine, Generation, GenerationRequest, Token

PROMPTS = [tuple((7 * row + 3 * column) % 250 + 10 for column in range(3 + 5 * row)) for row in range(8)]
WAIT_S = 120
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Berlin"]}, "sure": {"type": "boolean"}, "n": {"enum": [1, 22, 333]}},
        "required": ["city", "sure", "n"],
        "additionalProperties": False,
    }
)


@dataclass(frozen=True)
class Reference:
    model_dir: Path
    models: dict[str, Any]  # "" and the adapters' names → a model for one request at a time
    folders: dict[str, Path]
    tokenizer: Any

    @torch.inference_mode()
    def greedy(self, prompt: tuple[int, ...], max_new_tokens: int, adapter: str = "") -> tuple[int, ...]:
        out = self.models[adapter].generate(
            input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=None
        )
        return tuple(out[0, len(prompt) :].tolist())

    @torch.inference_mode()
    def logprobs(self, prompt: tuple[int, ...], answer: tuple[int, ...], adapter: str = "") -> torch.Tensor:
        """[len(answer), vocab_size]"""
        logits = self.models[adapter](input_ids=torch.tensor([[*prompt, *answer]])).logits[0].float()
        return torch.log_softmax(logits, dim=-1)[len(prompt) - 1 : -1]

    @property
    def stop(self) -> int:
        return int(self.tokenizer.eos_token_id)


def reference(model_dir: Path, folder: Path) -> Reference:
    """Writes the adapters into `folder`."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoTokenizer, LlamaForCausalLM

    def plain() -> Any:
        return LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    kinds: dict[str, dict[str, Any]] = {
        "A": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
        "B": {"r": 8, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "C": {"r": 16, "lora_alpha": 32, "target_modules": ["o_proj", "gate_proj"], "alpha_pattern": {"o_proj": 64}},
    }
    models, folders = {"": plain()}, {}
    for seed, (name, kind) in enumerate(kinds.items()):
        torch.manual_seed(seed)
        get_peft_model(plain(), LoraConfig(init_lora_weights=False, **kind)).save_pretrained(folder / name)
        folders[name] = folder / name
        models[name] = PeftModel.from_pretrained(plain(), folder / name).eval()
    return Reference(model_dir, models, folders, AutoTokenizer.from_pretrained(model_dir))


def streamed(engine: Engine, request: GenerationRequest) -> list[Token]:
    async def collect() -> list[Token]:
        return [token async for token in engine.stream(request)]

    return asyncio.run(collect())


def refused(engine: Engine, request: GenerationRequest) -> EngineError:
    """Refused before any of its neighbours is queued, and the engine lives on."""
    with pytest.raises(EngineError) as caught:
        engine.generate([GenerationRequest(PROMPTS[0], 2), request])
    assert caught.value.hint
    assert engine.health().num_tokens == 0
    return caught.value


def greedy_answers_are_those_of_generate(engine: Engine, reference: Reference) -> None:
    generations = engine.generate([GenerationRequest(prompt, 20) for prompt in PROMPTS])
    assert generations == [Generation(reference.greedy(prompt, 20), "length") for prompt in PROMPTS]
    assert len({generation.token_ids for generation in generations}) > 1


def stop_ids_end_an_answer(engine: Engine, reference: Reference) -> None:
    whole = reference.greedy(PROMPTS[3], 12)
    (cut,) = engine.generate([GenerationRequest(PROMPTS[3], 12, stop_token_ids=(whole[5], 3))])
    assert cut == Generation(whole[: whole.index(whole[5])], "stop")


def a_stream_gives_the_same_tokens_and_the_reason(engine: Engine, reference: Reference) -> None:
    tokens = streamed(engine, GenerationRequest(PROMPTS[5], 9))
    assert [token.token_id for token in tokens] == [*reference.greedy(PROMPTS[5], 9), None]
    assert [token.finish_reason for token in tokens] == [None] * 9 + ["length"]


def a_closed_stream_frees_its_place(engine: Engine, reference: Reference) -> None:
    async def take_two() -> None:
        stream = engine.stream(GenerationRequest(PROMPTS[0], 400))
        assert (await anext(stream)).token_id is not None
        assert engine.health().num_tokens > 0
        assert (await anext(stream)).token_id is not None
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(take_two())
    deadline = time.monotonic() + WAIT_S
    while (engine.health().num_running or engine.health().num_waiting) and time.monotonic() < deadline:
        time.sleep(0.01)
    health = engine.health()
    assert (health.num_running, health.num_waiting, health.num_tokens, health.ok) == (0, 0, 0, True)


def a_seed_gives_the_same_answer_alone_and_in_a_batch(engine: Engine, reference: Reference) -> None:
    seeded = GenerationRequest(PROMPTS[2], 24, temperature=1.0, top_p=0.9, seed=11)
    others = [GenerationRequest(prompt, 30, temperature=0.5 + i / 5, seed=i) for i, prompt in enumerate(PROMPTS)]
    (alone,) = engine.generate([seeded])
    assert engine.generate([*others[:4], seeded, *others[4:]])[4] == alone
    (other,) = engine.generate([GenerationRequest(PROMPTS[2], 24, temperature=1.0, top_p=0.9, seed=12)])
    assert other != alone


def each_request_of_a_batch_keeps_its_own_settings(engine: Engine, reference: Reference) -> None:
    prompt = PROMPTS[1]
    plain = reference.greedy(prompt, 16)
    hot = {"temperature": 2.0, "seed": 5}
    generations = engine.generate(
        [
            GenerationRequest(prompt, 16, **hot),  # type: ignore[arg-type]
            GenerationRequest(prompt, 16),
            GenerationRequest(prompt, 16, top_k=1, **hot),  # type: ignore[arg-type]
            GenerationRequest(prompt, 16, logit_bias=((plain[0], -100.0),)),
            GenerationRequest(prompt, 16, logit_bias=((77, 100.0),)),
            GenerationRequest(prompt, 16, logit_bias=((77, 30.0),), presence_penalty=2.0, frequency_penalty=2.0),
            GenerationRequest(prompt, 16, json_schema=SCHEMA, stop_token_ids=(reference.stop,)),
        ]
    )
    ids = [generation.token_ids for generation in generations]
    assert ids[0] != plain
    assert ids[1] == ids[2] == plain
    assert ids[3][0] == int(reference.logprobs(prompt, (plain[0],))[0].topk(2).indices[1])
    assert ids[4] == (77,) * 16
    assert ids[5][0] == 77
    assert 1 < ids[5].count(77) < 16  # each time that a token came counts against it


def logprobs_are_the_models_own(engine: Engine, reference: Reference) -> None:
    """Whatever changed the draw: before bias and temperature, and for a sampled token too."""
    request = GenerationRequest(PROMPTS[4], 6, temperature=2.0, seed=3, logit_bias=((9, 3.0),), num_logprobs=4)
    tokens = streamed(engine, request)[:-1]
    ids = tuple(token.token_id for token in tokens if token.token_id is not None)
    assert len(ids) == 6
    for token, expected in zip(tokens, reference.logprobs(PROMPTS[4], ids), strict=True):
        best = expected.topk(4)
        assert token.logprob is not None
        assert token.token_id is not None
        assert abs(token.logprob - float(expected[token.token_id])) < 1e-3
        assert [top for top, _ in token.top_logprobs[:4]] == best.indices.tolist()
        assert all(abs(a - b) < 1e-3 for (_, a), b in zip(token.top_logprobs, best.values.tolist(), strict=False))
    assert [token.logprob for token in streamed(engine, GenerationRequest(PROMPTS[4], 2))] == [None, None, None]


def answers_conform_to_their_schema(engine: Engine, reference: Reference) -> None:
    def asked(seed: int, schema: str = SCHEMA) -> GenerationRequest:
        return GenerationRequest(
            PROMPTS[seed], 200, temperature=1.5, seed=seed, json_schema=schema, stop_token_ids=(reference.stop,)
        )

    generations = engine.generate([*(asked(seed) for seed in range(4)), GenerationRequest(PROMPTS[6], 12)])
    for generation in generations[:4]:
        assert generation.finish_reason == "stop"
        answer = json.loads(reference.tokenizer.decode(generation.token_ids))
        assert set(answer) == {"city", "sure", "n"}
        assert answer["city"] in ("Paris", "Berlin")
        assert answer["n"] in (1, 22, 333)
    assert generations[4].token_ids == reference.greedy(PROMPTS[6], 12)
    text = reference.tokenizer.decode(engine.generate([asked(1, '{"type": "object"}')])[0].token_ids)
    assert text.lstrip().startswith("{")


def adapters_of_one_batch_answer_as_peft_does(engine: Engine, reference: Reference) -> None:
    names = ["A", "", "B", "C", "A", "", "C", "B"]
    requests = [GenerationRequest(prompt, 16, adapter=name) for prompt, name in zip(PROMPTS, names, strict=True)]
    for request, generation in zip(requests, engine.generate(requests), strict=True):
        assert generation.token_ids == reference.greedy(request.prompt_ids, 16, request.adapter), request.adapter


def one_prompt_under_several_adapters_is_each_ones_own(engine: Engine, reference: Reference) -> None:
    """Twice, so that the second finds whatever the first left in the cache of prefixes."""
    prompt = PROMPTS[7] * 2
    for _ in range(2):
        for name in ("", "A", "B", "C"):
            (generation,) = engine.generate([GenerationRequest(prompt, 12, adapter=name)])
            assert generation.token_ids == reference.greedy(prompt, 12, name), name
    assert len({reference.greedy(prompt, 12, name) for name in ("", "A", "B", "C")}) == 4


def wrong_requests_are_refused(engine: Engine, reference: Reference) -> None:
    prompt = PROMPTS[0]
    assert "603" in refused(engine, GenerationRequest(prompt, 600)).message
    assert "0 tokens" in refused(engine, GenerationRequest((), 5)).message
    assert "max_new_tokens=0" in refused(engine, GenerationRequest(prompt, 0)).message
    assert "adapter 'Z'" in refused(engine, GenerationRequest(prompt, 5, adapter="Z")).message
    stops = (reference.stop,)
    for schema in ('{"type": "objec"}', "{", "[]", '{"$ref": "#/nowhere"}'):
        assert (
            "json_schema" in refused(engine, GenerationRequest(prompt, 5, json_schema=schema, stop_token_ids=stops)).message
        )


CONTRACT: list[Callable[[Engine, Reference], None]] = [
    greedy_answers_are_those_of_generate,
    stop_ids_end_an_answer,
    a_stream_gives_the_same_tokens_and_the_reason,
    a_closed_stream_frees_its_place,
    a_seed_gives_the_same_answer_alone_and_in_a_batch,
    each_request_of_a_batch_keeps_its_own_settings,
    logprobs_are_the_models_own,
    answers_conform_to_their_schema,
    adapters_of_one_batch_answer_as_peft_does,
    one_prompt_under_several_adapters_is_each_ones_own,
    wrong_requests_are_refused,
]
