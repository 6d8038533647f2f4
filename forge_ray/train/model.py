"""Load a base model, put LoRA on it, export what was trained."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from forge_ray.config.classify import class_names
from forge_ray.config.train import TrainConfig
from forge_ray.data.dataset.version import TOKENIZER_FILES
from forge_ray.data.tokens.chat import load_tokenizer_dir
from forge_ray.errors import ConfigError
from forge_ray.inference.merge import write_sum
from forge_ray.machine import supported
from forge_ray.models.architecture import LM, Head, open_model
from forge_ray.models.class_head import draw, read_at_positions, targets_of, write_targets
from forge_ray.train import attention, lora
from forge_ray.train.adapter import load_weights, quantised, with_adapter
from forge_ray.train.freezing import freeze_weights
from forge_ray.train.neftune import add_noise
from forge_ray.train.zero import open_deepspeed, zero_config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@contextlib.contextmanager
def _partitioned_while_loading(config: TrainConfig, precision: str, world_size: int) -> Iterator[None]:
    """ZeRO-3: no rank ever holds the whole model. transformers looks for a live HfDeepSpeedConfig."""
    if config.engine != "deepspeed" or config.zero_stage != 3:
        yield
        return
    open_deepspeed()
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    holder = HfDeepSpeedConfig(zero_config(config, precision, world_size))
    try:
        yield
    finally:
        del holder
        unset_hf_deepspeed_config()


def load_for_training(
    folder: Path,
    config: TrainConfig,
    precision: str,
    device: torch.device,
    world_size: int,
    head: Head = LM,
    initial: Path | None = None,
) -> nn.Module:
    """The base model with its adapter, ready for an engine; the same weights on every rank for the same seed. The adapter
    is a new one, or that of the folder `initial`.

    Of a model that also sees, text alone is trained: nothing of the data passes the rest.
    """
    quiet_transformers()
    settings = quantised(config.adapter, device) if config.adapter else {}
    torch.manual_seed(config.seed)
    with _partitioned_while_loading(config, precision, world_size):
        model: Any = open_model(folder, DTYPES[precision], attention.register(), head, **settings)
    if head.targets:
        prepare_head(model, folder, head, config.seed)
    attention.refuse_unknown(model)
    model.config.get_text_config().use_cache = False  # with a cache the packed documents would see each other
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.adapter:
        torch.manual_seed(config.seed)
        model = with_adapter(model, config.adapter, head)
        if initial:
            load_weights(model, initial)
        lora.fuse(model, config)
        if config.activation_checkpointing:
            model.enable_input_require_grads()
    else:
        freeze_weights(model, config)
    if config.neftune_alpha:
        add_noise(model, config.neftune_alpha)
    if config.compile:
        compile_blocks(model)
    on_device: nn.Module = (model if settings else model.to(device)).train()
    return on_device


def load_frozen(folder: Path, adapter: Path | None, precision: str, device: torch.device) -> nn.Module:
    """A model that is asked about packed rows and not trained, with the adapter of a PEFT folder on it."""
    quiet_transformers()
    model: Any = open_model(folder, DTYPES[precision], attention.register())
    attention.refuse_unknown(model)
    model.config.get_text_config().use_cache = False
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter, is_trainable=False).get_base_model()
    frozen: nn.Module = model.to(device).eval().requires_grad_(False)
    return frozen


def prepare_head(model: Any, folder: Path, head: Head, seed: int) -> None:
    """A head over labels that packed rows are trained with: a new one, or that of the folder, if it has these labels.
    Raises `ConfigError` where it has others."""
    read_at_positions(model)
    own = targets_of(folder)
    if not own:
        draw(model, seed)
    elif class_names(own) != class_names(head.targets):
        raise ConfigError(
            f"base_model is a classifier with the labels {list(class_names(own))}, and train.method.targets has"
            f" {list(class_names(head.targets))}",
            hint="list the labels of the base model in its order, or start from the model that it was trained on",
        )


def quiet_transformers() -> None:
    """No warnings and no progress bars of transformers in this process."""
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def refuse_without_compiler(config: TrainConfig) -> None:
    """`ConfigError` where train.compile is set and this machine lacks what it needs: the first step would fail otherwise."""
    if not config.compile:
        return
    use_gpu = config.scaling.gpus_per_worker > 0
    problem = supported.compiler_problem(os.environ, supported.header_folders(), use_gpu)
    if problem:
        raise ConfigError(
            f"train.compile=true cannot work on {platform.node()}: {problem.message}",
            hint=f"{problem.hint}; or set train.compile=false",
        )


def compile_blocks(model: Any) -> None:
    """torch.compile for each block of the model in place: they share their code, so one compilation serves all."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):  # what transformers makes its blocks of
            module.compile()


