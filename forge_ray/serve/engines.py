"""The engines of one replica and the versions that are loaded into them (no ray).

An engine runs one set of full weights: a base with its adapters, a full version, or an adapter merged into its base.
Adapters are loaded into it and evicted from it: the least recently used one first, never one that a request still needs.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge_ray.config.release import DeployConfig
from forge_ray.data.dataset.encoders import with_proven
from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.chat import ChatTokenizer, load_tokenizer_dir
from forge_ray.data.tokens.text_tools import tools_of, with_tools
from forge_ray.errors import EngineError, ForgeError, StoreError
from forge_ray.inference.choose import begin_beside, open_beside
from forge_ray.inference.class_engine import ClassEngine
from forge_ray.inference.classifier import open_classifier
from forge_ray.inference.engine import Engine, EngineHealth, GenerationRequest
from forge_ray.inference.own_process import EngineProcess
from forge_ray.models.class_head import refuse_reward_model, targets_of
from forge_ray.records import ModelVersion
from forge_ray.serve.calibration import head_of
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.routing import ServedVersion
from forge_ray.store import paths
from forge_ray.store.files import Store
from forge_ray.store.verified import read_record

RECENT_USE_S = 0.5  # the request that chose an adapter so recently may not have reached the engine yet
EVICT_WAIT_S = 30.0  # how long a request whose adapter must be loaded waits for another to become idle


def fetch_version(store: Store, version_id: str) -> tuple[ModelVersion, Path]:
    """A model version's record, whose id follows from its content, and a local folder of exactly its files."""
    version = read_record(store, ModelVersion, version_id)
    return version, store.fetch_dir(paths.model(version.id), files=version.files)


def end_token_ids(tokenizer: Any, model_dir: Path) -> tuple[int, ...]:
    """Tokens that end an answer: what its template writes behind one, and those of generation_config.json."""
    token_ids = list(tokenizer.end_ids)
    path = model_dir / "generation_config.json"
    if path.is_file():
        configured = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        token_ids += configured if isinstance(configured, list) else [] if configured is None else [configured]
    return tuple(sorted(set(token_ids)))


@dataclass
class LoadedEngine:
    """One engine, and when each adapter in its memory was last chosen."""

    engine: Engine | ClassEngine
    tokenizer: ChatTokenizer
    stop_token_ids: tuple[int, ...]
    max_adapters: int
    last_used: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def _generator(self) -> Engine:
        assert not isinstance(self.engine, ClassEngine), "a classifier has an engine of its own, and no adapters"
        return self.engine

    def touch(self, adapter: str) -> bool:
        """Whether the adapter is in memory; if so, it counts as used now."""
        if adapter and adapter not in self.last_used:
            return False
        if adapter:
            self.last_used[adapter] = time.monotonic()
        return True

    def load(self, adapter: str, folder: Path) -> None:
        """Load an adapter and generate one token with it, so that its first client does not wait for that."""
        with self.lock:
            if self.touch(adapter):
                return
            while len(self.last_used) >= self.max_adapters:
                self._evict_least_recent()
            self._generator.load_adapter(adapter, folder)
            self.warm_up(adapter)
            self.last_used[adapter] = time.monotonic()

    def warm_up(self, adapter: str) -> None:
        (ids,) = self.tokenizer.text_ids(["Hello"])
        prompt = (0,) if isinstance(ids, Reject) else tuple(ids) or (0,)
        if isinstance(self.engine, ClassEngine):
            self.engine.submit([prompt]).result()
        else:
            self.engine.generate([GenerationRequest(prompt, 1, adapter=adapter)])

    def unload(self, adapter: str) -> bool:
        """Unload an adapter if no request needs it."""
        with self.lock:
            return self._unload(adapter)

    def _unload(self, adapter: str) -> bool:
        if time.monotonic() - self.last_used[adapter] < RECENT_USE_S:
            return False
        last = self.last_used.pop(adapter)  # before unloading: a request that comes now has it loaded again
        try:
            self._generator.unload_adapter(adapter)
        except EngineError:
            self.last_used[adapter] = last
            return False
        return True

    def _evict_least_recent(self) -> None:
        deadline = time.monotonic() + EVICT_WAIT_S
        while time.monotonic() < deadline:
            if any(self._unload(adapter) for adapter in sorted(self.last_used, key=self.last_used.__getitem__)):
                return
            time.sleep(0.02)
        raise EngineError(
            f"all {self.max_adapters} adapters in memory are in use",
            hint="send the request again, or raise engine.max_adapters",
        )


