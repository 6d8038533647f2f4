"""The engine against plain transformers: same greedy tokens, exact scores, sampling that belongs to its request."""

from __future__ import annotations

import asyncio
import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import mistral_common
import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.generation.continuous_batching.requests import RequestStatus

from forge_ray.config.release import EngineConfig
from forge_ray.errors import EngineError, PolicyError
from forge_ray.inference.engine import Generation, GenerationRequest, Question, Token
from forge_ray.inference.grammar import Grammars, Matcher, load_grammars
from forge_ray.inference.load import load_engine
from forge_ray.inference.pace import Pace
from forge_ray.inference.sampling import gumbel_noise, nucleus, sample
from forge_ray.inference.transformers_engine import TransformersEngine
from tests import engine_contract
from tests.engine_contract import PROMPTS, WAIT_S, Reference

pytestmark = pytest.mark.numerics

CONFIG = EngineConfig(precision="fp32", page_size=16, num_blocks=32, max_batch_tokens=64)
Check = Callable[[TransformersEngine, Reference], None]


@pytest.fixture(scope="module")
def engine(tiny_model_dir: Path) -> Iterator[TransformersEngine]:
    engine = load_engine(tiny_model_dir, None, CONFIG, use_gpu=False)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(tiny_model_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def peers(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory, engine: TransformersEngine) -> Reference:
    contract_reference = engine_contract.reference(tiny_model_dir, tmp_path_factory.mktemp("adapters"))
    for name, folder in contract_reference.folders.items():
        engine.load_adapter(name, folder)
    return contract_reference


@pytest.mark.parametrize("check", engine_contract.CONTRACT, ids=lambda check: check.__name__)
def test_contract(check: Check, engine: TransformersEngine, peers: Reference) -> None:
    check(engine, peers)


@torch.inference_mode()
def greedy(model: LlamaForCausalLM, prompt: tuple[int, ...], max_new_tokens: int) -> tuple[int, ...]:
    out = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=None)
    return tuple(out[0, len(prompt) :].tolist())


def test_small_kv_cache_gives_the_same_answers(tiny_model_dir: Path, reference: LlamaForCausalLM) -> None:
    small = load_engine(tiny_model_dir, None, CONFIG.model_copy(update={"num_blocks": 8}), use_gpu=False)
    try:
        answers = small.generate([GenerationRequest(prompt, 40) for prompt in PROMPTS])
        assert [generation.token_ids for generation in answers] == [greedy(reference, prompt, 40) for prompt in PROMPTS]
        (full,) = small.generate([GenerationRequest(PROMPTS[0], small.max_request_tokens - len(PROMPTS[0]))])
        assert len(PROMPTS[0]) + len(full.token_ids) == 8 * 16
    finally:
        small.close()


def test_requests_in_a_batch_keep_their_sampling_settings(engine: TransformersEngine, reference: LlamaForCausalLM) -> None:
    hot, cold, cut = engine.generate(
        [
            GenerationRequest(PROMPTS[1], 16, temperature=2.0, seed=5),
            GenerationRequest(PROMPTS[1], 16),
            GenerationRequest(PROMPTS[1], 16, temperature=2.0, top_p=0.0, seed=5),
        ]
    )
    assert cold.token_ids == cut.token_ids == greedy(reference, PROMPTS[1], 16)
    assert hot.token_ids != cold.token_ids


def test_unseeded_answers_differ(engine: TransformersEngine) -> None:
    answers = engine.generate([GenerationRequest(PROMPTS[1], 16, temperature=1.5)] * 4)
    assert len({generation.token_ids for generation in answers}) > 1


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8)])
def test_samples_follow_the_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    probs = torch.softmax(logits / temperature, dim=-1)
    if top_p < 1:
        kept = nucleus(torch.log(probs), top_p)
        assert probs[kept].sum() >= top_p > probs[kept].sum() - probs[kept].min()
        probs = torch.zeros_like(probs).index_copy(0, kept, probs[kept]) / probs[kept].sum()
    num = 4000
    counts = Counter(sample(logits, GenerationRequest((1,), 1, temperature, top_p), seed, 3) for seed in range(num))
    for token, prob in enumerate(probs.tolist()):
        sigma = (num * prob * (1 - prob)) ** 0.5
        assert abs(counts[token] - num * prob) <= 5 * sigma + 1e-9


