"""`forge models export`: a version leaves the store as a folder that other tools open.

The folder is written next to its place, with its documents and its signature; then the copy is put on record, and then the
folder gets its name. What a killed export leaves has a name that says of which process it is; the next export removes it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from forge_ray.errors import ConfigError, ForgeError, StoreError
from forge_ray.export.folder import (
    Form,
    Precision,
    StoredWeights,
    stored_precision,
    write_adapter_folder,
    write_documents,
    write_gguf_folder,
    write_merged_folder,
)
from forge_ray.models.class_head import is_classifier
from forge_ray.papers.facts import gather, num_parameters
from forge_ray.progress import Stage, stage
from forge_ray.records import ModelVersion, files_digest
from forge_ray.release.promotion import require_signed
from forge_ray.store import exports, modes, paths, signing
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import hash_dir, sync_tree
from forge_ray.store.home import expanded
from forge_ray.store.out_of_use import refuse_withdrawn
from forge_ray.store.owner import is_alive, owner_mark
from forge_ray.store.resolve import resolve

UNFINISHED = ".exporting-"
FULL = re.compile(rf"os error {errno.ENOSPC}\b|\d+ requested and \d+ written")
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Left:
    """A version that left the store. `is_new`: whether it was written now; the same copy was there otherwise. `notes`: what
    whoever uses it must know."""

    model_version: str
    form: Form
    precision: str
    to: str
    digest: str
    num_files: int
    num_bytes: int
    signed_by: str
    is_new: bool
    notes: tuple[str, ...] = ()


def export_version(catalog: Catalog, reference: str, out: str, form: Form, precision: Precision | None) -> Left:
    """Write a version to the new folder `out`. Raises `NotFound`, `ConfigError` for a form or a place that it cannot have,
    `PolicyError` where it may not leave, `StoreError` where there is no space."""
    version, target = catalog.model(resolve(catalog, reference)), expanded(out).absolute()
    refuse_withdrawn(catalog, version.id)
    require_signed(catalog, version)
    exports.refuse_export(catalog, version)
    _check_form(version, form, precision)
    _check_place(catalog, target)
    with stage("export") as it:
        held = _held(catalog, version, it)
        width = _precision(held, form, precision)
        if same := _same_copy(catalog, target, version, form, width):
            it.done(f"{version.id}  the same copy is in {target}")
            return same
        _refuse_other(target)
        with _failures_named(target), _staging(target) as folder:
            _check_space(catalog, held, form, width, target.parent)
            notes = _fill(held, form, width, folder, it)
            it.update(1, 1, "documents and signature")
            write_documents(gather(catalog, version.id), held, form, width, folder)
            signed_by, unsigned = _sign(catalog, version, folder)
            left = _publish(catalog, version, form, width, folder, target, signed_by, (*notes, *unsigned))
        it.done(f"{version.id} → {target}  {form}{f' in {width}' if width else ''}, {left.num_bytes / 1e6:.1f} MB")
        return left


def _check_form(version: ModelVersion, form: Form, precision: Precision | None) -> None:
    if form == "adapter" and version.weights != "adapter":
        raise ConfigError(
            f"{version.id} has full weights, and --form adapter is for adapters", hint="--form merged writes full weights"
        )
    if form == "adapter" and precision is not None:
        raise ConfigError(
            f"--precision {precision} converts weights, and --form adapter copies them as they are",
            hint="leave it out, or take --form merged",
        )
    if is_classifier(version) and (form == "gguf" or precision or (form == "merged" and version.weights == "adapter")):
        kept = "--form adapter" if version.weights == "adapter" else "--form merged without --precision"
        raise ConfigError(
            f"{version.id} is a classifier: --form {form}{f' --precision {precision}' if precision else ''} is for models"
            " that generate text",
            hint=f"{kept} copies it as it is; a run with train.export=merged has full weights",
        )
    if form == "merged" and precision == "fp16":
        raise ConfigError("--precision fp16 is for --form gguf", hint="--precision bf16 or fp32")


def _check_place(catalog: Catalog, target: Path) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ConfigError(f"--out {str(target)!r} is not a folder", hint="name a folder that does not exist yet")
    store = catalog.store
    if store.is_local and target.resolve().is_relative_to(Path(store.root).resolve()):
        raise ConfigError(f"--out {str(target)!r} is inside the store {store.place}", hint="name a folder outside of it")


def _held(catalog: Catalog, version: ModelVersion, it: Stage) -> StoredWeights:
    """The version's folders, every file verified."""
    base = version if version.weights == "full" else catalog.get_as(ModelVersion, version.base_model)
    total = sum(entry.size for one in {base.id: base, version.id: version}.values() for entry in one.files)
    read = 0

    def progress(count: int) -> None:
        nonlocal read
        read += count
        it.update(read, total, "verifying the store's files")

    def fetch(one: ModelVersion) -> Path:
        return catalog.store.fetch_dir(paths.model(one.id), files=one.files, progress=progress)

    folder = fetch(base)
    return StoredWeights(version, base, folder, None if base is version else fetch(version))


