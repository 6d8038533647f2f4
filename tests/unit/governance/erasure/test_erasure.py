"""The rules of an erasure: tombstones, and the fate of runs, routes and versions."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fabricated import dataset, record_of, run, version

from forge_ray.cli.main import cli
from forge_ray.config.release import AliasRoute
from forge_ray.data.build import tombstones as erased
from forge_ray.data.record.schema import DataRecord
from forge_ray.data.record.subject import Whose, subject_key
from forge_ray.errors import ConfigError, PolicyError, StoreError
from forge_ray.governance.erasure import closure
from forge_ray.governance.erasure.apply import erase
from forge_ray.governance.erasure.certificate import statement_of
from forge_ray.governance.erasure.leftovers import accounts_of
from forge_ray.governance.erasure.options import Options
from forge_ray.governance.erasure.plan import AffectedDataset, AffectedRun
from forge_ray.governance.erasure.purge import numbers_of
from forge_ray.governance.erasure.repeat import fate_of, refused_teacher, without_datasets
from forge_ray.governance.erasure.routes import replaced
from forge_ray.governance.erasure.search import ErasureRequest
from forge_ray.records import Event, ModelVersion, canonical_json
from forge_ray.release import promotion
from forge_ray.store.authority import Policy
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.out_of_use import refuse_withdrawn

pytestmark = pytest.mark.unit


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_tombstones_do_not_reveal_rows(store: Store, tmp_path: Path) -> None:
    record = DataRecord({"messages": [{"role": "user", "content": "x"}]})
    assert erased.tombstones(store) == ""
    assert not erased.read(store, "").holds(record, Whose("wq", (b"key",)))
    erased.write_tombstones(store, "er_1", {record.id})
    first = erased.tombstones(store)
    whose = Whose("wq", (subject_key(store, ""),))
    erased.write_tombstones(store, "er_1", {whose.digest})  # a request that is carried on adds to them
    second = erased.tombstones(store)
    assert len({"", first, second}) == 3
    tombstones = erased.read(store, second)
    assert tombstones.holds(record, None)
    assert tombstones.holds(DataRecord({"text": "y"}), whose)
    assert not tombstones.holds(DataRecord({"text": "y"}), None)
    listed = b"".join(map(store.read, erased.files_of(store, "er_1"))).decode()
    assert record.id.removeprefix("rec_") not in listed
    kept = store.read("keys/subject.key")
    for lost in (lambda: store.delete("keys/subject.key"), lambda: store.write("keys/subject.key", b"f" * 64)):
        lost()
        with pytest.raises(StoreError, match=r"keys/subject.key is not the key that tombstones/er_1-"):
            erased.tombstones(store)
    store.write("keys/subject.key", kept)
    other = Store(str(tmp_path / "other"))  # another key: the same record has another tombstone
    erased.write_tombstones(other, "er_1", {record.id})
    assert not erased.of_erasure(store, "er_1").keys & erased.of_erasure(other, "er_1").keys


def run_of(**more: Any) -> AffectedRun:
    values = {"id": "run_1", "name": "x", "dataset": "ds_1", "base_model": "mv_base", "used": True, "finished": True}
    values |= dict.fromkeys(("num_steps", "steps", "first_step", "last_step", "worker_hours", "gpu_hours"), 0)
    return AffectedRun.model_validate(values | {"adapter": True} | more)


@pytest.mark.parametrize(
    ("run", "options", "datasets", "versions", "in_use", "fate"),
    [
        (run_of(), Options(), {"ds_1": "ds_2"}, {}, False, "retrained"),
        (run_of(used=False), Options(), {"ds_1": "ds_2"}, {}, True, "kept"),
        (run_of(finished=False), Options(), {"ds_1": "ds_2"}, {}, True, "removed: it was not finished"),
        (run_of(), Options(retrain="none"), {}, {}, True, "removed: no replacement"),
        (run_of(), Options(retrain="used"), {"ds_1": "ds_2"}, {}, False, "removed: no replacement"),
        (run_of(), Options(retrain="used"), {"ds_1": "ds_2"}, {}, True, "retrained"),
        (run_of(), Options(remove_adapters=True), {"ds_1": "ds_2"}, {}, True, "removed: the adapter"),
        (run_of(adapter=False), Options(remove_adapters=True), {"ds_1": "ds_2"}, {}, True, "retrained"),
        (run_of(base_model="mv_gone"), Options(remove_adapters=True), {}, {"mv_gone": "mv_new"}, True, "retrained"),
        (run_of(base_model="mv_gone"), Options(), {}, {}, True, "removed: its base"),
        (run_of(), Options(), {"ds_1": ""}, {}, True, "removed: no row"),
    ],
)
def test_fate_of_a_run(
    run: AffectedRun, options: Options, datasets: dict[str, str], versions: dict[str, str], in_use: bool, fate: str
) -> None:
    assert fate_of(run, datasets, options, {"mv_gone"}, versions, in_use).startswith(fate)


def test_student_of_a_refused_licence_is_not_trained_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows go all the same: an erasure does not wait for the policy."""
    with Catalog.open(store) as catalog:
        data, base = dataset(catalog, [record_of(1)]), version(catalog, "base")
        teacher = version(catalog, "teacher", licence="Apache-2.0 AND CC-BY-NC-4.0")
        student = run(catalog, "student", data.id, base.id, method="distil", frozen_model=teacher.id, frozen_digest="x")
        other = run(catalog, "other", data.id, base.id)
        assert not refused_teacher(catalog, student)
        refusing = catalog.authority().model_copy(update={"policy": Policy(refused_licences=("cc-by-nc-4.0",))})
        monkeypatch.setattr(Catalog, "authority", lambda self: refusing)
        assert refused_teacher(catalog, student) == (
            "removed: the policy lets no run learn from a teacher with the licence CC-BY-NC-4.0"
        )
        assert not refused_teacher(catalog, other)


