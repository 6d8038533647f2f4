"""A tiny classifier on disk and in memory, for tests of what serves one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from forge_ray.config.classify import Target
from forge_ray.config.release import EngineConfig
from forge_ray.data.tokens.chat import load_tokenizer_dir
from forge_ray.inference.class_engine import ClassEngine
from forge_ray.inference.classifier import open_classifier
from forge_ray.models.architecture import Head
from forge_ray.models.class_head import draw, write_targets
from forge_ray.serve.calibration import ClassHead
from forge_ray.serve.loaded import Loaded

TOPIC = Target(name="topic", labels=("cards", "loans", "other"))
TOXIC = Target(name="toxic", labels=("insult", "threat"), loss="multi")


def make_classifier(base: Path, folder: Path, *targets: Target) -> Path:
    """The tiny model with a random head, whose logits are far apart, as a training run exports it."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model: Any = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, **Head(targets).settings)
    draw(model, seed=1)
    with torch.no_grad():
        model.score.weight.mul_(40)
    model.config.pad_token_id = load_tokenizer_dir(base).pad_id
    model.save_pretrained(folder)
    write_targets(folder, targets)
    for path in base.iterdir():
        if path.name.startswith(("tokenizer", "special_tokens", "chat_template")):
            shutil.copyfile(path, folder / path.name)
    return folder


def loaded_classifier(
    folder: Path, *targets: Target, version: str = "mv_c", max_batch_tokens: int = 128, **head: Any
) -> Loaded:
    """Close its engine when done. `head`: of `ClassHead`."""
    tokenizer = load_tokenizer_dir(folder)
    config = EngineConfig(precision="fp32", max_batch_tokens=max_batch_tokens)
    engine = ClassEngine(open_classifier(folder, None, targets, tokenizer, config, use_gpu=False))
    digest = "sha256:" + version.encode().hex().ljust(64, "0")
    return Loaded(version, digest, engine, "", tokenizer, (), ClassHead(targets, **head))