def test_first_token_follows_the_model_distribution(engine: TransformersEngine, reference: LlamaForCausalLM) -> None:
    prompt, num = PROMPTS[0], 400
    answers = engine.generate([GenerationRequest(prompt, 1, temperature=1.0, seed=seed) for seed in range(num)])
    counts = Counter(generation.token_ids[0] for generation in answers)
    with torch.inference_mode():
        probs = torch.softmax(reference(torch.tensor([prompt])).logits[0, -1], dim=-1)
    for token in probs.topk(5).indices.tolist():
        expected = num * float(probs[token])
        assert abs(counts[token] - expected) <= 5 * expected**0.5


def test_gumbel_noise_is_standard_and_independent_by_position() -> None:
    noise = gumbel_noise(1, 0, 200_000, torch.device("cpu"))
    assert noise.isfinite().all()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.02)
    assert float(noise.var()) == pytest.approx(1.6449, abs=0.05)
    other = gumbel_noise(1, 1, 200_000, torch.device("cpu"))
    assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.02


def test_nucleus_of_a_flat_distribution_needs_the_whole_vocabulary() -> None:
    assert len(nucleus(torch.zeros(4096), 0.75)) == 3072


def test_score_equals_teacher_forcing(engine: TransformersEngine, reference: LlamaForCausalLM) -> None:
    prompt = PROMPTS[4]
    continuations = [(5,), (17, 60, 200), (33, 34), (90, 12, 45, 77, 8), ()]
    scores = engine.score(prompt, continuations)
    for ids, score in zip(continuations, scores, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([[*prompt, *ids]])).logits[0].float()
        logprobs = torch.log_softmax(logits, dim=-1)
        expected = sum(float(logprobs[len(prompt) - 1 + k, token]) for k, token in enumerate(ids))
        assert score.num_tokens == len(ids)
        assert score.logprob == pytest.approx(expected, abs=1e-4)


