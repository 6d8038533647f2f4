"""`forge models …`: import, export, list, show, promote and archive model versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.model_check import print_lines, print_support, support_of_model
from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb

if TYPE_CHECKING:
    from forge_ray.store.files import Store


@click.group(cls=Verbs)
def models() -> None:
    """Import, list, show, promote and archive model versions."""


@verb(models, "import", "forge models import ~/models/SmolLM2-135M --licence Apache-2.0 --alias base")
@click.argument("path")
@click.option("--name", help="Name of the version. Default: the name of the file or folder.")
@click.option("--licence", default="", help="SPDX licence identifier, e.g. Apache-2.0.")
@click.option("--alias", default="", help="Alias to point at the version.")
@click.option("--add-tokens", default="", metavar="FILE", help="New tokens, one a line or a JSON list.")
def models_import(
    store: Store, as_json: bool, path: str, name: str | None, licence: str, alias: str, add_tokens: str
) -> Any:
    """Import a Hugging Face folder or GGUF file as a version.

    Hugging Face weights must be safetensors; no code of the model is executed."""
    from forge_ray.models import new_tokens
    from forge_ray.models.import_model import import_model
    from forge_ray.progress import stage
    from forge_ray.release import promotion
    from forge_ray.store.catalog import Catalog

    tokens = new_tokens.read_tokens(Path(add_tokens)) if add_tokens else ()
    with Catalog.open(store) as index, stage("import") as it:
        if alias:
            promotion.refuse_name(index, alias)  # before the work
        version = import_model(index, path, name or Path(path).stem.lower(), licence)
        if tokens:
            version = new_tokens.add_tokens(index, version, tokens, name or version.name)
        if alias:
            promotion.promote(index, version.id, alias)
        it.done(f"{version.id}  {version.name}{f' ← {alias}' if alias else ''}")
    if not as_json:
        print_support(store, version)
    return version


@verb(models, "shrink", "forge models shrink base --layers 0,2,4,6,8,10 --out base-half")
@click.argument("reference", metavar="VERSION|ALIAS")
@click.option("--layers", required=True, metavar="N,N,…", help="Layers to keep, by number from 0.")
@click.option("--out", "name", required=True, metavar="NAME", help="Name of the new version.")
@click.option("--alias", default="", help="Alias to point at the version.")
def models_shrink(store: Store, as_json: bool, reference: str, layers: str, name: str, alias: str) -> Any:
    """Make a version of some layers of another: a student to distil into.

    It answers badly until it is trained (docs/guides/distil.md)."""
    from forge_ray.errors import ConfigError
    from forge_ray.models.shrink import shrink
    from forge_ray.progress import stage
    from forge_ray.release import promotion
    from forge_ray.store.catalog import Catalog

    parts = [part.strip() for part in layers.split(",")]
    if wrong := [part for part in parts if not part.isdecimal()]:
        raise ConfigError(f"--layers {layers!r}: {wrong[0]!r} is not a number", hint="for example --layers 0,2,4")
    with Catalog.open(store) as index, stage("shrink") as it:
        if alias:
            promotion.refuse_name(index, alias)  # before the work
        version = shrink(index, reference, [int(part) for part in parts], name)
        if alias:
            promotion.promote(index, version.id, alias)
        it.done(f"{version.id}  {version.name}: {version.source}{f' ← {alias}' if alias else ''}")
    return version


@verb(models, "export", "forge models export support@prod --out support --form merged")
@click.argument("reference", metavar="VERSION|ALIAS")
@click.option("--out", required=True, metavar="DIR", help="New folder for the copy.")
@click.option(
    "--form",
    required=True,
    type=click.Choice(["adapter", "merged", "gguf"]),
    help="adapter: a PEFT folder; merged: a Hugging Face folder with full weights; gguf: a file for llama.cpp.",
)
@click.option(
    "--precision",
    type=click.Choice(["bf16", "fp16", "fp32"]),
    help="Precision of full weights; fp16 with gguf only. Default: as the version's full weights are stored.",
)
def models_export(store: Store, as_json: bool, reference: str, out: str, form: Any, precision: Any) -> Any:
    """Write a version to a folder that other tools open.

    The copy is an event in the audit log; a policy with no_export refuses it (exit code 3)."""
    from forge_ray.export.leave import export_version
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        left = export_version(index, reference, out, form, precision)
    if not as_json:
        for note in left.notes:
            echo(f"note: {note}", err=True)
        echo(left.to)
    return left


@verb(models, "check", "forge models check ~/models/SmolLM2-135M")
@click.argument("reference", metavar="PATH|VERSION|ALIAS")
def models_check(store: Store, as_json: bool, reference: str) -> Any:
    """Show what a model's chat template supports.

    Which conversations it has a place for, its ends of a turn, and one as it is trained."""
    from dataclasses import asdict

    support = support_of_model(store, reference)
    if not as_json:
        print_lines(support)
    return asdict(support)


@verb(models, "list", "forge models list")
def models_list(store: Store, as_json: bool) -> Any:
    """List every model version with its aliases and scores."""
    from forge_ray.cli.show import models as listed
    from forge_ray.cli.show import print_table
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        versions = listed(index)
    if not as_json:
        header = ("version", "name", "status", "weights", "MB", "aliases", "exact match", "loss")
        rows = [
            (
                *(str(item[key]) for key in ("id", "name", "status", "weights")),
                f"{item['size'] / 1e6:.1f}",
                ", ".join(item["aliases"]),
                *(f"{item['metrics'][key]:.3f}" if key in item["metrics"] else "" for key in ("exact_match", "loss")),
            )
            for item in versions
        ]
        print_table("Model versions", header, rows)
    return versions


@verb(models, "show", "forge models show support@prod")
@click.argument("reference", metavar="VERSION|ALIAS")
def models_show(store: Store, as_json: bool, reference: str) -> Any:
    """Show one model version: files, digests, licence, parents."""
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.resolve import resolve

    with Catalog.read_only(store) as index:
        version = index.model(resolve(index, reference))
        if not as_json:
            echo(json.dumps(version.model_dump(mode="json"), indent=2, ensure_ascii=False))
        return version


@verb(models, "promote", "forge models promote mv_0123456789abcdef --alias support@prod")
@click.argument("reference", metavar="VERSION|ALIAS")
@click.option("--alias", required=True, help="Alias to point at the version.")
def models_promote(store: Store, as_json: bool, reference: str, alias: str) -> Any:
    """Point an alias at a version.

    A rejected version is refused (exit code 3)."""
    from forge_ray.release import promotion
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        version = promotion.promote(index, reference, alias)
    if not as_json:
        echo(f"{alias} → {version.id}")
    return {"alias": alias, "model_version": version.id}


@verb(models, "archive", "forge models archive mv_0123456789abcdef")
@click.argument("reference", metavar="VERSION|ALIAS")
def models_archive(store: Store, as_json: bool, reference: str) -> Any:
    """Archive a version: endpoints answer 410 for it.

    An alias with a fallback is answered by the fallback. `forge models restore` restores the version."""
    return _archived(store, as_json, reference, restore=False)


@verb(models, "restore", "forge models restore mv_0123456789abcdef")
@click.argument("reference", metavar="VERSION|ALIAS")
def models_restore(store: Store, as_json: bool, reference: str) -> Any:
    """Restore an archived version."""
    return _archived(store, as_json, reference, restore=True)


def _archived(store: Store, as_json: bool, reference: str, restore: bool) -> Any:
    from forge_ray.release import promotion
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        version = promotion.archive(index, reference, restore)
    state = "active" if restore else "archived"
    if not as_json:
        echo(f"{version.id} {state}")
    return {"model_version": version.id, "state": state}
