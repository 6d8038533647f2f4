"""A dataset version for some settings and sources: the one that was built from the same inputs, or one that is built now."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from forge_ray.config.data import DataConfig
from forge_ray.data.build import kept_tombstones, work
from forge_ray.data.build.build import build, index_sources
from forge_ray.data.build.settings import Progress, input_digest, silent
from forge_ray.data.build.tombstones import tombstones
from forge_ray.data.dataset import index
from forge_ray.data.dataset.version import load_tokenizer, tokenizer_digest
from forge_ray.data.read.ingest import IndexedFile
from forge_ray.data.read.sources import folder_lines
from forge_ray.data.tokens.lost import remedy
from forge_ray.data.tokens.text_tools import refuse_unwritable
from forge_ray.errors import StoreError
from forge_ray.progress import visible
from forge_ray.records import DatasetManifest, ModelVersion, utc_now
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.erased import withdrawn
from forge_ray.store.files import Store


@dataclass(frozen=True)
class Prepared:
    """A dataset version; `is_new` where this call built it."""

    manifest: DatasetManifest
    is_new: bool

    @property
    def summary(self) -> str:
        """What the build came to, on one line."""
        if not self.is_new:
            return "already built"
        counts = ", ".join(f"{name} {stats.num_records}" for name, stats in self.manifest.splits.items())
        num_rejected = sum(self.manifest.rejects.values())
        counts += f", {num_rejected} quarantined" if num_rejected else ""
        counts += f" ({hint})" if (hint := remedy(self.manifest.rejects)) else ""
        num_dropped = sum(step.before - step.after for step in self.manifest.curation)
        counts += f", {num_dropped} dropped by rules" if num_dropped else ""
        counts += f", encoded by the tokenizer's own library: {why}" if (why := self.manifest.encoder.get("unused")) else ""
        num_erased = sum(map(len, self.manifest.erased.values()))
        return counts + (f", {num_erased} erased" if num_erased else "")


def existing_version(
    config: DataConfig, base: ModelVersion, catalog: Catalog, sources: list[IndexedFile] | None = None
) -> DatasetManifest | None:
    """The version that was built from these settings and from sources with the bytes that they have now, or with those of
    `sources`, which need no Ray."""
    restore_tombstones(catalog.store)
    indexed = index_sources(config) if sources is None else sources
    return _version_of(dated(config, base, catalog.store), base, catalog, indexed)


def prepare_version(
    name: str, config: DataConfig, base: ModelVersion, catalog: Catalog, progress: Progress = silent
) -> Prepared:
    """The version that was built from these inputs, or a new one with its index; needs an initialised Ray."""
    restore_tombstones(catalog.store)
    config = dated(config, base, catalog.store)
    for line in folder_lines(config):
        print(f"  {visible(line)}", file=sys.stderr)
    sources = index_sources(config, progress)
    if manifest := _version_of(config, base, catalog, sources):
        return Prepared(manifest, is_new=False)
    if config.tools == "text":
        refuse_unwritable(load_tokenizer(catalog.store, base.id), base.id)
    manifest = _build_version(name, config, base, catalog, sources, progress)
    index.build(catalog.store, manifest)
    return Prepared(manifest, is_new=True)


def dated(config: DataConfig, base: ModelVersion, store: Store) -> DataConfig:
    """The settings with today's date (UTC), if the base's chat template prints one and none is set: a build that crosses
    midnight is one build, and tomorrow's reproduction is equal."""
    names = [entry.path for entry in base.files if entry.path.endswith((".jinja", "tokenizer_config.json"))]
    prints = any(b"strftime_now" in store.read(paths.model(base.id, name)) for name in names)
    return config.model_copy(update={"date": utc_now()[:10]}) if prints and not config.date else config


def restore_tombstones(store: Store) -> None:
    """Restore tombstones that were removed or changed, and say so; `StoreError` where that cannot be done."""
    for difference in kept_tombstones.restore(store):
        print(f"  {visible(difference)}: restored from the audit log", file=sys.stderr)


def _version_of(
    config: DataConfig, base: ModelVersion, catalog: Catalog, sources: list[IndexedFile]
) -> DatasetManifest | None:
    inputs = input_digest(config, sources, tokenizer_digest(base), tombstones(catalog.store))
    noted = work.noted_dataset(catalog.store, inputs)
    for manifest in catalog.all(DatasetManifest):
        is_of_inputs = (manifest.input_digest == inputs or manifest.id == noted) and not _is_unpacked(manifest)
        if is_of_inputs and catalog.store.is_published(paths.dataset(manifest.id)):  # the record of one that is gone stays
            return manifest
    return None


def _is_unpacked(manifest: DatasetManifest) -> bool:
    """Whether a version is from before judged answers were packed."""
    judged = manifest.kinds.keys() & {"preference", "feedback"}
    return bool(judged) and not any(split.num_rows for split in manifest.splits.values())


def _build_version(
    name: str,
    config: DataConfig,
    base: ModelVersion,
    catalog: Catalog,
    sources: list[IndexedFile],
    progress: Progress,
) -> DatasetManifest:
    """Build and register the version, once more where rows were erased or the work area was emptied meanwhile."""
    store = catalog.store
    catalog.check_may("datasets")  # before the rows are packed, not after
    while True:
        tombstones_before, mark = tombstones(store), work.mark(store)
        try:
            built = build(name, config, base, store, sources, progress, mark)
            is_whole = store.exists(mark)
        except Exception:
            if store.exists(mark):
                raise
            progress(0, 1, "once more: the work area was emptied meanwhile")
            continue
        finally:
            store.delete(mark)
        if is_whole and tombstones(store) == tombstones_before:
            break
        if not catalog.has(built.id):  # rows were erased meanwhile, and this may hold some: nobody has seen it yet
            store.delete_dir(paths.dataset(built.id))
    if erasure := withdrawn(store).datasets.get(built.id):
        store.delete_dir(paths.dataset(built.id))
        raise StoreError(
            f"the build came to {built.id}, which {erasure} erased, so its tombstones do not keep the rows out",
            hint="`forge audit verify` says whether tombstones were changed; restore the store from a backup",
        )
    manifest = catalog.put(built)
    if manifest.input_digest != built.input_digest:  # erasures that touch none of its rows: these inputs give it too
        work.note_dataset(store, built.input_digest, manifest.id)
    return manifest