def test_many_continuations_are_scored_in_several_batches(engine: TransformersEngine) -> None:
    continuations = [(10 + k % 90, 20 + k // 2) for k in range(130)]
    scores = engine.score(PROMPTS[1], continuations)
    assert scores[129].logprob == pytest.approx(engine.score(PROMPTS[1], continuations[129:])[0].logprob, abs=1e-4)


def test_questions_scored_together_equal_each_alone(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of several lengths share passes, padded on the left, some with continuations of one token alone."""
    monkeypatch.setattr("forge_ray.inference.scoring.MAX_ROWS", 7)
    questions: list[Question] = [
        (prompt[:length], [(5,), (17, 60, 200), (9,), (33, 34)][: 1 + number % 4])
        for number, (prompt, length) in enumerate(itertools.product(PROMPTS, (1, 2, 3, 40)))
    ]
    questions += [(PROMPTS[0], [(k, k + 1) for k in range(20)]), (PROMPTS[1], [()]), (PROMPTS[2], [])]
    together = engine.score_all(questions)
    for question, scores in zip(questions, together, strict=True):
        alone = engine.score(*question)
        assert [score.num_tokens for score in scores] == [score.num_tokens for score in alone]
        assert [score.logprob for score in scores] == pytest.approx([score.logprob for score in alone], abs=1e-4)
    with pytest.raises(EngineError, match="0 tokens"):
        engine.score_all([questions[0], ((), [(1,)])])


def test_scoring_and_generating_do_not_interfere(engine: TransformersEngine) -> None:
    alone = engine.generate([GenerationRequest(prompt, 60) for prompt in PROMPTS])
    quiet = engine.score(PROMPTS[0], [(1, 2, 3), (4,)])
    answers: list[Generation] = []
    thread = threading.Thread(
        target=lambda: answers.extend(engine.generate([GenerationRequest(prompt, 60) for prompt in PROMPTS]))
    )
    thread.start()
    scores = [engine.score(PROMPTS[0], [(1, 2, 3), (4,)]) for _ in range(5)]
    thread.join(WAIT_S)
    assert answers == alone
    assert all(score == quiet for score in scores)


def test_closed_stream_frees_its_cache_blocks(engine: TransformersEngine) -> None:
    async def take_two() -> None:
        stream = engine.stream(GenerationRequest(PROMPTS[0], 400))
        assert (await anext(stream)).token_id is not None
        assert (await anext(stream)).token_id is not None
        await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(take_two())
    assert_all_blocks_are_free(engine)


def assert_all_blocks_are_free(engine: TransformersEngine) -> None:
    """No request holds one. Those that are kept for prompts that begin alike are given up when they are needed."""
    processor = engine._batching.batch_processor
    assert processor is not None
    (allocator,) = processor.cache.cache_allocators.values()
    # the generation thread frees the blocks a step after the request is forgotten
    deadline = time.monotonic() + WAIT_S
    while (engine.health().num_running or allocator.block_table) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.health().num_running == engine.health().num_waiting == 0
    assert not allocator.block_table
    with engine._model_alone(""):
        processor.cache.evict_cached_blocks()
        assert processor.cache.compute_free_capacity() > 0.8  # the rest is what transformers keeps for itself


def test_prompts_are_read_in_pieces_while_answers_are_under_way(
    engine: TransformersEngine, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of long prompts; then a step has a token of each answer and at most a piece of them. Answers stay what they are."""
    processor = engine._batching.batch_processor
    assert processor is not None
    sizes: list[tuple[int, int]] = []  # (requests that continue their answers, tokens of prompts) of each step
    schedule = processor.scheduler.schedule_batch

    def watched(token_budget: int, cache_budget: int) -> Any:
        active = processor.scheduler.active_requests.values()
        answering = {id(state) for state in active if state.status == RequestStatus.DECODING}
        scheduled = schedule(token_budget, cache_budget)
        of_prompts = sum(one.query_length for one in scheduled[0] or () if id(one.state) not in answering)
        sizes.append((len(answering), of_prompts))
        return scheduled

    short, long = GenerationRequest(PROMPTS[0], 60), GenerationRequest(tuple(range(10, 250)), 4)

    async def both() -> list[list[int]]:
        first = engine.stream(short)
        tokens = [(await anext(first)).token_id]
        second = asyncio.create_task(collected(engine.stream(long)))
        tokens += [token.token_id async for token in first]
        return [[token for token in tokens if token is not None], await second]

    piece = 24
    monkeypatch.setattr(Pace, "piece", piece)
    monkeypatch.setattr("forge_ray.inference.batching.LONG_PROMPT", 100)
    processor.scheduler.schedule_batch = watched  # type: ignore[method-assign]
    try:
        answers = asyncio.run(both())
        alone = asyncio.run(collected(engine.stream(GenerationRequest(tuple(range(9, 249)), 4))))
    finally:
        processor.scheduler.schedule_batch = schedule  # type: ignore[method-assign]
    among = [of_prompts for answering, of_prompts in sizes if answering]
    assert max(among) == piece < CONFIG.max_batch_tokens  # to the end of the prompt
    assert max(of_prompts for answering, of_prompts in sizes if not answering) == CONFIG.max_batch_tokens
    assert len(alone) == 4
    for request, answer in zip((short, long), answers, strict=True):
        ids = torch.tensor([request.prompt_ids])
        out = reference.generate(ids, do_sample=False, max_new_tokens=request.max_new_tokens, eos_token_id=None)
        assert answer == out[0, ids.shape[1] :].tolist()
    assert_all_blocks_are_free(engine)


async def collected(stream: AsyncIterator[Token]) -> list[int]:
    return [token.token_id async for token in stream if token.token_id is not None]


@pytest.mark.parametrize(
    ("request_", "named"),
    [
        (GenerationRequest(PROMPTS[0], 600), "3 + max_new_tokens of 600 = 603"),
        (GenerationRequest((), 5), "0 tokens"),
        (GenerationRequest(PROMPTS[0], 0), "max_new_tokens=0"),
        (GenerationRequest(PROMPTS[0], 5, temperature=-1.0), "temperature=-1.0"),
        (GenerationRequest(PROMPTS[0], 5, temperature=1.0, top_p=1.5), "top_p=1.5"),
        (GenerationRequest(PROMPTS[0], 5, top_k=-1), "top_k=-1"),
        (GenerationRequest(PROMPTS[0], 5, temperature=float("nan")), "temperature=nan"),
        (GenerationRequest(PROMPTS[0], 5, presence_penalty=float("inf")), "must be finite"),
        (GenerationRequest(PROMPTS[0], 5, logit_bias=((4, float("nan")),)), "must be finite"),
        (GenerationRequest(PROMPTS[0], 5, logit_bias=((4, 1.0), (4, 2.0))), "a token twice"),
        (GenerationRequest(PROMPTS[0], 5, logit_bias=((400_000, 1.0),)), "token id 400000 is not in 0.."),
        (GenerationRequest((1, -1), 5), "token id -1"),
        (GenerationRequest(PROMPTS[0], 5, num_logprobs=-1), "num_logprobs=-1"),
        (GenerationRequest(PROMPTS[0], 5, json_schema="{}"), "without stop_token_ids"),
        (GenerationRequest(PROMPTS[0], 5, json_schema='{"not": {}}', stop_token_ids=(1,)), "json_schema cannot be compiled"),
        (GenerationRequest(PROMPTS[0], 5, json_schema=" " * 70_000, stop_token_ids=(1,)), "70000 characters"),
    ],
)
def test_invalid_requests_are_refused_with_the_offending_value(
    engine: TransformersEngine, request_: GenerationRequest, named: str
) -> None:
    with pytest.raises(EngineError) as caught:
        engine.generate([GenerationRequest(PROMPTS[0], 2), request_])
    assert named in caught.value.message
    assert caught.value.hint
    assert engine.health().ok


def test_failed_request_does_not_affect_its_batch(
    engine: TransformersEngine, reference: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(self: Matcher, token_id: int) -> None:
        raise EngineError("the grammar failed: too complex")

    monkeypatch.setattr(Matcher, "accept", explode)
    wrong = GenerationRequest(PROMPTS[1], 200, json_schema='{"type": "object"}', stop_token_ids=(2,))
    answers: list[Generation] = []
    thread = threading.Thread(target=lambda: answers.extend(engine.generate([GenerationRequest(PROMPTS[0], 30)])))
    thread.start()
    with pytest.raises(EngineError, match="too complex"):
        engine.generate([wrong])

    async def first() -> None:
        async for _ in engine.stream(wrong):
            raise AssertionError("no token was drawn")

    with pytest.raises(EngineError, match="too complex"):
        asyncio.run(first())
    thread.join(WAIT_S)
    assert [one.token_ids for one in answers] == [greedy(reference, PROMPTS[0], 30)]
    assert engine.health().ok


def test_long_prompt_is_prefilled_in_several_steps(engine: TransformersEngine, reference: LlamaForCausalLM) -> None:
    """Cut into several steps, with others decoding beside it; then again, its prefix found in the cache."""
    long = tuple((11 * k) % 240 + 12 for k in range(200))
    for _ in range(2):
        answers = engine.generate(
            [GenerationRequest(PROMPTS[2], 30), GenerationRequest(long, 10), GenerationRequest(long[:150], 10)]
        )
        prompts = ((PROMPTS[2], 30), (long, 10), (long[:150], 10))
        assert [one.token_ids for one in answers] == [greedy(reference, *prompt) for prompt in prompts]


def test_top_k_and_top_p_restrict_sampling() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.5, -1.0, -3.0])

    def drawn(**settings: float) -> set[int]:
        request = GenerationRequest((1,), 1, 5.0, top_k=3, **settings)  # type: ignore[arg-type]
        return {sample(logits, request, seed, 1) for seed in range(-300, 300)}

    assert len(drawn()) == 3
    assert {0, 1} < drawn()
    assert drawn(top_p=0.35) == {0}  # of the three, renormalised, the first alone has more


def test_grammar_over_a_tekken_tokenizer(tmp_path: Path) -> None:
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    data = next(Path(mistral_common.__file__).parent.glob("data/tekken_*.json"))
    (tmp_path / "tekken.json").write_bytes(data.read_bytes())
    tokenizer = MistralTokenizer.from_file(data).instruct_tokenizer.tokenizer
    grammars = load_grammars(tmp_path, tokenizer.n_words)
    assert isinstance(grammars, Grammars)
    matcher = grammars.matcher('{"type": "array", "items": {"enum": ["é", "ab"]}, "minItems": 2, "maxItems": 2}', (2,))
    torch.manual_seed(0)
    ids: list[int] = []
    while True:
        allowed = matcher.allowed()
        if bool(allowed[2]):
            break
        ids.append(int(torch.multinomial(allowed.double(), 1)))
        matcher.accept(ids[-1])
    assert len(json.loads(tokenizer.decode(ids))) == 2
    assert not allowed[:2].any()
    assert "tokenizer.json or tekken.json" in str(load_grammars(tmp_path / "none", 10))


def test_scoring_beyond_max_positions_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(EngineError, match="513 tokens; the model has 512"):
        engine.score([5] * 510, [(1, 2, 3)])


def test_dead_generation_thread_fails_pending_requests(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(tiny_model_dir, None, CONFIG, use_gpu=False)
    try:
        engine.generate([GenerationRequest(PROMPTS[0], 2)])
        assert engine.health().ok

        def explode(*_: object) -> None:
            raise MemoryError("no memory for the batch")

        monkeypatch.setattr(engine._batching.batch_processor, "_generation_step", explode)
        with pytest.raises(EngineError, match="no memory for the batch"):
            engine.generate([GenerationRequest(PROMPTS[0], 5), GenerationRequest(PROMPTS[1], 5)])
        deadline = time.monotonic() + WAIT_S
        while engine.health().ok and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not engine.health().ok
        with pytest.raises(EngineError):
            engine.generate([GenerationRequest(PROMPTS[0], 2)])
        with pytest.raises(EngineError):
            engine.score(PROMPTS[0], [(1,)])
    finally:
        engine.close()


def test_closed_engine_refuses_requests(tiny_model_dir: Path) -> None:
    engine = load_engine(tiny_model_dir, None, CONFIG, use_gpu=False)
    engine.close()
    engine.close()  # twice is fine
    assert not engine.health().ok
    with pytest.raises(EngineError, match="closed"):
        engine.generate([GenerationRequest(PROMPTS[0], 2)])


def test_adapter_answers_match_peft(tiny_model_dir: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    torch.manual_seed(3)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(tmp_path)
    offline = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32), tmp_path
    ).eval()
    plain = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    engine = load_engine(tiny_model_dir, tmp_path, CONFIG, use_gpu=False)
    try:
        answers = engine.generate([GenerationRequest(prompt, 16) for prompt in PROMPTS[:4]])
    finally:
        engine.close()
    for prompt, generation in zip(PROMPTS, answers, strict=False):
        out = offline.generate(input_ids=torch.tensor([prompt]), do_sample=False, max_new_tokens=16, eos_token_id=None)
        assert generation.token_ids == tuple(out[0, len(prompt) :].tolist())
    assert answers[0].token_ids != greedy(plain, PROMPTS[0], 16)


def test_pickled_weights_are_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(PolicyError, match=r"no \.safetensors"):
        load_engine(tmp_path, None, CONFIG, use_gpu=False)
    with pytest.raises(PolicyError, match=r"adapter_model\.safetensors"):
        load_engine(tiny_model_dir, tmp_path, CONFIG, use_gpu=False)
