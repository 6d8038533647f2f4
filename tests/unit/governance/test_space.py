"""Disk space: the decision over items, what holds them, removal with its events, and a store that stays whole."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from click.testing import CliRunner
from fabricated import dataset, deployment, record_of, report, run, store_at, version

from forge_ray.cli.main import cli
from forge_ray.data.build import work
from forge_ray.doctor import stored
from forge_ray.errors import NotFound, PolicyError, StoreError
from forge_ray.governance.reproduce import reproduce
from forge_ray.governance.space import prune as pruning
from forge_ray.governance.space.decide import Kind, Retention, Role, StoredItem, decide
from forge_ray.governance.space.prune import examine, prune
from forge_ray.governance.trace import of_record, trace
from forge_ray.governance.verify import verify_log, verify_record
from forge_ray.records import Erasure, Event
from forge_ray.release import promotion
from forge_ray.store import paths, removed
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import MANIFEST, Store
from forge_ray.store.uses import using
from forge_ray.train import attempts

pytestmark = pytest.mark.unit
OLD_S = 90 * 86400.0
NOW = Retention(unreleased_days=0)
ROLES: tuple[Role, ...] = ("last", "best")


# ---------------------------------------------------------------- the decision


def graph(rng: random.Random, count: int) -> tuple[list[StoredItem], dict[str, list[str]], Retention]:
    """Items that need any of those in front of them, some of them held, under any policy."""
    items = [
        StoredItem(
            (f"item-{number}",),
            rng.choice(get_args(Kind)),
            rng.randrange(100),
            rng.choice([0.0, 29.9, 30.0, 400.0]),
            (*tuple(f"item-{need}" for need in range(number) if rng.random() < 0.1), "item-absent"),
            rng.random() < 0.3,
            rng.random() < 0.5,
            frozenset(role for role in ROLES if rng.random() < 0.3),
        )
        for number in range(count)
    ]
    held = {item.name: ["alias prod"] for item in items if rng.random() < 0.2}
    kept = frozenset(role for role in ROLES if rng.random() < 0.5)
    rng.shuffle(items)
    return items, held, Retention(kept, rng.choice([0.0, 30.0, 1e9]), rng.random() < 0.5, rng.random() < 0.5)


def needed_by(name: str, items: Sequence[StoredItem]) -> set[str]:
    """Names of everything that an item needs, directly or through others."""
    by_name, reached, waiting = {item.name: item for item in items}, set[str](), [name]
    while waiting:
        for need in by_name[waiting.pop()].needs:
            if need in by_name and need not in reached:
                reached.add(need)
                waiting.append(need)
    return reached


def test_nothing_held_or_needed_is_removed_at_any_moment() -> None:
    num_removed = 0
    for seed in range(300):
        items, held, policy = graph(random.Random(seed), 30)
        decisions = decide(items, held, policy)
        assert sorted(one.item.name for one in decisions) == sorted(item.name for item in items)
        removals = [one.item.name for one in decisions if one.removes]
        assert held.keys().isdisjoint(removals)
        remaining = {item.name for item in items}
        for name in removals:  # a process may be killed behind each of them
            remaining.remove(name)
            needing = [other for other in remaining if name in needed_by(other, items)]
            assert needing == [], (seed, name)
        num_removed += len(removals)
        for one in decisions:
            assert one.why
            assert all(one.why)
            if one.removes:
                assert one.item.kind not in ("run", "facts", "other")
                assert not (one.item.is_released and one.item.kind in ("version", "export", "dataset", "evaluation"))
    assert num_removed > 1000


@pytest.mark.parametrize(
    ("item", "policy", "removes"),
    [
        (StoredItem(("c",), "checkpoint", 1, 0, is_finished=True), Retention(), True),
        (StoredItem(("c",), "checkpoint", 1, 0, is_finished=False), Retention(), False),
        (StoredItem(("c",), "checkpoint", 1, 0, is_finished=True, roles=frozenset({"best"})), Retention(), False),
        (
            StoredItem(("c",), "checkpoint", 1, 0, is_finished=True, roles=frozenset({"best"})),
            Retention(frozenset({"last"})),
            True,
        ),
        (StoredItem(("c",), "checkpoint", 1, 31, roles=frozenset({"last"})), Retention(), True),
        (
            StoredItem(("c",), "checkpoint", 1, 99, is_released=True, is_finished=True, roles=frozenset({"last"})),
            Retention(),
            False,
        ),
        (StoredItem(("d",), "dataset", 1, 29), Retention(), False),
        (StoredItem(("d",), "dataset", 1, 31), Retention(), True),
        (StoredItem(("v",), "version", 1, 99, is_released=True), Retention(), False),
        (StoredItem(("b",), "base model", 1, 99), Retention(), False),
        (StoredItem(("b",), "base model", 1, 99), Retention(base_models=True), True),
        (StoredItem(("b",), "base model", 1, 1), Retention(base_models=True), False),
        (StoredItem(("w",), "cache", 1, 0), Retention(), False),
        (StoredItem(("w",), "cache", 1, 0), Retention(caches=True), True),
        (StoredItem(("h",), "half-built", 1, 0), Retention(), True),
        (StoredItem(("i",), "images", 1, 0, is_released=True), Retention(), False),
        (StoredItem(("r",), "reproduction", 1, 2), Retention(), False),
    ],
)
def test_each_kind_by_the_policy(item: StoredItem, policy: Retention, removes: bool) -> None:
    (decision,) = decide([item], {}, policy)
    assert decision.removes == removes
    assert not decide([item], {item.name: ["alias prod"]}, policy)[0].removes


# ---------------------------------------------------------------- a store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return store_at(tmp_path / "store")


def weights(store: Store, folder: str, content: bytes = b"w" * 1000) -> None:
    with store.staged_dir(folder) as staging:
        (staging / "model.safetensors").write_bytes(content)


def checkpoint(store: Store, run_id: str, step: int) -> None:
    with store.staged_dir(paths.checkpoint(run_id, step)) as staging:
        (staging / "state.pt").write_bytes(bytes([step]) * 5000)


def age(store: Store) -> None:
    """Everything was written long ago."""
    for place, _, names in os.walk(store.root):
        for name in names:
            os.utime(Path(place, name), (time.time() - OLD_S,) * 2)


def filled(store: Store) -> dict[str, str]:
    """Two runs on two datasets: the first is released behind an alias, the second is not. Both wrote three checkpoints."""
    with Catalog.open(store) as catalog:
        base = version(catalog, "base")
        weights(store, paths.model(base.id))
        ids = {"base": base.id}
        for name in ("released", "trial"):
            rows = [record_of(number) for number in range(20 if name == "released" else 30)]
            data = dataset(catalog, rows, name=name)
            record = run(catalog, name, data.id, base.id, created_at="2020-01-01T00:00:00+00:00")
            for step in (1, 2, 3):
                checkpoint(store, record.id, step)
            weights(store, paths.export(record.id), name.encode() * 100)
            judged = report(catalog, record.id, data.id, split="test", created_at="2020-01-01T00:00:00+00:00")
            store.write(paths.items(judged.id), b'{"record": "x"}\n')
            ids |= {f"{name} dataset": data.id, f"{name} run": record.id, f"{name} report": judged.id}
            if name == "released":
                tuned = version(catalog, name, record.id, base.id, evals=(judged.id,))
                store.copy_dir(paths.export(record.id), paths.model(tuned.id))
                promotion.promote(catalog, tuned.id, "prod")
                ids["version"] = tuned.id
    age(store)
    return ids


@pytest.fixture
def ids(store: Store, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    from forge_ray.governance.space import survey

    monkeypatch.setattr(survey, "_written", lambda record: 0.0)  # as if the records were as old as the files
    return filled(store)


def removed_names(store: Store, policy: Retention, apply: bool = True) -> set[str]:
    with Catalog.open(store) as catalog:
        decisions = prune(catalog, policy).removed if apply else examine(catalog, policy).removals
        return {decision.item.name for decision in decisions}


def test_released_work_stays_and_unreleased_work_goes(store: Store, ids: dict[str, str]) -> None:
    released, trial = ids["released run"], ids["trial run"]
    expected = {
        *(paths.checkpoint(released, step) for step in (1, 2)),
        *(paths.checkpoint(trial, step) for step in (1, 2, 3)),
        paths.export(trial),
        paths.report(ids["trial report"]),
        paths.dataset(ids["trial dataset"]),
    }
    before = sum(path.stat().st_blocks for path in Path(store.root).rglob("*"))
    assert removed_names(store, Retention(), apply=False) == expected
    assert sum(path.stat().st_blocks for path in Path(store.root).rglob("*")) == before
    assert removed_names(store, Retention()) == expected
    assert removed_names(store, Retention()) == set()
    for folder in (paths.export(released), paths.model(ids["version"]), paths.model(ids["base"])):
        store.fetch_dir(folder)
    assert store.exists(paths.dataset(ids["released dataset"]))
    assert not any(store.exists(name) for name in expected)
    with Catalog.read_only(store) as catalog:
        events = {path: catalog.events("removal", path) for path in expected}
        assert all(len(of_path) == 1 for of_path in events.values())
        (event,) = events[paths.export(trial)]
        assert event.data["bytes"] > 400
        assert event.data["why"].startswith("unreleased, unchanged for 90 days")
        assert event.data["by"].count("@") == 1


def test_records_stay_and_explain_what_was_removed(store: Store, ids: dict[str, str]) -> None:
    removed_names(store, Retention())
    trial, data = ids["trial run"], ids["trial dataset"]
    with Catalog.read_only(store) as catalog:
        checked = {one.id: one for one in verify_record(catalog, trial)}
        assert "removed on" in checked[trial].what
        assert not checked[trial].problem
        assert "removed on" in checked[data].what
        assert not checked[data].problem
        traced = trace(catalog, [of_record(record_of(0).id)])
        assert {use.run for one in traced.records for use in one.uses} <= {ids["released run"]}
        assert not traced.broken
    assert verify_log(store, every_signature=False).problems == ()
    assert [finding.status for finding in (*stored.health(store), *stored.log(store), *stored.tombstones(store))] == [
        "ok"
    ] * 3
    with pytest.raises(NotFound) as refused:
        reproduce(store, trial)
    assert f"{paths.dataset(data)} (removed on " in refused.value.message
    assert "unchanged for 90 days" in refused.value.message
    assert paths.model(ids["base"]) not in refused.value.message
    invoke = CliRunner().invoke
    for words in (["lineage", trial], ["runs", "list"], ["data", "list"], ["store", "du"]):
        outcome = invoke(cli, [*words, "--store", store.root])
        assert outcome.exit_code == 0, outcome.output
    assert "(removed)" in invoke(cli, ["data", "list", "--store", store.root]).output


def test_a_released_version_without_files_is_a_problem_whatever_an_event_says(store: Store, ids: dict[str, str]) -> None:
    folder = paths.model(ids["version"])
    with Catalog.open(store) as catalog:
        store.delete_dir(folder)
        catalog.append(removed.removal((folder,), 1, "nobody needs it"))
        checked = {one.id: one for one in verify_record(catalog, ids["version"])}
    assert "is not in the store" in checked[ids["version"]].problem


def test_removed_version_is_not_promoted(store: Store, ids: dict[str, str]) -> None:
    with Catalog.open(store) as catalog:
        other = version(catalog, "other")
        weights(store, paths.model(other.id))
        age(store)
        assert paths.model(other.id) in {one.item.name for one in prune(catalog, Retention(base_models=True)).removed}
        assert store.exists(paths.model(ids["base"]))  # which the released version needs
        with pytest.raises(NotFound, match=r"is not in the store any more \(removed on"):
            promotion.promote(catalog, other.id, "prod")


def test_deployed_and_recent_work_stays(store: Store, ids: dict[str, str]) -> None:
    trial = ids["trial run"]
    with Catalog.open(store) as catalog:
        candidate = version(catalog, "candidate", trial, ids["base"], status="candidate", step=3)
        weights(store, paths.model(candidate.id))
        endpoint = deployment(catalog, "trial", candidate.id)
        age(store)
        space = {one.item.name: one for one in examine(catalog, NOW).decisions}
        assert space[paths.model(candidate.id)].why[0] == f"deployment trial ({endpoint.id})"
        assert f"needed by {paths.model(candidate.id)}" in space[paths.dataset(ids["trial dataset"])].why
        deployment(catalog, "trial", ids["version"], state="stopped")
        assert paths.model(candidate.id) in {one.item.name for one in prune(catalog, NOW).removed}
    weights(store, paths.export(trial))
    assert paths.export(trial) not in removed_names(store, Retention())


def test_dataset_stays_while_weights_or_items_of_it_are_there(store: Store, ids: dict[str, str]) -> None:
    """An erasure finds what learned from a row, and what quotes it, through the dataset."""
    for folder in (paths.export(ids["trial run"]), paths.report(ids["trial report"])):
        for path in Path(store.root, folder).iterdir():
            os.utime(path)
        with Catalog.open(store) as catalog:
            decisions = {one.item.name: one for one in examine(catalog, Retention()).decisions}
        dataset_decision = decisions[paths.dataset(ids["trial dataset"])]
        assert not dataset_decision.removes
        assert f"needed by {folder}" in dataset_decision.why
        age(store)


def test_running_training_and_marked_folders_stay(store: Store, ids: dict[str, str]) -> None:
    trial = ids["trial run"]
    with attempts.driving(store, trial):
        names = removed_names(store, NOW, apply=False)
        assert not {name for name in names if trial in name or ids["trial dataset"] in name}
    with using(store, "evaluation", paths.export(trial)):
        names = removed_names(store, NOW)
        assert paths.export(trial) not in names
        assert paths.dataset(ids["trial dataset"]) not in names
    assert {paths.export(trial), paths.dataset(ids["trial dataset"])} <= removed_names(store, NOW)


def adapter_of(catalog: Catalog, ids: dict[str, str], name: str) -> str:
    """An adapter that no gate let through: nothing but what needs it keeps it."""
    record = version(catalog, name, ids["trial run"], ids["base"], status="rejected", weights="adapter")
    weights(catalog.store, paths.model(record.id))
    return record.id


def test_adapter_stays_with_what_was_trained_on_it(store: Store, ids: dict[str, str]) -> None:
    """With a released version, with an export, and with a run that is being trained or was, before it has a record."""
    started = {"dataset": ids["released dataset"], "base_model": ids["base"]}
    with Catalog.open(store) as catalog:
        unused = paths.model(adapter_of(catalog, ids, "unused"))
        initial = {name: adapter_of(catalog, ids, name) for name in ("released", "exported", "trained", "begun")}
        further = {
            name: run(catalog, f"on_{name}", ids["released dataset"], ids["base"], initial_adapter=initial[name]).id
            for name in ("released", "exported")
        }
        judged = report(catalog, further["released"], ids["released dataset"], split="test")
        second = version(catalog, "second", further["released"], ids["base"], evals=(judged.id,), weights="adapter")
        weights(store, paths.model(second.id))
        weights(store, paths.export(further["exported"]))
        for name in ("trained", "begun"):
            data = {"state": "running", "pid": 1, **started, "initial_adapter": initial[name]}
            catalog.append(Event(kind="run", subject=f"run_{name}", data=data))
        checkpoint(store, "run_begun", 1)
        age(store)
        for path in (
            *Path(store.root, paths.export(further["exported"])).iterdir(),
            *store.local("runs/run_begun").rglob("*"),
        ):
            os.utime(path)
    with attempts.driving(store, "run_trained"), Catalog.open(store) as catalog:
        decisions = {one.item.name: one for one in examine(catalog, Retention()).decisions}
        assert decisions[unused].removes
        reasons = {name: decisions[paths.model(adapter)].why for name, adapter in initial.items()}
        assert reasons["released"] == (f"needed by {paths.model(second.id)}",)
        assert reasons["exported"] == (f"needed by {paths.export(further['exported'])}",)
        assert reasons["trained"][0].startswith("being trained: ")
        assert reasons["begun"] == (f"needed by {paths.checkpoint('run_begun', 1)}",)
        pruned = {one.item.name for one in prune(catalog, Retention()).removed}
    assert unused in pruned
    assert all(store.exists(paths.model(adapter)) for adapter in initial.values())


@contextlib.contextmanager
def reading(path: Path) -> Iterator[int]:
    """Another process that holds the file open; its id."""
    script = "import sys; file = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdout
        assert reader.stdout.readline() == "open\n"
        yield reader.pid
        reader.communicate("")


def test_file_that_another_process_reads_stays(store: Store, ids: dict[str, str]) -> None:
    folder = paths.export(ids["trial run"])
    with reading(store.local(f"{folder}/model.safetensors")) as pid:
        with Catalog.open(store) as catalog:
            decisions = {one.item.name: one for one in examine(catalog, NOW).decisions}
        assert decisions[folder].why[0] == f"in use: open in pid {pid}"
    assert folder in removed_names(store, NOW, apply=False)


@pytest.mark.parametrize(("how", "why"), [("marked", "in use: evaluation"), ("open", "in use: open in pid ")])
def test_use_that_begins_at_the_last_moment_is_seen(
    store: Store, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch, how: str, why: str
) -> None:
    folder, set_aside = paths.export(ids["trial run"]), pruning.set_aside
    with contextlib.ExitStack() as running:

        def late(where: Store, path: str) -> removed.Aside:
            if path == folder:
                is_marked, file = how == "marked", where.local(f"{folder}/model.safetensors")
                running.enter_context(using(where, "evaluation", folder) if is_marked else reading(file))
            return set_aside(where, path)

        monkeypatch.setattr(pruning, "set_aside", late)
        with Catalog.open(store) as catalog:
            pruned = prune(catalog, NOW)
    assert folder in pruned.left
    assert pruned.left[folder][0].startswith(why)
    store.fetch_dir(folder)
    assert store.exists(paths.dataset(ids["trial dataset"]))  # which the export needs


def test_build_beside_keeps_its_files(store: Store, ids: dict[str, str]) -> None:
    store.write(f"{work.WORK}/piece.arrow", b"rows")
    store.write(paths.image("ab"), b"image")
    building = f"datasets/.building-x-{work.owner_mark()}-1/part.parquet"
    store.write(building, b"rows")
    unregistered = "datasets/ds_0000000000000000/part.parquet"
    store.write(unregistered, b"rows")
    mark = work.mark(store)
    age(store)
    everything = Retention(frozenset(), 0, caches=True, base_models=True)
    removed_names(store, everything)
    assert all(map(store.exists, (f"{work.WORK}/piece.arrow", paths.image("ab"), building, unregistered, mark)))
    store.delete(mark)
    names = removed_names(store, everything)
    assert {work.WORK, paths.image("ab"), "datasets/ds_0000000000000000"} <= names
    assert store.exists(building)  # its process, this one, is running


def test_hidden_files_in_use_stay_and_half_built_ones_go(store: Store, ids: dict[str, str]) -> None:
    stay = ("audit/.lock", "keys/checkpoints.key", f"runs/{ids['trial run']}/.validate_storage_marker", "notes/mine.txt")
    dead = work.owner_mark().replace(f".{os.getpid()}.", ".4194999.")
    go = (f"records/.tmp-{dead}-1", f"models/.importing-x-{dead}/w", f"runs/{ids['trial run']}/checkpoints/.tmp-9-1/w")
    for path in (*stay, *go):
        store.write(path, b"x")
    age(store)
    removed_names(store, Retention(frozenset(), 0, caches=True, base_models=True))
    assert [path for path in stay if not store.exists(path)] == []
    assert [path for path in go if store.exists(path)] == []


@pytest.mark.parametrize(
    "moment", ["half", *(pytest.param(name, marks=pytest.mark.large) for name in ("set_aside", "removal", "delete_aside"))]
)
def test_killed_removal_leaves_a_whole_store(
    store: Store, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Killed behind each step of the removal of a dataset: what is there verifies, and the next removal deletes the rest."""
    data = paths.dataset(ids["trial dataset"])
    index = paths.index(ids["trial dataset"], "about.json")
    store.write(index, b"{}")
    script = f"""
import os, sys
from forge_ray.governance.space import prune as pruning, survey
from forge_ray.governance.space.decide import Retention
from forge_ray.store import removed
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

survey._written = lambda record: 0.0
moment = {moment!r}
def killing(name):
    original = getattr(pruning, name)
    def function(*arguments):
        result = original(*arguments)
        if {ids["trial dataset"]!r} in str(arguments):
            os.kill(os.getpid(), 9)
        return result
    setattr(pruning, name, function)
if moment == "half":
    removed.shutil.rmtree = lambda place: os.kill(os.getpid(), 9) if {ids["trial dataset"]!r} in str(place) else None
else:
    killing(moment)
with Catalog.open(Store({store.root!r})) as catalog:
    pruning.prune(catalog, Retention(unreleased_days=0))
"""
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert not store.exists(f"{data}/{MANIFEST}")
    assert not store.exists(data)
    assert verify_log(store, every_signature=False).problems == ()
    assert [finding.status for finding in stored.health(store)] == ["ok"]
    assert removed_names(store, NOW)
    remaining = [path.name for path in Path(store.root).rglob("*") if path.name.startswith(removed.ASIDE)]
    assert remaining == []
    assert not store.exists(index)
    with Catalog.read_only(store) as catalog:
        assert removed.why_absent(catalog.standing, data)


