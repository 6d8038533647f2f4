"""The losses of judged answers as TRL's own trainers compute them, and the model and the answers of the comparison.

    python tests/numerics/trl_losses.py       writes golden/trl_losses.json

A trainer is opened on a row that it does not read again; its `compute_loss` is then given our answers as its own collator
would lay them out. Policy and reference are the tiny model with each weight moved by a sine of its place: no generator of
random numbers decides anything.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden" / "trl_losses.json"
# prompt, preferred, rejected; the preferred answers are as long as each other (see `of_trl`), the rejected ones are not
PAIRS = (
    ([11, 12, 13, 14], [21, 22, 23, 24, 2], [31, 32, 2]),
    ([15, 16, 17, 18, 19, 20], [41, 42, 43, 44, 2], [51, 52, 53, 54, 55, 56, 2]),
    ([25, 26], [61, 62, 63, 64, 2], [71, 72, 73, 74, 75, 2]),
)
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo", "beta": 0.3},
    "dpo_smoothed": {"kind": "dpo", "beta": 0.3, "label_smoothing": 0.1},
    "dpo_sft": {"kind": "dpo", "beta": 0.3, "sft_weight": 0.7},
    "robust": {"kind": "robust", "beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"kind": "ipo", "beta": 0.5},
    "hinge": {"kind": "hinge", "beta": 0.7},
    "simpo": {"kind": "simpo", "beta": 2.0, "gamma": 0.5},
    "simpo_sft": {"kind": "simpo", "beta": 2.0, "gamma": 0.5, "label_smoothing": 0.1, "sft_weight": 0.7},
    "orpo": {"kind": "orpo", "beta": 0.2},
    "kto": {"kind": "kto", "beta": 0.3, "good_weight": 1.5, "bad_weight": 0.5},
    "apo_zero": {"kind": "apo_zero", "beta": 0.3, "good_weight": 1.5, "bad_weight": 0.5},
}


@torch.no_grad()
def moved(model: Any, amount: float) -> Any:
    """The model with each weight moved by `amount` times a sine of its place in its tensor."""
    for parameter in model.parameters():
        places = torch.arange(parameter.numel(), dtype=torch.float64)
        parameter += (amount * torch.sin(1.0 + 0.7 * places)).to(parameter.dtype).view_as(parameter)
    return model


def of_gradients(named: dict[str, Tensor]) -> dict[str, list[float]]:
    """Of each weight's gradient, its norm and its product with a cosine of the places."""
    return {
        name: [float(value.double().norm()), float((value.double().flatten() * waves(value)).sum())]
        for name, value in sorted(named.items())
    }


def waves(value: Tensor) -> Tensor:
    return torch.cos(0.3 * torch.arange(value.numel(), dtype=torch.float64))


