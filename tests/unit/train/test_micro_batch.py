"""`train.micro_batch_size: auto`: as many rows as fit, the same ones for as long as a run lasts; rows that are assumed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from fabricated import dataset, record_of, store_at

from forge_ray import pipeline
from forge_ray.config.base import load, parse
from forge_ray.config.run import RunConfig
from forge_ray.config.train import TrainConfig
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train import run_folder
from forge_ray.train.micro_batch import SAFE, largest_pass
from forge_ray.train.plan import Model, plan
from forge_ray.train.preflight import Assumptions, micro_batch_of
from forge_ray.train.stated import Stated, has_shapes_alone

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> Model:
    return Model.of(tiny_model_dir)


def test_largest_pass_has_a_share_of_a_step_enough_tokens_and_what_fits(model: Model) -> None:
    rows = Stated.of(1000, 128)
    config = parse(TrainConfig, {"micro_batch_size": "auto", "global_batch": 32})

    def auto(limit: int | None, workers: int = 1, **settings: Any) -> int:
        return largest_pass(model, config.model_copy(update=settings), "fp32", rows, workers, limit)

    assert auto(1 << 40) == 16  # 2,048 tokens
    assert auto(1 << 40, workers=4) == 8  # of 32 rows
    assert auto(1 << 40, workers=4, sequence_parallel=2) == 16  # two workers share them
    assert auto(1 << 40, global_batch=3) == 2
    assert auto(None) == 1
    four = plan(model, config.model_copy(update={"micro_batch_size": 4}), "fp32", rows, 1).worker_bytes
    assert auto(int(four / SAFE) + 1) == 4
    assert auto(int(four / SAFE) - 10) == 2
    assert auto(1) == 1  # what does not fit is refused elsewhere


def test_run_keeps_the_pass_that_it_began_with(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Catalog.open(store) as catalog:
        base = catalog.model("tiny")
    with Catalog.open(store_at(tmp_path / "rows")) as catalog:
        rows = dataset(catalog, list(map(record_of, range(20))))
    train = parse(TrainConfig, {"micro_batch_size": "auto", "scaling": {"num_workers": 0}})
    memory = {"bytes": 1 << 40}
    monkeypatch.setattr("forge_ray.train.preflight.memory_per_worker", lambda scaling: memory["bytes"])

    def of_run(run: str, settings: TrainConfig = train) -> int:
        return micro_batch_of(settings, store, "fp32", base, rows, run, None)

    assert of_run("run_pass") == 8
    memory["bytes"] = 1
    assert of_run("run_pass") == run_folder.micro_batch_of(store, "run_pass") == 8
    assert of_run("run_small") == 1
    assert of_run("run_stated", parse(TrainConfig, {"micro_batch_size": 3})) == 0
    assert not run_folder.micro_batch_of(store, "run_stated")


def test_shapes_alone_are_planned_from_the_sizes_of_files(tmp_path: Path) -> None:
    """The run file of Mistral Small 4 as it is; the number of rows is an assumption, and is said to be one."""
    config = load(RunConfig, ROOT / "jobs" / "mistral-small-4.yaml")
    size = (ROOT / config.data.sources[0].path).stat().st_size
    estimate = pipeline.plan(config, Store(str(tmp_path)), Assumptions(memory_gb=80))
    assert estimate.is_assumed
    assert estimate.plan.num_rows == math.ceil(size * (1 - 0.05 - 0.1) / 4 / 4096)
    assert f"{size:,} bytes of sources, 4 a token" in estimate.dataset
    assert estimate.micro_batch_size == 1
    assert not has_shapes_alone(tmp_path)
