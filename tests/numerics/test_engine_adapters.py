"""Adapters in the transformers engine: what can be served beside others, what is refused, merged weights and embeddings."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from forge_ray.config.release import EngineConfig
from forge_ray.errors import EngineError
from forge_ray.inference.batching import salted
from forge_ray.inference.choose import write_merged
from forge_ray.inference.engine import Generation, GenerationRequest
from forge_ray.inference.load import load_engine, load_model
from forge_ray.inference.transformers_engine import TransformersEngine
from tests.engine_contract import PROMPTS, WAIT_S, Reference, reference

pytestmark = pytest.mark.numerics

CONFIG = EngineConfig(
    precision="fp32", page_size=16, num_blocks=64, max_batch_tokens=64, max_adapters=3, max_lora_rank=16, max_running=4
)


@pytest.fixture(scope="module")
def peers(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tiny_model_dir, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[TransformersEngine]:
    engine = load_engine(tiny_model_dir, None, CONFIG, use_gpu=False)
    yield engine
    engine.close()


def adapter(base: Path, folder: Path, **settings: Any) -> Path:
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(7)
    peft_model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 16, "init_lora_weights": False, **settings}))
    for name, parameter in peft_model.named_parameters():
        if "modules_to_save" in name or "magnitude" in name:
            torch.nn.init.normal_(parameter, std=0.3, mean=0.5)
    peft_model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True, "target_modules": ["q_proj"]}, "use_dora=True"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, "bias='lora_only'"),
        ({"target_modules": ["q_proj"], "r": 32}, "rank 32 exceeds engine.max_lora_rank=16"),
    ],
)
def test_adapters_that_cannot_share_an_engine_are_refused(
    engine: TransformersEngine, tiny_model_dir: Path, tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(EngineError) as caught:
        engine.load_adapter("odd", adapter(tiny_model_dir, tmp_path, **settings))
    assert named in caught.value.message
    assert "merged" in caught.value.hint
    with pytest.raises(EngineError, match="'odd' is not loaded"):
        engine.generate([GenerationRequest(PROMPTS[0], 2, adapter="odd")])


def test_adapter_of_another_model_is_refused(engine: TransformersEngine, peers: Reference, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(peers.folders["B"] / "adapter_model.safetensors")
    save_file(
        {name: tensor[..., :-1].contiguous() for name, tensor in weights.items()}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_bytes((peers.folders["B"] / "adapter_config.json").read_bytes())
    with pytest.raises(EngineError, match=r"the layer takes A \[rank, "):
        engine.load_adapter("other", tmp_path)


def test_merged_engine_serves_adapters_that_cannot_share_an_engine(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = adapter(
        tiny_model_dir, tmp_path, use_dora=True, target_modules=["q_proj", "o_proj"], modules_to_save=["lm_head"]
    )
    offline = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), folder).eval()
    answers = []
    for merge in (True, False):  # without merging, through PEFT's own layers
        engine = load_engine(tiny_model_dir, folder, CONFIG, use_gpu=False, merge=merge)
        try:
            answers.append([one.token_ids for one in engine.generate([GenerationRequest(p, 12) for p in PROMPTS[:3]])])
        finally:
            engine.close()
    for k, prompt in enumerate(PROMPTS[:3]):
        out = offline.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=None)
        assert answers[0][k] == answers[1][k] == tuple(out[0, len(prompt) :].tolist())


def test_merged_folder_for_another_engine_is_a_whole_model(tiny_model_dir: Path, peers: Reference, tmp_path: Path) -> None:
    write_merged(tiny_model_dir, peers.folders["B"], "fp32", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in tiny_model_dir.iterdir()}
    merged = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    out = merged.generate(torch.tensor([PROMPTS[3]]), do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert tuple(out[0, len(PROMPTS[3]) :].tolist()) == peers.greedy(PROMPTS[3], 12, "B") != peers.greedy(PROMPTS[3], 12)


def test_merging_adds_in_fp32_and_rounds_once(tiny_model_dir: Path, peers: Reference) -> None:
    merged = load_model(tiny_model_dir, peers.folders["A"], torch.bfloat16, torch.device("cpu"), merge=True)
    layer = peers.models["A"].base_model.model.model.layers[0].mlp.down_proj
    exact = (layer.base_layer.weight + layer.get_delta_weight("default")).detach()
    merged_weight = merged.model.layers[0].mlp.down_proj.weight
    assert torch.equal(merged_weight, exact.bfloat16())
    assert not torch.equal(merged_weight, layer.base_layer.weight.bfloat16() + layer.get_delta_weight("default").bfloat16())


def test_adapters_load_and_unload_while_requests_run(engine: TransformersEngine, peers: Reference) -> None:
    engine.load_adapter("A", peers.folders["A"])
    requests = [GenerationRequest(prompt, 60, adapter=name) for prompt, name in zip(PROMPTS, ("A", "") * 4, strict=True)]
    expected = [Generation(peers.greedy(one.prompt_ids, 60, one.adapter), "length") for one in requests]
    answers: list[Generation] = []
    most_running = 0
    thread = threading.Thread(target=lambda: answers.extend(engine.generate(requests)))
    thread.start()
    while engine.health().num_tokens == 0:
        time.sleep(0.001)
    with pytest.raises(EngineError, match="'A' still has requests"):
        engine.unload_adapter("A")
    for _ in range(2):
        for name in ("B", "C"):
            engine.load_adapter(name, peers.folders[name])
            (short,) = engine.generate([GenerationRequest(PROMPTS[2], 3, adapter=name)])
            assert short.token_ids == peers.greedy(PROMPTS[2], 3, name)
            most_running = max(most_running, engine.health().num_running)
            engine.unload_adapter(name)
    thread.join(WAIT_S)
    assert answers == expected
    assert most_running <= CONFIG.max_running
    assert engine.health().num_tokens == 0
    with pytest.raises(EngineError, match="'C' is not loaded"):
        engine.generate([GenerationRequest(PROMPTS[0], 2, adapter="C")])


def test_more_than_max_adapters_are_refused(engine: TransformersEngine, peers: Reference) -> None:
    for name in ("A", "second", "third"):
        engine.load_adapter(name, peers.folders["A"])
    engine.load_adapter("third", peers.folders["A"])  # is there: nothing to do
    with pytest.raises(EngineError, match=r"3 are loaded already, engine\.max_adapters=3"):
        engine.load_adapter("fourth", peers.folders["A"])
    engine.unload_adapter("second")
    engine.unload_adapter("third")
    with pytest.raises(EngineError, match="cannot be named ''"):
        engine.load_adapter("", peers.folders["A"])


def test_at_most_max_running_requests_run(engine: TransformersEngine) -> None:
    seen = []
    thread = threading.Thread(target=lambda: engine.generate([GenerationRequest(prompt, 80) for prompt in PROMPTS]))
    thread.start()
    while thread.is_alive():
        health = engine.health()
        seen.append((health.num_running, health.num_waiting, health.num_tokens))
        time.sleep(0.002)
    assert max(running for running, _, _ in seen) == CONFIG.max_running
    assert max(waiting for _, waiting, _ in seen) >= 4
    assert max(tokens for *_, tokens in seen) == sum(len(prompt) + 80 for prompt in PROMPTS)


def test_embeddings_are_mean_states_under_each_adapter(engine: TransformersEngine, peers: Reference) -> None:
    engine.load_adapter("A", peers.folders["A"])
    inputs = [PROMPTS[k % 8] for k in range(20)]
    for name in ("", "A"):
        vectors = torch.tensor(engine.embed(inputs, name))
        for vector, ids in zip(vectors, inputs, strict=True):
            model = peers.models[name]
            decoder = (model.get_base_model() if name else model).get_decoder()
            with torch.inference_mode():
                mean = decoder(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
            assert torch.allclose(vector, mean / mean.norm(), atol=1e-5)
    assert engine.embed([]) == []
    for wrong, named in (([()], "0 tokens"), ([(1,) * 513], "513 tokens"), ([(400_000,)], "400000")):
        with pytest.raises(EngineError, match=named):
            engine.embed(wrong)
    with pytest.raises(EngineError, match="'Z' is not loaded"):
        engine.embed([(1,)], "Z")


def test_scores_do_not_see_the_adapters_of_requests(engine: TransformersEngine, peers: Reference) -> None:
    engine.load_adapter("A", peers.folders["A"])
    engine.generate([GenerationRequest(PROMPTS[3], 2, adapter="A")])
    (score,) = engine.score(PROMPTS[3], [(5, 6)])
    expected = peers.logprobs(PROMPTS[3], (5, 6))
    assert score.logprob == pytest.approx(float(expected[0, 5] + expected[1, 6]), abs=1e-4)


def test_scoring_with_the_adapter_of_the_engine(tiny_model_dir: Path, peers: Reference) -> None:
    engine = load_engine(tiny_model_dir, peers.folders["B"], CONFIG, use_gpu=False)
    try:
        (score,) = engine.score(PROMPTS[3], [(5, 6)])
        (answer,) = engine.generate([GenerationRequest(PROMPTS[3], 8)])
    finally:
        engine.close()
    expected = peers.logprobs(PROMPTS[3], (5, 6), "B")
    assert score.logprob == pytest.approx(float(expected[0, 5] + expected[1, 6]), abs=1e-4)
    assert answer.token_ids == peers.greedy(PROMPTS[3], 8, "B")


def test_prefix_cache_is_separate_for_each_adapter(engine: TransformersEngine, peers: Reference) -> None:
    engine.load_adapter("A", peers.folders["A"])
    prompt = tuple(range(100, 150))
    cache = engine._batching.batch_processor.cache  # type: ignore[union-attr]
    engine.generate([GenerationRequest(prompt, 2, adapter="A")])
    (allocator,) = cache.cache_allocators.values()
    assert len(allocator.match_prefix_blocks(salted("1:A", list(prompt)))) == 3
    assert allocator.match_prefix_blocks(list(prompt)) == []
    assert allocator.match_prefix_blocks(salted("1:B", list(prompt))) == []


def test_adapter_folder_without_weights_is_refused(engine: TransformersEngine, peers: Reference, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({}, tmp_path / "adapter_model.safetensors")
    config = json.loads((peers.folders["A"] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(EngineError, match="has no weights"):
        engine.load_adapter("empty", tmp_path)
