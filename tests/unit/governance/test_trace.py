"""`forge trace`: the result equals a scan over all datasets and runs, in both directions."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fabricated import dataset, deployment, pick, record_of, report, run, store_at, train_config, version
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from forge_ray.cli.main import cli
from forge_ray.config.release import AliasRoute, Rule
from forge_ray.config.train import TrainConfig
from forge_ray.data.dataset.order import order_of
from forge_ray.data.dataset.version import SPLITS, place
from forge_ray.data.record.schema import parse_record
from forge_ray.data.record.subject import subject_digest, subject_key
from forge_ray.errors import ConfigError
from forge_ray.governance.trace import of_file, of_record, of_subject_value, trace
from forge_ray.governance.uses import ranges
from forge_ray.records import DatasetManifest, Event, RunRecord, canonical_json
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.owner import owner_mark
from forge_ray.train import incidents

pytestmark = [pytest.mark.unit, pytest.mark.slow]


def affected(catalog: Catalog, records: set[str]) -> Any:
    return trace(catalog, [of_record(record) for record in sorted(records)]).affected


def config_of(manifest: DatasetManifest) -> Any:
    from forge_ray.config.base import parse
    from forge_ray.config.data import DataConfig

    return parse(DataConfig, manifest.config)


def split_of(manifest: DatasetManifest, number: int) -> str:
    return SPLITS[place(record_of(number), config_of(manifest))[0]]


def train_ids(count: int, start: int = 0) -> list[int]:
    """Numbers of records that the default splits put into the training split."""
    from forge_ray.config.data import DataConfig

    config = DataConfig.model_validate({"sources": [{"path": "x"}]})
    numbers = (n for n in range(start, 10**6) if place(record_of(n), config)[0] == 0)
    return [next(numbers) for _ in range(count)]


# ---------------------------------------------------------------- against a scan of everything


def world(catalog: Catalog, rng: random.Random) -> dict[str, list[list[str]]]:
    """Random datasets and runs; returns the packed rows of each dataset."""
    rows_of: dict[str, list[list[str]]] = {}
    for number in range(rng.randint(1, 3)):
        members = [record_of(n) for n in pick(rng, range(24), least=6)]
        probe = dataset_rows(members)
        rows = [pick(rng, probe, least=0)[:3] for _ in range(rng.randint(1, 17))] if probe else []
        if not rows:
            continue
        block_rows = rng.randint(1, 5)
        whole = len(rows) // block_rows
        shards = [block_rows * rng.randint(1, whole - 1)] if whole > 1 else []
        manifest = dataset(
            catalog, members, rows, block_rows=block_rows, shards=shards, parts=rng.choice([1, 2, 4]), name=f"d{number}"
        )
        rows_of[manifest.id] = rows
        for each in range(rng.randint(0, 2)):
            possible = [
                {"number": 1, "at": "2020", "kind": "spike", "step": 2, "last_step": rng.randint(2, 4)},
                {"number": 2, "at": "2020", "kind": "quarantine", "step": 3, "rows": [rng.randrange(len(rows))]},
                {"number": 3, "at": "2020", "kind": "not_finite", "step": rng.randint(1, 6), "rows": []},
                {"number": 4, "at": "2020", "kind": "not_finite", "step": 1, "rows": []},
            ]
            name, chosen = f"{manifest.id}{each}", tuple(pick(rng, possible))
            options = {"global_batch": rng.randint(1, 5), "seed": rng.randint(0, 9)}
            run(catalog, name, manifest.id, num_steps=rng.randint(1, 12), train=train_config(**options), incidents=chosen)
            again = {"step": 1, "loss": 1.0} if rng.random() < 0.5 else {"step": 1, "left_out": "not finite"}
            catalog.store.write(f"runs/run_{name}/metrics.jsonl", canonical_json(again) + b"\n")
    return rows_of


def dataset_rows(members: list[Any]) -> list[str]:
    from forge_ray.config.data import DataConfig

    config = DataConfig.model_validate({"sources": [{"path": "x"}]})
    return [record.id for record in members if place(record, config)[0] == 0]


def scan(catalog: Catalog, run_record: RunRecord, rows: list[list[str]]) -> dict[str, Counter[int]]:
    """Record → step → times, by iterating over the whole run as its loop did."""
    manifest = catalog.get_as(DatasetManifest, run_record.dataset)
    settings = TrainConfig.model_validate(run_record.config["train"])
    order, out = (
        order_of(manifest, "train", settings.seed, settings.global_batch, manifest.id),
        incidents.left_out(run_record.incidents),
    )
    line = json.loads(catalog.store.read(f"runs/{run_record.id}/metrics.jsonl"))
    not_finite = {one["step"] for one in run_record.incidents if one["kind"] == "not_finite"} - (
        {1} if "loss" in line else set()
    )
    seen: dict[str, Counter[int]] = {}
    for step in range(1, run_record.num_steps + 1):
        if step in out.steps or step in not_finite:
            continue
        for row in order.rows_of(step - 1, range(order.global_batch)):
            if not (row in out.rows and out.rows[row] <= step):
                for record in rows[row]:
                    seen.setdefault(record, Counter())[step] += 1
    return seen


@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_trace_matches_a_scan_of_every_step(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    rng = random.Random(seed)
    with Catalog.open(store_at(tmp_path_factory.mktemp("store"))) as catalog:
        rows_of = world(catalog, rng)
        asked = [record_of(n).id for n in range(26)]  # two of them are nowhere
        traced = trace(catalog, [of_record(record) for record in asked])
        used = {
            (use.run, one.record): Counter(use.steps) for one in traced.records for use in one.uses if use.how == "trained"
        }
        used = {key: steps for key, steps in used.items() if steps}
        expected = {}
        for one in catalog.all(RunRecord):
            for record, steps in scan(catalog, one, rows_of[one.dataset]).items():
                expected[one.id, record] = steps
        assert used == expected
        held = {(item.dataset, one.record, item.place.split) for one in traced.records for item in one.held}
        manifests = catalog.all(DatasetManifest)
        assert held == {
            (manifest.id, row["record"], split)
            for manifest in manifests
            for split in SPLITS
            for row in read(catalog, manifest, split)
        }
        assert set(traced.affected.runs) == {name for name, _ in expected}
        # the other direction: every record of a row that some step used leads back to that run
        for name, record in rng.sample(sorted(expected), min(3, len(expected))):
            assert name in affected(catalog, {record}).runs


def read(catalog: Catalog, manifest: DatasetManifest, split: str) -> list[dict[str, Any]]:
    from forge_ray.data.dataset.version import read_records

    return read_records(catalog.store, manifest, split)


# ---------------------------------------------------------------- what comes of a run


def test_trace_reaches_runs_versions_aliases_and_deployments(catalog: Catalog) -> None:
    a, b = train_ids(2)
    data = dataset(catalog, [record_of(a), record_of(b)], [[record_of(a).id]] * 4 + [[record_of(b).id]])
    base, other = version(catalog, "base"), version(catalog, "other")
    first = run(catalog, "first", data.id, base.id, num_steps=1, train=train_config(global_batch=5))
    v1 = version(catalog, "v1", first.id, base.id)
    second = run(catalog, "second", "ds_elsewhere", v1.id)  # began from a version that saw it
    v2 = version(catalog, "v2", second.id, v1.id, status="rejected", reasons=("worse",))
    clean = run(catalog, "clean", "ds_elsewhere", base.id)
    v3 = version(catalog, "v3", clean.id, base.id)
    promotion.promote(catalog, v1.id, "prod")
    promotion.promote(catalog, v3.id, "prod")
    promotion.set_route(catalog, "beta", AliasRoute(versions={v3.id: 1}, rules=(Rule(to=v1.id, user=("x",)),)))
    promotion.promote(catalog, v3.id, "quiet")
    live = deployment(catalog, "live", v1.id)
    followed = deployment(catalog, "followed", v3.id, models=["beta"])  # by its alias
    deployment(catalog, "clean", v3.id)
    catalog.append(Event(kind="deployment", subject=live.id, data={"state": "stopped", "name": "live"}))
    report(catalog, first.id, data.id, "test")

    traced = trace(catalog, [of_record(record_of(a).id)])
    (one,) = traced.records
    assert [(use.run, Counter(use.steps)) for use in one.uses] == [(first.id, Counter({1: 4}))]
    assert {run.run: run.how for run in traced.reached.runs} == {first.id: "trained", second.id: "base"}
    assert {v.version: (v.status, v.how) for v in traced.reached.versions} == {
        v1.id: ("accepted", "trained"),
        v2.id: ("rejected", "base"),
    }
    assert [(a.alias, a.version, bool(a.until)) for a in traced.reached.aliases] == [
        ("prod", v1.id, True),
        ("beta", v1.id, False),
    ]
    assert {d.deployment: (d.live, d.state) for d in traced.reached.deployments} == {
        live.id: (False, "stopped"),
        followed.id: (True, "running"),
    }
    assert traced.affected == affected(catalog, {record_of(a).id})
    assert traced.affected.evals == ()  # it is in the train split, the report is on the test split
    assert other.id not in traced.affected.versions
    assert base.id not in traced.affected.versions


def test_an_endpoint_whose_process_is_gone_has_crashed(catalog: Catalog) -> None:
    """It wrote no end. One of another machine, or of an older release, counts by its last event."""
    a, _ = train_ids(2)
    data = dataset(catalog, [record_of(a)], [[record_of(a).id]] * 5)
    base = version(catalog, "base")
    first = run(catalog, "first", data.id, base.id, num_steps=1, train=train_config(global_batch=5))
    v1 = version(catalog, "v1", first.id, base.id)
    ended = subprocess.run(
        [sys.executable, "-c", "from forge_ray.store.owner import owner_mark; print(owner_mark())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    states = {"lives": owner_mark(), "gone": ended, "elsewhere": "~00000000.1.1~", "cluster": None}
    names = {}
    for name, process in states.items():
        names[deployment(catalog, name, v1.id).id] = name
        more = {"process": process} if process else {}
        (identifier,) = [one for one, other in names.items() if other == name]
        catalog.append(Event(kind="deployment", subject=identifier, data={"state": "running", "name": name, **more}))
    traced = trace(catalog, [of_record(record_of(a).id)])
    assert {names[d.deployment]: (d.live, d.state) for d in traced.reached.deployments} == {
        "lives": (True, "running"),
        "gone": (False, "crashed"),
        "elsewhere": (True, "running"),
        "cluster": (True, "running"),
    }


def test_validation_records_reach_versions_they_selected(catalog: Catalog) -> None:
    records = [record_of(n) for n in range(200)]
    data = dataset(catalog, records)
    base = version(catalog, "base")
    test = next(r for n, r in enumerate(records) if split_of(data, n) == "test")
    unseen = next(r for n, r in enumerate(records) if split_of(data, n) == "test" and r.id != test.id)
    watched = next(r for n, r in enumerate(records) if split_of(data, n) == "validation")
    plain = run(catalog, "plain", data.id, base.id)
    every = {"every_steps": 2}
    train = train_config(export_step="best", validation=every, checkpoint=every)
    best = run(catalog, "best", data.id, base.id, train=train)
    blind = run(catalog, "blind", data.id, base.id, train=train_config(validation={"max_rows": 0}))
    chosen = version(catalog, "chosen", best.id, base.id)
    version(catalog, "measured", plain.id, base.id)
    one, labels = report(catalog, best.id, data.id), report(catalog, plain.id, data.id, config={"labels": "from_data"})
    for item in (one, labels):
        catalog.store.write(f"evals/{item.id}/items.jsonl", canonical_json({"record": test.id}) + b"\n")
    assert set(affected(catalog, {test.id}).evals) == {one.id, labels.id}
    assert affected(catalog, {unseen.id}).evals == ()  # of the split, but not among the examples
    reached = affected(catalog, {watched.id})
    assert (reached.runs, reached.validated, reached.versions) == ((best.id,), (plain.id,), (chosen.id,))
    assert blind.id not in (*reached.runs, *reached.validated)
    taught = next(r for n, r in enumerate(records) if split_of(data, n) == "train")
    assert affected(catalog, {taught.id}).evals == (labels.id,)


def test_only_versions_of_later_steps_are_reached(catalog: Catalog) -> None:
    numbers = train_ids(8)
    rows = [[record_of(n).id] for n in numbers]
    data = dataset(catalog, [record_of(n) for n in numbers], rows)
    base = version(catalog, "base")
    settings = train_config(global_batch=1)
    order = order_of(data, "train", 0, 1, data.id)
    target = record_of(numbers[order.row(4)]).id  # step 5 alone
    spike = {"number": 1, "at": "2999-01-01", "kind": "spike", "step": 5, "last_step": 6}
    early = run(catalog, "early", data.id, base.id, num_steps=8, export_step=4, train=settings)
    late = run(catalog, "late", data.id, base.id, num_steps=8, train=settings)
    spiked = run(catalog, "spiked", data.id, base.id, num_steps=8, train=settings, incidents=(spike,))
    versions = {
        name: version(catalog, name, trained.id, base.id, **more).id
        for name, trained, more in (
            ("early", early, {}),
            ("late", late, {}),
            ("spiked", spiked, {}),
            ("before", late, {"status": "candidate", "step": 4, "dataset": data.id}),
            ("after", late, {"status": "candidate", "step": 5, "dataset": data.id}),
            ("given up", spiked, {"status": "candidate", "step": 6, "dataset": data.id}),  # before the spike was seen
        )
    }
    reached = affected(catalog, {target})
    assert set(reached.versions) == {versions["late"], versions["after"], versions["given up"]}
    assert reached.runs == (early.id, late.id)


def test_unfinished_runs_count_up_to_their_last_step(catalog: Catalog) -> None:
    numbers = train_ids(8)
    data = dataset(catalog, [record_of(n) for n in numbers], [[record_of(n).id] for n in numbers])
    base = version(catalog, "base")
    settings = train_config(global_batch=1)
    order = order_of(data, "train", 0, 1, data.id)
    third, sixth = (record_of(numbers[order.row(step - 1)]).id for step in (3, 6))
    store = catalog.store
    for name in ("saved", "running", "lost"):
        catalog.append(Event(kind="run", subject=f"run_{name}", data={"state": "running"}))
    for name in ("saved", "running"):
        store.write(f"runs/run_{name}/config-1.json", canonical_json({"name": name, "train": settings}))
        position = {"step": 3, "dataset": data.id, "base_digest": base.files_digest}
        manifest = canonical_json({"files": [], "position": position})
        store.write(f"runs/run_{name}/checkpoints/step-00000003/MANIFEST.json", manifest)
    lines = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, 7))
    store.write("runs/run_running/metrics.jsonl", lines.encode())
    # "lost" has no settings: nobody can say that it did not use a record
    assert affected(catalog, {third}).runs == ("run_lost", "run_running", "run_saved")
    assert affected(catalog, {sixth}).runs == ("run_lost", "run_running")


def test_run_without_checkpoint_is_matched_by_its_id(catalog: Catalog) -> None:
    from forge_ray.train.job import run_id

    (number,) = train_ids(1)
    data, base = dataset(catalog, [record_of(number)]), version(catalog, "base")
    settings = train_config(global_batch=1)
    name = run_id(TrainConfig.model_validate(settings), "fp32", data, base)
    catalog.append(Event(kind="run", subject=name, data={"state": "running"}))
    catalog.store.write(f"runs/{name}/config-1.json", canonical_json({"name": "x", "train": settings}))
    catalog.store.write(f"runs/{name}/metrics.jsonl", b'{"step": 1, "loss": 1.0}\n')
    (use,) = trace(catalog, [of_record(record_of(number).id)]).records[0].uses
    assert (use.run, use.steps, use.exact) == (name, (1,), True)


def test_rows_of_a_teacher_reach_its_students(catalog: Catalog) -> None:
    """Also where only an adapter was the teacher, a reference took its place, or the student's run has not ended."""
    first, second = train_ids(2)
    theirs, ours = (dataset(catalog, [record_of(n)], [[record_of(n).id]]) for n in (first, second))
    base = version(catalog, "base")
    taught = run(catalog, "taught", theirs.id, base.id)
    teacher = version(catalog, "teacher", taught.id, base.id, weights="adapter")
    learned = run(catalog, "learned", ours.id, base.id, method="distil", frozen_model=teacher.id, frozen_digest="x")
    student = version(catalog, "student", learned.id, base.id)
    onwards = run(catalog, "onwards", ours.id, student.id)
    grandchild = version(catalog, "grandchild", onwards.id, student.id)
    apart = run(catalog, "apart", ours.id, base.id)
    version(catalog, "apart", apart.id, base.id)
    started = {"state": "running", "dataset": ours.id, "base_model": base.id, "frozen_model": teacher.id}
    catalog.append(Event(kind="run", subject="run_going", data=started))
    assert set(catalog.parents(learned.id)) == {ours.id, base.id, teacher.id}
    reached = trace(catalog, [of_record(record_of(first).id)]).reached
    assert {one.run: one.how for one in reached.runs} == {
        taught.id: "trained",
        learned.id: "frozen",
        "run_going": "frozen",
        onwards.id: "base",
    }
    assert {one.version: one.how for one in reached.versions} == {
        teacher.id: "trained",
        student.id: "frozen",
        grandchild.id: "base",
    }
    result = CliRunner().invoke(cli, ["trace", record_of(first).id, "--store", catalog.store.root])
    assert "learned from a teacher or reference trained on it" in result.output


