"""A store with signers and a policy, for tests of who may do what."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from forge_ray.governance import signers
from forge_ray.records import EvalReport, FileEntry, ModelVersion, RunRecord, files_digest
from forge_ray.store import signing
from forge_ray.store.catalog import Catalog

PEOPLE = {
    "olga": ("owner",),
    "sam": ("data_steward",),
    "tina": ("trainer",),
    "vera": ("validator",),
    "rosa": ("releaser",),
    "rolf": ("releaser",),
}


def add_people(catalog: Catalog, folder: Path) -> dict[str, Any]:
    """name → private key; all of them signers of the store."""
    keys: dict[str, Any] = {}
    for name, roles in PEOPLE.items():
        with signing.acting(keys.get("olga")):
            signers.create(catalog, name, roles, folder, "ed25519")
        keys[name] = signing.load_private(folder / f"{name}.key")
    return keys


def model(name: str, **more: Any) -> ModelVersion:
    values = {
        "status": "imported",
        "weights": "full",
        "files": (),
        "files_digest": files_digest(()),
        "licence": "mit",
    } | more
    return ModelVersion(name=name, **cast(Any, values)).sealed()


def trained(
    catalog: Catalog,
    people: dict[str, Any],
    status: str = "accepted",
    name: str = "tuned",
    files: tuple[FileEntry, ...] = (),
) -> ModelVersion:
    """A version that Tina trained and evaluated."""
    with signing.acting(people["tina"]):
        base = catalog.put(model("base"))
        run = RunRecord.model_construct(
            id="run_0123456789abcdef",
            name="run",
            method="sft",
            config={},
            config_digest="c",
            dataset="ds_x",
            base_model=base.id,
            base_digest="b",
            seed=0,
            num_steps=1,
            samples_seen=1,
            order_digest="o",
            attempts=(),
            code_digest="d",
            environment={},
            metrics={},
            export=(),
            export_kind="full",
        )
        catalog.put(run)
        report = EvalReport(
            subject=run.id,
            subject_digest="s",
            dataset="ds_x",
            split="test",
            config={},
            num_examples=1,
            metrics={},
            per_class={},
            items_sha256="i",
        ).sealed()
        report = catalog.put(report)
        more: dict[str, Any] = {"files": files, "files_digest": files_digest(files)}
        return catalog.put(model(name, status=status, run=run.id, base_model=base.id, evals=(report.id,), **more))


def allow(catalog: Catalog, people: dict[str, Any], **policy: Any) -> None:
    with signing.acting(people["olga"]):
        signers.set_policy(catalog, policy, "")
