"""General rows: those that come with forge_ray, what is refused, and how their scores are named, compared and judged."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from fabricated import dataset, record_of, report, run
from fabricated import version as model_version

from forge_ray.config.base import parse
from forge_ray.config.measurements import GeneralConfig
from forge_ray.config.release import EvalConfig, Gate
from forge_ray.config.run import RunConfig
from forge_ray.data.curate.decontaminate import marks
from forge_ray.data.record.schema import DataRecord, parse_line
from forge_ray.errors import ConfigError, DataError, NotFound
from forge_ray.evaluate.general import CARRIED, place_of, refuse_trained, require_rows
from forge_ray.evaluate.items import split_of, splits_of
from forge_ray.evaluate.measures import differences, intervals, statistics
from forge_ray.evaluate.summary import slice_scores
from forge_ray.governance.erasure.plan import plan_of
from forge_ray.governance.erasure.search import ErasureRequest, search
from forge_ray.governance.space.survey import survey
from forge_ray.governance.trace import of_record, trace
from forge_ray.records import EvalReport, canonical_json
from forge_ray.release.gate import LOWER_IS_BETTER, checks
from forge_ray.store.catalog import Catalog

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[3]
HELD_OUT = {"splits": {"validation": 0.0, "test": 1.0}}
SHORT = 400  # bytes of a row that any model has positions for


@pytest.mark.parametrize(("name", "count"), [("chats", 120), ("texts", 40)])
def test_the_rows_that_come_along_are_whole_short_and_distinct(name: str, count: int) -> None:
    data = (ROOT / CARRIED[name]).read_bytes()
    records = [parse_line(line) for line in data.splitlines()]
    assert {record.kind for record in records} == {name.removesuffix("s")}
    assert len({record.id for record in records}) == len(records) == count
    assert max(len(record.json.encode()) for record in records) <= SHORT
    for record in records:
        for message in record.content.get("messages", []):
            assert message["content"] == message["content"].strip()
    runs = [mark for record in records for text in all_texts(record) for mark in set(marks(text, 8).tolist())]
    assert len(runs) == len(set(runs))  # no two share eight words in a row
    readme = (ROOT / "jobs" / "data" / "README.md").read_text(encoding="utf-8")
    assert hashlib.sha256(data).hexdigest() in readme


def all_texts(record: DataRecord) -> list[str]:
    messages = record.content.get("messages", [])
    return [message["content"] for message in messages if message["role"] != "system"] or [record.content["text"]]


def test_the_conversations_that_come_along_are_of_many_kinds() -> None:
    rows = [json.loads(line)["messages"] for line in (ROOT / CARRIED["chats"]).read_text("utf-8").splitlines()]
    assert all(row[-1]["role"] == "assistant" and row[-2]["role"] == "user" for row in rows)
    assert sum(row[0]["role"] == "system" for row in rows) >= 8
    assert sum(sum(message["role"] == "user" for message in row) > 1 for row in rows) >= 8
    assert len({row[-2]["content"] for row in rows}) > 115


def test_none_of_them_is_a_row_of_the_quick_start() -> None:
    own = {parse_line(line).id for line in (ROOT / "jobs/data/debian_sections.jsonl").read_bytes().splitlines()}
    for place in CARRIED.values():
        assert own.isdisjoint(parse_line(line).id for line in (ROOT / place).read_bytes().splitlines())


def test_a_name_stands_for_the_rows_that_come_along_and_a_path_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert place_of(GeneralConfig(rows="chats")) == str(ROOT / "jobs/data/general_chats.jsonl")
    assert place_of(GeneralConfig(rows="./chats")) == "./chats"
    assert require_rows(GeneralConfig(rows="ds_0123456789abcdef")) == []
    monkeypatch.chdir(tmp_path)
    Path("ds_old.jsonl").write_text('{"text": "one"}\n')
    assert [file.name for file in require_rows(GeneralConfig(rows="ds_old.jsonl"))] == ["ds_old.jsonl"]  # a file named so
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one"}\n')
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for sha256 in ("", digest, f"sha256:{digest}"):
        (indexed,) = require_rows(GeneralConfig(rows=str(file), sha256=sha256))
        assert indexed.sha256 == digest


def test_a_changed_file_and_one_that_is_not_there_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "one"}\n')
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    with pytest.raises(DataError) as refused:
        require_rows(GeneralConfig(rows=str(file), sha256="0" * 64))
    assert refused.value.message == (f"eval.general.rows={file} has sha256 {digest}, and eval.general.sha256 is {'0' * 64}")
    assert "if the change is meant" in refused.value.hint
    with pytest.raises(NotFound, match=r"eval\.general\.rows=chat: there is no such file") as absent:
        require_rows(GeneralConfig(rows="chat"))
    assert "chats or texts" in absent.value.hint


@pytest.mark.parametrize(
    ("general", "message"),
    [
        ({"rows": ""}, "eval.general.rows"),
        ({}, "eval.general.rows: required and missing"),
        ({"rows": "a.jsonl", "sha256": "abc"}, "eval.general.sha256='abc'"),
        ({"rows": "ds_0123456789abcdef", "sha256": "0" * 64}, "whose id is a digest already"),
        ({"rows": "chats", "max_examples": -1}, "eval.general.max_examples=-1"),
    ],
)
def test_settings_that_cannot_be_are_refused(general: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        parse(RunConfig, run_file(general))


def run_file(general: Any, **gate: Any) -> dict[str, Any]:
    rows = {"data": {"sources": [{"path": "rows.jsonl"}]}, "eval": {"general": general}}
    return {"name": "n", "base_model": "m", **rows, "release": {"alias": "a", "gate": gate}}


@pytest.mark.parametrize(
    "gate",
    [
        {"thresholds": {"general_loss": {"max": 2}}},
        {"better_than": [{"metric": "general_loss"}]},
        {"no_worse_than": [{"metric": "general_loss", "tolerance": 0.1}]},
    ],
)
def test_a_gate_on_general_rows_needs_them(gate: dict[str, Any]) -> None:
    parse(RunConfig, run_file({"rows": "chats"}, **gate))
    with pytest.raises(ConfigError, match=r"judges general_loss, but eval\.general is not set") as refused:
        parse(RunConfig, run_file(None, **gate))
    assert "rows: chats" in refused.value.hint


def test_older_reports_are_still_found_and_keep_their_ids() -> None:
    assert EvalConfig(general=GeneralConfig(rows="chats")).scoring() == EvalConfig().scoring()
    fixed = {"subject": "run_1", "subject_digest": "0", "dataset": "ds_1", "split": "validation", "config": {}}
    plain = EvalReport(**fixed, num_examples=1, metrics={"loss": 1.0}, per_class={}, items_sha256="0")
    assert not {"general", "num_general"} & set(plain.identity())
    general = plain.model_copy(update={"general": "ds_2", "num_general": 3})
    assert general.sealed().id != plain.sealed().id
    assert (plain.parents(), general.parents()) == (("run_1", "ds_1"), ("run_1", "ds_1", "ds_2"))
    assert splits_of(general) == (("ds_1", "validation"), ("ds_2", "test"))
    assert (split_of(general, "loss"), split_of(general, "general_loss")) == splits_of(general)


def answer(number: int, nats: float, kind: str = "general_answer") -> dict[str, Any]:
    own = {"num_bytes": 8} if kind == "general_text" else {}
    return {"kind": kind, "record": f"rec_{number}", "source": "s", "logprob": -nats, "num_tokens": 2, **own}


def task(number: int, nats: float) -> dict[str, Any]:
    scored = {"record": f"rec_{number}", "source": "s", "logprob": -nats, "num_tokens": 2, "likeliest": ""}
    return {**scored, "reference": "x", "prediction": "x"}


def test_general_scores_have_names_of_their_own_and_touch_no_other() -> None:
    own = [task(number, 1.0) for number in range(12)]
    general = [answer(number, 3.0) for number in range(12)] + [answer(20, 4.0, "general_text")]
    by_metric = statistics([*own, *general], ())
    assert by_metric["loss"].value == 0.5
    assert by_metric["general_loss"].value == 1.5
    assert by_metric["general_text_loss"].value == 2.0
    assert by_metric["exact_match"].num_rows == 12
    assert set(by_metric) - set(statistics(own, ())) == {
        *("general_loss", "general_perplexity"),
        *("general_text_loss", "general_text_perplexity", "general_bits_per_byte"),
    }
    assert {name for name in by_metric if name.startswith("general_")} <= LOWER_IS_BETTER
    assert "general_loss" in intervals([*own, *general], ())
    assert slice_scores([*own, *general], (), ("source",))["source"]["s"]["count"] == 12  # they are in no slice


def test_a_row_that_is_held_out_and_general_is_compared_as_both() -> None:
    ours = [*(task(n, 1.0) for n in range(12)), *(answer(n, 4.0) for n in range(12))]
    theirs = [*(task(n, 2.0) for n in range(12)), *(answer(n, 3.0) for n in range(12))]
    changes = differences(ours, theirs, (), 0.95)
    assert changes["loss"]
    assert changes["general_loss"]
    assert (changes["loss"].value, changes["general_loss"].value) == (-0.5, 0.5)


@pytest.mark.parametrize(("rise", "passes"), [(0.1, True), (0.35, False), (0.6, False)])
def test_a_gate_bounds_the_rise_on_the_same_rows(rise: float, passes: bool) -> None:
    """The mean rise of 0.35 is below the tolerance of 0.4; the rows do not show it to be."""
    theirs = [answer(number, 2.0 + number % 3) for number in range(30)]
    ours = [answer(n, 2.0 + n % 3 + 2 * (rise + (0.3 if n % 2 else -0.3))) for n in range(30)]
    rows = {"ours": ours, "theirs": theirs}
    fixed = {"subject_digest": "0", "dataset": "ds_1", "split": "test", "config": {}, "num_examples": 1, "per_class": {}}
    reports = {
        name: EvalReport(
            **fixed,
            subject=name,
            items_sha256="0",
            metrics={"general_loss": statistics(rows[name], ())["general_loss"].value},
        )
        for name in rows
    }
    gate = parse(Gate, {"no_worse_than": [{"metric": "general_loss", "tolerance": 0.4, "confidence": 0.95}]})
    (check,) = checks(gate, reports["ours"], {"base": reports["theirs"]}, rows=lambda one: rows[one.subject])
    assert check.passed == passes
    assert check.name == "general_loss no worse than base at 95%"
    measured = parse(Gate, {"no_worse_than": [{"metric": "general_loss", "tolerance": 0.4}]})
    (plain,) = checks(measured, reports["ours"], {"base": reports["theirs"]})
    assert plain.passed == (rise < 0.4)


def test_training_rows_are_no_general_rows(catalog: Catalog) -> None:
    trained = dataset(catalog, [record_of(number) for number in range(30)], data={"splits": {"validation": 0, "test": 0}})
    apart = dataset(catalog, [record_of(number) for number in range(40, 50)], data=HELD_OUT)
    refuse_trained(catalog.store, apart, trained)
    shared = dataset(catalog, [record_of(number) for number in range(28, 38)], data=HELD_OUT)
    with pytest.raises(
        DataError, match=f"2 of the 10 general rows \\({shared.id}\\) are training rows of {trained.id}"
    ) as no:
        refuse_trained(catalog.store, shared, trained)
    assert f"{{rule: held_out, against: [{shared.id}]}}" in no.value.hint
    refuse_trained(catalog.store, shared, shared)  # held-out rows of the run itself are not trained on


def test_erasure_trace_and_pruning_see_the_general_rows_of_a_report(catalog: Catalog) -> None:
    rows = dataset(catalog, [record_of(number) for number in range(10)])
    general = dataset(catalog, [record_of(number) for number in range(40, 45)], data=HELD_OUT, name="general")
    base = model_version(catalog, "base")
    record = run(catalog, "a", rows.id, base.id)
    scored = report(catalog, record.id, rows.id, general=general.id, num_general=5)
    plain = report(catalog, record.id, rows.id)
    items = [{"kind": "general_text", "record": record_of(number).id} for number in range(40, 45)]
    catalog.store.write(f"evals/{scored.id}/items.jsonl", b"\n".join(map(canonical_json, items)) + b"\n")
    catalog.store.write(f"evals/{plain.id}/items.jsonl", b"")
    erased = record_of(42).id
    assert trace(catalog, [of_record(erased)]).affected.evals == (scored.id,)
    plan = plan_of(catalog, search(catalog, ErasureRequest("record", (erased,))))
    assert {one.id: one.quotes for one in plan.evals} == {scored.id: 1}
    assert [one.id for one in plan.datasets] == [general.id]
    assert (plan.runs, plan.versions) == ((), ())
    (item,) = [one for one in survey(catalog).items if one.paths == (f"evals/{scored.id}",)]
    assert set(item.needs) == {f"datasets/{rows.id}", f"datasets/{general.id}"}
