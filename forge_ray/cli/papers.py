"""`forge papers`, `forge export mlflow`: what is on record about a version, for others to read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.verbs import Verbs, verb

if TYPE_CHECKING:
    from forge_ray.store.files import Store


@click.group(cls=Verbs)
def top() -> None:
    """Commands of this module that stand alone."""


@click.group(cls=Verbs)
def export() -> None:
    """Runs and versions for other registries."""


@verb(top, "papers")
@click.argument("reference", metavar="VERSION|ALIAS")
@click.option("--out", required=True, metavar="DIR", help="Folder for the papers.")
@click.option("--pack", metavar="FILE.tar", help="Also a tar of papers, records and signatures, to be checked offline.")
@click.option("--power-w", type=float, help="Mean watts of one worker while it trains; energy is estimated from it.")
@click.option("--base-flops", type=float, help="Training compute of the base model in FLOPs, as its provider states it.")
def papers(
    store: Store, as_json: bool, reference: str, out: str, pack: str | None, power_w: float | None, base_flops: float | None
) -> Any:
    """Model card, bill of materials, Croissant, OpenLineage, provenance and evidence of a version, from its records.

    With FORGE_SIGNER set, the provenance is signed too."""
    from forge_ray.papers import write
    from forge_ray.papers.facts import gather
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.signing import private_key

    with Catalog(store) as index:
        facts = gather(index, reference, power_w, base_flops)
    made = write.papers(facts, private_key())
    digests = write.write(Path(out), made)
    packed = write.pack(Path(pack), store, facts, made) if pack else None
    if not as_json:
        for name in made:
            click.echo(f"{digests[name][:16]}  {len(made[name]):>8,}  {Path(out) / name}")
        if packed:
            click.echo(f"{packed[:16]}  {Path(str(pack)).stat().st_size:>8,}  {pack}")
        if facts.missing:
            click.echo(f"not in this store: {', '.join(facts.missing)}", err=True)
    result: dict[str, Any] = {"model_version": facts.version.id, "out": out, "papers": digests, "missing": facts.missing}
    return result | ({"pack": {"path": pack, "sha256": packed}} if packed else {})


@verb(export, "mlflow")
@click.argument("reference", metavar="VERSION|ALIAS|RUN")
@click.option("--uri", required=True, metavar="URI", help="Of the tracking server, e.g. http://mlflow.internal:5000.")
@click.option("--experiment", default="", help="Name of the experiment; default: the run's name.")
@click.option("--with-weights", is_flag=True, help="Upload the version's files; else their digest is all that it gets.")
def export_mlflow(store: Store, as_json: bool, reference: str, uri: str, experiment: str, with_weights: bool) -> Any:
    """A run, its metrics and its version → an MLflow server; what is there already is not written again."""
    from forge_ray.papers import mlflow_export
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        done = mlflow_export.export(index, reference, uri, experiment, with_weights)
    if not as_json:
        click.echo(f"{done.run} → run {done.mlflow_run} of experiment {done.experiment}, {done.metrics} values")
        if done.version:
            aliases = ", ".join((done.aliases or {}).values())
            click.echo(f"{done.version} → {done.registered} version {done.registered_version}, aliases: {aliases or 'none'}")
    return done


PAPERS: tuple[click.Command, ...] = (top.commands["papers"], export)
