"""From pairs of answers to a verdict: packed, trained, scored on held-out pairs, gated, traced, repeated, erased."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forge_ray import pipeline
from forge_ray.config.base import load
from forge_ray.config.run import RunConfig
from forge_ray.data.dataset.stream import Rows
from forge_ray.errors import TrainingError
from forge_ray.governance.reproduce import reproduce
from forge_ray.governance.space.survey import survey
from forge_ray.governance.trace import of_record, trace
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
RUN = Path(__file__).parents[1] / "e2e" / "run.yaml"


def pairs(folder: Path) -> Path:
    """The colour of a thing against that of the thing before it."""
    chats = [json.loads(line)["messages"] for line in (RUN.parent / "colours.jsonl").read_text().splitlines()]
    colours = sorted({chat[-1]["content"] for chat in chats})
    rows = [
        {
            "prompt": chat[:-1],
            "chosen": chat[-1]["content"],
            "rejected": colours[colours.index(chat[-1]["content"]) - 1],
        }
        for chat in chats
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pairs.jsonl"


def config(rows: Path, *overrides: str) -> RunConfig:
    here = (
        "name=pairs",
        f"data.sources=[{{path: {rows}}}]",
        "train={epochs: 10, global_batch: 4, micro_batch_size: 4, optimizer: {lr: 5.0e-3}, engine: torch, zero_stage: 0,"
        " precision: fp32, scaling: {num_workers: 0}, method: {kind: dpo, beta: 0.2}}",
        "eval={slices: [source], kl: {max_examples: 8}}",
        "release={alias: pairs, gate: {thresholds: {pair_accuracy: {min: 0.9}, kl: {max: 1.0e6}},"
        " better_than: [{incumbent: base, metric: pair_accuracy, margin: 0.2}]}}",
        "deploy=null",
    )
    return load(RunConfig, RUN, (*here, *overrides))


def test_pairs_from_rows_to_a_verdict(store: Store, tmp_path: Path) -> None:
    outcome = pipeline.run(config(pairs(tmp_path)), store)
    dataset, run = outcome.dataset, outcome.run
    assert dataset.kinds == {"preference": sum(split.num_records for split in dataset.splits.values())}
    rows = Rows.of(store, dataset, "train")
    for records in rows.records(list(range(rows.num_rows))):
        assert records[0::2] == records[1::2]  # both answers of each pair, one behind the other
    assert run.method == "dpo"
    assert outcome.version.status == "accepted", outcome.version.reasons
    assert outcome.report.metrics["pair_accuracy"] >= 0.9
    assert outcome.report.metrics["pair_accuracy"] > outcome.base_report.metrics["pair_accuracy"] + 0.2
    assert outcome.report.metrics["pair_margin"] > 0
    assert outcome.report.metrics["kl"] > 0.01
    assert "kl" not in outcome.base_report.metrics  # which no run made
    assert {"pair_accuracy", "pair_margin"} <= outcome.report.intervals.keys()
    assert reproduce(store, run.id)["verdict"] == "equal"

    record = rows.records([0])[0][0]
    with Catalog.open(store) as catalog:
        assert run.id in str(trace(catalog, [of_record(record)]))
        (item,) = [one for one in survey(catalog).items if one.name == paths.dataset(dataset.id)]
    assert any(path.startswith(paths.reference(dataset.id)) for path in item.paths)


def test_rows_of_another_kind_are_refused_with_the_method_that_takes_them(store: Store, tmp_path: Path) -> None:
    rows = pairs(tmp_path)
    with pytest.raises(TrainingError, match=r"train\.method=sft takes chat and text records") as caught:
        pipeline.train(config(rows, "train.method=sft"), store)
    assert "train.method={kind: dpo}" in caught.value.hint
    with pytest.raises(TrainingError, match=r"train\.method=dpo takes preference records"):
        pipeline.train(config(RUN.parent / "colours.jsonl"), store)
