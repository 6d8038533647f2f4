"""A folder of the store is exactly the files that were signed: nothing beside them, no name and no link that leads out."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fabricated
import pytest

from forge_ray.errors import ForgeError, StoreError
from forge_ray.evaluate.reports import model_subject
from forge_ray.governance.signers import export_signed
from forge_ray.governance.verify import check_files
from forge_ray.models.import_model import import_model
from forge_ray.records import DatasetManifest, FileEntry, ModelVersion, canonical_json
from forge_ray.serve.engines import fetch_version
from forge_ray.store import audit_log, paths, signing
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import MANIFEST, Store, hash_dir, verify_files

pytestmark = pytest.mark.unit

LEADS_OUT = (
    *("/etc/passwd", "../evil", "a/../../evil", "..", ".", "", "a//b", "a/./b", "./a", "a/", "//host/share"),
    *("..\\evil", "a\\b", "C:/evil", "c:evil", "a\x00b", "a\nb", "a\x1b[2Jb", "a\u202eb"),
)


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> tuple[Path, ModelVersion]:
    """A store that holds the tiny model, to be copied."""
    folder = tmp_path_factory.mktemp("imported") / "store"
    with Catalog.open(Store(str(folder))) as catalog:
        return folder, import_model(catalog, tiny_model_dir, "tiny", "apache-2.0")


@pytest.fixture
def place(tmp_path: Path, imported: tuple[Path, ModelVersion]) -> tuple[Store, ModelVersion]:
    folder, version = imported
    return Store(str(shutil.copytree(folder, tmp_path / "store"))), version


def remote(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """Every store is as one on a bucket: its files are copied before they are opened."""
    monkeypatch.setattr(Store, "is_local", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


def list_in_manifest(folder: Path, *entries: dict[str, Any]) -> None:
    listed = json.loads((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(canonical_json({"files": [*listed["files"], *entries]}))


@pytest.mark.parametrize("path", LEADS_OUT)
def test_no_manifest_or_record_can_name_a_file_outside_its_folder(path: str) -> None:
    with pytest.raises(StoreError, match="does not name a file below a folder"):
        FileEntry(path=path, size=1, sha256="0" * 64)


def test_names_of_real_models_are_names_of_files() -> None:
    for path in ("model-00001-of-00002.safetensors", ".gitattributes", "a b/größe.json", "1_Pooling/config.json", "..a"):
        assert FileEntry(path=path, size=1, sha256="").path == path


@pytest.mark.parametrize("path", ["{victim}", "../{name}", "sub/../../{name}"])
def test_a_manifest_on_a_bucket_writes_nothing_outside_the_cache(
    place: tuple[Store, ModelVersion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    store, version = place
    victim = tmp_path / "victim.bashrc"
    victim.write_text("honest")
    folder = store.local(paths.model(version.id))
    entry = {"path": path.format(victim=victim, name=victim.name), "size": 5, "sha256": "0" * 64}
    list_in_manifest(folder, entry)
    remote(monkeypatch, tmp_path / "cache")
    with pytest.raises(StoreError, match="does not name a file below a folder"):
        store.fetch_dir(paths.model(version.id))
    assert victim.read_text() == "honest"
    assert not list((tmp_path / "cache").rglob("*"))


def test_a_link_in_the_cache_is_not_written_through(
    place: tuple[Store, ModelVersion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, version = place
    remote(monkeypatch, tmp_path / "cache")
    folder = store.fetch_dir(paths.model(version.id))
    victim = tmp_path / "victim"
    victim.write_text("honest")
    for name in ("config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(victim)
    assert store.fetch_dir(paths.model(version.id)) == folder
    assert victim.read_text() == "honest"
    assert not [path for path in folder.rglob("*") if path.is_symlink()]


def test_what_a_bucket_holds_beside_a_model_is_not_fetched(
    place: tuple[Store, ModelVersion], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, version = place
    (store.local(paths.model(version.id)) / "adapter_config.json").write_text("{}")
    remote(monkeypatch, tmp_path / "cache")
    folder = fetch_version(store, version.id)[1]
    (folder / "adapter_config.json").write_text("{}")  # and one laid into the cache is taken away
    assert fetch_version(store, version.id)[1] == folder
    assert {path.name for path in folder.iterdir()} == {entry.path for entry in version.files}


def lay_a_file(folder: Path) -> str:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/tmp/evil"}')
    return "adapter_config.json is not listed"


def lay_a_hidden_file(folder: Path) -> str:
    (folder / ".hidden.json").write_text("{}")
    return r"\.hidden\.json is not listed"


def lay_a_file_in_a_folder(folder: Path) -> str:
    (folder / "chat_templates").mkdir()
    (folder / "chat_templates" / "tool_use.jinja").write_text("evil")
    return r"tool_use\.jinja is not listed"


def lay_a_second_manifest(folder: Path) -> str:
    (folder / "deeper").mkdir()
    shutil.copy(folder / MANIFEST, folder / "deeper" / MANIFEST)
    return rf"deeper/{MANIFEST} is not listed"


def lay_a_link(folder: Path) -> str:
    (folder / "tokenizer.model").symlink_to("/etc/passwd")
    return r"tokenizer\.model is a link"


def lay_a_linked_folder(folder: Path) -> str:
    (folder / "chat_templates").symlink_to("/tmp")
    return "chat_templates is a link"


def lay_a_pipe(folder: Path) -> str:
    os.mkfifo(folder / "vocab.json")
    return r"vocab\.json is not a regular file"


def replace_by_a_link(folder: Path) -> str:
    (folder / "config.json").rename(folder.parent / "config-elsewhere.json")
    (folder / "config.json").symlink_to(folder.parent / "config-elsewhere.json")
    return r"config\.json is a link"


def replace_by_a_pipe(folder: Path) -> str:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return r"config\.json is not a regular file"


def list_a_file_more(folder: Path) -> str:
    (folder / "adapter_config.json").write_text("{}")
    entry = next(entry for entry in hash_dir(folder) if entry.path == "adapter_config.json")
    list_in_manifest(folder, entry.model_dump())
    return "does not list the files of its record: adapter_config.json differs"


TAMPERINGS = (
    *(lay_a_file, lay_a_hidden_file, lay_a_file_in_a_folder, lay_a_second_manifest, lay_a_link, lay_a_linked_folder),
    *(lay_a_pipe, replace_by_a_link, replace_by_a_pipe, list_a_file_more),
)


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda tamper: tamper.__name__)
def test_unlisted_file_beside_a_model_is_refused(place: tuple[Store, ModelVersion], tamper: Callable[[Path], str]) -> None:
    """By what serves it, verifies it, evaluates it and trains on it."""
    store, version = place
    check_files(store, version)
    reason = tamper(store.local(paths.model(version.id)))
    with pytest.raises(ForgeError, match=reason):
        fetch_version(store, version.id)
    with pytest.raises(ForgeError, match=reason):
        check_files(store, version)
    with pytest.raises(ForgeError, match=reason):
        store.fetch_dir(paths.model(version.id), files=version.files, verify=False)
    with Catalog.read_only(store) as catalog, pytest.raises(ForgeError, match=reason):
        model_subject(catalog, version).fetch(store)


def test_evaluation_holds_the_base_under_an_adapter_to_its_record(place: tuple[Store, ModelVersion]) -> None:
    store, version = place
    with Catalog.open(store) as catalog:
        adapter = catalog.put(
            ModelVersion.model_validate(
                version.model_dump() | {"name": "adapter", "weights": "adapter", "base_model": version.id}
            ).sealed()
        )
        subject = model_subject(catalog, adapter)
    list_a_file_more(store.local(paths.model(version.id)))
    with pytest.raises(StoreError, match="does not list the files of its record"):
        replace(subject, adapter="").fetch(store)


def test_unlisted_file_beside_an_adapter_or_an_export_is_not_copied(place: tuple[Store, ModelVersion]) -> None:
    store, version = place
    lay_a_file(store.local(paths.model(version.id)))
    with pytest.raises(StoreError, match="is not listed"):
        store.copy_dir(paths.model(version.id), paths.model("mv_copy"))
    assert not store.exists(paths.model("mv_copy"))


def test_folders_that_the_product_itself_links_are_folders_of_listed_files(place: tuple[Store, ModelVersion]) -> None:
    """Builds and reproductions link finished files: their bytes are held to the digest under either name."""
    store, version = place
    for entry in (*version.files, FileEntry(path=MANIFEST, size=0, sha256="")):
        store.link(paths.model(version.id, entry.path), f"models/mv_linked/{entry.path}")
    (store.local("models/mv_linked") / ".nfs000000000001").write_text("a removed file that is still read")
    (store.local("models/mv_linked") / "empty").mkdir()
    verify_files(store.fetch_dir("models/mv_linked"), version.files)


def test_record_read_by_a_signer_cannot_make_it_write_outside_its_folder(
    place: tuple[Store, ModelVersion], tmp_path: Path
) -> None:
    """`forge sign --openssf --out DIR` of a record that names `../evil`: refused, and nothing is written."""
    store, version = place
    entry = {"path": "../evil_payload.txt", "size": 4, "sha256": "0" * 64}
    value = version.model_dump(mode="json") | {"files": [entry], "id": "mv_0123456789abcdef"}
    audit_log.publish(store, paths.record("models", value["id"]), canonical_json(value), "models.put", value["id"])
    store.write(f"models/{value['id']}/{MANIFEST}", canonical_json({"files": [entry]}))
    store.write("models/evil_payload.txt", b"evil")
    with pytest.raises(ForgeError, match="does not name a file below"), signing.acting(signing.generate("p256")):
        export_signed(Catalog.open(store), value["id"], str(tmp_path / "out" / "dir"))
    assert not (tmp_path / "out").exists()


def test_signed_export_holds_the_listed_files_alone(place: tuple[Store, ModelVersion], tmp_path: Path) -> None:
    store, version = place
    with Catalog.open(store) as catalog, signing.acting(signing.generate("p256")):
        folder = Path(export_signed(catalog, version.id, str(tmp_path / "dir")))
    assert {path.name for path in folder.iterdir()} == {entry.path for entry in version.files} | {"model.sig"}


def test_unlisted_file_beside_the_rows_of_a_dataset_is_refused(tmp_path: Path) -> None:
    from forge_ray.data.dataset.version import SPLITS, listed, read_records

    with Catalog.open(Store(str(tmp_path / "store"))) as catalog:
        store = catalog.store
        manifest = fabricated.dataset(catalog, [fabricated.record_of(number) for number in range(40)])
    files = hash_dir(store.local(paths.dataset(manifest.id)))
    listing = DatasetManifest.model_validate(manifest.model_dump() | {"files": files})
    split = next(split for split in SPLITS if listed(store, listing, f"records/{split}"))
    count = len(read_records(store, listing, split))
    assert count
    part = store.local(paths.records(manifest.id, split)) / "part-00000.parquet"
    shutil.copy(part, part.with_name("part-00001.parquet"))
    with pytest.raises(StoreError, match=r"part-00001\.parquet is not one of the files of ds_"):
        read_records(store, listing, split)
