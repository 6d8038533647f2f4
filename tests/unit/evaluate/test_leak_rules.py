"""Leak audit, canaries, safety prompts and contamination: hand-computed figures, and who must not be mistaken for whom."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge_ray.config.measurements import Contamination, LeakConfig
from forge_ray.data.curate import canaries
from forge_ray.data.curate.contamination import contaminated
from forge_ray.data.dataset.order import Order
from forge_ray.data.record.schema import parse_record
from forge_ray.errors import ConfigError, DataError, ForgeError, NotFound
from forge_ray.evaluate.leak import (
    Findings,
    TrainedOrder,
    _is_usable,
    auc,
    auc_interval,
    exposure,
    metrics_of,
    sample_of,
    used_rows,
)
from forge_ray.evaluate.safety import SafetyPrompt, answer_prompts, read_prompts
from forge_ray.inference.engine import EngineHealth, Generation, GenerationRequest, Score, Token

pytestmark = pytest.mark.unit

# ---------------------------------------------------------------- canaries


def test_only_canary_prompts_are_recognised_as_canaries() -> None:
    rows = canaries.generate(50, 6, seed=1)
    assert rows == canaries.generate(50, 6, seed=1) != canaries.generate(50, 6, seed=2)
    codes = [row["messages"][1]["content"] for row in rows]
    assert all(len(code) == 6 and code.isdigit() for code in codes)
    assert len(set(codes)) > 45
    record = parse_record(rows[0])  # as the dataset keeps it
    canary = canaries.canary_of(record.id, record.content)
    assert canary == canaries.Canary(record.id, rows[0]["messages"][0]["content"], codes[0])

    def says(asked: str, answer: str = "123456") -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}

    asked = rows[0]["messages"][0]["content"]
    assert canaries.canary_of("r", says(asked, "[PHONE]")) is None  # masked by a rule: no code to look for
    assert canaries.is_canary(says(asked, "[PHONE]"))
    for other in ("What is a canary?", asked.replace("-", "-0", 1), asked[:-3] + "00?", asked + " "):
        assert not canaries.is_canary(says(other))
    assert not canaries.is_canary({"text": asked})


def test_candidate_codes_differ_and_have_the_same_length() -> None:
    canary = canaries.Canary("rec_1", "?", "042")
    drawn = canaries.candidates(canary, 100, seed=0)
    assert len(set(drawn)) == 100
    assert "042" not in drawn
    assert {len(code) for code in drawn} == {3}
    assert drawn == canaries.candidates(canary, 100, seed=0) != canaries.candidates(canary, 100, seed=1)
    assert len(canaries.candidates(canary, 5000, seed=0)) == 999  # there are no more


def test_canaries_are_written_once(tmp_path: Path) -> None:
    target = tmp_path / "c.jsonl"
    canaries.write(target, canaries.generate(3, 4, 0))
    assert len(target.read_text().splitlines()) == 3
    for wrong in (
        lambda: canaries.write(target, []),
        lambda: canaries.write(tmp_path / "no" / "c.jsonl", []),
        lambda: canaries.generate(0, 4, 0),
        lambda: canaries.generate(1, 19, 0),
    ):
        with pytest.raises(ConfigError) as caught:
            wrong()
        assert caught.value.hint


# ---------------------------------------------------------------- figures


def test_auc_and_its_interval() -> None:
    low, high = np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0])
    assert auc(high, low) == 1.0
    assert auc(low, high) == 0.0
    assert auc(low, low) == 0.5
    assert auc(np.array([1.0, 3.0]), np.array([2.0, 3.0])) == pytest.approx((0 + 0 + 1 + 0.5) / 4)
    assert math.isnan(auc(np.array([math.nan, 1.0]), low))
    random = np.random.default_rng(0)
    apart = random.normal(1, 1, 60), random.normal(0, 1, 60)
    below, above = auc_interval(*apart, seed=0)
    assert below < auc(*apart) < above
    assert 0.05 < above - below < 0.3  # Hanley and McNeil: about 4 standard errors of 0.04
    assert auc_interval(high, low, seed=0) == (1.0, 1.0)


def findings(train: list[float], held_out: list[float], **more: Any) -> Findings:
    extracted = {"train_said": np.array([True, False]), "held_out_said": np.array([False, False])}
    fields: dict[str, Any] = {**extracted, "canaries": [], "canaries_held_out": [], **more}
    return Findings(train=np.array(train), held_out=np.array(held_out), **fields)


def test_leak_metrics_use_the_base_model_as_control() -> None:
    tuned = findings([-0.5, -1.5], [-2.0, -3.0], canaries=[7.0, 3.0], canaries_held_out=[1.0])
    base = findings([-2.0, -4.0], [-3.0, -3.0], canaries=[1.0, 2.0], canaries_held_out=[1.5])
    metrics = metrics_of(tuned, base, seed=0)
    assert (metrics["leak_auc"], metrics["leak_auc_base"], metrics["leak_auc_gain"]) == (1.0, 0.5, 0.5)
    assert (metrics["leak_gap"], metrics["leak_gap_base"]) == (1.5, 0.0)
    assert (metrics["extraction_rate"], metrics["extraction_rate_held_out"], metrics["extraction_gain"]) == (0.5, 0.0, 0.5)
    assert (metrics["exposure_mean"], metrics["exposure_max"], metrics["exposure_base_mean"]) == (5.0, 7.0, 1.5)
    assert metrics["exposure_held_out_mean"] == 1.0
    assert "exposure_max" not in metrics_of(findings([-1.0, -1.0], [-1.0, -1.0]), base, seed=0)


class Digits:
    """An engine to which a code is the likelier the greater it is as text, and which answers `hello`."""

    max_request_tokens, lacks = 512, dict[str, str]()

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        return [Generation(tuple(self.tokenizer("hello")["input_ids"]), "stop") for _ in requests]

    def stream(self, request: GenerationRequest) -> AsyncIterator[Token]:
        raise AssertionError("not used")

    def score(self, prompt_ids: Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Score]:
        texts = [self.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in continuations]
        return [
            Score(math.nan if text == "00" else float(text), len(ids))
            for text, ids in zip(texts, continuations, strict=True)
        ]

    def embed(self, inputs: Sequence[Sequence[int]], adapter: str = "") -> list[list[float]]:
        raise AssertionError("not used")

    def load_adapter(self, name: str, folder: Path) -> None: ...

    def unload_adapter(self, name: str) -> None: ...

    def health(self) -> EngineHealth:
        return EngineHealth(True, "", 0, 0)

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.mark.parametrize(
    ("code", "expected"), [("99", math.log2(100)), ("98", math.log2(100) - 1), ("50", 1.0), ("01", math.log2(100 / 99))]
)
def test_exposure_is_the_rank_in_bits(tokenizer: Any, code: str, expected: float) -> None:
    """All 100 codes of two digits: rank 1, 2, 50 and the last but one, whose comparison with `00` is with no number."""
    config = LeakConfig(candidates=99)
    bits = exposure(Digits(tokenizer), _wrapped(tokenizer), canaries.Canary("rec_1", "?", code), config)
    assert bits == pytest.approx(expected)


def _wrapped(tokenizer: Any) -> Any:
    from forge_ray.data.tokens.chat import chat_tokenizer

    return chat_tokenizer(tokenizer)


def test_a_nan_score_has_no_exposure(tokenizer: Any) -> None:
    canary = canaries.Canary("rec_1", "?", "00")
    assert math.isnan(exposure(Digits(tokenizer), _wrapped(tokenizer), canary, LeakConfig()))


def test_training_rows_are_only_those_the_run_used() -> None:
    class Rows:
        shard_rows = (40,)

    order = Order("ds_1", 0, 40, 8, 4)
    for steps, count in ((0, 0), (3, 12), (9, 36), (10, 40), (25, 40)):
        taken = used_rows(TrainedOrder(Rows(), order, steps))  # type: ignore[arg-type]
        assert taken.sum() == count
    numbers = {number for step in range(3) for number in order.rows_of(step, range(4))}
    assert set(np.flatnonzero(used_rows(TrainedOrder(Rows(), order, 3))).tolist()) == numbers  # type: ignore[arg-type]


# ---------------------------------------------------------------- safety


@pytest.mark.parametrize(
    ("judged", "answer"),
    [({"chosen": "yes", "rejected": "no"}, "yes"), ({"completion": "yes", "label": True}, "yes"), ({}, "")],
    ids=["pair", "judged answer", "prompt alone"],
)
def test_judged_rows_are_audited_by_the_answer_that_was_trained(tokenizer: Any, judged: dict[str, Any], answer: str) -> None:
    turn = [{"role": "user", "content": "open?"}]
    sides = {
        name: [{"role": "assistant", "content": value}] if name in ("chosen", "rejected") else value
        for name, value in judged.items()
    }
    row = {"messages": turn} if not judged else parse_record({"prompt": turn, **sides}).content
    assert _is_usable(row) is bool(answer)
    if answer:
        sample = sample_of(tokenizer, {"record": "rec_1", "content": row}, 500)
        assert answer in tokenizer.decode(list(sample.answer))
        assert "open?" in tokenizer.decode(list(sample.prompt))


def test_an_answer_must_match_every_must_and_no_must_not() -> None:
    prompt = SafetyPrompt(prompt="?", must=("(?i)cannot",), must_not=(r"\d{4}", "secret"))
    assert prompt.failures("I CANNOT say.") == []
    assert prompt.failures("The secret is 1234") == [r"must_not \d{4}", "must_not secret", "must (?i)cannot"]


def test_safety_prompts_are_read_asked_and_kept(tokenizer: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "Say hello", "must": ["^hello"]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}], "must_not": ["hello"]},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)))
    prompts, digests = read_prompts([str(file), file.as_uri()])
    assert [prompt.place for prompt in prompts[:2]] == ["p.jsonl:1", "p.jsonl:3"]
    assert len(set(digests)) == 1
    items = list(answer_prompts(Digits(tokenizer), tokenizer, prompts[:2], 8))
    assert [item["failures"] for item in items] == [[], ["must_not hello"]]
    assert items[1]["asked"] == rows[1]["messages"]
    assert items[0]["answer"] == "hello"


@pytest.mark.parametrize(
    ("line", "problem", "kind"),
    [
        ('{"prompt": "a"}', "every answer passes", DataError),
        ('{"must": ["a"]}', "needs `prompt` or `messages`", DataError),
        ('{"prompt": "a", "must": ["("]}', "is not a regular expression", DataError),
        ('{"prompt": "a", "must": ["b"], "mustnt": []}', "mustnt: Extra inputs", DataError),
        ('{"messages": [{"role": "user"}], "must": ["b"]}', "`role` and `content`", DataError),
        ("[1]", "is not an object", DataError),
        ("{", "p.jsonl:1: Expecting", DataError),
        ("", "has no prompt", DataError),
        (None, "does not exist", NotFound),
    ],
)
def test_an_invalid_prompt_file_is_refused(tmp_path: Path, line: str | None, problem: str, kind: type[ForgeError]) -> None:
    file = tmp_path / "p.jsonl"
    if line is not None:
        file.write_text(line)
    with pytest.raises(kind) as caught:
        read_prompts([str(file)])
    assert problem in caught.value.message
    assert caught.value.hint


# ---------------------------------------------------------------- contamination

WORDS = [f"word{number}" for number in range(14)]


def chat(record: str, asked: str, answer: str = "yes", system: str = "") -> dict[str, Any]:
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    messages = ([{"role": "system", "content": system}] if system else []) + messages
    return {"record": record, "kind": "chat", "content": {"messages": messages}}


def test_shared_ngrams_are_contamination_but_task_wording_is_not() -> None:
    rule = Contamination(ngram=8)
    shared, system = " ".join(WORDS[:8]), "one two three four five six seven eight nine"
    evaluated = [
        chat("e1", f"so {shared} then", system=system),
        chat("e2", " ".join(WORDS[:7]) + " else", system=system),  # seven words in a row, not eight
        chat("e3", "a b c d e f", "v w x y z"),  # shorter than a run: the whole text counts
        chat("e4", "please", "yes"),  # too short to be evidence
    ]
    training = [
        chat("t1", "nothing of it at all", system=system),
        chat("t2", f"{shared.upper()}!"),
        chat("t3", f"again {shared}"),
        chat("t4", "A, b, c, d, e, f", "other"),
        chat("t5", "please", "yes"),
    ]
    assert contaminated(evaluated, training, rule) == [
        {"record": "e1", "train_record": "t2", "shared": 1, "runs": 3},
        {"record": "e3", "train_record": "t4", "shared": 1, "runs": 2},
    ]
    assert contaminated(evaluated, training[:1], rule) == []
    template = "please name the section of the debian package called"
    many = [chat(f"e{number}", f"{template} {WORDS[number]}") for number in range(14)]
    asked = [chat("t", f"{template} other")]
    assert contaminated(many, asked, rule) == []
    assert len(contaminated(many, asked, Contamination(ngram=8, template_share=1.0))) == 14
    assert len(contaminated(many[:2], asked, rule)) == 2  # two rows make no template
