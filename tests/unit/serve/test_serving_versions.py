"""What a replica loads: the version's own files, verified; an adapter with the base that it names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("ray")

from forge_ray.config.base import parse
from forge_ray.config.release import DeployConfig
from forge_ray.data.tokens.text_tools import TextTools, Tools, write_form
from forge_ray.errors import EngineError, NotFound, StoreError
from forge_ray.inference.engine import EngineHealth
from forge_ray.records import ModelVersion, files_digest
from forge_ray.serve import directory as directory_module
from forge_ray.serve import engines as engines_module
from forge_ray.serve.directory import ReplicaDirectory
from forge_ray.serve.engines import EnginePool, end_token_ids, fetch_version
from forge_ray.serve.replica import needs_keys
from forge_ray.serve.routing import ServedVersion, Table
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit


def publish(store: Store, weights: str, content: bytes, base_model: str = "", form: Tools = "template") -> ModelVersion:
    with store.staged_dir("models/.new") as folder:
        (folder / "weights.safetensors").write_bytes(content)
        write_form(folder, form)
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
    with Catalog.open(store) as catalog:
        return catalog.put(version)


def test_a_version_is_its_record_and_its_own_folder(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    version = publish(store, "full", b"base")
    assert fetch_version(store, version.id) == (version, tmp_path / "models" / version.id)


class FakeEngine:
    """Knows which adapters it has and which of them requests need."""

    max_request_tokens = 100
    lacks: dict[str, str] = {}

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.pending: set[str] = set()
        self.closed = False

    def load_adapter(self, name: str, folder: Path) -> None:
        self.loaded.append(name)

    def unload_adapter(self, name: str) -> None:
        if name in self.pending:
            raise EngineError("in use", hint="wait")
        self.loaded.remove(name)

    def generate(self, requests: object) -> list[object]:
        return []

    def health(self) -> EngineHealth:
        return EngineHealth(True, "", len(self.pending), 0, 7 * len(self.pending))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EnginePool:
    """Engines that only note what happens to them; room for two adapters; nothing counts as just used."""
    tokenizer = SimpleNamespace(eos_token_id=2, end_ids=(2,), text_ids=lambda texts: [[1]])
    monkeypatch.setattr(engines_module, "load_tokenizer_dir", lambda folder: tokenizer)
    monkeypatch.setattr(engines_module, "open_beside", lambda *arguments, **more: FakeEngine())
    monkeypatch.setattr(engines_module, "RECENT_USE_S", 0.0)
    monkeypatch.setattr(engines_module, "EVICT_WAIT_S", 0.1)
    config = parse(DeployConfig, {"name": "bot", "models": ["x"], "engine": {"max_adapters": 2}})
    return EnginePool(config, Store(str(tmp_path)))


def served(version: ModelVersion, weights: str = "") -> ServedVersion:
    return ServedVersion(
        id=version.id,
        digest=version.files_digest,
        weights=weights or version.weights,  # type: ignore[arg-type]
        engine=version.base_model if not weights and version.base_model else version.id,
        base=version.base_model or version.id,
        name="m",
        licence="",
        run="",
        dataset="",
        created_at=version.created_at,
    )


def test_least_recently_used_adapter_is_evicted(pool: EnginePool) -> None:
    base = publish(pool.store, "full", b"base")
    versions = [served(publish(pool.store, "adapter", bytes([n]), base.id)) for n in range(3)]
    loaded = [pool.load_version(version) for version in versions]
    engine = loaded[0].engine
    assert isinstance(engine, FakeEngine)
    assert {item.engine for item in loaded} == {engine}
    names = [version.digest for version in versions]
    assert engine.loaded == names[:2]  # the third waits until it is asked for
    assert pool.touch(versions[0], loaded[0])
    assert not pool.touch(versions[2], loaded[2])
    pool.ensure_adapter(versions[2], loaded[2])
    assert engine.loaded == [names[0], names[2]]
    engine.pending = {names[0]}
    pool.ensure_adapter(versions[1], loaded[1])
    assert engine.loaded == [names[0], names[1]]
    engine.pending = {names[0], names[1]}
    with pytest.raises(EngineError, match="all 2 adapters in memory are in use"):
        pool.ensure_adapter(versions[2], loaded[2])
    assert pool.workload() == {"running": 2, "waiting": 0, "tokens": 14}


def test_adapters_of_one_base_are_given_tools_as_each_was_trained(pool: EnginePool) -> None:
    base = publish(pool.store, "full", b"base")
    versions = [publish(pool.store, "adapter", bytes([n]), base.id, form) for n, form in enumerate(("template", "text"))]
    (own, text), merged = (
        [pool.load_version(served(version)).tokenizer for version in versions],
        pool.load_version(served(versions[1], "merged")).tokenizer,
    )
    assert not isinstance(own, TextTools)
    assert isinstance(text, TextTools)
    assert text.inner is own
    assert isinstance(merged, TextTools)


def test_unused_engines_and_adapters_are_unloaded(pool: EnginePool) -> None:
    base, other = publish(pool.store, "full", b"base"), publish(pool.store, "full", b"other")
    adapter = served(publish(pool.store, "adapter", b"a", base.id))
    merged = served(publish(pool.store, "adapter", b"b", base.id), "merged")
    engines = [pool.load_version(version).engine for version in (served(base), served(other), merged)]
    pool.load_version(adapter)
    assert len({id(engine) for engine in engines}) == 3
    assert pool.versions_in_memory() == sorted([base.id, other.id, merged.id, adapter.id])
    first, second, third = engines
    assert isinstance(first, FakeEngine)
    assert isinstance(second, FakeEngine)
    assert isinstance(third, FakeEngine)
    second.pending = {""}
    pool.unload_unused({base.id: served(base)})
    assert (first.loaded, first.closed, second.closed, third.closed) == ([], False, False, True)
    assert pool.versions_in_memory() == sorted([base.id, other.id])
    second.pending = set()
    pool.unload_unused({base.id: served(base)})
    assert second.closed
    assert pool.load_version(served(other)).engine is not second


def test_archived_version_is_unloaded_even_if_configured(pool: EnginePool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a deployment file names the version itself."""
    monkeypatch.setattr(directory_module, "SETTLED_S", -1.0)
    versions = [served(publish(pool.store, "full", name)) for name in (b"one", b"two")]
    directory, table = ReplicaDirectory(pool), Table(versions={version.id: version for version in versions}, routes={})
    for now, held in ((table, versions), (table.model_copy(update={"archived": (versions[1].id,)}), versions[:1])):
        assert directory.prepare(now) == {}
        assert directory.go_live(now.id)
        directory.unload_unused()
        assert pool.versions_in_memory() == sorted(version.id for version in held)


