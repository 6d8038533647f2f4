"""`forge eval` without a run: a file of chats, calls and texts, and a text-only run file before and after training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from forge_ray.cli.main import cli
from forge_ray.config.release import EvalConfig
from forge_ray.data.build import prepare
from forge_ray.data.build.build import index_sources
from forge_ray.evaluate.items import items_of, verify_sources
from forge_ray.evaluate.reports import is_whole, reports_of
from forge_ray.governance.verify import verify_record
from forge_ray.models.import_model import import_model
from forge_ray.records import DatasetManifest, EvalReport
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def forge(store: Store, *arguments: str) -> tuple[int, Any]:
    done = CliRunner().invoke(cli, [*arguments, "--store", store.uri, "--json"])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return done.exit_code, json.loads(lines[-1]) if lines else done.output


@pytest.fixture
def base(store: Store, tiny_model_dir: Path) -> str:
    with Catalog.open(store) as catalog:
        version = import_model(catalog, tiny_model_dir, "tiny", licence="apache-2.0")
        promotion.promote(catalog, version.id, "tiny")
    return version.id


def test_models_are_scored_on_every_row_of_a_file(store: Store, base: str, tmp_path: Path) -> None:
    chats = [
        {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": f"a {n}"}]} for n in range(12)
    ]
    texts = [{"text": f"Section {n}: the pump is inspected every {n} months. " * 3} for n in range(12)]
    rows = tmp_path / "held out.jsonl"
    rows.write_text("\n".join(map(json.dumps, [*chats, *texts])))
    code, result = forge(
        store, "eval", "--model", base, "--model", "tiny", "--data", str(rows), "--set", "eval.max_new_tokens=4"
    )
    assert code == 0, result
    assert set(result["reports"]) == {base, "tiny"}
    report = EvalReport.model_validate(result["reports"][base])
    assert (report.num_examples, report.subject, report.left_out) == (24, base, {})
    assert {"exact_match", "loss", "text_loss", "bits_per_byte"} <= set(report.metrics)
    low, high = report.intervals["bits_per_byte"]
    assert 0 < low <= report.metrics["bits_per_byte"] <= high
    items = items_of(store, report)
    assert sum(item["num_bytes"] for item in items if item.get("kind") == "text") == sum(len(row["text"]) for row in texts)
    assert result["reports"]["tiny"]["id"] == report.id  # the same model on the same rows is one report
    with Catalog.read_only(store) as catalog:
        assert catalog.get(report.id) == report
        assert report.dataset in report.parents()

    code, result = forge(store, "eval", "--model", base)
    assert (code, result["error"]["message"]) == (2, "--model needs rows")
    code, result = forge(store, "eval", "--model", "nobody", "--data", str(rows))
    assert code == 2
    assert "'nobody' is no id" in result["error"]["message"]
    code, result = forge(store, "eval", "--model", base, "--data", str(rows), "--set", "train.seed=1")
    assert "only eval.… and data.… are settings" in result["error"]["message"]


def test_own_functions_and_a_schema_score_answers(store: Store, base: str, tmp_path: Path) -> None:
    rows, own, schema = (tmp_path / name for name in ("answers.jsonl", "own.py", "schema.json"))
    chats = [
        {"messages": [{"role": "user", "content": f"q {n}"}, {"role": "assistant", "content": json.dumps({"n": n})}]}
        for n in range(12)
    ]
    rows.write_text("\n".join(map(json.dumps, chats)))
    own.write_text("def length(row, answer):\n    return {'num_chars': len(answer['text'])}\n")
    schema.write_text(json.dumps({"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}))
    arguments = ("eval", "--model", base, "--data", str(rows), "--set", "eval.max_new_tokens=4")
    arguments += ("--set", f"eval.metrics=[{own}:length]", "--set", f"eval.json_schema={schema}")
    code, result = forge(store, *arguments)
    assert code == 0, result
    report = EvalReport.model_validate(result["reports"][base])
    items = items_of(store, report)
    assert report.metrics["num_chars"] == sum(len(item["prediction"]) for item in items) / 12
    assert report.num_scored == {"num_chars": 12}
    assert report.metrics["valid_schema"] == sum(item["valid_schema"] for item in items) / 12
    assert {"num_chars", "valid_schema"} <= report.intervals.keys()
    verify_sources(store, report)
    with Catalog.read_only(store) as catalog:
        assert all(not one.problem for one in verify_record(catalog, report.id))
    assert forge(store, *arguments)[1] == result

    own.write_text(own.read_text().replace("len(answer['text'])", "1 / (row['reference']['text'] != '{\"n\": 3}')"))
    code, failed = forge(store, *arguments)
    assert code == 2
    assert "raised ZeroDivisionError in line 2" in failed["error"]["message"]
    own.write_text(own.read_text().replace("1 / ", "0 + "))
    code, edited = forge(store, *arguments)
    assert code == 0, edited
    assert edited["reports"][base]["id"] != report.id
    assert edited["reports"][base]["metrics"]["num_chars"] == 11 / 12


def test_a_run_on_text_is_judged_before_and_after_training(
    store: Store, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "texts.jsonl"
    rows.write_text("\n".join(json.dumps({"text": f"line {n} of the manual says {n % 7}. " * 4}) for n in range(80)))
    run = tmp_path / "run.yaml"
    run.write_text(
        json.dumps(
            {
                "name": "manual",
                "base_model": base,
                "data": {
                    "sources": [{"path": str(rows)}],
                    "sequence_length": 64,
                    "splits": {"validation": 0, "test": 0.4},
                },
                "train": {"max_steps": 8, "global_batch": 4, "optimizer": {"lr": 5e-3}, "engine": "torch", "zero_stage": 0}
                | {"scaling": {"num_workers": 1, "cpus_per_worker": 1}, "precision": "fp32"},
                "release": {
                    "alias": "manual",
                    "gate": {"better_than": [{"incumbent": "base", "metric": "bits_per_byte", "confidence": 0.95}]},
                },
            }
        )
    )
    num_listed = 0
    index = index_sources

    def counted(*arguments: Any) -> Any:
        nonlocal num_listed
        num_listed += 1
        return index(*arguments)

    code, prepared = forge(store, "data", "prepare", str(run))
    assert code == 0, prepared
    monkeypatch.setattr(prepare, "index_sources", counted)
    code, before = forge(store, "eval", str(run))
    assert code == 0, before
    assert num_listed == 1
    assert before["tuned"] is None
    assert before["base"]["subject"] == base
    code, trained = forge(store, "train", str(run))
    assert code == 0, trained
    num_listed = 0
    code, after = forge(store, "eval", str(run))
    assert code == 0, after
    assert num_listed == 1
    assert after["base"]["id"] == before["base"]["id"]
    assert after["tuned"]["metrics"]["bits_per_byte"] < after["base"]["metrics"]["bits_per_byte"]
    code, version = forge(store, "release", str(run))
    assert code == 0, version
    (check,) = version["checks"]
    assert check["name"] == "bits_per_byte better than base at 95%"
    assert check["passed"]
    assert check["value"] > 0


def test_a_report_of_an_earlier_version_that_left_texts_out_is_made_anew(store: Store, base: str, tmp_path: Path) -> None:
    rows = tmp_path / "ds_mixed.jsonl"  # named as a dataset's id begins
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rows.write_text("\n".join(map(json.dumps, [chat, {"text": "The pump is inspected every month. " * 3}])))
    arguments = ("eval", "--model", base, "--data", str(rows))
    code, first = forge(store, *arguments)
    assert code == 0, first
    whole = EvalReport.model_validate(first["reports"][base])
    with Catalog.open(store) as catalog:
        fields = {"intervals": {}, "num_examples": 1, "metrics": {"exact_match": 0.0, "loss": 1.0}, "items_sha256": "0"}
        earlier = whole.model_copy(update=fields)
        key = (earlier.subject, earlier.dataset, earlier.config)
        assert not is_whole(catalog, earlier, catalog.get_as(DatasetManifest, whole.dataset), EvalConfig())
        assert is_whole(catalog, whole, catalog.get_as(DatasetManifest, whole.dataset), EvalConfig())
        assert [report.id for report in reports_of(catalog, key)] == [whole.id]
