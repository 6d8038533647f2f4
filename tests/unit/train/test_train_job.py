"""A run's id is the hash of what decides its weights, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from forge_ray.config.base import load, parse
from forge_ray.config.run import RunConfig
from forge_ray.config.train import TrainConfig
from forge_ray.records import DatasetManifest, ModelVersion, digest, short_id
from forge_ray.store.files import Store
from forge_ray.train.job import TrainJob, identity, identity_digest, run_id

pytestmark = pytest.mark.unit


def dataset(tokens: str = "a") -> DatasetManifest:
    return DatasetManifest(
        name="rows",
        format=1,
        input_digest=tokens,
        config={},
        tokenizer_digest=tokens,
        base_model="mv_1",
        sources=(),
        splits={},
        num_duplicates=0,
        rejects={},
        sequence_length=64,
    ).sealed()


def base(digest: str = "sha256:b") -> ModelVersion:
    return ModelVersion(name="m", status="imported", weights="full", files=(), files_digest=digest, licence="mit").sealed()


def identifier(precision: str = "fp32", rows: str = "a", weights: str = "sha256:b", **settings: Any) -> str:
    return run_id(parse(TrainConfig, settings), precision, dataset(rows), base(weights))


@pytest.mark.parametrize(
    "settings",
    [
        {"seed": 1},
        {"epochs": 2},
        {"max_steps": 3},
        {"global_batch": 16},
        {"micro_batch_size": 2},
        {"optimizer": {"lr": 1e-5}},
        {"optimizer": {"weight_decay": 0.1}},
        {"optimizer": {"name": "adafactor"}, "engine": "torch", "zero_stage": 0},
        {"schedule": {"name": "linear"}},
        {"schedule": {"name": "wsd"}},
        {"max_grad_norm": 0.5},
        {"adapter": {"r": 4}},
        {"adapter": {"lr_ratio": 4}},
        {"adapter": {"modules_to_save": ["lm_head"]}},
        {"neftune_alpha": 5},
        {"freeze": ["embed_tokens"]},
        {"zero_stage": 3},
        {"engine": "torch", "zero_stage": 0},
        {"activation_checkpointing": True},
        {"offload": {"optimizer": "cpu"}},
        {"precision": "bf16", "rows": "b"},
    ],
    ids=str,
)
def test_settings_that_affect_weights_change_run_id(settings: dict[str, Any]) -> None:
    assert identifier(**settings) != identifier()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "38454d9ffa538f842572cdc215a5e74901405b3ec9df086ad98797e3499251aa"),
        ({"adapter": {}}, "90eb74b23106d6388323e9c659b60026ec5db0a0720b0ea6725bf56b8cdd9243"),
        (
            {"engine": "torch", "zero_stage": 0, "optimizer": {"lr": 1e-5}, "schedule": {"name": "constant"}},
            "59280bd1ad5c67327c0d5398a3b7a547db5c0ae5a001103536d6491ea33b0a97",
        ),
    ],
    ids=str,
)
def test_settings_that_are_not_used_keep_the_identity_of_earlier_runs(settings: dict[str, Any], expected: str) -> None:
    assert digest(parse(TrainConfig, settings).identity()) == f"sha256:{expected}"


@pytest.mark.parametrize(
    ("size", "run_ids"),
    [
        (2, ["run_d468bdbf2fe20f06", "run_a1ea28bbea7f4613"]),  # as its file said before
        ("auto", ["run_dd353c0252b0e3bf", "run_3c80fe188cb8223a"]),
    ],
)
def test_quick_start_keeps_its_run_ids(size: int | str, run_ids: list[str]) -> None:
    config = load(
        RunConfig, Path(__file__).parents[3] / "jobs" / "quickstart.yaml", (f"train.micro_batch_size={size}",)
    ).train
    rows, weights = "ds_1fefad2e07351f35", "sha256:502110d5a8e245a17a1daa0f6dd19d90b1fa9a6fb503d1bec80b0b82f42e18bf"
    assert [short_id("run", identity(config, precision, rows, base(weights))) for precision in ("fp32", "bf16")] == run_ids


def test_dataset_base_model_and_precision_change_run_id() -> None:
    run_ids = {identifier(), identifier(rows="c"), identifier(weights="sha256:d"), identifier(precision="bf16")}
    assert len(run_ids) == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"scaling": {"num_workers": 4}},
        {"scaling": {"max_failures": 9}},
        {"sequence_parallel": 2, "scaling": {"num_workers": 2}},
        {"validation": {"every_steps": 5}},
        {"checkpoint": {"every_steps": 5, "keep": 3}},
    ],
    ids=str,
)
def test_validation_frequency_and_num_workers_keep_run_id(settings: dict[str, Any]) -> None:
    assert identifier(**settings) == identifier()


def test_parameter_offload_keeps_run_id() -> None:
    assert identifier(zero_stage=3, offload={"parameters": "cpu"}) == identifier(zero_stage=3)


def test_adapter_export_format_changes_run_id() -> None:
    """The run folder holds one export, so another kind of it is another run."""
    assert identifier(adapter={"r": 4}, export="merged") != identifier(adapter={"r": 4})


def test_train_job_json_round_trip(tmp_path: Path) -> None:
    config = parse(TrainConfig, {"adapter": {"r": 4}, "optimizer": {"lr": 1e-5}})
    job = TrainJob(
        "run_x", "a name", config, Store(str(tmp_path)), dataset(), base(), "fp32", under_ray=True, chosen_micro_batch=4
    )
    again = TrainJob.from_json(json.loads(json.dumps(job.to_json())))
    assert again == job
    assert identity_digest(again) == identity_digest(job)


def test_a_pass_has_the_rows_of_the_run_file_or_those_that_were_chosen(tmp_path: Path) -> None:
    def job(size: int | str) -> TrainJob:
        config = parse(TrainConfig, {"micro_batch_size": size})
        return TrainJob("run_x", "name", config, Store(str(tmp_path)), dataset(), base(), "fp32", True, chosen_micro_batch=4)

    assert (job("auto").micro_batch_size, job(3).micro_batch_size) == (4, 3)
    assert TrainJob.from_json(job("auto").to_json()).micro_batch_size == 4
