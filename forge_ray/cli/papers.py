"""`forge papers`, `forge export mlflow`: documents about a version, and exports to other registries."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb

if TYPE_CHECKING:
    from forge_ray.store.files import Store


@click.group(cls=Verbs)
def top() -> None:
    """Top-level verbs; `forge` registers them."""


@click.group(cls=Verbs)
def export() -> None:
    """Export runs and versions to MLflow."""


@verb(top, "papers", "forge papers support@prod --out papers/ --pack papers.tar")
@click.argument("reference", metavar="VERSION|ALIAS")
@click.option("--out", required=True, metavar="DIR", help="Folder for the documents.")
@click.option("--pack", metavar="FILE.tar", help="Also write a tar of documents, records and signatures, to verify offline.")
@click.option("--power-w", type=float, help="Mean power of one worker during training in watts, to estimate energy.")
@click.option("--base-flops", type=float, help="Training compute of the base model in FLOPs, as published by its provider.")
def papers(
    store: Store, as_json: bool, reference: str, out: str, pack: str | None, power_w: float | None, base_flops: float | None
) -> Any:
    """Write documents: model card, bill of materials, provenance.

    Also writes Croissant, OpenLineage and evidence for the EU AI Act, all from the records of the version.
    With FORGE_SIGNER set, the provenance is signed."""
    from forge_ray.papers import write
    from forge_ray.papers.facts import gather
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.signing import private_key

    with Catalog.read_only(store) as index:
        facts = gather(index, reference, power_w, base_flops)
    documents = write.papers(facts, private_key())
    digests = write.write(Path(out), documents)
    packed = write.pack(Path(pack), store, facts, documents) if pack else None
    if not as_json:
        for name in documents:
            echo(f"{digests[name][:16]}  {len(documents[name]):>8,}  {Path(out) / name}")
        if packed:
            echo(f"{packed[:16]}  {Path(str(pack)).stat().st_size:>8,}  {pack}")
        if facts.missing:
            echo(f"not in this store: {', '.join(facts.missing)}", err=True)
    result: dict[str, Any] = {"model_version": facts.version.id, "out": out, "papers": digests, "missing": facts.missing}
    return result | ({"pack": {"path": pack, "sha256": packed}} if packed else {})


@verb(export, "mlflow", "forge export mlflow support@prod --uri http://mlflow.internal:5000")
@click.argument("reference", metavar="VERSION|ALIAS|RUN")
@click.option("--uri", required=True, metavar="URI", help="URI of the tracking server, e.g. http://mlflow.internal:5000.")
@click.option("--experiment", default="", help="Name of the experiment. Default: the run's name.")
@click.option("--with-weights", is_flag=True, help="Upload the version's files. Default: only their digest.")
def export_mlflow(store: Store, as_json: bool, reference: str, uri: str, experiment: str, with_weights: bool) -> Any:
    """Export a run, its metrics and its version to MLflow.

    What the server already has is not written again."""
    from forge_ray.papers import mlflow_export
    from forge_ray.store.catalog import Catalog

    with (Catalog.open if with_weights else Catalog.read_only)(store) as index:  # weights that leave are on record
        exported = mlflow_export.export(index, reference, uri, experiment, with_weights)
    if not as_json:
        echo(f"{exported.run} → run {exported.mlflow_run} of experiment {exported.experiment}, {exported.metrics} values")
        if exported.version:
            aliases = ", ".join((exported.aliases or {}).values())
            registered = f"{exported.registered} version {exported.registered_version}"
            echo(f"{exported.version} → {registered}, aliases: {aliases or 'none'}")
    return exported


PAPERS: tuple[click.Command, ...] = (top.commands["papers"], export)