@pytest.mark.parametrize(
    ("settings", "haproxy", "keys"),
    [
        ({}, "0", False),
        ({"host": "0.0.0.0"}, "0", True),
        ({}, "1", True),  # it listens on all interfaces, whatever the host
        ({"auth": "none"}, "1", False),
        ({"auth": "keys"}, "0", True),
    ],
)
def test_when_keys_are_required(settings: dict[str, str], haproxy: str, keys: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", haproxy)
    assert needs_keys(parse(DeployConfig, {"name": "bot", "models": ["x"], **settings})) is keys


def test_a_version_of_another_digest_is_refused(pool: EnginePool) -> None:
    version = publish(pool.store, "full", b"base")
    with pytest.raises(StoreError, match="has digest"):
        pool.load_version(served(version).model_copy(update={"digest": "sha256:0"}))


def test_a_changed_file_is_refused_even_with_a_manifest_that_fits_it(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    version = publish(store, "full", b"base")
    with store.staged_dir(f"models/{version.id}") as folder:
        (folder / "weights.safetensors").write_bytes(b"evil")
    with pytest.raises(StoreError, match=r"does not list the files of its record: weights\.safetensors differs"):
        fetch_version(store, version.id)
    with store.staged_dir(f"models/{version.id}") as folder:
        (folder / "weights.safetensors").write_bytes(b"base")
    (tmp_path / "models" / version.id / "weights.safetensors").write_bytes(b"torn!")
    with pytest.raises(StoreError, match="its manifest says"):
        fetch_version(store, version.id)


def test_missing_version_is_named_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="mv_absent"):
        fetch_version(Store(str(tmp_path)), "mv_absent")


@pytest.mark.parametrize(
    ("tokenizer_end", "config", "expected"),
    [(2, None, (2,)), (2, {"eos_token_id": 5}, (2, 5)), (None, {"eos_token_id": [7, 5]}, (5, 7)), (None, {}, ())],
)
def test_end_tokens(tokenizer_end: int | None, config: object, expected: tuple[int, ...], tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    assert end_token_ids(SimpleNamespace(end_ids=() if tokenizer_end is None else (tokenizer_end,)), tmp_path) == expected