def _precision(held: StoredWeights, form: Form, precision: Precision | None) -> str:
    """What the weights are written as, by default as the full weights are stored; "" for an adapter, which is copied."""
    if form == "adapter":
        return ""
    own = precision or stored_precision(held.base_folder)
    is_copied = held.adapter_folder is None and precision is None
    return "fp32" if own == "fp16" and form == "merged" and not is_copied else own


def _same_copy(catalog: Catalog, target: Path, version: ModelVersion, form: Form, precision: str) -> Left | None:
    """The copy that lies in `target` unchanged, if it is the one that is asked for."""
    if not target.is_dir():
        return None
    names = {path.relative_to(target).as_posix() for path in target.rglob("*") if not path.is_dir()}
    copies = exports.exported(catalog, {version.id})
    alike = [one for one in copies if one.form == form and one.precision == precision and one.files.keys() == names]
    if not alike:
        return None
    files = hash_dir(target)
    if not any(exports.is_unchanged(copy, files) for copy in alike):
        return None
    size = sum(entry.size for entry in files)
    return Left(version.id, form, precision, str(target), files_digest(files), len(files), size, "", is_new=False)


def _refuse_other(target: Path) -> None:
    if target.is_dir() and (first := next(iter(sorted(target.iterdir())), None)):
        raise ConfigError(
            f"--out {str(target)!r} holds something else: {first.name}",
            hint="name a folder that does not exist yet, or remove this one",
        )


def _check_space(catalog: Catalog, held: StoredWeights, form: Form, precision: str, folder: Path) -> None:
    """Raise `StoreError` where the disk has less room than the weights need."""
    needed = sum(entry.size for entry in held.version.files)
    if form != "adapter":
        needed = BYTES[precision] * (num_parameters(catalog.store, held.base) or 0)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StoreError(
            f"the copy needs {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB left",
            hint="free space there, or give another --out",
        )


@contextlib.contextmanager
def _failures_named(target: Path) -> Iterator[None]:
    """What the system says of a disk, as an error of ours; safetensors and numpy say it in words of their own."""
    from safetensors import SafetensorError

    try:
        yield
    except ForgeError:
        raise
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT) or FULL.search(str(error)):
            raise StoreError(
                f"{target} cannot be written: the disk is full",
                hint="free space there, or give another --out; nothing was left behind",
            ) from error
        if number is None:
            raise
        raise StoreError(
            f"{target} cannot be written: {os.strerror(number)}", hint="check the folder, or give another --out"
        ) from error


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A folder next to `target` that goes with the block, unless it got another name. Those of ended exports go first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in target.parent.glob(f"{UNFINISHED}*"):
        if is_alive(path.name) is False:
            shutil.rmtree(path, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f"{UNFINISHED}{owner_mark()}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fill(held: StoredWeights, form: Form, precision: str, folder: Path, it: Stage) -> tuple[str, ...]:
    def done(number: int, total: int) -> None:
        it.update(number, total, "writing")

    match form, precision:
        case "adapter", _:
            write_adapter_folder(held, folder)
        case "merged", "bf16" | "fp16" | "fp32":
            write_merged_folder(held, precision, folder, done)
        case "gguf", "bf16" | "fp16" | "fp32":
            return write_gguf_folder(held, precision, folder, done)
    return ()


def _sign(catalog: Catalog, version: ModelVersion, folder: Path) -> tuple[str, tuple[str, ...]]:
    """Sign the folder where this process has a key: the key's id, and a note where the store has signers and it has none."""
    key = signing.private_key()
    if key is None:
        is_missed = bool(catalog.authority().signers)
        return "", (f"not signed: {signing.SIGNER} is not set",) if is_missed else ()
    (folder / signing.BUNDLE_FILE).write_bytes(signing.model_bundle(version.id, hash_dir(folder), key))
    return signing.key_id(key.public_key()), ()


def _publish(
    catalog: Catalog,
    version: ModelVersion,
    form: Form,
    precision: str,
    folder: Path,
    target: Path,
    signed_by: str,
    notes: tuple[str, ...],
) -> Left:
    """The event, then the name: unless an erasure withdrew the version in the meantime."""
    files = hash_dir(folder)
    sync_tree(folder)
    os.chmod(folder, modes.publish_mode(folder))
    catalog.sync()
    refuse_withdrawn(catalog, version.id)
    copy = exports.record_export(catalog, version, form, precision, str(target), files)
    refuse_withdrawn(catalog, version.id)
    os.rename(folder, target)  # refused where something was put there in the meantime
    size = sum(entry.size for entry in files)
    return Left(version.id, form, precision, str(target), copy.digest, len(files), size, signed_by, is_new=True, notes=notes)
