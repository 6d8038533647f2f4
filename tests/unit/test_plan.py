"""The plan: counts are exact, memory moves with the settings as it must; `benchmarks/plan.py` holds it against runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forge_ray.config.base import parse
from forge_ray.config.train import Offload, TrainConfig
from forge_ray.train.plan import Model, memory, nearest, plan

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Model:
    return Model.of(tiny_model_dir)


def of(model: Model, workers: int = 1, precision: str = "bf16", **settings: Any) -> Any:
    return memory(model, parse(TrainConfig, settings), precision, 128, workers)


def test_the_counts_are_those_of_torch(model: Model, tiny_model_dir: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    from forge_ray.train.model import with_adapter

    real: Any = LlamaForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    assert model.num_parameters == sum(parameter.numel() for parameter in real.parameters())
    for targets in ("all-linear", ("q_proj", "down_proj")):
        config = parse(TrainConfig, {"adapter": {"r": 4, "target_modules": targets}})
        assert config.adapter is not None
        adapted = with_adapter(LlamaForCausalLM.from_pretrained(tiny_model_dir), config.adapter)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
        assert model.num_trained(config) == trained
    assert model.num_trained(parse(TrainConfig, {})) == model.num_parameters


def test_states_are_divided_as_the_stage_says(model: Model) -> None:
    one, eight = (of(model, workers, zero_stage=2) for workers in (1, 8))
    assert one.weights == eight.weights == 2 * model.num_parameters
    assert eight.optimizer == pytest.approx(one.optimizer / 8, rel=1e-4)
    third = of(model, 8, zero_stage=3)
    assert third.weights == math.ceil(2 * model.num_parameters / 8)


def test_what_is_offloaded_is_counted_in_main_memory_and_a_slice_as_a_slice(model: Model) -> None:
    inside = of(model, 4, zero_stage=3)
    outside = of(model, 4, zero_stage=3, offload={"optimizer": "cpu"})
    assert (outside.gradients, outside.optimizer, outside.weights) == (0, 0, inside.weights)
    assert outside.host >= inside.gradients + inside.optimizer
    assert outside.total < inside.total
    all_of_it = of(model, 4, zero_stage=3, offload={"optimizer": "cpu", "parameters": "cpu"})
    assert all_of_it.weights + all_of_it.host == outside.weights + outside.host
    assert inside.host == 0
    shared = of(model, 4, sequence_parallel=2, scaling={"num_workers": 4})
    assert (shared.activations, shared.logits) == (of(model, 4).activations // 2, of(model, 4).logits // 2)


def test_activations_grow_with_a_pass_and_shrink_when_recomputed(model: Model) -> None:
    small, large = (of(model, micro_batch_size=size) for size in (1, 4))
    assert large.activations == 4 * small.activations
    assert of(model, activation_checkpointing=True).activations < small.activations
    assert of(model, adapter={"r": 4}).optimizer < small.optimizer / 2


def test_the_nearest_settings_that_fit_change_least(model: Model) -> None:
    stats = SimpleNamespace(num_rows=100, num_tokens=12_000, num_trained_tokens=6_000)
    dataset: Any = SimpleNamespace(splits={"train": stats}, sequence_length=128)
    config = parse(TrainConfig, {"micro_batch_size": 4, "zero_stage": 1, "global_batch": 8})

    def needs(**settings: Any) -> int:
        return plan(model, config.model_copy(update=settings), "bf16", dataset, 4).memory.total

    def fits(room: int) -> dict[str, Any] | None:
        found = nearest(model, config, "bf16", dataset, 4, room)
        names = ("micro_batch_size", "activation_checkpointing", "zero_stage")
        return found and {name: getattr(found, name) for name in names if getattr(found, name) != getattr(config, name)}

    assert fits(needs()) == {}
    assert fits(needs() - 1) == {"micro_batch_size": 1}
    smaller = needs(micro_batch_size=1)
    assert fits(smaller - 1) == {"micro_batch_size": 1, "activation_checkpointing": True}
    assert fits(1) is None
    large = {"engine": "deepspeed", "zero_stage": 3, "global_batch": 8}
    config = parse(TrainConfig, large)
    model = replace(model, shapes={f"model.layers.{n}.weight": (4096, 4096) for n in range(32)})  # more than a bucket
    for wanted in ({"optimizer": "cpu"}, {"optimizer": "cpu", "parameters": "cpu"}):
        room = plan(
            model, parse(TrainConfig, large | {"activation_checkpointing": True, "offload": wanted}), "bf16", dataset, 4
        )
        moved = nearest(model, config, "bf16", dataset, 4, room.memory.total)
        assert moved is not None
        assert moved.offload == Offload.model_validate(wanted)
    config = parse(TrainConfig, {"micro_batch_size": 4, "zero_stage": 1, "global_batch": 8})
    whole = plan(model, config, "bf16", dataset, 4)
    assert (whole.steps, whole.num_tokens, whole.num_trained_tokens) == (13, 12_480, 6_240)


def test_of_an_object_store_only_the_headers_are_read(model: Model, tiny_model_dir: Path, tmp_path: Path) -> None:
    """A truncated copy of each file of weights: enough for the plan, and nothing of the weights."""
    from forge_ray.preflight import headers
    from forge_ray.store import Store, hash_dir

    store = Store("mock:///")
    base: Any = SimpleNamespace(id="mv_1", files=hash_dir(tiny_model_dir))
    for entry in base.files:
        store.write(f"models/mv_1/{entry.path}", (tiny_model_dir / entry.path).read_bytes())
    folder = headers(store, base, tmp_path)
    assert Model.of(folder) == model
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sorted(sizes) == ["config.json", "model.safetensors"]
    assert sizes["model.safetensors"] < (tiny_model_dir / "model.safetensors").stat().st_size / 10
