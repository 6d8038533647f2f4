"""A certificate is true of the disk: whatever a killed process left, hidden or orphaned, the next erasure finds and removes,
and what it cannot reach is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
import pytest
from fabricated import dataset, record_of, run, store_at, version

from forge_ray.config.data import Splits
from forge_ray.data.build import tombstones as erased
from forge_ray.data.dataset.version import RECORDS, split_of
from forge_ray.governance.erasure.apply import erase
from forge_ray.governance.erasure.options import Options
from forge_ray.governance.erasure.search import ErasureRequest
from forge_ray.records import DatasetManifest, ModelVersion, RunRecord
from forge_ray.store import audit_log
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.owner import is_alive, owner_mark
from forge_ray.store.scratch import scratch_folder

pytestmark = pytest.mark.unit
TRAINED = [n for n in range(30) if split_of(bytes.fromhex(record_of(n).id[4:]), Splits()) == 0]
HERS, OTHER = record_of(TRAINED[0]), record_of(TRAINED[1])
SECRET = HERS.content["text"].encode()
OPTIONS = Options(retrain="none", wait_s=2)
REQUEST = ErasureRequest("record", (HERS.id,))


@pytest.fixture
def place(tmp_path: Path) -> tuple[Store, dict[str, str]]:
    """A store with a dataset version that holds the row and one that does not, a run and a version of each."""
    store = store_at(tmp_path / "store")
    with Catalog.open(store) as catalog:
        base = version(catalog, "base")
        ids = {"base": base.id}
        for name, records in {"hers": [HERS, OTHER], "clean": [OTHER]}.items():
            data = dataset(catalog, records, name=name)
            trained = run(catalog, name, data.id, base.id)
            ids |= {f"ds_{name}": data.id, f"mv_{name}": version(catalog, name, trained.id, base.id).id}
        for name in ("mv_hers", "mv_clean", "base"):
            put(store, f"models/{ids[name]}/model.safetensors", b"weights")
        for name in ("hers", "clean"):
            put(store, f"runs/run_{name}/checkpoints/step-00000004/state.pt", b"state")
            put(store, f"runs/run_{name}/metrics.jsonl", b'{"step": 1}\n')
    return store, ids


def put(store: Store, path: str, data: bytes) -> Path:
    """A file as another process wrote it a while ago."""
    file = Path(store.root, path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    old = time.time() - 3600
    os.utime(file, (old, old))
    return file


def rows_file(store: Store, path: str, number: int = TRAINED[0]) -> Path:
    row = dict.fromkeys(RECORDS.names) | {"record": record_of(number).id, "content": record_of(number).json}
    file = put(store, path, b"")
    pq.write_table(pa.Table.from_pylist([row], RECORDS), file)
    old = time.time() - 3600
    os.utime(file, (old, old))
    return file


def ended_mark() -> str:
    """The mark of a process that ran on this machine and was killed."""
    code = (
        "import os; from forge_ray.store.owner import owner_mark; print(owner_mark(), flush=True); os.kill(os.getpid(), 9)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def files_with(store: Store, *needles: bytes) -> list[str]:
    """Every file of the store, hidden ones too, in which one of the byte strings lies, in whatever encoding of a table."""
    matches = []
    for path in sorted(Path(store.root).rglob("*")):
        if path.is_file() and not path.is_symlink():
            data = path.read_bytes()
            if path.suffix == ".parquet":
                data += repr(pq.read_table(path).to_pylist()).encode()
            if any(needle in data for needle in needles):
                matches.append(path.relative_to(store.root).as_posix())
    return matches


def test_the_mark_of_a_process_says_whether_it_runs() -> None:
    assert is_alive(f".tmp-x-{owner_mark()}-abc") is True
    assert is_alive(f".tmp-x-{ended_mark()}-abc") is False
    assert is_alive(".tmp-x-1234") is None
    assert is_alive(".tmp-x-~00000000.1.2~-abc") is None


LEFT = [
    "datasets/.building-0123456789ab-{mark}-cafe0000/records/train/part-00000.parquet",
    "datasets/.building-0123456789ab-cafe0000/records/train/part-00000.parquet",  # of a version without marks
    "datasets/.tmp-ds_1-{mark}-x/records/train/part-00000.parquet",
    "datasets/.old-ds_1-4711/records/train/part-00000.parquet",
    "datasets/ds_0123456789abcdef/records/train/part-00000.parquet",  # killed between rename and record
    "datasets/{ds_clean}/records/train/.tmp-{mark}-x.parquet",
    "index/.tmp-ds_1-{mark}-x/records.bin",
    "cards/.tmp-ds_1-{mark}-x/card.md",
    "models/.tmp-mv_1-{mark}-x/model.safetensors",
    "models/.old-mv_1-4711/model.safetensors",
    "models/.importing-0123456789abcdef/model.safetensors",
    "models/mv_0123456789abcdef/model.safetensors",
    "evals/.tmp-ev_1-{mark}-x/items.jsonl",
    "evals/ev_0123456789abcdef/items.jsonl",
    "runs/.tmp-run_1-{mark}-x/export/model.safetensors",
    "runs/run_hers/.tmp-export-{mark}-x/model.safetensors",
    "runs/run_hers/exports/step-00000004/model.safetensors",
    "runs/run_hers/checkpoints/.tmp-00000008-000001/state.pt",
    "runs/run_hers/checkpoints/.old-step-00000004-4711/state.pt",
    "runs/run_unknown/checkpoints/.tmp-00000008-000001/state.pt",
    "work/data/0123-0.arrow",
    "work/data/.tmp-{mark}-x",
    "work/reproduce/0123456789ab/runs/run_hers/export/model.safetensors",
    "images/0123",
    ".tmp-{mark}-x/rows",
]


@pytest.mark.parametrize("left", LEFT)
def test_what_a_killed_process_left_is_gone_after_the_next_erasure(place: tuple[Store, dict[str, str]], left: str) -> None:
    store, ids = place
    path = left.format(mark=ended_mark(), **ids)
    rows_file(store, path) if path.endswith(".parquet") else put(store, path, SECRET)
    kept = [
        *(f"models/{ids['mv_clean']}/model.safetensors", f"models/{ids['base']}/model.safetensors"),
        *("runs/run_clean/checkpoints/step-00000004/state.pt", "runs/run_hers/metrics.jsonl"),
    ]
    statement = erase(store, REQUEST, OPTIONS, "she asked")["predicate"]
    assert not store.exists(path)
    assert files_with(store, SECRET) == []
    assert all(map(store.exists, kept))
    assert store.exists(f"datasets/{ids['ds_clean']}")
    assert not store.exists(f"models/{ids['mv_hers']}")
    assert statement["unconfirmed"] == {}
    if not path.startswith("work/"):
        listing = store.read_json(f"erasures/{statement['erasure']}/purged.json")
        assert path in {entry["path"] for entry in listing["files"]}


def test_certificate_searches_files_not_records(
    place: tuple[Store, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset version that was published behind the plan's back goes through every stage without a second request."""
    store, _ = place
    from forge_ray.governance.erasure import apply

    withdraw, late = apply.withdraw, {}

    def published_late(catalog: Catalog, *arguments: Any) -> Any:
        if not late:
            late["dataset"] = dataset(catalog, [HERS], name="late", data={"block_rows": 7})
            trained = run(catalog, "late", late["dataset"].id)
            late["version"] = version(catalog, "late", trained.id)
            put(store, f"models/{late['version'].id}/model.safetensors", b"weights")
        return withdraw(catalog, *arguments)

    monkeypatch.setattr(apply, "withdraw", published_late)
    statement = erase(store, REQUEST, OPTIONS)["predicate"]
    assert late["dataset"].id in {one["old"] for one in statement["datasets"]}
    assert late["version"].id in {one["version"] for one in statement["versions"]}
    assert len(statement["purged"]["lists"]) == 2
    assert files_with(store, SECRET) == []
    assert not store.exists(f"models/{late['version'].id}")
    assert erase(store, REQUEST, OPTIONS)["predicate"] == statement  # nothing is left to do