def test_unfinished_student_is_matched_by_its_id(catalog: Catalog) -> None:
    from forge_ray.train.frozen import FrozenModel
    from forge_ray.train.job import run_id

    (number,) = train_ids(1)
    data, base, teacher = dataset(catalog, [record_of(number)]), version(catalog, "base"), version(catalog, "teacher")
    settings = train_config(global_batch=1, method={"kind": "distil", "teacher": "an-alias-that-moved"})
    name = run_id(TrainConfig.model_validate(settings), "fp32", data, base, None, FrozenModel(teacher))
    catalog.append(Event(kind="run", subject=name, data={"state": "running"}))
    catalog.store.write(f"runs/{name}/config-1.json", canonical_json({"name": "x", "train": settings}))
    catalog.store.write(f"runs/{name}/metrics.jsonl", b'{"step": 1, "loss": 1.0}\n')
    from forge_ray.governance.impact import StoreUses

    assert StoreUses.of(catalog).runs[name].starts_from == (base.id, teacher.id)


# ---------------------------------------------------------------- what is asked


def test_duplicates_are_listed_both_ways(catalog: Catalog) -> None:
    stays, near, also, short = (record_of(n).id for n in (*train_ids(1), 900, 901, 902))
    (number,) = train_ids(1)
    dropped = [
        (near, f"near duplicate of {stays}"),
        (also, f"near duplicate of {stays}"),
        (short, "fewer than min_words words"),
    ]
    data = dataset(catalog, [record_of(number)], dropped=dropped)

    def alike(record: str) -> set[tuple[str, str]]:
        (one,) = trace(catalog, [of_record(record)]).records
        return {(held.place.record, held.relation) for held in one.alike}

    assert alike(stays) == {(near, "dropped for it"), (also, "dropped for it")}
    assert alike(near) == {(stays, "stays for it"), (also, "dropped with it")}
    (one,) = trace(catalog, [of_record(short)]).records
    assert [(held.dataset, held.place.split, held.place.reason) for held in one.held] == [
        (data.id, "dropped", "fewer than min_words words")
    ]
    assert one.uses == ()


