"""The losses of judged answers against TRL's trainers: the values and gradients that TRL 1.16 gave, and TRL itself where it
is installed. No peer: `offset`, which TRL has no longer; `test_preference.py` compares it with its paper's equation."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_losses import GOLDEN, PAIRS, SETTINGS, moved, of_gradients, of_trl, rows_of

from forge_ray.config.base import parse
from forge_ray.config.method import OF_ANSWERS, OF_PAIRS, Preference
from forge_ray.config.train import TrainConfig
from forge_ray.train.loss import segment_sums, token_logps
from forge_ray.train.method import STEP_MEAN
from forge_ray.train.methods.preference import judged_loss, num_documents, num_pairs, pair_loss
from forge_ray.train.mismatched import change_of_moved, moved_answers
from forge_ray.train.model import load_for_training

pytestmark = pytest.mark.numerics


def packed() -> dict[str, Tensor]:
    """The pairs in two rows: two pairs, and one with padding."""
    rows = rows_of(PAIRS)
    width = max(sum(len(prompt + answer) for prompt, answer in row) for row in rows) + 3
    columns: dict[str, list[list[int]]] = {"input_ids": [], "loss_mask": [], "segment_ids": [], "position_ids": []}
    for row in rows:
        values: dict[str, list[int]] = {name: [] for name in columns}
        for segment, (prompt, answer) in enumerate(row, start=1):
            size = len(prompt + answer)
            values["input_ids"] += prompt + answer
            values["loss_mask"] += [0] * len(prompt) + [1] * len(answer)
            values["segment_ids"] += [segment] * size
            values["position_ids"] += list(range(size))
        blank = width - len(values["input_ids"])
        values["position_ids"] += list(range(blank))
        for name in columns:
            columns[name].append(values[name] + [0] * (width - len(values[name])))
    return {name: torch.tensor(value) for name, value in columns.items()}


def ours(folder: Path, name: str) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradient by the weight's name) of the packed pairs."""
    config, batch = parse(Preference, SETTINGS[name]), packed()
    plain = parse(TrainConfig, {"engine": "torch", "zero_stage": 0, "adapter": None})
    policy, reference = (
        moved(load_for_training(folder, plain, "fp32", torch.device("cpu"), 1), amount) for amount in (0.05, 0.02)
    )
    with torch.no_grad():
        batch["reference_logps"], _ = segment_sums(*token_logps(reference, batch), batch)
    batch["grades"] = torch.tensor([1.0, -1.0]).repeat(2)[None].expand(2, -1)
    is_judged = config.kind in OF_ANSWERS
    if config.kind == "kto":
        with torch.no_grad():
            batch["moved_logps"], _ = segment_sums(*token_logps(reference, moved_answers(batch)), moved_answers(batch))
            total, count = change_of_moved(policy, batch)
        assert int(count) == 6
        assert total > 0  # else z0 is 0, and the loss that of `apo_zero`
        batch[STEP_MEAN] = total / count
    sums = (judged_loss if is_judged else pair_loss)(config, policy, batch)
    loss = sums.loss / (num_documents if is_judged else num_pairs)(batch)
    loss.backward()
    return float(loss.detach()), {one: weight.grad for one, weight in policy.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_are_those_that_trl_gave(tiny_model_dir: Path, name: str) -> None:
    frozen: dict[str, Any] = json.loads(GOLDEN.read_text())["losses"][name]
    loss, gradients = ours(tiny_model_dir, name)
    assert loss == pytest.approx(frozen["loss"], rel=1e-5, abs=1e-5)
    products = of_gradients(gradients)
    assert products.keys() == frozen["gradients"].keys()
    for weight, (norm, product) in products.items():
        right_norm, right_product = frozen["gradients"][weight]
        assert norm == pytest.approx(right_norm, rel=1e-5), weight
        assert product == pytest.approx(right_product, abs=1e-5 * max(right_norm, 1.0)), weight


@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL")
@pytest.mark.parametrize("name", SETTINGS)
def test_loss_and_gradient_are_those_of_trl(tiny_model_dir: Path, name: str) -> None:
    loss, gradients = ours(tiny_model_dir, name)
    right, theirs = of_trl(tiny_model_dir, name)
    assert loss == pytest.approx(right, rel=1e-5, abs=1e-5)
    assert gradients.keys() == theirs.keys()
    for weight, gradient in gradients.items():
        largest = float((gradient - theirs[weight]).abs().max())
        assert largest < 1e-5 * max(1.0, float(theirs[weight].abs().max())), (weight, largest)


def test_every_kind_is_compared_with_trl() -> None:
    assert {settings["kind"] for settings in SETTINGS.values()} == {*OF_PAIRS, *OF_ANSWERS} - {"offset"}