def test_folder_whose_record_may_come_at_any_moment_is_waited_for(place: tuple[Store, dict[str, str]]) -> None:
    """Between the last byte of a folder and its record a process needs a moment; one that was killed there never gets on."""
    from forge_ray.governance.erasure import leftovers

    store, _ = place
    file = rows_file(store, "datasets/ds_0123456789abcdef/records/train/part-00000.parquet", TRAINED[1])
    with Catalog.open(store) as catalog:
        (old,) = leftovers.accounts_of(catalog).leftovers
        os.utime(file)
        (new,) = leftovers.accounts_of(catalog).leftovers
    assert (old.is_written, new.is_written) == (False, True)


def test_build_that_runs_is_not_taken_for_a_leftover_unless_it_holds_the_rows(place: tuple[Store, dict[str, str]]) -> None:
    store, _ = place
    from forge_ray.governance.erasure import purging

    with Catalog.open(store) as catalog:
        clean = rows_file(store, f"datasets/.building-a-{owner_mark()}-1/records/train/part-00000.parquet", TRAINED[1])
        erased.write_tombstones(store, "er_1", [HERS.id])
        checked = purging.check(catalog, "er_1", [], 0.1, {})
        assert (checked.unconfirmed, clean.exists()) == ({}, True)
        hers = rows_file(store, f"datasets/.building-b-{owner_mark()}-1/records/train/part-00000.parquet")
        checked = purging.check(catalog, "er_1", [], 0.1, {})
        assert list(checked.unconfirmed) == [hers.parents[2].relative_to(store.root).as_posix()]
        torn = put(store, f"datasets/.building-c-{owner_mark()}-1/records/train/part-00000.parquet", b"PAR1")
        hers.unlink()
        assert "building-c" in next(iter(purging.check(catalog, "er_1", [], 0.1, {}).unconfirmed))
        torn.unlink()