def test_rows_of_a_file_are_read_as_each_version_read_them(catalog: Catalog, tmp_path: Path) -> None:
    row = {"q": "who is a@example.com?", "a": "a customer"}
    mapping = {"prompt": "q", "answer": "a"}
    from forge_ray.config.curate import PersonalDataRule
    from forge_ray.config.data import Mapping
    from forge_ray.data.curate.rules import compile_rule

    plain = parse_record(row, "auto", Mapping(**mapping))
    masked = compile_rule(PersonalDataRule(rule="personal_data"))(plain).record
    assert masked is not None
    source = {"sources": [{"path": "x.jsonl", "mapping": mapping}], "splits": {"test": 0, "validation": 0}}
    kept = dataset(catalog, [plain], data=source, name="plain")
    rules = [{"rule": "personal_data", "action": "mask"}, {"rule": "length", "min_chars": 1}]
    hidden = dataset(catalog, [masked], data=source | {"curate": rules}, name="masked")
    first = dataset(
        catalog, [record_of(1)], data=source | {"curate": rules}, dropped=[(plain.id, "duplicate of x")], name="c"
    )
    file = tmp_path / "asked.csv"
    file.write_text('q,a\n"who is a@example.com?",a customer\nnot,there\n')
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        queries = of_file(catalog, "asked.csv")
    assert [query.asked for query in queries] == ["asked.csv:2", "asked.csv:3"]
    traced = trace(catalog, queries)
    assert {held.dataset for one in traced.records for held in one.held} == {kept.id, hidden.id, first.id}
    assert traced.nowhere == ("asked.csv:3",)
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n[")
    assert all("no record: " in query.note for query in of_file(catalog, str(bad)))


def test_rows_of_a_file_are_read_in_the_encoding_of_the_versions(catalog: Catalog, tmp_path: Path) -> None:
    row = {"prompt": "Wie groß?", "completion": "Sehr groß."}
    source = {"path": "x.csv", "encoding": "windows-1252"}
    data = {"sources": [source], "splits": {"test": 0, "validation": 0}}
    kept = dataset(catalog, [parse_record(row)], data=data)
    dataset(catalog, [record_of(1)], data=data | {"sources": [{"path": "y.jsonl"}]}, name="b")
    file = tmp_path / "asked.csv"
    for encoding in ("cp1252", "utf-8", "utf-16"):
        file.write_bytes("prompt,completion\nWie groß?,Sehr groß.\nplain,ascii\n".encode(encoding))
        queries = of_file(catalog, str(file))
        assert [query.asked for query in queries] == [f"{file}:2", f"{file}:3"]
        assert {held.dataset for one in trace(catalog, queries).records for held in one.held} == {kept.id}
    file.write_bytes("prompt,completion\nprompt,completion\n".encode("utf-16-le"))  # which none of them would read
    (query,) = of_file(catalog, str(file))
    assert "the file is UTF-16 without a byte order mark" in query.note


def test_a_person_is_found_under_each_key(catalog: Catalog, tmp_path: Path) -> None:
    other = tmp_path / "own.key"
    other.write_text("0123456789abcdef0123")
    numbers = train_ids(4)
    ids = [record_of(n).id for n in numbers]
    by_store = subject_digest(subject_key(catalog.store, ""), "person 7")
    by_file = subject_digest(subject_key(catalog.store, str(other)), "person 7")
    records = [record_of(n) for n in numbers]
    subject = {"subject": {"field": "customer"}}
    dataset(catalog, records[:3], subjects={ids[0]: by_store, ids[1]: by_file}, data=subject, name="a")
    dataset(
        catalog, records[2:], subjects={ids[3]: by_file}, data={"subject": subject["subject"] | {"key_file": str(other)}}
    )
    silent = dataset(catalog, records, name="none")
    query = of_subject_value(catalog, " person 7 ")
    assert (set(query.records), query.unsearched) == ({ids[0], ids[3]}, (silent.id,))
    assert of_subject_value(catalog, "person 8").records == ()
    catalog.store.delete("keys/subject.key")
    with pytest.raises(ConfigError, match="is missing"):
        of_subject_value(catalog, "person 7")


def test_trace_command(catalog: Catalog) -> None:
    (number,) = train_ids(1)
    data = dataset(catalog, [record_of(number)])
    trained = run(catalog, "one", data.id, num_steps=3)
    released = version(catalog, "v", trained.id)
    promotion.promote(catalog, released.id, "prod")
    store, record = catalog.store.root, record_of(number).id

    def forge(*words: str) -> Any:
        return CliRunner().invoke(cli, ["trace", *words, "--store", store])

    text = forge(record).output
    for part in (data.id, "rows.jsonl:1", "1–3 (6 times in 3 steps)", released.id, "prod", "now"):
        assert part in text
    assert json.loads(forge(record, "--json").stdout)["affected"]["versions"] == [released.id]
    nowhere = forge("rec_" + "0" * 24)
    assert (nowhere.exit_code, "no dataset version holds it (1 searched)" in nowhere.output) == (0, True)
    assert forge("rec_short").exit_code == 2
    assert forge().exit_code == 2


def test_unsearchable_dataset_is_reported_and_hides_no_other(catalog: Catalog) -> None:
    (number,) = train_ids(1)
    subject = {"subject": {"field": "customer"}}
    whose = subject_digest(subject_key(catalog.store, ""), "person 7")
    good = dataset(catalog, [record_of(number)], subjects={record_of(number).id: whose}, data=subject)
    bad = dataset(catalog, [record_of(number)], [["rec_not hex, but of 24 x"]], data=subject, name="bad")

    def forge(verb: str, *words: str) -> Any:
        return CliRunner().invoke(cli, [verb, *words, "--store", catalog.store.root])

    for asked in ((record_of(number).id,), ("--subject", "person 7")):
        done = forge("trace", *asked)
        assert done.exit_code == 1
        assert f"not searched: {bad.id}: a record id or a subject is not hex" in done.output
        assert good.id in done.output
        assert "cannot be searched:" not in done.output  # it has a subject: that is not what is wrong with it
        done = forge("trace", *asked, "--json")
        assert (done.exit_code, json.loads(done.stdout)["affected"]["datasets"]) == (1, [good.id])
    erase = forge("erase", "--record", record_of(number).id, "--plan")  # which must be sure of all
    assert erase.exit_code == 1
    assert f"a dataset version cannot be searched: {bad.id}" in erase.output


def test_step_ranges_as_text() -> None:
    assert ranges([3]) == "3 (1 time)"
    assert ranges([1, 2, 3, 3, 9]) == "1–3, 9 (5 times in 4 steps)"
