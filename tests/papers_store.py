"""A store with a whole history in a moment: a base, a full model trained on it, an adapter on that, judged and released."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from forge_ray.config.base import parse, resolved
from forge_ray.config.run import RunConfig
from forge_ray.models.import_model import import_model
from forge_ray.records import (
    Check,
    CurationStep,
    DatasetManifest,
    Deployment,
    EvalReport,
    Event,
    FileEntry,
    ModelVersion,
    RunRecord,
    SourceFile,
    SourceStats,
    SplitStats,
    canonical_json,
    digest,
    files_digest,
)
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

STEPS = 4
TOKENS, TRAINED = 13_212, 1_238  # of each run
HOSTILE = "rows/<script>alert(1)</script>|`x`\n# heading.jsonl"
LEFT_PAD = {"version": "1.3.0", "record": ""}
ENVIRONMENT = {"python": "3.11.7", "machine": "x86_64", "torch": "2.13.0+cpu", "ray": "2.60.0", "vllm": "absent"}


def filled(root: Path, model: Path) -> tuple[Store, dict[str, str]]:
    """The store and the ids of what is in it."""
    store = Store(str(root))
    with Catalog.open(store) as catalog:
        base = import_model(catalog, model, "tiny-llama", "Apache-2.0")
        promotion.promote(catalog, base.id, "tiny")
        dataset = catalog.put(manifest("tickets", base.id, 79))
        first = catalog.put(run(store, "run_1111111111111111", dataset.id, base, None))
        middle = catalog.put(version(store, "middle", first, base, "full", ()))
        second = catalog.put(run(store, "run_2222222222222222", dataset.id, middle, {"r": 16, "alpha": 32}))
        general = catalog.put(manifest("general", base.id, 0))
        own = catalog.put(report(second.id, dataset.id, 0.875, general.id))
        rival = catalog.put(report(base.id, dataset.id, 0.0, general.id))
        leak = catalog.put(leaks(second.id, dataset.id))
        tuned = catalog.put(version(store, "tickets", second, middle, "adapter", (own.id, rival.id)))
        promotion.promote(catalog, tuned.id, "support@prod")
        endpoint = Deployment(
            name="helpdesk",
            model="support@prod",
            model_version=tuned.id,
            model_digest=tuned.files_digest,
            models={"support@prod": tuned.id},
            config={},
            config_digest=digest({}),
        )
        deployed = catalog.put(endpoint.sealed())
        catalog.append(Event(kind="deployment", subject=deployed.id, data={"state": "up"}))
    ids = {"base": base.id, "middle": middle.id, "tuned": tuned.id, "dataset": dataset.id, "deployed": deployed.id}
    ids["general"] = general.id
    return store, ids | {"first": first.id, "second": second.id, "own": own.id, "rival": rival.id, "leak": leak.id}


def manifest(name: str, base: str, rows: int) -> DatasetManifest:
    counts = {"train": rows, "test": 18}
    splits = {
        split: SplitStats(
            num_records=count,
            num_rows=8,
            num_tokens=count * 40,
            num_trained_tokens=count * 4,
            rows_digest=digest([name, split]),
            block_rows=8,
            shard_rows=(8,),
        )
        for split, count in counts.items()
    }
    source = SourceStats(
        name="tickets",
        num_records=97,
        num_documents=79,
        num_tokens=3160,
        num_trained_tokens=316,
        epochs=1.0,
        licences={"CC-BY-4.0": 90, "": 7},
    )
    masked = CurationStep(rule="personal_data", before=99, after=99, changed=11, found={"email": 12}, reasons={})
    dropped = CurationStep(rule="length", before=99, after=97, changed=0, found={}, reasons={"too_short": 2})
    return DatasetManifest(
        name=name,
        format=2,
        input_digest=digest(name),
        config={"splits": {"test": 0.2, "validation": 0.0}},
        tokenizer_digest=digest("tokenizer"),
        base_model=base,
        sources=(SourceFile(path=HOSTILE, sha256="a1" * 32, size=14_472, num_records=97, num_rejected=3, num_dropped=2),),
        kinds={"chat": 97},
        mixture=(source,),
        curation=(masked, dropped),
        splits=splits,
        num_duplicates=5,
        rejects={"not_json": 3},
        sequence_length=128,
        files=(
            FileEntry(path="packed/train/shard-00000.parquet", size=6835, sha256="b2" * 32),
            FileEntry(path="records/test/part-00000.parquet", size=4331, sha256="c3" * 32),
            FileEntry(path="records/train/part-00000.parquet", size=6455, sha256="d4" * 32),
        ),
        seconds=2.5,
    ).sealed()


def run(store: Store, identifier: str, dataset: str, base: ModelVersion, adapter: dict[str, Any] | None) -> RunRecord:
    """Four steps of 9 s; the first start had two workers and did one of them, the second had one and did the rest."""
    train = {"adapter": adapter, "global_batch": 4, "max_steps": STEPS, "scaling": {"num_workers": 2}}
    gate = {"thresholds": {"exact_match": {"min": 0.5}}, "better_than": [{"incumbent": "base", "margin": 0.2}]}
    values = {
        "name": "tickets",
        "base_model": base.id,
        "data": {"sources": [{"path": "rows.jsonl"}]},
        "train": train,
        "release": {"alias": "support@prod", "gate": gate},
    }
    lines = [
        {"step": step, "loss": 1.0 / step, "lr": 0.1, "tokens": TOKENS // STEPS, "seconds": 9.0}
        for step in range(1, STEPS + 1)
    ]
    store.write(f"runs/{identifier}/metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    with store.staged_dir(f"runs/{identifier}/export") as folder:
        weights = struct.pack("<Q", len(header)) + header + bytes(24)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "of": identifier}))
    lock = canonical_json({"packages": {"torch": {"version": "2.13.0+cpu", "record": "77" * 32}, "left-pad": LEFT_PAD}})
    lock_digest = hashlib.sha256(lock).hexdigest() if adapter else ""  # the older run is from before locks were kept
    if adapter:
        store.write_once(f"environments/{lock_digest}.json", lock)
    return RunRecord(
        id=identifier,
        name="tickets",
        method="sft",
        config=resolved(parse(RunConfig, values)),
        config_digest=digest(identifier),
        dataset=dataset,
        base_model=base.id,
        base_digest=base.files_digest,
        seed=7,
        num_steps=STEPS,
        samples_seen=16,
        order_digest=digest("order"),
        attempts=(
            {"number": 1, "at": "2026-11-25T01:16:58.654+00:00", "host": "n1", "pid": 7, "world_size": 2, "first_step": 0},
            {"number": 2, "at": "2026-11-25T01:18:58.654+00:00", "host": "n1", "pid": 8, "world_size": 1, "first_step": 1},
        ),
        incidents=({"number": 1, "at": "2026-11-25T01:18:00.000+00:00", "kind": "restart", "step": 1},),
        code_digest=digest("code"),
        code_commit="c0ffee" * 6 + "abcd" if adapter else "",
        environment=ENVIRONMENT,
        environment_digest=lock_digest and f"sha256:{lock_digest}",
        hardware={"machine": "x86_64", "cpu": "EPYC 9654", "gpus": []} if adapter else {},
        metrics={"loss": 0.25, "seconds": 36.0, "tokens": float(TOKENS), "trained_tokens": float(TRAINED)},
        adapter={"trained": 32_768} if adapter else {},
        export=store.files(f"runs/{identifier}/export"),
        export_kind="adapter" if adapter else "full",
    )


def version(
    store: Store, name: str, made_by: RunRecord, base: ModelVersion, weights: Any, evals: tuple[str, ...]
) -> ModelVersion:
    """As `release` registers it; a full one has its base's files, so that its shape can be read."""
    files = base.files if weights == "full" else made_by.export
    registered = ModelVersion(
        name=name,
        status="accepted",
        weights=weights,
        files=files,
        files_digest=files_digest(files),
        base_model=base.id,
        run=made_by.id,
        evals=evals,
        checks=(Check(name="exact_match", value=0.875, bound=0.5, passed=True),) if evals else (),
        licence=base.licence,
    ).sealed()
    store.copy_dir(f"models/{base.id}" if weights == "full" else f"runs/{made_by.id}/export", f"models/{registered.id}")
    return registered


def report(subject: str, dataset: str, score: float, general: str) -> EvalReport:
    return EvalReport(
        subject=subject,
        subject_digest=digest(subject),
        dataset=dataset,
        split="test",
        config={},
        num_examples=18,
        metrics={"exact_match": score, "loss": 0.1256, "general_loss": 2.5},
        per_slice={"source": {"tickets": {"exact_match": score, "count": 18.0}}},
        costs={"latency_ms_per_token": 3.25},
        undefined=("perplexity",),
        per_class={"late|parcel": {"f1": score, "support": 9.0}, "refund": {"f1": 1.0, "support": 9.0}},
        general=general,
        num_general=16,
        items_sha256="f6" * 32,
        seconds=8.0,
    ).sealed()


def leaks(subject: str, dataset: str) -> EvalReport:
    """A leak audit."""
    return EvalReport(
        subject=subject,
        subject_digest=digest(subject),
        dataset=dataset,
        split="train",
        config={"leak": {}},
        num_examples=64,
        metrics={"leak_auc": 0.53, "exposure_max": 1.5},
        per_class={},
        items_sha256="99" * 32,
    ).sealed()