def test_piece_that_a_build_wrote_after_the_purge_is_removed(place: tuple[Store, dict[str, str]]) -> None:
    store, _ = place
    from forge_ray.governance.erasure import purging

    table = pa.table({"record": pa.array([bytes.fromhex(HERS.id[4:])], pa.binary(12)), "content": [HERS.json]})
    file = put(store, "work/data/0123-0.arrow", b"")
    with ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)
    with Catalog.open(store) as catalog:
        erased.write_tombstones(store, "er_1", [HERS.id])
        assert purging.check(catalog, "er_1", [], 5, {}).removed == ("work/data/0123-0.arrow",)
    assert not file.exists()


def test_hard_links_and_files_of_others_are_found_or_named(place: tuple[Store, dict[str, str]], tmp_path: Path) -> None:
    store, ids = place
    weights = Path(store.root, "models", ids["mv_hers"], "model.safetensors")
    inside, outside = Path(store.root, "backup/model.safetensors"), tmp_path / "copy.safetensors"
    inside.parent.mkdir()
    os.link(weights, inside)
    os.link(weights, outside)
    rows_file(store, "notes/export.parquet")
    rows_file(store, "notes/clean.parquet", TRAINED[1])
    put(store, "notes/readme.txt", b"?")
    put(store, f"models/{ids['mv_clean']}/beside.bin", b"?")  # in a version's folder, and in no list
    Path(store.root, "elsewhere").symlink_to(tmp_path)
    remains = erase(store, REQUEST, OPTIONS)["predicate"]["remains"]
    assert not inside.exists()
    assert remains["more names of deleted files outside the store"] == {
        f"models/{ids['mv_hers']}/model.safetensors": 1,
        "backup/model.safetensors": 1,
    }
    assert remains["files that forge_ray did not write"] == {
        "notes/export.parquet": "1 of the rows",
        "notes/clean.parquet": "none of the rows",
        "notes/readme.txt": "unknown",
        f"models/{ids['mv_clean']}/beside.bin": "unknown",
    }
    assert remains["links that were not followed"] == {"elsewhere": str(tmp_path)}
    assert "backups" in remains["not reached"]