def test_numbers_of_a_withdrawn_teacher_go_and_what_is_being_written_stays(store: Store) -> None:
    for folder, versions in (("one", ["mv_t"]), ("two", ["mv_other"]), ("old", None), (".building-x", None)):
        store.write(f"references/ds_1/{folder}/train-000000000.parquet", b"x")
        if versions:
            store.write(f"references/ds_1/{folder}/made_by.json", canonical_json({"versions": versions}))
    with Catalog.open(store) as catalog:
        accounts = accounts_of(catalog)
        assert sorted(numbers_of(store, {"mv_t"}, accounts)) == ["references/ds_1/old", "references/ds_1/one"]
        assert not numbers_of(store, set(), accounts)


def test_route_replaces_withdrawn_versions() -> None:
    route = AliasRoute(versions={"mv_a": 90, "mv_b": 10}, shadow=("mv_a", "mv_c"), fallback="base")
    new = replaced(route, {"mv_a": "mv_a2"}, {"mv_a", "mv_c"})
    assert new is not None
    assert list(new.versions.items()) == [("mv_a2", 90), ("mv_b", 10)]
    assert (new.shadow, new.fallback) == (("mv_a2",), "base")
    assert replaced(route, {}, {"mv_a"}) is None  # nothing may take the stable version's place
    new = replaced(route, {}, {"mv_b"})
    assert new is not None
    assert new.versions == {"mv_a": 90}


def test_which_splits_affect_weights() -> None:
    held = AffectedDataset(id="ds_1", name="x", held={"validation": 1, "test": 2})
    assert not held.decides({"validation": {"early_stopping": None, "keep_best": False}, "export_step": "last"})
    assert held.decides({"validation": {"keep_best": True}})
    assert held.decides({"export_step": "best"})
    assert not held.model_copy(update={"held": {"test": 1, "dropped": 1}}).decides({"export_step": "best"})
    assert held.model_copy(update={"held": {"dropped": 1}, "changed": True}).decides({})


def test_rules_use_replacement_datasets() -> None:
    rule = {"rule": "decontaminate", "against": ["ds_old", "ds_gone", "eval.jsonl"]}
    lone = {"rule": "decontaminate", "against": ["ds_gone"]}
    settings = without_datasets({"curate": [rule, lone, {"rule": "length"}]}, {"ds_old": "ds_new", "ds_gone": ""})
    assert settings["curate"] == [{**rule, "against": ["ds_new", "eval.jsonl"]}, {"rule": "length"}]


