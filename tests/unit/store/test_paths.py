"""Where things lie in a store: written here as a person finds them, for an old store must be found again."""

from __future__ import annotations

import pytest

from forge_ray.store import paths

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (paths.of_kind("models"), "records/models"),
        (paths.record("models", "mv_1"), "records/models/mv_1.json"),
        (paths.event("2026~ev.json"), "events/2026~ev.json"),
        (paths.audit("log.jsonl"), "audit/log.jsonl"),
        (paths.signatures("mv_1"), "signatures/mv_1"),
        (paths.signatures("mv_1", "k.json"), "signatures/mv_1/k.json"),
        (paths.erasure(), "erasures"),
        (paths.erasure("er_1", "certificate.json"), "erasures/er_1/certificate.json"),
        (paths.environment("sha256:00ff"), "environments/00ff.json"),
        (paths.environment("00ff"), "environments/00ff.json"),
        (paths.dataset(), "datasets"),
        (paths.dataset("ds_1", "MANIFEST.json"), "datasets/ds_1/MANIFEST.json"),
        (paths.dataset("ds_1", ""), "datasets/ds_1/"),
        (paths.records("ds_1", "train"), "datasets/ds_1/records/train"),
        (paths.packed("ds_1", "train"), "datasets/ds_1/packed/train"),
        (paths.shard("ds_1", "train", 7), "datasets/ds_1/packed/train/shard-00007.parquet"),
        (paths.index("ds_1", "subjects.bin"), "index/ds_1/subjects.bin"),
        (paths.card("ds_1"), "cards/ds_1"),
        (paths.image("sha256:00ff"), "images/00ff"),
        (paths.image(""), "images/"),
        (paths.work("data"), "work/data"),
        (paths.run(), "runs"),
        (paths.run("run_1", "metrics.jsonl"), "runs/run_1/metrics.jsonl"),
        (paths.result("run_1"), "runs/run_1/result.json"),
        (paths.export("run_1"), "runs/run_1/export"),
        (paths.checkpoints("run_1"), "runs/run_1/checkpoints"),
        (paths.checkpoint("run_1", 120), "runs/run_1/checkpoints/step-00000120"),
        (paths.checkpoint("run_1", 120, "MANIFEST.json"), "runs/run_1/checkpoints/step-00000120/MANIFEST.json"),
        (paths.attempt("run_1", 3), "runs/run_1/attempts/000003.json"),
        (paths.incident("run_1", 3), "runs/run_1/incidents/000003.json"),
        (paths.validation("run_1", 40), "runs/run_1/validations/00000040.json"),
        (paths.model("mv_1", "config.json"), "models/mv_1/config.json"),
        (paths.report("ev_1"), "evals/ev_1"),
        (paths.items("ev_1"), "evals/ev_1/items.jsonl"),
        (paths.usage("2026-11-25", "r-1.jsonl"), "usage/2026-11-25/r-1.jsonl"),
    ],
)
def test_paths_of_the_store_layout(path: str, expected: str) -> None:
    assert path == expected
