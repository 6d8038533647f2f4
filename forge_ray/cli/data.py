"""`forge data …`: prepare, list, show, card, diff, find, export, canaries, clean."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, run_file, verb
from forge_ray.errors import ConfigError

if TYPE_CHECKING:
    from forge_ray.config.run import RunConfig
    from forge_ray.store.files import Store


@click.group(cls=Verbs)
def data() -> None:
    """Build, inspect, compare and export datasets."""


@verb(data, "prepare", "forge data prepare RUN.yaml")
@run_file
def data_prepare(store: Store, as_json: bool, config: RunConfig) -> Any:
    """Build a packed, content-addressed dataset version from rows."""
    from forge_ray import pipeline

    manifest = pipeline.prepare(config, store)
    if not as_json:
        from forge_ray.cli.show import print_table
        from forge_ray.data.tokens.lost import remedy

        header = ("split", "records", "packed rows", "tokens", "trained tokens", "fill")
        rows = []
        for name, stats in manifest.splits.items():
            capacity = max(1, stats.num_rows * manifest.sequence_length)
            counts = (stats.num_records, stats.num_rows, stats.num_tokens, stats.num_trained_tokens)
            rows.append((name, *(f"{count:,}" for count in counts), f"{stats.num_tokens / capacity:.1%}"))
        print_table(manifest.id, header, rows)
        for reason, count in manifest.rejects.items():
            echo(f"  {count} × {reason}")
        if hint := remedy(manifest.rejects):
            echo(f"  {hint}")
    return manifest


@verb(data, "list", "forge data list")
def data_list(store: Store, as_json: bool) -> Any:
    """List every dataset version."""
    from forge_ray.cli.show import print_table
    from forge_ray.records import DatasetManifest
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.erased import withdrawn

    with Catalog.read_only(store) as index:
        manifests, present = index.all(DatasetManifest), {manifest.id for manifest in index.datasets()}
        erased = withdrawn(store).datasets
    if not as_json:
        absent = {d.id: " (rows erased)" if d.id in erased else " (removed)" for d in manifests if d.id not in present}
        names = {d.id: f"{d.name}{absent.get(d.id, '')}" for d in manifests}
        rows = [
            (
                d.id,
                names[d.id],
                *(f"{d.splits[s].num_records:,}" for s in ("train", "validation", "test")),
                d.created_at[:19],
            )
            for d in manifests
        ]
        print_table("Datasets", ("dataset", "name", "train", "validation", "test", "created (UTC)"), rows)
    return [manifest.model_dump(mode="json", exclude={"files"}) for manifest in manifests]


@verb(data, "show", "forge data show ds_0123456789abcdef --rows 5")
@click.argument("dataset", metavar="ds_…")
@click.option("--rows", default=3, show_default=True, help="Number of packed rows to show.")
@click.option(
    "--split", type=click.Choice(["train", "validation", "test"]), default="train", show_default=True, help="Split to show."
)
def data_show(store: Store, as_json: bool, dataset: str, rows: int, split: str) -> Any:
    """Show packed rows token by token, with trained tokens marked.

    Each document is shown with the id of its record."""
    from forge_ray.cli.show import packed_rows, print_packed_rows
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        packed = packed_rows(index, dataset, split, rows)
    if not as_json:
        print_packed_rows(packed)
    return {"dataset": dataset, "split": split, "rows": packed}


@verb(data, "card", "forge data card ds_0123456789abcdef")
@click.argument("dataset", metavar="ds_…")
def data_card(store: Store, as_json: bool, dataset: str) -> Any:
    """Write a dataset card: counts, sources, licences, lengths.

    The card is written to cards/<id>/README.md in the store; it also counts the dropped rows."""
    from forge_ray.data.dataset.card import markdown, write_card
    from forge_ray.records import DatasetManifest
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        manifest = index.get_as(DatasetManifest, dataset)
    folder = write_card(store, manifest)
    if not as_json:
        echo(markdown(manifest))
        echo(f"written: {store.place}/{folder}", err=True)
    return {"dataset": dataset, "folder": f"{store.place}/{folder}", "manifest": manifest.model_dump(exclude={"files"})}


@verb(data, "diff", "forge data diff ds_0123456789abcdef ds_fedcba9876543210")
@click.argument("old", metavar="ds_OLD")
@click.argument("new", metavar="ds_NEW")
def data_diff(store: Store, as_json: bool, old: str, new: str) -> Any:
    """Compare the records of two dataset versions.

    Lists records that were added, removed and changed, by source."""
    from forge_ray.data.dataset.compare import diff
    from forge_ray.records import DatasetManifest
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        changes = diff(store, index.get_as(DatasetManifest, old), index.get_as(DatasetManifest, new))
    if not as_json:
        from forge_ray.cli.show import print_table

        kinds = ("added", "removed", "changed")
        rows = [(name, *(f"{counts[kind]:,}" for kind in kinds)) for name, counts in changes["by_source"].items()]
        print_table(
            f"{old} → {new}", ("source", *kinds), [*rows, ("all", *(f"{changes['counts'][kind]:,}" for kind in kinds))]
        )
        for key, (before, after) in changes["settings"].items():
            echo(f"  {key}: {before} → {after}")
        for kind in kinds:
            for row in changes[kind]:
                was = f"  was {row['was']}" if kind == "changed" else ""
                echo(f"  {kind:<8} {row['record']}  {row['file']}:{row['line']}{was}")
    return changes


@verb(data, "find", "forge data find rec_0123456789abcdef01234567")
@click.argument("record", metavar="rec_…", required=False, default="")
@click.option("--subject", default="", help="Value of the subject column; - reads it from standard input.")
@click.option("--key-file", default="", help="File with the HMAC key, if the run file named one.")
def data_find(store: Store, as_json: bool, record: str, subject: str, key_file: str) -> Any:
    """Find the dataset versions that hold a record or a person."""
    from forge_ray.data.dataset.compare import holders
    from forge_ray.data.record.subject import OTHER_CASE
    from forge_ray.governance.trace import subject_digests
    from forge_ray.records import DatasetManifest
    from forge_ray.store.catalog import Catalog

    if bool(record) == bool(subject):
        raise ConfigError("forge data find needs either a record id or --subject", hint="forge data find rec_…")
    if subject == "-":  # an argument would stay in the shell's history
        subject = sys.stdin.read().strip()
    with Catalog.read_only(store) as index:
        manifests = index.all(DatasetManifest)
        digests = subject_digests(store, manifests, subject, key_file) if subject else {}
        spelt = {
            dataset: [digest for digest, difference in of_dataset.items() if difference != OTHER_CASE]
            for dataset, of_dataset in digests.items()
        }
        holdings = holders(store, manifests, record, spelt)
    if not as_json:
        from forge_ray.cli.show import print_table

        rows = [
            (row["record"], row["dataset"], row["name"], row["split"], f"{row['file']}:{row['line']}") for row in holdings
        ]
        print_table(f"{len(holdings)} found", ("record", "dataset", "name", "split", "where"), rows)
    return holdings


@verb(data, "export", "forge data export ds_0123456789abcdef rows.parquet")
@click.argument("dataset", metavar="ds_…")
@click.argument("target", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--split",
    type=click.Choice(["train", "validation", "test", "all"]),
    default="all",
    show_default=True,
    help="Split to export.",
)
def data_export(store: Store, as_json: bool, dataset: str, target: Path, split: str) -> Any:
    """Export the records of a dataset as JSONL or Parquet.

    The file name's extension chooses the format; Parquet has typed columns."""
    from forge_ray.data.dataset.export import export
    from forge_ray.data.dataset.version import SPLITS
    from forge_ray.records import DatasetManifest
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        manifest = index.get_as(DatasetManifest, dataset)
    count = export(store, manifest, SPLITS if split == "all" else (split,), target)
    if not as_json:
        echo(f"{count:,} records in {target}")
    return {"dataset": dataset, "split": split, "file": str(target), "records": count}