def test_withdrawn_version_stays_withdrawn(store: Store) -> None:
    with Catalog.open(store) as catalog:
        values = {"name": "x", "status": "accepted", "weights": "full", "files": (), "files_digest": "", "licence": ""}
        version = catalog.put(ModelVersion.model_validate(values).sealed())
        promotion.promote(catalog, version.id, "prod")
        data = {"state": "withdrawn", "erasure": "er_1"}
        catalog.append(Event(kind="model", subject=version.id, data=data))
        assert catalog.archived() == set()  # answers still, where it is only marked
        promotion.archive(catalog, version.id)
        assert catalog.archived() == {version.id}
        for refused in (
            lambda: promotion.archive(catalog, version.id, restore=True),
            lambda: promotion.promote(catalog, version.id, "prod"),
            lambda: refuse_withdrawn(catalog, version.id),
        ):
            with pytest.raises(PolicyError, match="er_1 erased") as caught:
                refused()
            assert "certificate.json" in caught.value.hint


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--record", "rec_" + "0" * 24], "give --plan or --apply"),
        (["--record", "rec_" + "0" * 24, "--plan", "--apply"], "give --plan or --apply"),
        (["--plan"], "give --subject, --record, --answer or --file"),
        (["--record", "rec_" + "0" * 24, "--subject", "x", "--plan"], "give --subject, --record, --answer or --file"),
        (["--record", "rec_" + "0" * 24, "--key-file", "x", "--plan"], "--key-file needs --subject"),
        (["--record", "ds_1", "--plan"], "'ds_1' is not a record id"),
        (["--record", "rec_" + "0" * 24, "--any-case", "--plan"], "--any-case needs --subject"),
        (["--record", "rec_" + "0" * 24, "--keep", "x", "--plan"], "--keep 'x' is not a record id"),
        (["--subject", "x", "--no-near-duplicates", "--similarity", "0.9", "--plan"], "--similarity finds near duplicates"),
        (["--record", "rec_" + "0" * 24, "--apply", "--yes", "--stopped", "dep_1"], "no record 'dep_1'"),
        (["--file", "nowhere.jsonl", "--plan"], "no file nowhere.jsonl"),
        (["--subject", "x", "--plan"], "no dataset version of this store has data.subject set"),
        (["--record", "rec_" + "0" * 24, "--apply"], "there is no terminal"),
        (
            ["--record", "rec_" + "0" * 24, "--apply", "--yes"],
            "no dataset version and no kept answer of this store holds such a row",
        ),
    ],
)
def test_refusals_say_what_to_do(store: Store, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["erase", *arguments, "--store", store.uri, "--json"])
    assert result.exit_code == 2
    error = json.loads(result.stdout.splitlines()[-1])["error"]
    assert message in error["message"]
    assert error["hint"]


def test_only_an_erasure_has_a_certificate() -> None:
    import base64

    payload = base64.b64encode(json.dumps({"predicateType": "urn:other"}).encode()).decode()
    with pytest.raises(ConfigError, match="urn:other"):
        statement_of({"payload": payload})


def test_items_that_quote_nothing_have_no_record() -> None:
    lines = b'{"record": "rec_1"}\n{"record": "rec_2"}\n{"group": "base"}\n'
    assert closure.quoting(lines, {"rec_2"}.__contains__) == 1


def test_images_are_deleted_unless_another_dataset_has_them(tmp_path: Path) -> None:
    own = Store(str(tmp_path / "store"))
    names = {what: hashlib.sha256(what.encode()).hexdigest() for what in ("only here", "in both")}

    def shows(what: str, number: int) -> DataRecord:
        part = {"type": "image", "image": f"sha256:{names[what]}"}
        return DataRecord({"messages": [{"role": "user", "content": [part]}, {"role": "assistant", "content": str(number)}]})

    with Catalog.open(own) as catalog:
        hers = [shows("only here", 1), shows("in both", 2)]
        dataset(catalog, hers)
        dataset(catalog, [shows("in both", 3)], name="other")
    for what, name in names.items():
        own.write(f"images/{name}", what.encode())
    statement = erase(own, ErasureRequest("record", tuple(record.id for record in hers)), Options(retrain="none"))
    assert own.list("images") == [f"images/{names['in both']}"]
    listed = own.read_json(f"erasures/{statement['predicate']['erasure']}/purged.json")["files"]
    assert [entry["sha256"] for entry in listed if entry["path"].startswith("images/")] == [names["only here"]]
