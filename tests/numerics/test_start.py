"""Runs that start from an adapter version: its adapter is trained on, exactly and through kills, or added to its base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Jobs, Run, export_digest, exported, first_steps, largest_difference
from safetensors.torch import load_file
from worker import KILLED

from forge_ray.config.adapter import Adapter
from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.models.architecture import open_model
from forge_ray.records import ModelVersion, files_digest
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train import start
from forge_ray.train.adapter import load_weights, with_adapter
from forge_ray.train.model import export_adapter

pytestmark = pytest.mark.numerics
LORA: dict[str, Any] = {"r": 4, "dropout": 0.1}
STILL = {"optimizer": {"lr": 1e-30, "weight_decay": 0.0}, "max_steps": 1}  # nothing moves: 1e-30 is lost in the sum
CASES = {
    "torch": {"engine": "torch", "zero_stage": 0},
    "zero2": {"zero_stage": 2},
    "zero3": {"zero_stage": 3},
}


def adapted(folder: Path, seed: int) -> tuple[Any, dict[str, torch.Tensor]]:
    """The model of the folder with an adapter whose matrices are random, both of them; and these."""
    torch.manual_seed(seed)
    model = with_adapter(open_model(folder, "auto"), Adapter(r=4))
    weights = {name: torch.randn_like(p) * 0.05 for name, p in model.named_parameters() if p.requires_grad}
    return model, weights


def register(catalog: Catalog, base: ModelVersion, seed: int = 7) -> ModelVersion:
    """An adapter version on the base, as a run would have released it."""
    store = catalog.store
    model, weights = adapted(store.local(f"models/{base.id}"), seed)
    with store.staged_dir(f"models/.adapter-{seed}") as folder:
        export_adapter(model, weights, base.id, folder)
    files = store.files(f"models/.adapter-{seed}")
    version = ModelVersion(
        name="first",
        status="accepted",
        weights="adapter",
        files=files,
        files_digest=files_digest(files),
        base_model=base.id,
        licence="mit",
    ).sealed()
    store.move_dir(f"models/.adapter-{seed}", f"models/{version.id}")
    store.delete_dir(f"models/.adapter-{seed}")
    return catalog.put(version)


@pytest.fixture(scope="module")
def first(store: Store) -> ModelVersion:
    with Catalog.open(store) as catalog:
        return register(catalog, catalog.model("tiny"))


@pytest.mark.parametrize(
    ("kinds", "killed"),
    [
        pytest.param(("torch", "zero3"), ("zero3",), id="two engines"),
        pytest.param(tuple(CASES), tuple(CASES), id="every engine", marks=pytest.mark.large),
    ],
)
def test_an_adapter_is_trained_on_exactly(
    kinds: tuple[str, ...], killed: tuple[str, ...], first: ModelVersion, jobs: Jobs, run: Run, store: Store
) -> None:
    """Two ranks. With a learning rate that moves nothing the export is the adapter of the first version; a killed run ends
    with the bytes of one that was not."""
    common = {"adapter": LORA, "init_from": "continue"}
    still = {k: replace(jobs(f"still-{k}-{len(kinds)}", **CASES[k], **common, **STILL), initial=first) for k in kinds}
    settings = {"max_steps": 3, "checkpoint": {"every_steps": 1}}
    whole = {k: replace(jobs(f"on-{k}-{len(kinds)}", **CASES[k], **common, **settings), initial=first) for k in killed}
    run(*still.values(), *whole.values(), ranks=2)
    theirs = {n: w.float() for n, w in load_file(store.local(f"models/{first.id}/adapter_model.safetensors")).items()}
    for job in still.values():
        assert largest_difference(exported(job), theirs) == 0
    for kind, job in whole.items():
        assert largest_difference(exported(job), theirs) > 1e-4
        broken = replace(job, run=f"broken-on-{kind}-{len(kinds)}")
        run(broken, ranks=2, kill_at=3, expect=KILLED)
        run(broken, ranks=2)
        assert first_steps(broken) == [0, 2]
        assert export_digest(broken) == export_digest(job)


def test_another_adapter_is_refused_where_weights_are_loaded(first: ModelVersion, store: Store) -> None:
    folder, base = store.local(f"models/{first.id}"), store.local(f"models/{first.base_model}")
    for other in (Adapter(r=8), Adapter(r=4, target_modules=("q_proj",)), Adapter(r=4, method="dora")):
        with pytest.raises(ConfigError, match="other weights than"):
            load_weights(with_adapter(open_model(base, "auto"), other), folder)


def test_merged_weights_are_the_sum_and_the_same_each_time(tmp_path: Path, store: Store) -> None:
    """In the dtype of the base, whatever the number of threads; the version is registered once, and no alias takes it."""
    own = Store(str(tmp_path / "store"))
    with Catalog.open(store) as there, Catalog.open(own) as catalog:
        folder = tmp_path / "bf16"
        model = open_model(store.local(f"models/{there.model('tiny').id}"), torch.bfloat16)
        model.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name).write_bytes(store.local(f"models/{there.model('tiny').id}/{name}").read_bytes())
        from forge_ray.models.import_model import import_model

        base = import_model(catalog, folder, "bf16", "mit")
        adapter = register(catalog, base)
        config, threads, versions = parse(TrainConfig, {"init_from": "merge"}), torch.get_num_threads(), []
        try:
            for number in (1, 2):
                torch.set_num_threads(number)
                versions.append(start._merge(catalog, adapter, base))
        finally:
            torch.set_num_threads(threads)
        assert versions[0] == versions[1] == start.start_of(catalog, adapter, config).base
        with pytest.raises(PolicyError, match=f"{adapter.id} merged into {base.id}, which no gate has judged"):
            promotion.promote(catalog, versions[0].id, "prod")
        assert not [name for name in own.local("models").iterdir() if name.name.startswith(".")]
    merged = load_file(own.local(f"models/{versions[0].id}/model.safetensors"))
    before = load_file(own.local(f"models/{base.id}/model.safetensors"))
    low_rank = load_file(own.local(f"models/{adapter.id}/adapter_model.safetensors"))
    assert {weight.dtype for weight in merged.values()} == {torch.bfloat16}
    changed = 0
    for name, weight in before.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected = weight.float()
        if f"{prefix}.lora_A.weight" in low_rank:
            a, b = (low_rank[f"{prefix}.lora_{side}.weight"].float() for side in "AB")
            expected, changed = expected + (32 / 4) * (b @ a), changed + 1
        assert torch.equal(merged[name], expected.to(torch.bfloat16)) or largest_step(merged[name], expected) <= 1, name
    assert changed == 14


def largest_step(weight: torch.Tensor, expected: torch.Tensor) -> int:
    """How many bf16 numbers lie between the two at most: a product in another order rounds differently."""
    steps = weight.view(torch.int16).int() - expected.to(torch.bfloat16).view(torch.int16).int()
    return int(steps.abs().max())


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path, first: ModelVersion, store: Store) -> None:
    with Catalog.open(store) as catalog:
        base = catalog.get_as(ModelVersion, first.base_model)
        with pytest.raises(ConfigError, match="does not say how to start from it"):
            start.full_base(catalog, first, TrainConfig())
        with pytest.raises(ConfigError, match="has full weights"):
            start.full_base(catalog, base, parse(TrainConfig, {"init_from": "merge"}))
        orphan = first.model_copy(update={"base_model": "mv_0123456789abcdef"})
        with pytest.raises(NotFound, match="is an adapter on mv_0123456789abcdef, whose files are not in this store"):
            start.full_base(catalog, orphan, parse(TrainConfig, {"init_from": "merge"}))
        begun = start.Start(base, first)
        for settings, message in (
            ({"r": 8}, "train.adapter.r=8: the adapter of .* has r=4"),
            ({"r": 4, "alpha": 8}, "train.adapter.alpha=8.0: the adapter of .* has alpha=32"),
            ({"r": 4, "method": "dora"}, "train.adapter.method=dora: the adapter of .* has method=lora"),
            ({"r": 4, "target_modules": ["q_proj", "lm_head"]}, "also lm_head and not down_proj, gate_proj"),
        ):
            with pytest.raises(ConfigError, match=message):
                start.refuse_other_adapter(catalog, begun, Adapter.model_validate(settings))
        every = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        start.refuse_other_adapter(catalog, begun, Adapter.model_validate({"r": 4, "target_modules": every, "dropout": 0.3}))
