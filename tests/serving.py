"""The endpoint that the serving tests share: two replicas of the tiny model."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from forge_ray.config.base import parse
from forge_ray.config.release import DeployConfig
from forge_ray.records import Deployment, ModelVersion, files_digest
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

WAIT_S = 120
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How do I reset my password?"}]


@dataclass(frozen=True)
class Endpoint:
    url: str
    deployment: Deployment
    version: ModelVersion


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def config(port: int, **more: Any) -> DeployConfig:
    engine = {"precision": "fp32", "page_size": 16, "num_blocks": 256, "max_batch_tokens": 128, "max_adapters": 3}
    base = {"name": "bot", "models": ["tiny"], "port": port, "limits": {"max_new_tokens": 480}, "engine": engine}
    return parse(DeployConfig, base | {"replicas": {"min": 2, "max": 2}} | more)


def make_adapter(model_dir: Path, folder: Path, seed: int, r: int = 4) -> Path:
    """A PEFT adapter of the tiny model whose weights are far from zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    settings = LoraConfig(r=r, lora_alpha=2 * r, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32), settings)
    for name, weights in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weights, std=0.3)
    model.save_pretrained(folder)
    return folder


def register(catalog: Catalog, folder: Path, base: ModelVersion | None, name: str, status: str = "accepted") -> ModelVersion:
    """The folder's files as a model version: an adapter of `base`, or full weights."""
    store: Store = catalog.store
    with store.staged_dir("models/.new") as staged:
        for file in folder.iterdir():
            if file.suffix in (".json", ".safetensors", ".jinja"):
                (staged / file.name).write_bytes(file.read_bytes())
    files = store.files("models/.new")
    version = ModelVersion(
        name=name,
        status=status,  # type: ignore[arg-type]
        weights="adapter" if base else "full",
        files=files,
        files_digest=files_digest(files),
        base_model=base.id if base else "",
        licence="apache-2.0",
    ).sealed()
    store.move_dir("models/.new", f"models/{version.id}")
    return catalog.put(version)