class EnginePool:
    """All engines of a replica. `load_version` and `unload_unused` are called from one thread, `ensure_adapter` from any."""

    def __init__(self, config: DeployConfig, store: Store) -> None:
        self.config = config
        self.store = store
        self.engines: dict[str, LoadedEngine] = {}
        self._begun: EngineProcess | None = None
        self._folders: dict[str, Path] = {}
        self._versions: dict[str, tuple[ServedVersion, Loaded]] = {}

    def begin(self) -> None:
        """Start the process of the first engine now, while nobody knows yet which versions are served."""
        self._begun = begin_beside(self.config.engine)

    def load_version(self, version: ServedVersion) -> Loaded:
        """Fetch, verify and load what a version needs, once; `ForgeError` with the reason where it cannot be served."""
        entry = self._versions.get(version.id)
        if entry is None or entry[0] != version or version.engine not in self.engines:
            entry = self._versions[version.id] = (version, self._prepare(version))
        loaded, engine = entry[1], self.engines[version.engine]
        if loaded.adapter and len(engine.last_used) < engine.max_adapters:
            engine.load(loaded.adapter, self._folders[version.id])
        return loaded

    def _prepare(self, version: ServedVersion) -> Loaded:
        record, folder = fetch_version(self.store, version.id)
        if record.files_digest != version.digest:
            raise StoreError(
                f"{version.id} has digest {record.files_digest}, not {version.digest}", hint="import or release it again"
            )
        refuse_reward_model(self.store, record)
        self._folders[version.id] = folder
        if version.engine not in self.engines:
            self.engines[version.engine] = self._open(version, folder)
        engine = self.engines[version.engine]
        if isinstance(engine.engine, ClassEngine):
            head = head_of(self.store, record, engine.engine.classifier.targets)
            return Loaded(version.id, version.digest, engine.engine, "", engine.tokenizer, (), head)
        adapter = version.digest if version.weights == "adapter" else ""
        if adapter and not engine.max_adapters:
            raise EngineError(
                f"{version.id} is an adapter and engine.max_adapters is 0", hint="raise it, or list the version in `merged`"
            )
        tokenizer = with_tools(engine.tokenizer, tools_of(folder))  # adapters of one base may have been trained with either
        return Loaded(version.id, version.digest, engine.engine, adapter, tokenizer, engine.stop_token_ids)

    def _open(self, version: ServedVersion, folder: Path) -> LoadedEngine:
        model_dir = folder if version.weights == "full" else fetch_version(self.store, version.base)[1]
        tokenizer = with_proven(load_tokenizer_dir(model_dir), self.store, model_dir)
        merged = folder if version.weights == "merged" else None
        on_gpu = self.config.gpus_per_replica > 0
        if targets := targets_of(folder):
            classifier = open_classifier(model_dir, merged, targets, tokenizer, self.config.engine, on_gpu)
            loaded_engine = LoadedEngine(ClassEngine(classifier), tokenizer, (), 0)
            loaded_engine.warm_up("")
            return loaded_engine
        begun, self._begun = self._begun, None
        engine = open_beside(begun, model_dir, merged, self.config.engine, on_gpu, merge=merged is not None)
        end_tokens = end_token_ids(tokenizer, model_dir)
        loaded_engine = LoadedEngine(engine, tokenizer, end_tokens, self.config.engine.max_adapters)
        loaded_engine.warm_up("")
        return loaded_engine

    def ensure_adapter(self, version: ServedVersion, loaded: Loaded) -> None:
        """Load the version's adapter again if it was evicted."""
        self.engines[version.engine].load(loaded.adapter, self._folders[version.id])

    def touch(self, version: ServedVersion, loaded: Loaded) -> bool:
        """Whether the version's weights are in memory; if so, its adapter counts as used now."""
        return self.engines[version.engine].touch(loaded.adapter)

    def unload_unused(self, versions: dict[str, ServedVersion]) -> None:
        """Unload adapters and close engines that none of `versions` needs and no request uses."""
        engine_ids = {version.engine for version in versions.values()}
        adapters = {version.digest for version in versions.values()}
        for engine_id in list(self.engines):
            engine = self.engines[engine_id]
            for adapter in [name for name in engine.last_used if name not in adapters]:
                engine.unload(adapter)
            health = engine.engine.health()
            if engine_id not in engine_ids and not health.num_running and not health.num_waiting:
                del self.engines[engine_id]
                self._versions = {name: entry for name, entry in self._versions.items() if entry[0].engine != engine_id}
                engine.engine.close()

    def versions_in_memory(self) -> list[str]:
        """The versions whose weights are in memory."""
        adapters = [
            name
            for name, (version, loaded) in list(self._versions.items())
            if loaded.adapter and version.engine in self.engines and loaded.adapter in self.engines[version.engine].last_used
        ]
        return sorted({*list(self.engines), *adapters})

    def health(self) -> list[EngineHealth]:
        """The health of each engine."""
        return [engine.engine.health() for engine in list(self.engines.values())]

    def failures(self) -> list[str]:
        """Why engines are unhealthy."""
        return [health.detail for health in self.health() if not health.ok]

    def workload(self) -> dict[str, int]:
        """Requests that run and wait, and their tokens, over all engines."""
        states = self.health()
        return {
            "running": sum(state.num_running for state in states),
            "waiting": sum(state.num_waiting for state in states),
            "tokens": sum(state.num_tokens for state in states),
        }

    def end_begun(self) -> None:
        """End the process of `begin` where no engine took it, as with classifiers alone."""
        begun, self._begun = self._begun, None
        if begun is not None:
            begun.end()

    def close(self) -> None:
        self.end_begun()
        for engine in self.engines.values():
            with contextlib.suppress(ForgeError):
                engine.engine.close()
