"""`forge data …`: prepare, list, show, card, diff, find, export, canaries, clean."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.verbs import Verbs, run_file, verb
from forge_ray.errors import ConfigError

if TYPE_CHECKING:
    from forge_ray.config.run import RunConfig
    from forge_ray.store.files import Store


@click.group(cls=Verbs)
def data() -> None:
    """Datasets: prepare, list, show, card, diff, find, export, canaries, clean."""


@verb(data, "prepare")
@run_file
def data_prepare(store: Store, as_json: bool, config: RunConfig) -> Any:
    """Rows → a packed, content-addressed dataset version."""
    from forge_ray import pipeline

    manifest = pipeline.prepare(config, store)
    if not as_json:
        from forge_ray.cli.show import print_table

        header = ("split", "records", "packed rows", "tokens", "trained tokens", "fill")
        rows = []
        for name, stats in manifest.splits.items():
            room = max(1, stats.num_rows * manifest.sequence_length)
            counts = (stats.num_records, stats.num_rows, stats.num_tokens, stats.num_trained_tokens)
            rows.append((name, *(f"{count:,}" for count in counts), f"{stats.num_tokens / room:.1%}"))
        print_table(manifest.id, header, rows)
        for reason, count in manifest.rejects.items():
            click.echo(f"  {count} × {reason}")
    return manifest


@verb(data, "list")
def data_list(store: Store, as_json: bool) -> Any:
    """Every dataset version."""
    from forge_ray.cli.show import print_table
    from forge_ray.records import DatasetManifest
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        found, present = index.all(DatasetManifest), {manifest.id for manifest in index.datasets()}
    if not as_json:
        names = {d.id: d.name if d.id in present else f"{d.name} (rows erased)" for d in found}
        rows = [
            (
                d.id,
                names[d.id],
                *(f"{d.splits[s].num_records:,}" for s in ("train", "validation", "test")),
                d.created_at[:19],
            )
            for d in found
        ]
        print_table("Datasets", ("dataset", "name", "train", "validation", "test", "created (UTC)"), rows)
    return [manifest.model_dump(mode="json", exclude={"files"}) for manifest in found]


@verb(data, "show")
@click.argument("dataset", metavar="ds_…")
@click.option("--rows", default=3, show_default=True, help="How many packed rows.")
@click.option("--split", type=click.Choice(["train", "validation", "test"]), default="train", show_default=True)
def data_show(store: Store, as_json: bool, dataset: str, rows: int, split: str) -> Any:
    """Packed rows token by token, trained tokens coloured, with the records inside."""
    from forge_ray.cli.show import packed_rows, print_packed_rows
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        shown = packed_rows(index, dataset, split, rows)
    if not as_json:
        print_packed_rows(shown)
    return {"dataset": dataset, "split": split, "rows": shown}


@verb(data, "card")
@click.argument("dataset", metavar="ds_…")
def data_card(store: Store, as_json: bool, dataset: str) -> Any:
    """Counts, sources, licences, drops and a length histogram, written as cards/<id>/README.md of the store."""
    from forge_ray.data.dataset.card import markdown, write_card
    from forge_ray.records import DatasetManifest
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        manifest = index.get_as(DatasetManifest, dataset)
    folder = write_card(store, manifest)
    if not as_json:
        click.echo(markdown(manifest))
        click.echo(f"written: {store.place}/{folder}", err=True)
    return {"dataset": dataset, "folder": f"{store.place}/{folder}", "manifest": manifest.model_dump(exclude={"files"})}


@verb(data, "diff")
@click.argument("old", metavar="ds_OLD")
@click.argument("new", metavar="ds_NEW")
def data_diff(store: Store, as_json: bool, old: str, new: str) -> Any:
    """Records added, removed and changed between two versions, by source."""
    from forge_ray.data.dataset.compare import diff
    from forge_ray.records import DatasetManifest
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        found = diff(store, index.get_as(DatasetManifest, old), index.get_as(DatasetManifest, new))
    if not as_json:
        from forge_ray.cli.show import print_table

        kinds = ("added", "removed", "changed")
        rows = [(name, *(f"{counts[kind]:,}" for kind in kinds)) for name, counts in found["by_source"].items()]
        print_table(
            f"{old} → {new}", ("source", *kinds), [*rows, ("all", *(f"{found['counts'][kind]:,}" for kind in kinds))]
        )
        for key, (before, after) in found["settings"].items():
            click.echo(f"  {key}: {before} → {after}")
        for kind in kinds:
            for row in found[kind]:
                was = f"  was {row['was']}" if kind == "changed" else ""
                click.echo(f"  {kind:<8} {row['record']}  {row['file']}:{row['line']}{was}")
    return found


@verb(data, "find")
@click.argument("record", metavar="rec_…", required=False, default="")
@click.option("--subject", default="", help="Value of the subject column; - reads it from standard input.")
@click.option("--key-file", default="", help="The HMAC key, where the run file named one.")
def data_find(store: Store, as_json: bool, record: str, subject: str, key_file: str) -> Any:
    """Which dataset versions hold a record, or any record of a person."""
    from forge_ray.data.dataset.compare import holders
    from forge_ray.data.record.subject import subject_digest, subject_key
    from forge_ray.records import DatasetManifest
    from forge_ray.store.catalog import Catalog

    if bool(record) == bool(subject):
        raise ConfigError("forge data find needs a record id or --subject, and one of them", hint="forge data find rec_…")
    if subject == "-":  # an argument would stay in the shell's history
        subject = sys.stdin.read().strip()
    hashed = subject_digest(subject_key(store, key_file), subject) if subject else ""
    with Catalog(store) as index:
        found = holders(store, index.all(DatasetManifest), record, hashed)
    if not as_json:
        from forge_ray.cli.show import print_table

        rows = [(row["record"], row["dataset"], row["name"], row["split"], f"{row['file']}:{row['line']}") for row in found]
        print_table(f"{len(found)} found", ("record", "dataset", "name", "split", "where"), rows)
    return found


@verb(data, "export")
@click.argument("dataset", metavar="ds_…")
@click.argument("target", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--split", type=click.Choice(["train", "validation", "test", "all"]), default="all", show_default=True)
def data_export(store: Store, as_json: bool, dataset: str, target: Path, split: str) -> Any:
    """The records as JSONL, or as Parquet with typed columns, by the ending of FILE."""
    from forge_ray.data.dataset.export import export
    from forge_ray.data.dataset.version import SPLITS
    from forge_ray.records import DatasetManifest
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        manifest = index.get_as(DatasetManifest, dataset)
    count = export(store, manifest, SPLITS if split == "all" else (split,), target)
    if not as_json:
        click.echo(f"{count:,} records in {target}")
    return {"dataset": dataset, "split": split, "file": str(target), "records": count}


@verb(data, "canaries")
@click.argument("target", metavar="OUT.jsonl", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--count", default=32, show_default=True, help="Rows; some of them will be held out, which is their control.")
@click.option("--digits", default=8, show_default=True, help="Length of each row's random code.")
@click.option("--seed", default=0, show_default=True)
def data_canaries(store: Store, as_json: bool, target: Path, count: int, digits: int, seed: int) -> Any:
    """Rows with random codes, to list among data.sources: `forge audit leak` then measures how well they are remembered."""
    from forge_ray.data.curate import canaries

    canaries.write(target, canaries.generate(count, digits, seed))
    if not as_json:
        click.echo(f"{count} canaries in {target}; add to data.sources: {{path: {target}, name: canaries}}")
    return {"file": str(target), "count": count, "digits": digits, "seed": seed}


@verb(data, "clean")
def data_clean(store: Store, as_json: bool) -> Any:
    """Remove the work area of dataset builds; the next build redoes what it would have found there."""
    from forge_ray.data.build.work import clean

    freed = clean(store)
    if not as_json:
        click.echo(f"removed {freed / 1e6:,.1f} MB")
    return {"bytes": freed}