def test_unfinished_erasure_comes_first(store: Store, ids: dict[str, str]) -> None:
    with Catalog.open(store) as catalog:
        values: dict[str, Any] = {"asked_by": "record", "asked": "x", "near_duplicates": True, "num_records": 1}
        erasure = catalog.put(Erasure(**values, options={}, plan={}).sealed())
        with pytest.raises(PolicyError, match=f"{erasure.id} is not finished") as refused:
            prune(catalog, NOW)
        assert "forge erase" in refused.value.hint


def test_what_cannot_be_removed_keeps_what_it_needs(
    store: Store, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export, set_aside = paths.export(ids["trial run"]), pruning.set_aside

    def refusing(where: Store, path: str) -> removed.Aside:
        if path == export:
            raise PermissionError(13, "Permission denied")
        return set_aside(where, path)

    monkeypatch.setattr(pruning, "set_aside", refusing)
    with Catalog.open(store) as catalog:
        pruned = prune(catalog, NOW)
    assert pruned.left[export] == ["could not be removed: Permission denied"]
    assert store.exists(paths.dataset(ids["trial dataset"]))


@pytest.mark.parametrize("moment", ["second path", "event", "disk", "interrupt"])
def test_failure_in_the_middle_puts_every_path_back(
    store: Store, ids: dict[str, str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """An item of three paths; whatever ends its removal before the event, nothing of it is out of sight."""
    data, last = ids["trial dataset"], f"cards/{ids['trial dataset']}"
    for path in (paths.index(data, "about.json"), f"{last}/card.md"):
        store.write(path, b"{}")
    age(store)
    before = {str(path) for path in Path(store.root).rglob("*") if data in str(path)}
    set_aside, fsync_dir = pruning.set_aside, removed.fsync_dir

    def failing(where: Store, path: str) -> removed.Aside:
        if path == last:
            raise KeyboardInterrupt if moment == "interrupt" else PermissionError(13, "Permission denied")
        return set_aside(where, path)

    def full(folder: Path) -> None:
        if folder.name == "cards":
            raise OSError(28, "No space left on device")
        fsync_dir(folder)

    def unwritten(event: Event) -> Event:
        if event.subject == paths.dataset(data):
            raise StoreError("the log cannot be written", hint="free space")
        return append(event)

    monkeypatch.setattr(pruning, "set_aside", set_aside if moment in ("disk", "event") else failing)
    monkeypatch.setattr(removed, "fsync_dir", full if moment == "disk" else fsync_dir)
    with Catalog.open(store) as catalog:
        append = catalog.append
        if moment == "event":
            monkeypatch.setattr(catalog, "append", unwritten)
        with pytest.raises(KeyboardInterrupt) if moment == "interrupt" else contextlib.nullcontext():
            pruned = prune(catalog, NOW)
            assert pruned.left[paths.dataset(data)][0].startswith("could not be removed: ")
        assert catalog.events("removal", paths.dataset(data)) == []
    assert {str(path) for path in Path(store.root).rglob("*") if data in str(path)} == before


def test_folder_of_an_object_store_is_put_back_with_its_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Store("mock:///bucket")
    bucket.write(f"models/mv_x/{MANIFEST}", b"{}")
    bucket.write("models/mv_x/weights", b"x")
    aside = removed.set_aside(bucket, "models/mv_x")
    assert not bucket.is_published("models/mv_x")
    removed.put_back(bucket, aside)
    assert bucket.read(f"models/mv_x/{MANIFEST}") == b"{}"
    delete = bucket.delete

    def lost(path: str) -> None:
        delete(path)
        raise OSError("the answer did not arrive")

    monkeypatch.setattr(Store, "delete", lambda self, path: lost(path))
    with pytest.raises(OSError, match="did not arrive"):
        removed.set_aside(bucket, "models/mv_x")
    assert bucket.is_published("models/mv_x")
    removed.delete_aside(bucket, aside)
    assert not bucket.exists("models/mv_x/weights")


# ---------------------------------------------------------------- what du and prune print


def test_hard_links_count_once(store: Store, ids: dict[str, str]) -> None:
    export, released = paths.export(ids["released run"]), paths.model(ids["version"])
    one, two = (store.local(f"{folder}/model.safetensors").stat() for folder in (export, released))
    assert one.st_ino == two.st_ino
    assert one.st_nlink == 2
    with Catalog.read_only(store) as catalog:
        space = examine(catalog, Retention())
    inodes = {path.stat().st_ino: path.stat().st_size for path in Path(store.root).rglob("*") if path.is_file()}
    assert space.survey.size == sum(inodes.values())
    sizes = {item.name: item.size for item in space.survey.items}
    assert sizes[released] > sizes[export]  # the version counts the weights
    assert [item.size for item in space.survey.items] == sorted(sizes.values(), reverse=True)
    assert space.survey.freed([export]) == sizes[export]
    assert space.survey.freed([export, released]) == sizes[export] + sizes[released]


def test_du_and_prune_on_the_command_line(store: Store, ids: dict[str, str]) -> None:
    invoke = CliRunner().invoke
    before = invoke(cli, ["store", "du", "--store", store.root])
    assert before.exit_code == 0
    assert "alias prod" in before.output
    assert "could go: " in before.output
    assert "`forge store prune` would free" in before.output
    dry = invoke(cli, ["store", "prune", "--store", store.root])
    assert dry.exit_code == 0
    assert "--apply removes it" in dry.output
    assert store.exists(paths.export(ids["trial run"]))
    applied = invoke(cli, ["store", "prune", "--apply", "--store", store.root, "--json"])
    assert applied.exit_code == 0
    assert '"applied": true' in applied.stdout
    assert ids["trial dataset"] in applied.stdout
    assert "0.0 MB would be freed" in invoke(cli, ["store", "prune", "--store", store.root]).output
    wrong = invoke(cli, ["store", "prune", "--store", store.root, "--checkpoints", "newest"])
    assert wrong.exit_code == 2
    assert "--checkpoints 'newest' is not one of last, best, none" in wrong.output
