"""Tombstones cannot be taken away in silence, and they keep out what is the same row or person in other bytes."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from fabricated import dataset, store_at
from hypothesis import given, settings
from hypothesis import strategies as st
from rechained import rechained

from forge_ray.cli.main import cli
from forge_ray.config.data import DataConfig
from forge_ray.data.build import kept_tombstones
from forge_ray.data.build import tombstones as erased
from forge_ray.data.build.build import _jobs
from forge_ray.data.build.map import run_job
from forge_ray.data.build.prepare import restore_tombstones
from forge_ray.data.build.settings import Segment
from forge_ray.data.read.ingest import index_file
from forge_ray.data.read.sources import expand
from forge_ray.data.record.normal import row_digest
from forge_ray.data.record.schema import DataRecord, parse_record
from forge_ray.data.record.subject import Whose, erased_digests, subject_digest, subject_key, subject_of, written_digest
from forge_ray.doctor.stored import tombstones as doctor_check
from forge_ray.errors import NotFound, StoreError
from forge_ray.governance.erasure.apply import erase
from forge_ray.governance.erasure.options import Options
from forge_ray.governance.erasure.plan import plan_of
from forge_ray.governance.erasure.search import ErasureRequest, search
from forge_ray.records import canonical_json
from forge_ray.store import audit_log
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit
QUESTION, ANSWER = "Where is the café parcel of Wilhelmina Quartz?", "It waits at the depot."
OPTIONS = Options(retrain="none", wait_s=0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_at(tmp_path / "store")


def chat(question: str, answer: str = ANSWER, system: str = "") -> DataRecord:
    turns = [{"role": "system", "content": system}] if system else []
    turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return parse_record({"messages": turns})


HERS = chat(QUESTION)


# ---------------------------------------------------------------- taken away


def removed(store: Store, path: str) -> None:
    store.delete(path)


def emptied(store: Store, path: str) -> None:
    store.write(path, canonical_json(store.read_json(path) | {"keys": [], "texts": []}))


def torn(store: Store, path: str) -> None:
    store.write(path, store.read(path)[:10])


@pytest.mark.parametrize("harm", [removed, emptied, torn])
def test_tombstones_that_were_harmed_are_noticed_and_restored(
    store: Store, harm: Callable[[Store, str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    erased.write_tombstones(store, "er_1", [HERS.id])
    before = erased.tombstones(store)
    (path,) = erased.files_of(store, "er_1")
    for n in range(20):  # long before the lines that any command that opens the store restores
        erased.write_tombstones(store, "er_2", [f"rec_{n:024d}"])
    after = erased.tombstones(store)
    harm(store, path)
    (problem,) = kept_tombstones.problems(store)
    assert path in problem
    (finding,) = doctor_check(store)
    assert (finding.status, path in finding.observed) == ("fail", True)
    result = CliRunner().invoke(cli, ["audit", "verify", "--store", store.uri])
    assert (result.exit_code, path in result.output) == (3, True)
    restore_tombstones(store)
    assert f"{path} was {'removed' if harm is removed else 'changed'}: restored" in capsys.readouterr().err
    assert before != after == erased.tombstones(store)
    assert kept_tombstones.problems(store) == []
    assert [finding.status for finding in doctor_check(store)] == ["ok"]


def test_tombstones_that_nobody_wrote_are_refused(store: Store) -> None:
    """They would leave rows out of datasets that nobody erased."""
    erased.write_tombstones(store, "er_1", [HERS.id])
    store.write("tombstones/er_1-0000000000000000.json", canonical_json({"keys": ["0" * 64], "texts": [], "made_with": ""}))
    with pytest.raises(StoreError, match=r"er_1-0000000000000000\.json is in no line of the audit log"):
        kept_tombstones.restore(store)


def test_erasure_whose_tombstones_are_nowhere_is_refused_by_name(store: Store) -> None:
    with Catalog.open(store) as catalog:
        dataset(catalog, [HERS, chat("another question")])
    er = erase(store, ErasureRequest("record", (HERS.id,)), OPTIONS)["predicate"]["erasure"]
    (path,) = erased.files_of(store, er)
    rechained(store, [line for line in audit_log.read(store) if line["path"] != path])
    store.delete(path)
    with pytest.raises(StoreError, match=f"the tombstones of {er} are missing: its rows would come back"):
        kept_tombstones.restore(store)
    result = CliRunner().invoke(cli, ["audit", "verify", "--store", store.uri])
    assert result.exit_code == 3


def test_list_that_workers_read_is_the_one_of_its_name(store: Store) -> None:
    erased.write_tombstones(store, "er_1", [HERS.id])
    name = erased.tombstones(store)
    store.write(f"work/data/erased-{name}.json", b"[]")
    with pytest.raises(StoreError, match="lists other tombstones"):
        erased.read(store, name)


def test_tombstones_of_older_versions_work_and_enter_the_log(store: Store) -> None:
    key = subject_key(store, "")
    values = [HERS.id, written_digest(key, "4711.0")]
    old = {"keys": sorted(erased.key_of(key, value) for value in values), "made_with": erased.key_of(key, "made with")}
    store.write("erasures/er_0123456789abcdef.json", canonical_json(old))
    before = erased.tombstones(store)
    tombstones = erased.read(store, before)
    assert tombstones.holds(HERS, None)
    assert tombstones.holds(DataRecord({"text": "x"}), Whose("4711.0", (key,)))
    assert kept_tombstones.restore(store) == []
    store.delete("erasures/er_0123456789abcdef.json")
    assert erased.tombstones(store) == before  # a dataset version that they do not touch keeps its inputs' digest
    assert kept_tombstones.restore(store) == kept_tombstones.problems(store) == []


# ---------------------------------------------------------------- other bytes

VARIANTS = {
    "trailing blank": chat(QUESTION + " "),
    "double blank": chat(QUESTION.replace(" ", "  ")),
    "case": chat(QUESTION.upper(), ANSWER.lower()),
    "accent form": chat(unicodedata.normalize("NFD", QUESTION)),
    "zero width": chat(QUESTION.replace("parcel", "par\u200bcel")),
    "byte order mark": chat("\ufeff" + QUESTION),
    "soft hyphen": chat(QUESTION.replace("Wilhelmina", "Wilhel\u00admina")),
    "full width": chat("".join(chr(ord(c) + 0xFEE0) if "a" <= c <= "z" else c for c in QUESTION)),
    "system prompt": chat(QUESTION, system="You are a helpful assistant."),
    "plain text": DataRecord({"text": f"{QUESTION}\n{ANSWER}"}, "text"),
    "plain text with speakers": DataRecord({"text": f"User: {QUESTION}\n\nAssistant: {ANSWER}\n"}, "text"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_of_an_erased_row_does_not_come_back(store: Store, name: str) -> None:
    with Catalog.open(store) as catalog:
        dataset(catalog, [HERS, chat("another question")])
    erase(store, ErasureRequest("record", (HERS.id,)), OPTIONS)
    tombstones = erased.read(store, erased.tombstones(store))
    assert VARIANTS[name].id != HERS.id
    assert tombstones.holds(VARIANTS[name], None)
    assert not tombstones.holds(chat(QUESTION.replace("Quartz", "Marble")), None)


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=30), st.data())
def test_generated_variants_do_not_come_back(text: str, data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
    mark, blank = (
        data.draw(st.sampled_from(["\u200b", "\ufeff", "\u00ad", ""])),
        data.draw(st.sampled_from([" ", "  ", "\n"])),
    )
    place = data.draw(st.integers(0, len(text)))
    other = unicodedata.normalize(form, text[:place] + mark + text[place:]).replace(" ", blank) + blank
    assert row_digest(DataRecord({"text": other}, "text")) == row_digest(DataRecord({"text": text}, "text"))
    key = b"0123456789abcdef"
    assert set(erased_digests(key, text)) & set(Whose(other, (key,)).digests())


@pytest.mark.parametrize(
    ("value", "erases"),
    [
        ("wq", True),
        (" wq ", True),
        ("wq\u200b", True),
        ("\ufeffwq", True),
        ("ｗｑ", True),
        ("WQ", False),
        ("wq2", False),
    ],
)
def test_person_does_not_come_back_in_another_spelling(store: Store, value: str, erases: bool) -> None:
    key = subject_key(store, "")
    erased.write_tombstones(store, "er_1", erased_digests(key, "wq"))
    tombstones = erased.read(store, erased.tombstones(store))
    assert tombstones.holds(DataRecord({"text": "x"}), Whose(value, (key,))) is erases
    assert tombstones.holds(DataRecord({"text": "x"}), Whose(value, (key,), caseless=True)) is (value != "wq2")


def test_any_case_is_kept_out_where_the_request_says_so(store: Store) -> None:
    key = subject_key(store, "")
    erased.write_tombstones(store, "er_1", erased_digests(key, "wq", any_case=True))
    assert erased.read(store, erased.tombstones(store)).holds(DataRecord({"text": "x"}), Whose("Wq", (key,)))


def test_numbers_are_equal_across_types(store: Store) -> None:
    """A column with a gap becomes one of floats in pandas."""
    config = DataConfig.model_validate({"sources": [{"path": "x"}], "subject": {"field": "customer"}})
    whose = subject_of(config, store)
    records = [
        parse_record({"text": "x", "customer": value}, keep=("customer",)) for value in (4711, 4711.0, "4711", "4711.0")
    ]
    assert len({whose(record).digest for record in records}) == 1  # type: ignore[union-attr]


def test_setting_for_case_changes_no_id_of_older_settings() -> None:
    assert DataConfig.model_validate({"sources": [{"path": "x"}], "subject": {"field": "c"}}).model_dump(mode="json")[
        "subject"
    ] == {"field": "c", "key_file": ""}
    told_apart = {"field": "c", "key_file": "", "caseless": True}
    subject = DataConfig.model_validate({"sources": [{"path": "x"}], "subject": told_apart}).subject
    assert subject is not None
    assert subject.model_dump(mode="json") == told_apart


# ---------------------------------------------------------------- what the plan shows

BY_CUSTOMER = {"subject": {"field": "customer"}}


def test_plan_shows_every_variant_with_why_it_matched(store: Store) -> None:
    """One dataset version of now, whose subjects have their normal form, and one of before."""
    key = subject_key(store, "")
    rows = {
        "exact": chat("a long question of hers about the parcel that never came to the door of her house"),
        "same": chat("A long question of hers  about the parcel that never came to the door of her house"),
        "similar": chat(
            "a long question of hers about the parcel that never came to the door of her house", "It waits at the station."
        ),
        "number": chat("a question of the customer whose number became a float"),
        "case": chat("a question of the customer in capitals"),
        "other": chat("what is the capital of France, and how many live there?"),
    }
    whose = {"exact": subject_digest(key, "w4711"), "case": written_digest(key, "W4711")}
    with Catalog.open(store) as catalog:
        held = dataset(
            catalog,
            list(rows.values()),
            subjects={rows[name].id: digest for name, digest in whose.items()},
            data=BY_CUSTOMER,
        )
        request = ErasureRequest("subject", ("w4711",))
        plan = plan_of(catalog, search(catalog, request))
        by_id = {record.id: name for name, record in rows.items()}
        matches = {by_id[one.record]: (one.why, one.erased, one.where) for one in plan.variants}
        assert matches["same"] == ("same text", True, (held.id,))
        assert matches["similar"] == ("similarity 0.89; --similarity erases it", False, (held.id,))
        assert matches["case"] == ("subject differs in upper and lower case; --any-case erases it", False, (held.id,))
        assert set(matches) == {"same", "similar", "case"}
        assert (plan.num_records, plan.num_near_duplicates) == (1, 1)
        assert "variants" not in plan.stored()
        any_case = search(catalog, ErasureRequest("subject", ("w4711",), any_case=True))
        assert any_case.asked == {rows["exact"].id, rows["case"].id}
        assert search(catalog, ErasureRequest("subject", ("w4711",), near_duplicates=False)).near == {rows["same"].id}
        for threshold, names in ((0.88, {"same", "similar"}), (0.95, {"same"})):
            reached = search(catalog, ErasureRequest("subject", ("w4711",), similarity=threshold))
            assert {by_id[record] for record in reached.near} == names
        keep = (rows["same"].id, rows["similar"].id)
        kept = search(catalog, ErasureRequest("subject", ("w4711",), similarity=0.8, keep=keep))
        assert kept.near == set()
        assert row_digest(rows["same"]) not in kept.texts  # or the next build would leave out what was kept
        assert row_digest(rows["exact"]) not in kept.texts


def test_number_in_a_dataset_version_of_before_is_found(store: Store) -> None:
    key, row = subject_key(store, ""), chat("a question of the customer whose number became a float")
    with Catalog.open(store) as catalog:
        dataset(catalog, [row, chat("x")], subjects={row.id: written_digest(key, "4711.0")}, data=BY_CUSTOMER)
        reached = search(catalog, ErasureRequest("subject", ("4711",)))
    assert reached.asked == {row.id}
    assert [one.why for one in reached.variants] == ["subject in another spelling: number"]


def test_column_that_ignores_case_is_searched_in_every_case(store: Store) -> None:
    key, row = subject_key(store, ""), chat("a question")
    caseless = {"subject": {"field": "customer", "caseless": True}}
    with Catalog.open(store) as catalog:
        dataset(catalog, [row, chat("x")], subjects={row.id: subject_digest(key, "Wq", caseless=True)}, data=caseless)
        reached = search(catalog, ErasureRequest("subject", ("wQ",)))
    assert (reached.asked, reached.variants) == ({row.id}, ())


def test_request_that_matches_only_nearly_says_how_to_go_on(store: Store) -> None:
    key, row = subject_key(store, ""), chat("a question")
    with Catalog.open(store) as catalog:
        dataset(catalog, [row, chat("x")], subjects={row.id: written_digest(key, "WQ")}, data=BY_CUSTOMER)
    with pytest.raises(NotFound) as refused:
        erase(store, ErasureRequest("subject", ("wq",)), OPTIONS)
    assert "--plan" in refused.value.hint


def test_choices_make_another_request_and_none_make_the_same(store: Store) -> None:
    plain = ErasureRequest("record", (HERS.id,))
    others = [
        ErasureRequest("record", (HERS.id,), similarity=0.9),
        ErasureRequest("record", (HERS.id,), any_case=True),
        ErasureRequest("record", (HERS.id,), keep=("rec_" + "0" * 24,)),
    ]
    assert plain.fingerprint(store) == erased.fingerprint_of(store, HERS.id)
    assert len({request.fingerprint(store) for request in (plain, *others)}) == 4


# ---------------------------------------------------------------- through the reader


def erased_lines(store: Store, path: Path) -> list[int]:
    """Lines of a file that a build leaves out, as its first stage reads them."""
    rule = {"rule": "near_duplicates"}
    settings = {"sources": [{"path": str(path)}], "curate": [rule], "subject": {"field": "customer"}}
    config = DataConfig.model_validate(settings)
    (file,) = expand(config)
    (job,) = _jobs(config, [index_file(file.path, file.name, file.format)])
    segment = Segment(0, 0, 0, tombstones=erased.tombstones(store))
    return sorted(line for _, line in run_job(job, segment, config, "", store).erased)


def test_reader_leaves_out_variants_of_rows_and_of_a_person(store: Store, tmp_path: Path) -> None:
    erased.write_tombstones(store, "er_1", [HERS.id, erased.TEXT + row_digest(HERS)])
    erased.write_tombstones(store, "er_2", erased_digests(subject_key(store, ""), "4711"))
    rows: list[dict[str, Any]] = [{**record.content} for record in (HERS, *VARIANTS.values())]
    rows += [
        {"text": f"row {n} of a customer", "customer": value}
        for n, value in enumerate((4711, 4711.0, "4711", " 4711\u200b"))
    ]
    stay = [{"text": "row of another", "customer": 4712}, {"text": f"{QUESTION} {ANSWER} Thanks."}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *stay]))
    assert erased_lines(store, file) == list(range(1, len(rows) + 1))


def test_reader_leaves_out_a_number_in_a_column_with_a_gap(store: Store, tmp_path: Path) -> None:
    """pandas makes floats of it; three of four rows were found."""
    erased.write_tombstones(store, "er_1", erased_digests(subject_key(store, ""), "4711"))
    columns = {"text": ["a", "b", "c"], "customer": pa.array([4711.0, None, 4712.0], pa.float64())}
    pq.write_table(pa.table(columns), tmp_path / "rows.parquet")
    assert len(erased_lines(store, tmp_path / "rows.parquet")) == 1