def of_trl(folder: Path, name: str) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradient by the weight's name). TRL takes the mean of the preferred answers' cross-entropy over the tokens of
    the batch, and ours is per answer (arXiv:2404.19733, eq. 1): equal where these are as long as each other. Its ORPO counts
    the prompt's tokens in the cross-entropy, which the paper does not (arXiv:2403.07691, section 4.1: the likelihood of the
    preferred answer): that term is put together here from the log probabilities that its trainer computes."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    settings = dict(SETTINGS[name])
    kind, sft_weight, smoothing = (settings.get(key, 0.0) for key in ("kind", "sft_weight", "label_smoothing"))
    open_model = AutoModelForCausalLM.from_pretrained
    policy, reference = (moved(open_model(folder, dtype=torch.float32), amount) for amount in (0.05, 0.02))
    common = {
        "output_dir": tempfile.mkdtemp(prefix="trl-losses-"),
        "beta": settings["beta"],
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": len(PAIRS),
    }
    opened = {
        "model": policy,
        "processing_class": AutoTokenizer.from_pretrained(folder),
        "train_dataset": Dataset.from_list([{"prompt": "one", "chosen": " two", "rejected": " three"}] * 2),
    }
    if kind in ("kto", "apo_zero"):
        weights = {"desirable_weight": settings["good_weight"], "undesirable_weight": settings["bad_weight"]}
        single = Dataset.from_list([{"prompt": "a", "completion": " b", "label": label} for label in (True, False)])
        loss_type = "apo_zero_unpaired" if kind == "apo_zero" else kind
        args = KTOConfig(**common, **weights, loss_type=loss_type, train_sampling_strategy="sequential")
        trainer: Any = KTOTrainer(args=args, ref_model=reference, **opened | {"train_dataset": single})
        loss = trainer.compute_loss(trainer.model, judged_batch() | (moved_batch() if kind == "kto" else {}))
    elif kind == "simpo":
        args = CPOConfig(
            **common, loss_type="simpo", simpo_gamma=settings["gamma"], cpo_alpha=sft_weight, label_smoothing=smoothing
        )
        trainer = CPOTrainer(args=args, **opened)
        loss = trainer.compute_loss(trainer.model, two_sided_batch())
    elif kind == "orpo":
        trainer = ORPOTrainer(args=ORPOConfig(**common), **opened)
        chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, two_sided_batch())
        loss = -chosen.mean() - trainer.odds_ratio_loss(chosen, rejected)[0].mean()
    else:
        losses = {"dpo": "sigmoid"}.get(kind, kind)
        many: Any = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, sft_weight]} if sft_weight else {}
        args = DPOConfig(**common, **({"loss_type": losses} | many), label_smoothing=smoothing)
        trainer = DPOTrainer(args=args, ref_model=reference, **opened)
        loss = trainer.compute_loss(trainer.model, pair_batch())
        if kind == "dpo" and smoothing:  # TRL's `sigmoid` reads none: its loss of the pairs as they are, and turned round
            loss = (1 - smoothing) * loss + smoothing * trainer.compute_loss(trainer.model, pair_batch(turned=True))
    loss.backward()
    return float(loss.detach()), {one: weight.grad for one, weight in policy.named_parameters() if weight.grad is not None}


def padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def pair_batch(turned: bool = False) -> dict[str, Tensor]:
    """First the preferred answers, or `turned` the rejected ones."""
    answers = [(prompt, pair[side]) for side in ((1, 0) if turned else (0, 1)) for prompt, *pair in PAIRS]
    return {
        "input_ids": padded([prompt + answer for prompt, answer in answers], 0),
        "attention_mask": padded([[1] * len(prompt + answer) for prompt, answer in answers], 0),
        "completion_mask": padded([[0] * len(prompt) + [1] * len(answer) for prompt, answer in answers], 0),
    }


def judged_batch() -> dict[str, Tensor]:
    return pair_batch() | {"label": torch.tensor([True] * len(PAIRS) + [False] * len(PAIRS))}


def moved_batch() -> dict[str, Tensor]:
    """Each answer behind the prompt of the document after it in its packed row (`rows_of`)."""
    moved = [(prompt, row[number - 1][1]) for row in rows_of(PAIRS) for number, (prompt, _) in enumerate(row)]
    columns = {
        "input_ids": [prompt + answer for prompt, answer in moved],
        "attention_mask": [[1] * len(prompt + answer) for prompt, answer in moved],
        "completion_mask": [[0] * len(prompt) + [1] * len(answer) for prompt, answer in moved],
    }
    return {f"KL_{name}": padded(values, 0) for name, values in columns.items()}


def rows_of(pairs: Any) -> list[list[tuple[list[int], list[int]]]]:
    """The documents (prompt, answer) of two packed rows: of two pairs, and of one."""
    return [[(prompt, answer) for prompt, *both in part for answer in both] for part in (pairs[:2], pairs[2:])]


def two_sided_batch() -> dict[str, Tensor]:
    batch, half = pair_batch(), len(PAIRS)
    labels = batch["input_ids"].where(batch["completion_mask"] == 1, -100)
    sides = {"chosen": slice(None, half), "rejected": slice(half, None)}
    return {
        f"{side}_{column}": values[part]
        for side, part in sides.items()
        for column, values in (
            ("input_ids", batch["input_ids"]),
            ("attention_mask", batch["attention_mask"]),
            ("labels", labels),
        )
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from importlib.metadata import version

    from conftest import make_tiny_model

    values: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as target:
        tiny = make_tiny_model(Path(target) / "tiny")
        for one in SETTINGS:
            value, gradients = of_trl(tiny, one)
            values[one] = {"loss": value, "gradients": of_gradients(gradients)}
    how = {"made_by": "python tests/numerics/trl_losses.py", "trl": version("trl"), "torch": version("torch")}
    GOLDEN.write_text(json.dumps(how | {"losses": values}, indent=1) + "\n", encoding="utf-8")
