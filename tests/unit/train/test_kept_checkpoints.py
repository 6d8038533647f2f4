"""A run that has ended: its checkpoints are those that the run file keeps, and the plan says how much they use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from fabricated import store_at

from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.records import canonical_json
from forge_ray.store import paths
from forge_ray.store.files import Store
from forge_ray.store.uses import using
from forge_ray.train import checkpoint, validation
from forge_ray.train.plan import Model, plan
from forge_ray.train.preflight import left_bytes, num_kept
from forge_ray.train.stated import Stated

pytestmark = pytest.mark.unit
RUN = "run_1"


def written(store: Store, *steps: int) -> None:
    for step in steps:
        relative = paths.checkpoint(RUN, step)
        store.write(f"{relative}/state.pt", b"s" * step)
        manifest: dict[str, Any] = {"files": [{"path": "state.pt", "size": step, "sha256": "0" * 64}]}
        store.write(f"{relative}/MANIFEST.json", canonical_json(manifest | {"position": {"step": step, "left_out": ""}}))


@pytest.mark.parametrize(("keep_best", "kept"), [(False, [10, 8]), (True, [10, 8, 4])])
def test_ended_run_keeps_what_its_run_file_says(tmp_path: Path, keep_best: bool, kept: list[int]) -> None:
    """While it ran, a validation held step 2, and step 6 was the best until the last result was there."""
    store = store_at(tmp_path / "store")
    written(store, 2, 4, 6, 8, 10)
    for step, loss in ((2, 3.0), (4, 1.0), (6, 2.0)):
        validation.write(store, RUN, validation.Result(step, loss=loss))
    half = store.local(paths.checkpoints(RUN, ".tmp-00000012-000001"))
    half.mkdir()
    config = parse(
        TrainConfig,
        {"validation": {"keep_best": keep_best, "every_steps": 2, "max_rows": 4}, "checkpoint": {"every_steps": 2}},
    )
    checkpoint.tidy(store, RUN, config)
    assert checkpoint.steps(store, RUN) == kept
    assert not half.exists()


def test_checkpoint_in_use_stays_until_it_is_not(tmp_path: Path) -> None:
    store = store_at(tmp_path / "store")
    written(store, 2, 4, 6)
    with using(store, "evaluation", paths.checkpoint(RUN, 2)):
        checkpoint.retire(store, RUN, keep=1)
        assert checkpoint.steps(store, RUN) == [6, 2]
    checkpoint.retire(store, RUN, keep=1)
    assert checkpoint.steps(store, RUN) == [6]


@pytest.mark.parametrize(
    ("settings", "num"),
    [
        ({"max_steps": 10}, 1),
        ({"max_steps": 10, "checkpoint": {"every_steps": 10}}, 1),
        ({"max_steps": 11, "checkpoint": {"every_steps": 10}}, 2),
        ({"max_steps": 100, "checkpoint": {"every_steps": 10, "keep": 3}}, 3),
        (
            {
                "max_steps": 100,
                "checkpoint": {"every_steps": 10},
                "validation": {"every_steps": 10},
                "export_step": "best",
            },
            3,
        ),
    ],
)
def test_plan_counts_what_stays(tiny_model_dir: Path, settings: dict[str, Any], num: int) -> None:
    config = parse(TrainConfig, settings)
    whole = plan(Model.of(tiny_model_dir), config, "fp32", Stated.of(1000, 128), 1)
    assert num_kept(config, whole) == num
    assert left_bytes(config, whole) == num * whole.checkpoint_bytes + 4 * whole.num_parameters


def test_merged_export_is_as_large_as_the_model(tiny_model_dir: Path) -> None:
    sizes = {}
    for kind in ("adapter", "merged"):
        config = parse(TrainConfig, {"adapter": {"r": 4}, "export": kind})
        sizes[kind] = plan(Model.of(tiny_model_dir), config, "bf16", Stated.of(10, 128), 1)
    assert sizes["merged"].export_bytes == 2 * sizes["merged"].num_parameters
    assert sizes["adapter"].export_bytes == 2 * sizes["adapter"].num_trained
