"""What a replica loads: the version's own files, verified; an adapter with the base that it names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from forge_ray.catalog import Catalog
from forge_ray.errors import NotFound, StoreError
from forge_ray.records import ModelVersion, files_digest
from forge_ray.serve.replica import end_token_ids, model_dirs
from forge_ray.store import Store

pytestmark = pytest.mark.unit


def publish(store: Store, weights: str, content: bytes, base_model: str = "") -> ModelVersion:
    with store.staged_dir("models/.new") as folder:
        (folder / "weights.safetensors").write_bytes(content)
    files = store.files("models/.new")
    version = ModelVersion(
        name="m",
        status="imported",
        weights=weights,  # type: ignore[arg-type]
        files=files,
        files_digest=files_digest(files),
        base_model=base_model,
        licence="apache-2.0",
    ).sealed()
    store.move_dir("models/.new", f"models/{version.id}")
    with Catalog(store) as catalog:
        return catalog.put(version)


def test_full_weights_are_their_own_folder(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    version = publish(store, "full", b"base")
    assert model_dirs(store, version.id) == (version, tmp_path / "models" / version.id, None)


def test_an_adapter_comes_with_its_base(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    base = publish(store, "full", b"base")
    adapter = publish(store, "adapter", b"adapter", base.id)
    folders = (tmp_path / "models" / base.id, tmp_path / "models" / adapter.id)
    assert model_dirs(store, adapter.id) == (adapter, *folders)


def test_a_changed_file_is_refused_even_with_a_manifest_that_fits_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    version = publish(store, "full", b"base")
    with store.staged_dir(f"models/{version.id}") as folder:
        (folder / "weights.safetensors").write_bytes(b"evil")
    with pytest.raises(StoreError, match="is not the file that"):
        model_dirs(store, version.id)
    (tmp_path / "models" / version.id / "weights.safetensors").write_bytes(b"torn!")
    with pytest.raises(StoreError, match="its manifest says"):
        model_dirs(store, version.id)


def test_a_version_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="mv_absent"):
        model_dirs(Store(str(tmp_path)), "mv_absent")


@pytest.mark.parametrize(
    ("tokenizer_end", "config", "expected"),
    [(2, None, (2,)), (2, {"eos_token_id": 5}, (2, 5)), (None, {"eos_token_id": [7, 5]}, (5, 7)), (None, {}, ())],
)
def test_end_tokens(tokenizer_end: int | None, config: object, expected: tuple[int, ...], tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert end_token_ids(SimpleNamespace(eos_token_id=tokenizer_end), tmp_path) == expected
