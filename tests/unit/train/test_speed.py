"""FLOPs by the stated formula, memory, and what a terminal shows of a run."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forge_ray import progress
from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.train import speed, status
from forge_ray.train.plan import Model
from forge_ray.train.validation import Result

pytestmark = pytest.mark.unit
DATASET: Any = SimpleNamespace(splits={"train": SimpleNamespace(num_tokens=600, num_records=20)})


def test_flops_formula_matches_torch_counter(tiny_model_dir: Path) -> None:
    """Forward and backward of one document, all weights trained: torch counts the attention as a square, we half of it."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import LlamaForCausalLM

    model: Any = LlamaForCausalLM.from_pretrained(tiny_model_dir, attn_implementation="eager")
    tokens = 30
    ids = torch.randint(0, 300, (1, tokens))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    ours = speed.flops(tiny_model_dir, parse(TrainConfig, {}), DATASET)
    assert ours is not None
    attention = 2 * 64 * tokens * tokens * 6  # layers x heads x head size
    assert ours.of(tokens, tokens) + attention == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_flops_exclude_frozen_gradients_and_inactive_experts(tiny_model_dir: Path) -> None:
    full = speed.flops(tiny_model_dir, parse(TrainConfig, {}), DATASET)
    lora = speed.flops(tiny_model_dir, parse(TrainConfig, {"adapter": {"r": 1}}), DATASET)
    assert full is not None
    assert lora is not None
    assert 0.6 < lora.per_token / full.per_token < 0.75
    assert lora.per_trained_token / full.per_trained_token == pytest.approx(4 / 6)
    shapes: dict[str, tuple[int, ...]] = {
        "a.mlp.experts.0.up_proj.weight": (10, 10),
        "a.mlp.experts.1.up_proj.weight": (10, 10),
        "a.mlp.shared_experts.up_proj.weight": (10, 10),
        "embed_tokens.weight": (100, 10),
    }
    mixture = Model(tiny_model_dir, shapes, {"num_local_experts": 2, "num_experts_per_tok": 1})
    assert speed.active_weights(mixture, shapes) == 200
    half = speed.flops(tiny_model_dir, parse(TrainConfig, {"freeze": ["layers.0", "lm_head"]}), DATASET)
    assert half is not None
    assert 0.8 < half.per_token / full.per_token < 0.9  # of two layers alike, one without the third of its gradients
    assert half.per_trained_token == lora.per_trained_token
    assert speed.flops(tiny_model_dir / "nowhere", parse(TrainConfig, {}), DATASET) is None


def test_measured_peaks_are_plausible() -> None:
    cpu = torch.device("cpu")
    assert 1e8 < speed.peak_flops(cpu, "fp32") < 1e15
    assert 5e7 < speed.peak_bytes(cpu) < 1e12


LINES: list[dict[str, Any]] = [
    {"step": step, "of": 9, "loss": 2.0, "lr": 1e-3, "tokens": 500, "seconds": 0.5, "tokens_per_s": 1000.0, "mfu": 0.25}
    | {"eta_s": 3700.0, "peak_bytes": [1_500_000_000, 1_600_000_000]}
    for step in (1, 2)
]
INCIDENT = {"kind": "spike", "step": 2}
VALIDATIONS = [Result(1, loss=2.5), Result(2, loss=2.75), Result(3)]


def test_progress_line_and_status_details() -> None:
    assert status.progress_line(LINES[-1]) == "step 2/9  loss 2.000  1000 tokens/s  1:01:40 left"
    left_out = {key: value for key, value in LINES[-1].items() if key != "loss"} | {"left_out": "spike"}
    assert "left out: spike" in status.progress_line(left_out)
    assert dict(status.details(LINES, VALIDATIONS, [INCIDENT])) == {
        "training": "loss 2.0000, learning rate 0.001",
        "validation": "loss 2.7500 at step 2, best 2.5000 at step 1",
        "speed": "1,000 tokens/s, 25.0% of the peak (MFU), 1:01:40 left",
        "memory": "1.60 GB at most in one of 2 workers",
        "incident": "step 2: the loss rose and stayed; the run went back and left these steps out",
    }
    assert [name for name, _ in status.details([left_out], [], [])] == ["speed", "memory"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_has_details_on_terminal_and_plain_lines_in_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    screen, file = Terminal(), io.StringIO()
    monkeypatch.setattr(progress, "PLAIN_EVERY_S", 0.0)
    for stream in (screen, file):
        stage = progress.Stage("train", stream)
        stage.update(2, 9, status.progress_line(LINES[-1]), status.details(LINES, VALIDATIONS, [INCIDENT]))
        if stage._live:
            stage._live.refresh()
        stage.done("run_1")
        stage.close(failed=False)
    for words in ("step 2/9", "25.0% of the peak", "best 2.5000 at step 1", "1.60 GB at most", "the loss rose and stayed"):
        assert words in screen.getvalue()
    first, last = file.getvalue().splitlines()
    assert first == "  train     2/9 step 2/9  loss 2.000  1000 tokens/s  1:01:40 left"
    assert last.startswith("✓ train     run_1")