@verb(data, "canaries", "forge data canaries canaries.jsonl --count 64")
@click.argument("target", metavar="OUT.jsonl", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--count", default=32, show_default=True, help="Number of rows; some are held out, as the control group.")
@click.option("--digits", default=8, show_default=True, help="Length of each random code.")
@click.option("--seed", default=0, show_default=True, help="Seed for the random codes.")
def data_canaries(store: Store, as_json: bool, target: Path, count: int, digits: int, seed: int) -> Any:
    """Write rows with random codes, to measure memorisation.

    Add the file to data.sources and train; `forge audit leak` then measures how well the codes are memorised."""
    from forge_ray.data.curate import canaries

    canaries.write(target, canaries.generate(count, digits, seed))
    if not as_json:
        echo(f"{count} canaries in {target}; add to data.sources: {{path: {target}, name: canaries}}")
    return {"file": str(target), "count": count, "digits": digits, "seed": seed}


@verb(data, "clean", "forge data clean")
def data_clean(store: Store, as_json: bool) -> Any:
    """Remove the intermediate files of dataset builds.

    The next build computes them again."""
    from forge_ray.data.build.work import clean

    freed = clean(store)
    if not as_json:
        echo(f"removed {freed / 1e6:,.1f} MB")
    return {"bytes": freed}
