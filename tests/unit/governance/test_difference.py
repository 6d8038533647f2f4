"""`forge diff`: each section, with hand-made records; and the checks of `forge reproduce` before it trains."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from forge_ray.cli.main import cli
from forge_ray.errors import ConfigError, NotFound, StoreError
from forge_ray.governance import difference
from forge_ray.machine import environment
from forge_ray.records import (
    DatasetManifest,
    EvalReport,
    FileEntry,
    ModelVersion,
    RunRecord,
    SplitStats,
    canonical_json,
    digest,
    files_digest,
)
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import MANIFEST, Store

pytestmark = pytest.mark.unit

LOCK: dict[str, Any] = {
    "format": 1,
    "python": "CPython 3.11.7",
    "packages": {
        "torch": {"version": "2.13.0", "record": "a" * 64},
        "numpy": {"version": "2.3.5", "record": "b" * 64},
        "xxhash": {"version": "3.5.0", "record": "c" * 64},
    },
    "hardware": {"machine": "x86_64", "cpu": "EPYC", "cpu_flags": ["avx2", "avx512f", "fma"], "gpus": []},
    "threads": 1,
    "switches": {},
}
OTHER_LOCK: dict[str, Any] = {
    **LOCK,
    "packages": {
        "torch": {"version": "2.12.0", "record": "d" * 64},
        "numpy": {"version": "2.3.5", "record": "e" * 64},
    },
    "hardware": {**LOCK["hardware"], "cpu": "Xeon", "cpu_flags": ["amx_bf16", "avx2", "fma"]},
    "threads": 2,
    "switches": {"OMP_NUM_THREADS": "2"},
}


def put_dataset(catalog: Catalog, name: str, splits: dict[str, list[str]]) -> DatasetManifest:
    """A dataset version whose folder holds only record ids."""
    manifest = DatasetManifest(
        name=name,
        format=2,
        input_digest=name,
        config={"name": name},
        tokenizer_digest="",
        base_model="mv_base",
        sources=(),
        splits={
            split: SplitStats(
                num_records=len(ids),
                num_rows=1,
                num_tokens=10 * len(ids),
                num_trained_tokens=5,
                rows_digest="",
                block_rows=1,
                shard_rows=(1,),
            )
            for split, ids in splits.items()
        },
        num_duplicates=0,
        rejects={},
        sequence_length=8,
    ).sealed()
    for split, ids in splits.items():
        folder = catalog.store.local(f"datasets/{manifest.id}/records/{split}")
        folder.mkdir(parents=True)
        pq.write_table(pa.table({"record": ids}), folder / "part-00000.parquet")
    catalog.store.write(f"datasets/{manifest.id}/{MANIFEST}", b'{"files":[]}')
    return catalog.put(manifest)


def put_version(
    catalog: Catalog,
    name: str,
    manifest: DatasetManifest,
    lock: dict[str, Any],
    answers: dict[str, str],
    lr: float,
    reasons: tuple[str, ...] = (),
) -> ModelVersion:
    """A trained version with its run, lock, metrics and report; every item wants `yes`."""
    store, run = catalog.store, f"run_{name}"
    store.write_once(f"environments/{digest(lock).removeprefix('sha256:')}.json", canonical_json(lock))
    lines = [{"step": 1, "of": 1, "seconds": 1800.0, "peak_bytes": [1, 1], "loss": 1.0}]
    store.write(f"runs/{run}/metrics.jsonl", b"".join(canonical_json(line) + b"\n" for line in lines))
    files = (FileEntry(path="model.safetensors", size=4, sha256=hashlib.sha256(name.encode()).hexdigest()),)
    record = RunRecord(
        id=run,
        name=name,
        method="sft",
        config={"train": {"optimizer": {"lr": lr}, "seed": 0}},
        config_digest="",
        dataset=manifest.id,
        base_model="mv_base",
        base_digest="",
        seed=0,
        num_steps=1,
        samples_seen=8,
        order_digest="",
        attempts=({"world_size": 2, "environments": [digest(lock)]},),
        code_digest=f"sha256:{name}",
        code_commit=name * 40,
        environment={},
        environment_digest=digest(lock),
        hardware=lock["hardware"],
        metrics={"loss": 1.0, "tokens": 100.0, "seconds": 1800.0},
        export=files,
        export_kind="full",
    )
    catalog.put(record)
    items = [{"record": key, "reference": "yes", "prediction": text} for key, text in answers.items()]
    data, safety = b"".join(canonical_json(item) + b"\n" for item in items), b'{"failures":[]}\n'
    report = catalog.put(
        EvalReport(
            subject=run,
            subject_digest=files_digest(files),
            dataset=manifest.id,
            split="test",
            config={},
            num_examples=len(items),
            metrics={"exact_match": sum(text == "yes" for text in answers.values()) / len(items)},
            per_class={},
            items_sha256=hashlib.sha256(data + safety).hexdigest(),
            costs={"latency_ms_per_token": lr * 1000},
        ).sealed()
    )
    store.write(f"evals/{report.id}/items.jsonl", data)
    store.write(f"evals/{report.id}/safety.jsonl", safety)
    catalog.put(  # a leak audit is a report too, whose items are not answers
        EvalReport(
            subject=run,
            subject_digest=files_digest(files),
            dataset=manifest.id,
            split="train",
            config={"leak": {}},
            num_examples=1,
            metrics={"exposure": lr},
            per_class={},
            items_sha256="",
        ).sealed()
    )
    return catalog.put(
        ModelVersion(
            name=name,
            status="rejected" if reasons else "accepted",
            reasons=reasons,
            weights="full",
            files=files,
            files_digest=files_digest(files),
            run=run,
            evals=(report.id,),
            licence="",
        ).sealed()
    )


@pytest.fixture
def versions(catalog: Catalog) -> tuple[ModelVersion, ModelVersion]:
    one = put_dataset(catalog, "one", {"train": ["rec_1", "rec_2", "rec_3"], "test": ["rec_8", "rec_9"]})
    two = put_dataset(catalog, "two", {"train": ["rec_2", "rec_3", "rec_4", "rec_9"], "test": ["rec_8"]})
    old = put_version(catalog, "a", one, LOCK, {"rec_7": "yes", "rec_8": "yes", "rec_9": "no"}, 1e-3)
    new = put_version(catalog, "b", two, OTHER_LOCK, {"rec_8": "no", "rec_9": "yes"}, 1e-2, ("exact_match=0.5 is low",))
    return old, new


def test_diff_reports_every_section(catalog: Catalog, versions: tuple[ModelVersion, ModelVersion]) -> None:
    old, new = versions
    differences = difference.diff(catalog, old.id, new.id)
    assert not differences["same_weights"]
    assert differences["data"]["splits"]["train"] == {"common": 2, "only_old": 1, "only_new": 2}
    assert differences["data"]["splits"]["test"] == {"common": 1, "only_old": 1, "only_new": 0}
    assert differences["data"]["splits"]["validation"] == {"common": 0, "only_old": 0, "only_new": 0}
    assert differences["data"]["moved"] == 1  # rec_9: what was a test is trained on
    assert differences["data"]["counts"]["train.num_records"] == [3, 4]
    assert differences["config"] == {"train.optimizer.lr": [1e-3, 1e-2]}
    assert differences["code"] == {"commit": ["a" * 40, "b" * 40], "digest": ["sha256:a", "sha256:b"]}
    assert differences["environment"] == {
        "packages.numpy": ["2.3.5 (RECORD bbbbbbbbbbbb)", "2.3.5 (RECORD eeeeeeeeeeee)"],
        "packages.torch": ["2.13.0", "2.12.0"],
        "packages.xxhash": ["3.5.0", None],
        "switches.OMP_NUM_THREADS": [None, "2"],
        "threads": [1, 2],
    }
    assert differences["hardware"] == {"cpu": ["EPYC", "Xeon"], "cpu_flags": [["avx512f"], ["amx_bf16"]]}
    (report,) = differences["evaluation"]
    assert report["metrics"] == {"exact_match": [2 / 3, 0.5]}
    assert (report["num_common"], report["right"]) == (2, [1, 1])
    assert report["right_to_wrong"] == [{"record": "rec_8", "reference": "yes", "was": "yes", "is": "no"}]
    assert report["wrong_to_right"] == [{"record": "rec_9", "reference": "yes", "was": "no", "is": "yes"}]
    assert "not the same items: 3 and 2, of which 2 are common" in report["problem"]
    assert differences["gate"] == {"reasons": [[], ["exact_match=0.5 is low"]], "status": ["accepted", "rejected"]}
    assert differences["cost"] == differences["size"] == {}
    assert difference._cost(catalog.store, difference.Side.of(catalog, old.id))["worker_hours"] == 1.0  # 1800 s, two workers
    text = "\n".join(difference.describe(differences))
    for line in (
        "  train: 2 records in both, 1 only in the first, 2 only in the second",
        "  1 records are in another split",
        "  train.optimizer.lr: 0.001 → 0.01",
        f"  commit: {'a' * 12}… → bbbbbbbbbbbb…",
        "  packages.torch: 2.13.0 → 2.12.0",
        "    costs latency_ms_per_token: 1 → 10",
        "  cpu_flags: avx512f → amx_bf16",
        '      rec_8  wants "yes": "yes" → "no"',
        "equal: cost, size",
    ):
        assert line in text.splitlines()


def test_a_version_does_not_differ_from_itself(catalog: Catalog, versions: tuple[ModelVersion, ModelVersion]) -> None:
    promotion.promote(catalog, versions[0].id, "here")
    differences = difference.diff(catalog, "here", versions[0].files_digest)
    assert differences["same_weights"]
    assert [differences[name] for name in ("data", "config", "code", "environment", "hardware", "gate", "cost", "size")] == [
        {}
    ] * 8
    report, leak = differences["evaluation"]
    assert leak["metrics"] == {"exposure": [1e-3, 1e-3]}
    assert (report["right_to_wrong"], report["wrong_to_right"], report["num_common"]) == ([], [], 3)


def test_diff_reports_missing_and_altered_files(catalog: Catalog, versions: tuple[ModelVersion, ModelVersion]) -> None:
    old, new = versions
    store = catalog.store
    dataset = catalog.get_as(RunRecord, old.run).dataset
    store.delete_dir(f"datasets/{dataset}")
    path = f"evals/{old.evals[0]}/items.jsonl"
    store.write(path, store.read(path).replace(b'"no"', b'"yes"'))
    differences = difference.diff(catalog, old.id, new.id)
    assert differences["data"]["problem"] == f"records not compared: {dataset} is no longer in the store"
    assert "splits" not in differences["data"]
    assert "does not match the report's digest" in differences["evaluation"][0]["problem"]
    assert "wrong_to_right" not in differences["evaluation"][0]
    lock = f"environments/{digest(LOCK).removeprefix('sha256:')}.json"
    store.write(lock, store.read(lock).replace(b"2.13.0", b"2.12.0"))
    with pytest.raises(StoreError, match="altered"):
        difference.diff(catalog, old.id, new.id)
    store.delete(lock)  # as of runs trained before locks were kept
    assert difference.diff(catalog, old.id, new.id)["environment"] == {"lock": ["not kept", "kept"]}


def test_diff_command_prints_text_and_json(catalog: Catalog, versions: tuple[ModelVersion, ModelVersion]) -> None:
    words = ["diff", versions[0].id, versions[1].id, "--store", catalog.store.root]
    done = CliRunner().invoke(cli, words)
    assert (done.exit_code, "wrong → right: 1" in done.output) == (0, True)
    assert json.loads(CliRunner().invoke(cli, [*words, "--json"]).stdout)["config"] == {"train.optimizer.lr": [1e-3, 1e-2]}
    assert CliRunner().invoke(cli, ["diff", versions[0].id, "nothing", "--store", catalog.store.root]).exit_code == 2


def test_sections_in_a_list_are_named_by_their_number() -> None:
    old = {"sources": [{"path": "a", "weight": 1.0}, {"path": "b"}], "curate": [{"rule": "x"}]}
    new = {"sources": [{"path": "a", "weight": 2.0}, {"path": "c"}], "curate": []}
    assert difference.changes(old, new) == {
        "curate": [[{"rule": "x"}], []],
        "sources.0.weight": [1.0, 2.0],
        "sources.1.path": ["b", "c"],
    }


def test_an_imported_version_has_no_settings_to_compare(
    catalog: Catalog, versions: tuple[ModelVersion, ModelVersion]
) -> None:
    values = versions[0].model_dump() | {"run": "", "evals": (), "id": "", "status": "imported", "source": "folder"}
    imported = catalog.put(ModelVersion.model_validate(values).sealed())
    differences = difference.diff(catalog, imported.id, versions[1].id)
    assert differences["config"] == {"run": [None, "run_b"]}
    assert differences["data"] == {"dataset": [None, catalog.get_as(RunRecord, "run_b").dataset]}
    assert differences["environment"] == {}
    assert "run: – → run_b" in "\n".join(difference.describe(differences))


# ---------------------------------------------------------------- reproduce, before anything is computed


def reproduce(catalog: Catalog, reference: str, code: int) -> dict[str, Any]:
    done = CliRunner().invoke(cli, ["reproduce", reference, "--store", catalog.store.root, "--json"])
    assert done.exit_code == code, done.output
    error: dict[str, Any] = json.loads(done.stdout)["error"]
    return error


def test_reproduce_rejects_imported_model(catalog: Catalog, versions: tuple[ModelVersion, ModelVersion]) -> None:
    values = versions[0].model_dump() | {"run": "", "evals": (), "id": "", "source": "folder sha256:1"}
    imported = catalog.put(ModelVersion.model_validate(values | {"status": "imported"}).sealed())
    error = reproduce(catalog, imported.id, ConfigError.exit_code)
    assert "imported (folder sha256:1)" in error["message"]
    values |= {"run": versions[0].run, "status": "candidate", "step": 3}
    candidate = catalog.put(ModelVersion.model_validate(values).sealed())
    error = reproduce(catalog, candidate.id, ConfigError.exit_code)
    assert "is step 3 of run_a" in error["message"]
    assert "forge reproduce run_a" in error["hint"]
    assert "not finished" in reproduce(catalog, "run_0", NotFound.exit_code)["message"]


def test_reproduce_requires_unaltered_inputs(catalog: Catalog, tmp_path: Path) -> None:
    from forge_ray.governance import reproduce as again

    store = catalog.store
    with store.staged_dir("datasets/ds_1") as folder:
        (folder / "rows").write_bytes(b"rows")
    files = store.files("datasets/ds_1")
    assert again._link(store, "work/reproduce/x", "datasets/ds_1", files, "the dataset") == 4
    assert Store(store.path("work/reproduce/x")).fetch_dir("datasets/ds_1")
    store.local("datasets/ds_1/rows").write_bytes(b"rowz")
    with pytest.raises(StoreError, match="its manifest says"):
        again._link(store, "work/reproduce/y", "datasets/ds_1", files, "the dataset")
    store.delete("datasets/ds_1/rows")
    with pytest.raises(StoreError, match=r"datasets/ds_1/rows is missing"):
        again._link(store, "work/reproduce/z", "datasets/ds_1", files, "the dataset")
    store.delete_dir("datasets/ds_1")
    with pytest.raises(NotFound, match="not in the store") as caught:
        again._link(store, "work/reproduce/z", "datasets/ds_1", files, "the dataset")
    assert "--rebuild-data" in caught.value.hint
    altered = put_dataset(catalog, "one", {"train": ["rec_1"]}).model_copy(update={"format": 9})
    with pytest.raises(StoreError, match="was altered"):
        again._sealed(altered)


def test_reproduce_notes_worker_counts_and_incidents(catalog: Catalog, versions: tuple[ModelVersion, ModelVersion]) -> None:
    from forge_ray.governance.reproduce import settings

    config = {
        "name": "a",
        "base_model": "b",
        "data": {"sources": [{"path": "c"}]},
        "train": {"scaling": {"num_workers": {"min": 1, "max": 4}}, "sinks": ["mlflow"]},
        "release": {"alias": "a"},
    }
    record = catalog.get_as(RunRecord, versions[0].run).model_copy(update={"config": config})
    taken, notes = settings(record)
    assert (taken.train.scaling.num_workers, taken.train.sinks, notes) == (2, (), [])
    sizes = [{"world_size": 4}, {"world_size": 2}]
    more = {"attempts": sizes, "incidents": ({"kind": "restart"}, {"kind": "quarantine", "rows": [1]})}
    taken, notes = settings(record.model_copy(update=more))
    assert taken.train.scaling.num_workers == 2
    assert notes[0].startswith("it had 4 then 2 workers")
    assert "1 × quarantine" in notes[1]


def test_tensors_are_compared_by_value_kind_and_name(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from forge_ray.governance.tensors import compare_tensors

    old = {"same": torch.ones(3), "moved": torch.zeros(4), "kind": torch.ones(2), "gone": torch.ones(1)}
    new = {"same": torch.ones(3), "moved": torch.tensor([0.0, 0.0, 0.0, 0.25]), "kind": torch.ones(2).bfloat16()}
    for name, tensors in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
    comparison = compare_tensors(tmp_path / "old", tmp_path / "new")
    assert comparison["tensors"] == [
        {"name": "kind", "was": "float32 [2]", "is": "bfloat16 [2]"},
        {"name": "moved", "largest": 0.25, "share": 0.25},
    ]
    assert (comparison["num_tensors"], comparison["num_differ"], comparison["largest"]) == (4, 2, 0.25)
    assert (comparison["only_before"], comparison["only_after"]) == (["gone"], [])


def test_code_commit_marks_a_modified_checkout(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        of = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(of, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    code = tmp_path / "code"
    code.mkdir()
    (code / "__init__.py").write_text("")
    find = environment.code_commit.__wrapped__
    assert find(code) == ""
    git("init", "-q")
    assert find(code) == ""  # in a checkout, and not of it: as a virtual environment may lie
    git("add", ".")
    git("commit", "-qm", "first")
    assert find(code) == git("rev-parse", "HEAD")
    (code / "__init__.py").write_text("changed = True\n")
    assert find(code) == git("rev-parse", "HEAD") + "-dirty"
