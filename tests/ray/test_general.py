"""General rows from a run file to a verdict: scored for base and tuned, judged, followed by lineage and erasure."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from forge_ray import pipeline
from forge_ray.cli.main import cli
from forge_ray.config.base import load
from forge_ray.config.run import RunConfig
from forge_ray.errors import DataError
from forge_ray.evaluate.items import compared, items_of
from forge_ray.governance.erasure.apply import erase
from forge_ray.governance.erasure.options import Options
from forge_ray.governance.erasure.plan import plan_of
from forge_ray.governance.erasure.search import ErasureRequest, search
from forge_ray.governance.trace import of_record, trace
from forge_ray.records import DatasetManifest, RunRecord
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
RUN = Path(__file__).parents[1] / "e2e" / "run.yaml"
COLOURS = RUN.parent / "colours.jsonl"
TRAIN = (
    "train={epochs: 6, global_batch: 4, micro_batch_size: 4, optimizer: {lr: 5.0e-3}, engine: torch, zero_stage: 0,"
    " precision: fp32, scaling: {num_workers: 0}}"
)


def overrides(name: str, *more: str) -> tuple[str, ...]:
    here = (f"name={name}", f"release.alias={name}", f"data.sources=[{{path: {COLOURS}}}]", TRAIN, "deploy=null")
    return *here, *more


def config(name: str, *more: str) -> RunConfig:
    return load(RunConfig, RUN, overrides(name, *more))


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_base_and_tuned_are_compared_on_general_rows_and_a_gate_judges_the_rise(store: Store, tmp_path: Path) -> None:
    texts = [{"text": f"The pump of hall {n} is inspected every {n + 2} months. " * 2} for n in range(12)]
    chats = [chat(f"What is {n} plus 1?", f"{n} plus 1 is {n + 1}.") for n in range(11)]
    chats.append(chat("Colour of an emerald, number 99?", "Nobody knows."))
    bad = [{"messages": [{"role": "user", "content": "no answer"}]}, {"neither": 1}]
    rows = tmp_path / "general.jsonl"
    rows.write_text("\n".join(map(json.dumps, [*texts, *chats, *bad])))
    rule = "{metric: general_loss, tolerance: 100, confidence: 0.95}"
    settings = (f"eval.general.rows={rows}", "eval.contamination={ngram: 5}")
    outcome = pipeline.run(config("general", *settings, f"release.gate={{no_worse_than: [{rule}]}}"), store)
    base, tuned, version = outcome.base_report, outcome.report, outcome.version
    assert version.status == "accepted", version.reasons
    (check,) = version.checks
    assert check.name == "general_loss no worse than base at 95%"
    own = {"general_loss", "general_perplexity", "general_text_loss", "general_bits_per_byte", "general_contamination"}
    assert own < set(tuned.metrics)
    assert own < set(base.metrics)
    assert "general_exact_match" not in tuned.metrics  # nothing is generated
    assert tuned.metrics["general_contamination"] == pytest.approx(1 / 24)  # the emerald
    assert (tuned.general, tuned.num_general) == (base.general, 24)
    assert sum(count for reason, count in tuned.left_out.items() if reason.startswith("general row, ")) == 2
    kinds = Counter(item.get("kind", "") for item in items_of(store, tuned))
    assert kinds == {"": tuned.num_examples, "general_answer": 12, "general_text": 12}
    with Catalog.open(store) as catalog:
        manifest = catalog.get_as(DatasetManifest, tuned.general)
        assert (manifest.splits["test"].num_records, manifest.splits["train"].num_records) == (24, 0)
        assert tuned.parents() == (outcome.run.id, outcome.dataset.id, manifest.id)
    change = compared(store, tuned, base, 0.95)["general_loss"]
    assert change is not None
    assert change.value == pytest.approx(tuned.metrics["general_loss"] - base.metrics["general_loss"])
    assert check.value is not None
    assert check.value <= -change.value  # the bound of the gain is below the measured one

    sets = [word for override in overrides("general", *settings) for word in ("--set", override)]
    table = CliRunner().invoke(cli, ["eval", str(RUN), "--store", store.uri, *sets])
    assert table.exit_code == 0, table.output
    assert f"Held-out test rows: {tuned.num_examples}; general rows: 24" in table.output
    assert " general_loss " in table.output
    assert "not evaluated: 1 rows, general row, quarantined: " in table.output

    strict = config("general", *settings, "release.gate={thresholds: {general_bits_per_byte: {max: 0.001}}}")
    refused = pipeline.release(strict, store)
    assert refused.status == "rejected"
    assert refused.reasons[0].startswith("general_bits_per_byte=")

    # without general rows, the report is the one of before, and no row of theirs is in it
    plain, _ = pipeline.evaluate(config("general", "eval.contamination={ngram: 5}"), store)
    assert plain.general == ""
    assert plain.metrics == {name: value for name, value in base.metrics.items() if not name.startswith("general_")}

    # erasing a general row reaches its dataset version and both reports, and no run
    record = next(item["record"] for item in items_of(store, tuned) if item.get("kind") == "general_answer")
    with Catalog.open(store) as catalog:
        assert trace(catalog, [of_record(record)]).affected.evals == tuple(sorted([base.id, tuned.id]))
        request = ErasureRequest("record", (record,))
        planned = plan_of(catalog, search(catalog, request))
        assert [dataset.id for dataset in planned.datasets] == [tuned.general]
        assert {report.id: report.quotes for report in planned.evals} == {base.id: 1, tuned.id: 1}
        assert (planned.runs, planned.versions) == ((), ())
    erase(store, request, Options())
    assert not store.exists(paths.report(tuned.id))
    again, tuned_again = pipeline.evaluate(config("general", *settings), store)
    assert again.num_general == tuned_again.num_general == 23
    assert tuned_again.general not in ("", tuned.general)
    assert record not in {item["record"] for item in items_of(store, tuned_again)}


def test_general_rows_that_are_trained_on_are_refused_before_training(store: Store, tmp_path: Path) -> None:
    rows = tmp_path / "general.jsonl"
    rows.write_text("\n".join([*COLOURS.read_text().splitlines()[:40], json.dumps(chat("Hello!", "Hello!"))]))
    with Catalog.open(store) as catalog:
        before = len(catalog.all(RunRecord))
    overlapping = config("overlap", f"eval.general.rows={rows}")
    with pytest.raises(DataError, match="of the 41 general rows") as refused:
        pipeline.train(overlapping, store)
    assert "held_out" in refused.value.hint
    general = refused.value.hint.split("[")[1].split("]")[0]
    with Catalog.open(store) as catalog:
        assert len(catalog.all(RunRecord)) == before
    curated = config("overlap", f"eval.general.rows={rows}", f"data.curate=[{{rule: held_out, against: [{general}]}}]")
    manifest = pipeline.prepare(curated, store)
    assert manifest.curation[0].before > manifest.curation[0].after
    assert pipeline.evaluate_file(curated, store)[0].general == general  # the rule of the hint is the remedy


def test_conversations_are_refused_for_a_model_without_a_chat_template_and_texts_are_not(
    store: Store, tmp_path: Path, tiny_model_dir: Path
) -> None:
    bare = shutil.copytree(tiny_model_dir, tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    rows = tmp_path / "texts.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"line {n} of the manual says {n % 7}. " * 4}) for n in range(40)))
    texts = (f"data.sources=[{{path: {rows}}}]", f"base_model={bare}", "licence=apache-2.0", "eval.labels=null")
    with_chats = config("bare", *texts, "eval.general={rows: chats}", "release.gate={}")
    with pytest.raises(DataError, match=r"^eval\.general\.rows=chats: none of 120 rows can be used") as refused:
        pipeline.train(with_chats, store)
    assert "`texts`" in refused.value.hint
    report = pipeline.evaluate_file(config("bare", *texts, "eval.general={rows: texts}", "release.gate={}"), store)[0]
    assert report.num_general == 40
    assert "general_bits_per_byte" in report.intervals


def test_rows_that_come_along_are_scored_for_a_model_of_any_template(store: Store) -> None:
    report = pipeline.evaluate_file(config("carried", "eval.general={rows: chats, max_examples: 20}"), store)[0]
    assert report.num_general == 20
    assert report.intervals["general_loss"][0] < report.metrics["general_loss"] < report.intervals["general_loss"][1]
    texts = pipeline.evaluate_file(config("carried", "eval.general={rows: texts}"), store)[0]
    assert (texts.num_general, texts.left_out) == (40, {})
    assert texts.general != report.general


def test_models_without_a_run_are_compared_on_general_rows_too(store: Store, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps(chat(f"q {n}", f"a {n}")) for n in range(3)))
    general = "eval.general={rows: texts, max_examples: 5}"
    words = ["eval", "--model", "tiny", "--data", str(rows), "--set", general, "--set", "eval.max_new_tokens=2", "--json"]
    done = CliRunner().invoke(cli, [*words, "--store", store.uri])
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout.splitlines()[-1])["reports"]["tiny"]
    assert (report["num_examples"], report["num_general"]) == (3, 5)
    assert {"loss", "general_bits_per_byte"} < set(report["metrics"])