def test_scratch_folders_and_spilled_objects_of_ended_processes_go(
    place: tuple[Store, dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forge_ray.machine import sessions

    store, _ = place
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    living, ended, old = scratch_folder("save"), tmp_path / f"forge-save-{ended_mark()}-x", tmp_path / "forge-save-abc"
    spills = {}
    for name in ("session_a", "session_b", "session_c"):
        session = tmp_path / "ray" / name
        spills[name] = session / "ray_spilled_objects_0"
        spills[name].mkdir(parents=True)
        (spills[name] / "object").write_bytes(SECRET)
        if name != "session_b":
            (session / sessions.NOTES).mkdir()
            (session / sessions.NOTES / sessions._name(store)).touch()
    monkeypatch.setattr(sessions, "_commands", lambda: [f"raylet --session-name={spills['session_c'].parent.name}"])
    for folder in (living, ended, old):
        folder.mkdir(exist_ok=True)
        (folder / "state.pt").write_bytes(SECRET)
    statement = erase(store, REQUEST, OPTIONS)["predicate"]
    assert [folder.exists() for folder in (living, ended, old)] == [True, False, True]
    assert [spills[name].exists() for name in sorted(spills)] == [False, True, True]
    left = statement["remains"]["outside the store"]
    assert set(left) == {str(old), str(spills["session_b"]), str(spills["session_c"])}
    assert "another program" in left[str(spills["session_b"])]
    assert "running" in left[str(spills["session_c"])]
    assert set(statement["purged"]["outside the store"]) == {str(ended), str(spills["session_a"])}


def test_cache_of_a_remote_store_forgets_what_was_purged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    from forge_ray.governance.erasure import outside

    store = Store(str(tmp_path / "store"))
    monkeypatch.setattr(Store, "is_local", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(outside, "abandoned", lambda: ([], []))
    names = {
        folder: hashlib.sha256(f"{store.uri}/{folder}".encode()).hexdigest()[:16]
        for folder in ("models/mv_1", "models/mv_2")
    }
    for name in names.values():
        (tmp_path / "cache/forge_ray" / name).mkdir(parents=True)
    cut_off = tmp_path / "cache/forge_ray" / f".partial-{names['models/mv_1']}-1-2"
    cut_off.write_bytes(b"")
    places = outside.clear(store, ["models/mv_1/model.safetensors"])
    assert len(places.removed) == 2
    assert [path.name for path in (tmp_path / "cache/forge_ray").iterdir()] == [names["models/mv_2"]]


def test_what_stays_of_a_run_that_learned_from_the_rows_is_listed_by_name(place: tuple[Store, dict[str, str]]) -> None:
    """What is not known to hold no rows goes, whatever it is called."""
    store, _ = place
    for name in ("rollouts/step-00000001.jsonl", "new-kind-of-file.bin", "tensorboard/events", "attempts/000001.json"):
        put(store, f"runs/run_hers/{name}", b"{}")
    erase(store, REQUEST, OPTIONS)
    assert sorted(path.removeprefix("runs/run_hers/") for path in store.list("runs/run_hers", recursive=True)) == [
        *("attempts/000001.json", "metrics.jsonl", "tensorboard/events"),
    ]


def test_records_and_certificate_name_nobody(place: tuple[Store, dict[str, str]]) -> None:
    store, _ = place
    statement = erase(store, REQUEST, OPTIONS)
    facts = [
        store.read(path)
        for folder in ("erasures", "tombstones", "events", "records/erasures")
        for path in store.list(folder, True)
    ]
    facts += [line for line in audit_log.lines(store) if b'"action":"erasure' in line or b'"action":"tombstones' in line]
    digits = HERS.id.removeprefix("rec_").encode()
    assert not [fact for fact in facts if digits in fact or SECRET in fact]
    assert HERS.id not in json.dumps(statement)
    with Catalog.open(store) as catalog:
        for kind in (DatasetManifest, RunRecord, ModelVersion):
            assert catalog.all(kind)  # the evidence stays


def test_copies_that_left_the_store_are_named(
    place: tuple[Store, dict[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """By the plan, the certificate and a trace: an erasure does not reach them."""
    from forge_ray.cli.erase import show
    from forge_ray.cli.trace import lines
    from forge_ray.governance.erasure.plan import plan_of
    from forge_ray.governance.erasure.search import search
    from forge_ray.governance.trace import of_record, trace
    from forge_ray.store.exports import record_export

    store, ids = place
    with Catalog.open(store) as catalog:
        for name in ("hers", "clean"):
            subject = catalog.get_as(ModelVersion, ids[f"mv_{name}"])
            record_export(catalog, subject, "merged", "bf16", f"/mnt/usb/{name}", subject.files)
        plan = plan_of(catalog, search(catalog, REQUEST))
        assert [(copy.version, copy.to) for copy in plan.exported] == [(ids["mv_hers"], "/mnt/usb/hers")]
        show(plan, begun=False)
        assert f"left the store, remove it yourself: /mnt/usb/hers (merged of {ids['mv_hers']}" in capsys.readouterr().out
        traced = trace(catalog, [of_record(HERS.id)])
        assert [copy.to for copy in traced.reached.exported] == ["/mnt/usb/hers"]
        assert any("left the store: /mnt/usb/hers" in line for line in lines(traced))
    remains = erase(store, REQUEST, OPTIONS)["predicate"]["remains"]
    (copy,) = remains["copies that left the store"]
    assert (copy["version"], copy["to"], copy["form"]) == (ids["mv_hers"], "/mnt/usb/hers", "merged")
