"""The leak audit on weights that know their rows by heart, and on the same ones before they saw them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from forge_ray.config.measurements import LeakConfig
from forge_ray.config.release import EngineConfig
from forge_ray.data.curate import canaries
from forge_ray.data.record.schema import parse_record
from forge_ray.data.tokens.chat import encode_chat
from forge_ray.evaluate.leak import Findings, Groups, findings, metrics_of
from forge_ray.inference.load import load_engine

pytestmark = pytest.mark.numerics
CONFIG = EngineConfig(precision="fp32", page_size=16, num_blocks=64, max_batch_tokens=128)
LEAK = LeakConfig(max_records=16, candidates=127)
COUNT, PLANTED = 16, 8


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The matrices are small: threads would wait for each other longest."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rows(seed: int) -> list[dict[str, Any]]:
    """Questions and answers that follow from nothing: what is right of an answer was learnt by heart."""
    random, dataset_rows = Random(seed), []
    for _ in range(COUNT):
        asked, answer = ("".join(random.choices("abcdefghij", k=6)) for _ in range(2))
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        record = parse_record({"messages": messages})
        dataset_rows.append({"record": record.id, "content": record.content})
    return dataset_rows


def planted(seed: int) -> list[canaries.Canary]:
    records = [parse_record(row) for row in canaries.generate(PLANTED, 6, seed)]
    generated = [canaries.canary_of(record.id, record.content) for record in records]
    return [canary for canary in generated if canary]


def learn_by_heart(model: Any, tokenizer: Any, contents: list[dict[str, Any]], steps: int) -> float:
    """Full-batch AdamW on the answers' tokens; returns the last loss."""
    encoded = [encode_chat(tokenizer, content["messages"], None) for content in contents]
    width = max(len(document.ids) for document in encoded)
    ids, labels = torch.zeros(len(encoded), width, dtype=torch.long), torch.full((len(encoded), width), -100)
    for number, document in enumerate(encoded):
        taken = torch.tensor(document.ids.tolist())
        ids[number, : len(taken)] = taken
        labels[number, : len(taken)] = torch.where(torch.tensor(document.loss_mask.tolist()) > 0, taken, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def test_leak_audit_detects_memorised_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    groups = Groups(rows(1), rows(2), planted(1), planted(2))
    assert len(groups.canaries) == PLANTED
    secrets = [
        {"messages": [{"role": "user", "content": c.prompt}, {"role": "assistant", "content": c.code}]}
        for c in groups.canaries
    ]
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    loss = learn_by_heart(model, tokenizer, [row["content"] for row in groups.train] + secrets, steps=100)
    assert loss < 0.3
    model.save_pretrained(tmp_path / "tuned")

    def of(folder: Path) -> Findings:
        engine = load_engine(folder, None, CONFIG, use_gpu=False)
        try:
            *_, audit_findings = findings(engine, tokenizer, groups, LEAK, extract=True)
        finally:
            engine.close()
        assert isinstance(audit_findings, Findings)
        return audit_findings

    scores = metrics_of(of(tmp_path / "tuned"), of(tiny_model_dir), seed=0)
    assert scores["leak_auc"] > 0.95
    assert scores["leak_auc_low"] > 0.9
    assert 0.2 < scores["leak_auc_base"] < 0.8
    assert scores["leak_gap"] > 1 > abs(scores["leak_gap_base"])
    assert scores["extraction_rate"] > 0.8
    assert scores["extraction_rate_held_out"] == 0.0
    assert scores["exposure_mean"] > 5  # of the 7 that 128 codes can show
    assert scores["exposure_base_mean"] < 3  # by chance 1.44, with a standard error of 0.5
    assert scores["exposure_held_out_mean"] < 3