def export_adapter(model: Any, weights: dict[str, Tensor], base_model: str, folder: Path, head: Head = LM) -> None:
    """PEFT's own files; `base_model` is the id of the version that the adapter belongs to, not a path."""
    if head.targets:
        write_targets(folder, head.targets)
    model.peft_config["default"].base_model_name_or_path = base_model
    model.peft_config["default"].inference_mode = True
    model.save_pretrained(folder, state_dict=weights, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT writes a card with placeholders
    config = folder / "adapter_config.json"
    settings = json.loads(config.read_text(encoding="utf-8"))
    for name in ("target_modules", "target_parameters", "modules_to_save"):  # a set's order differs between processes
        if settings.get(name):
            settings[name] = sorted(settings[name])
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def export_full(base: Path, weights: dict[str, Tensor], folder: Path, head: Head = LM) -> None:
    """A plain Hugging Face directory: the trained weights, the base's configuration and tokenizer."""
    dtype = next(iter(weights.values())).dtype
    model = open_model(base, dtype, head=head)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    tied = set(model.all_tied_weights_keys)
    if unexpected or set(missing) - tied:
        raise ConfigError(f"export: weights do not fit the base: {sorted(unexpected)[:3]} {sorted(missing)[:3]}", hint="")
    save_full(model, base, folder, head)


def save_full(model: Any, base: Path, folder: Path, head: Head) -> None:
    """Weights, configuration and tokenizer."""
    model.save_pretrained(folder)
    _name_classes(base, folder, head)
    copy_tokenizer(base, folder)


def _name_classes(base: Path, folder: Path, head: Head) -> None:
    """Of a classifier: its targets, and in its configuration the pad token, without which transformers reads one text at a
    time."""
    if not head.targets:
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.get_text_config().pad_token_id = load_tokenizer_dir(base).pad_id
    config.save_pretrained(folder)
    write_targets(folder, head.targets)


def merge_adapter(base: Path, adapter: Path, folder: Path) -> None:
    """Base and adapter as one plain model with the base's tokenizer, in its dtype (`write_sum`); a head that the adapter has
    takes the place of the base's."""
    quiet_transformers()
    head = Head(targets_of(adapter))
    write_sum(base, adapter, folder, head=head)
    _name_classes(base, folder, head)
    copy_tokenizer(base, folder)


def copy_tokenizer(base: Path, folder: Path) -> None:
    for path in base.iterdir():
        if path.name.startswith((*TOKENIZER_FILES, "generation_config")):
            shutil.copyfile(path, folder / path.name)
    name_ends(folder)


def name_ends(folder: Path) -> None:
    """Name in generation_config.json every token at which a turn ends, as the chat template writes it: so that whoever
    generates with the folder stops where the training stopped."""
    path = folder / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    listed = settings.get("eos_token_id")
    before = listed if isinstance(listed, list) else [] if listed is None else [listed]
    ends = sorted({*before, *load_tokenizer_dir(folder).end_ids})
    if ends != sorted(before):
        path.write_text(json.dumps(settings | {"eos_token_id": ends}, indent=2, sort_keys=True) + "\n", encoding="utf-8")
