"""Attempts beside each other: what changed in a few words, what it brought, and one picture that needs nothing else."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from forge_ray.config.base import apply_overrides, parse, resolved
from forge_ray.config.run import RunConfig
from forge_ray.errors import ConfigError, NotFound
from forge_ray.records import EvalReport, Event, ModelVersion, RunRecord, canonical_json
from forge_ray.release.compare_runs import (
    attempts,
    chosen,
    compare,
    curve,
    differences,
    in_words,
    listed,
    picture,
    table,
)
from forge_ray.store.catalog import Catalog
from forge_ray.train import validation

pytestmark = pytest.mark.unit
RUN: dict[str, Any] = {
    "name": "tickets",
    "base_model": "base",
    "data": {"sources": [{"path": "rows.jsonl"}]},
    "train": {"adapter": {"r": 16}},
    "release": {"alias": "tickets", "gate": {"better_than": [{"metric": "macro_f1"}]}},
}


def trained(catalog: Catalog, run: str, dataset: str, scores: dict[str, float], verdict: Any, *overrides: str) -> None:
    store, config = catalog.store, parse(RunConfig, apply_overrides(RUN, overrides))
    lines = [{"step": step, "loss": 2.0 / step, **({"validation_loss": 1.0} if step == 4 else {})} for step in range(1, 5)]
    store.write(f"runs/{run}/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    store.write(f"runs/{run}/config-0.json", canonical_json(resolved(config)))
    validation.write(store, run, validation.Result(step=2, loss=1.5))
    validation.write(store, run, validation.Result(step=3, loss=float("nan")))
    catalog.append(Event(kind="run", subject=run, data={"state": "succeeded" if verdict else "failed", "why": "no disk"}))
    if not verdict:
        return
    facts: dict[str, Any] = {"method": "sft", "config_digest": "", "base_model": "mv_0", "base_digest": "", "seed": 0}
    facts |= {"num_steps": 4, "samples_seen": 32, "order_digest": "", "attempts": (), "code_digest": "", "environment": {}}
    facts |= {"metrics": {"loss": 0.5}, "export": (), "export_kind": "full", "dataset": dataset, "config": resolved(config)}
    catalog.put(RunRecord(id=run, name=config.name, **facts))
    about: dict[str, Any] = {"subject": run, "subject_digest": run, "dataset": dataset, "num_examples": 4, "per_class": {}}
    about |= {"items_sha256": ""}
    report = catalog.put(EvalReport(**about, split="test", config={}, metrics=scores).sealed())
    catalog.put(EvalReport(**about, split="train", config={"leak": {}}, metrics={"leak_auc": 0.5}).sealed())
    version = ModelVersion(
        name="tickets",
        status=verdict,
        weights="full",
        files=(),
        files_digest=run,
        run=run,
        evals=(report.id,),
        licence="",
    )
    catalog.put(version.sealed())


@pytest.fixture
def catalog(catalog: Catalog) -> Catalog:
    """With four runs."""
    trained(catalog, "run_a", "ds_1", {"macro_f1": 0.5, "loss": 2.0}, "rejected")
    changes = ("train.optimizer.lr=1e-3", "train.seed=1", "train.adapter=null")
    trained(catalog, "run_b", "ds_2", {"macro_f1": 0.75, "loss": 1.0}, "accepted", *changes)
    trained(catalog, "run_c", "ds_1", {}, "", "train.micro_batch_size=2", "eval.labels=[a, b]")
    trained(catalog, "run_<x>", "ds_1", {"macro_f1": 0.25}, "rejected", "name=other")
    return catalog


def test_each_attempt_lists_its_changes_and_its_gain(catalog: Catalog) -> None:
    first, second, failed, other = listed(attempts(catalog))
    assert (first["score"], first["gain"], first["changed"], first["verdict"]) == (0.5, None, {}, "rejected")
    assert (second["metric"], second["score"], second["gain"], second["before"]) == ("macro_f1", 0.75, 0.25, "run_a")
    assert second["changed"]["train.optimizer.lr"] == [0.0002, 0.001]
    assert second["changed"]["dataset"] == ["ds_1", "ds_2"]
    summary = "dataset ds_1→ds_2, adapter {alpha: 32, dropout: 0, method:…→none, optimizer.lr 0.0002→0.001, seed 0→1"
    assert second["changed_in_words"] == summary  # a section that is gone is one change
    assert second["verdict"] == "accepted"
    assert (failed["state"], failed["name"], failed["score"], failed["why"]) == ("failed", "tickets", None, "no disk")
    assert failed["changed"]["train.micro_batch_size"] == [1, 2]  # of the config in its folder: it has no record
    assert failed["changed"]["eval.labels"] == [None, ["a", "b"]]
    assert "dataset" not in failed["changed"]  # not known, so not said
    assert (other["before"], other["changed"]) == ("", {})  # the first of its name


def test_many_changes_are_counted(catalog: Catalog) -> None:
    before, after, *_ = attempts(catalog)
    summary = in_words(differences(before, after), most=2)
    assert summary == "dataset ds_1→ds_2, adapter {alpha: 32, dropout: 0, method:…→none, and 2 more"


def test_curves_join_losses_of_the_loop_and_of_validation_tasks(catalog: Catalog) -> None:
    drawn = curve(catalog.store, "run_a")
    assert drawn.train == [(1, 2.0), (2, 1.0), (3, 2 / 3), (4, 0.5)]
    assert drawn.validation == [(2, 1.5), (4, 1.0)]  # a loss that is no number is not drawn


def test_losses_of_different_methods_have_a_panel_each(catalog: Catalog) -> None:
    def width(*methods: str) -> int:
        runs = [
            replace(attempt, config={"train": {"method": method if method == "sft" else {"kind": method}}})
            for attempt, method in zip(chosen(catalog, ("run_a", "run_b")), methods, strict=True)
        ]
        return int.from_bytes(picture(runs, [curve(catalog.store, attempt.run) for attempt in runs])[16:20], "big")

    assert width("sft", "dpo") > width("sft", "sft") == width("dpo", "dpo")


def test_compare_writes_a_png_or_an_html_page(catalog: Catalog, tmp_path: Path) -> None:
    runs = ("run_a", "run_b", "run_c", "run_<x>")
    tried, png = compare(catalog, runs, tmp_path / "c.png")
    assert png.read_bytes().startswith(b"\x89PNG")
    _, page = compare(catalog, runs, tmp_path / "c.html")
    text = page.read_text()
    (embedded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert base64.b64decode(embedded).startswith(b"\x89PNG")
    assert "run_&lt;x&gt;" in text
    assert "<x>" not in text
    assert "http" not in text  # nothing is fetched
    rows = {row[0]: row[1:] for row in table(tried)}
    assert rows["macro_f1 ↑"] == ["0.5", "0.75", "-", "0.25"]
    assert rows["loss ↓"] == ["2", "1", "-", "-"]
    assert rows["train.seed"] == ["0", "1", "0", "0"]
    assert "train.epochs" not in rows  # the same in all


def test_invalid_comparisons_are_refused(catalog: Catalog, tmp_path: Path) -> None:
    cases: list[tuple[tuple[str, ...], str, type[Exception], str]] = [
        (("run_a", "run_a"), "c.png", ConfigError, "two runs or more"),
        (("run_a", "run_z"), "c.png", NotFound, "run_z"),
        (("run_a", "run_b"), "c.pdf", ConfigError, "neither"),
        (("run_a", "run_b"), "no/c.png", ConfigError, "cannot be written"),
    ]
    for runs, name, kind, problem in cases:
        with pytest.raises(kind, match=problem):
            compare(catalog, runs, tmp_path / name)
