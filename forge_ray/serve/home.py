"""The engines of one replica and the versions that live in them (no ray).

An engine runs one set of full weights: a base with its adapters, a full version, or an adapter merged into its base.
Adapters come and go in it: the least recently used one makes room, never one that a request still needs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forge_ray.config.release import DeployConfig
from forge_ray.data.tokens.chat import ChatTokenizer, load_tokenizer_dir
from forge_ray.errors import EngineError, ForgeError, StoreError
from forge_ray.inference.choose import open_engine
from forge_ray.inference.engine import Engine, EngineHealth, GenerationRequest
from forge_ray.records import ModelVersion
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.routing import ServedVersion
from forge_ray.store import paths
from forge_ray.store.files import Store

IN_USE_S = 0.5  # an adapter chosen so recently may be about to be asked for
ROOM_S = 30.0  # a request whose adapter must be loaded waits so long for one that nobody needs
LOG = logging.getLogger(__name__)


def fetch_version(store: Store, version_id: str) -> tuple[ModelVersion, Path]:
    """A model version's record and its files in a local folder, verified against the record."""
    version = ModelVersion.model_validate(store.read_json(paths.record("models", version_id)))
    where = paths.model(version.id)
    folder = store.fetch_dir(where)
    listed = {entry.path: entry for entry in store.files(where)}
    for entry in version.files:
        if listed.get(entry.path) != entry:
            raise StoreError(
                f"{where}/{entry.path} is not the file that {version.id} names (sha256 {entry.sha256})",
                hint="restore the folder from a backup, or import the model again",
            )
    return version, folder


def end_token_ids(tokenizer: Any, model_dir: Path) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's end token and those of generation_config.json."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    path = model_dir / "generation_config.json"
    if path.is_file():
        more = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found += more if isinstance(more, list) else [] if more is None else [more]
    return tuple(sorted(set(found)))


@dataclass
class Home:
    """One engine, and when each adapter in it was last chosen."""

    engine: Engine
    tokenizer: ChatTokenizer
    stop_token_ids: tuple[int, ...]
    max_adapters: int
    used: dict[str, float] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def touch(self, adapter: str) -> bool:
        """Whether the adapter is in memory; if so it counts as used now."""
        if adapter and adapter not in self.used:
            return False
        if adapter:
            self.used[adapter] = time.monotonic()
        return True

    def load(self, adapter: str, folder: Path) -> None:
        """Bring an adapter into memory and answer one token with it, so that its first client does not wait for that."""
        with self.lock:
            if self.touch(adapter):
                return
            while len(self.used) >= self.max_adapters:
                self._make_room()
            self.engine.load_adapter(adapter, folder)
            self.warm(adapter)
            self.used[adapter] = time.monotonic()

    def warm(self, adapter: str) -> None:
        prompt = tuple(self.tokenizer.text_ids(["Hello"])[0]) or (0,)
        self.engine.generate([GenerationRequest(prompt, 1, adapter=adapter)])

    def forget(self, adapter: str) -> bool:
        """Unload an adapter if no request needs it."""
        with self.lock:
            return self._unload(adapter)

    def _unload(self, adapter: str) -> bool:
        if time.monotonic() - self.used[adapter] < IN_USE_S:
            return False
        last = self.used.pop(adapter)  # first: whoever asks now has it loaded again
        try:
            self.engine.unload_adapter(adapter)
        except EngineError:
            self.used[adapter] = last
            return False
        return True

    def _make_room(self) -> None:
        deadline = time.monotonic() + ROOM_S
        while time.monotonic() < deadline:
            if any(self._unload(adapter) for adapter in sorted(self.used, key=self.used.__getitem__)):
                return
            time.sleep(0.02)
        raise EngineError(
            f"all {self.max_adapters} adapters in memory are in use",
            hint="send the request again, or raise engine.max_adapters",
        )


class Homes:
    """Every engine of a replica; `open` and `load` are called from one thread, `loaded` from any."""

    def __init__(self, config: DeployConfig, store: Store) -> None:
        self.config = config
        self.store = store
        self.homes: dict[str, Home] = {}
        self._folders: dict[str, Path] = {}
        self._ready: dict[str, tuple[ServedVersion, Loaded]] = {}

    def ready(self, version: ServedVersion) -> Loaded:
        """Fetch, verify and load what a version needs, once; `ForgeError` with the reason where it cannot be served."""
        known = self._ready.get(version.id)
        if known is None or known[0] != version or version.engine not in self.homes:
            known = self._ready[version.id] = (version, self._make_ready(version))
        loaded, home = known[1], self.homes[version.engine]
        if loaded.adapter and len(home.used) < home.max_adapters:
            home.load(loaded.adapter, self._folders[version.id])
        return loaded

    def _make_ready(self, version: ServedVersion) -> Loaded:
        record, folder = fetch_version(self.store, version.id)
        if record.files_digest != version.digest:
            raise StoreError(
                f"{version.id} has digest {record.files_digest}, not {version.digest}", hint="import or release it again"
            )
        self._folders[version.id] = folder
        if version.engine not in self.homes:
            self.homes[version.engine] = self._open(version, folder)
        home = self.homes[version.engine]
        adapter = version.digest if version.weights == "adapter" else ""
        if adapter and not home.max_adapters:
            raise EngineError(
                f"{version.id} is an adapter and engine.max_adapters is 0", hint="raise it, or list the version in `merged`"
            )
        return Loaded(version.id, version.digest, home.engine, adapter, home.tokenizer, home.stop_token_ids)

    def _open(self, version: ServedVersion, folder: Path) -> Home:
        model_dir = folder if version.weights == "full" else fetch_version(self.store, version.base)[1]
        tokenizer = load_tokenizer_dir(model_dir)
        merged = folder if version.weights == "merged" else None
        on_gpu = self.config.gpus_per_replica > 0
        engine = open_engine(model_dir, merged, self.config.engine, on_gpu, merge=merged is not None)
        home = Home(engine, tokenizer, end_token_ids(tokenizer, model_dir), self.config.engine.max_adapters)
        home.warm("")
        return home

    def bring(self, version: ServedVersion, loaded: Loaded) -> None:
        """Make sure that an adapter which had to leave is in memory again."""
        self.homes[version.engine].load(loaded.adapter, self._folders[version.id])

    def touch(self, version: ServedVersion, loaded: Loaded) -> bool:
        return self.homes[version.engine].touch(loaded.adapter)

    def tidy(self, versions: dict[str, ServedVersion]) -> None:
        """Let go of what no version needs any more and no request uses."""
        engines = {version.engine for version in versions.values()}
        adapters = {version.digest for version in versions.values()}
        for key in list(self.homes):
            home = self.homes[key]
            for adapter in [name for name in home.used if name not in adapters]:
                home.forget(adapter)
            state = home.engine.health()
            if key not in engines and not state.num_running and not state.num_waiting:
                del self.homes[key]
                self._ready = {name: ready for name, ready in self._ready.items() if ready[0].engine != key}
                home.engine.close()

    def held(self) -> list[str]:
        """The versions whose weights are in memory."""
        adapters = [
            name
            for name, (version, loaded) in list(self._ready.items())
            if loaded.adapter and version.engine in self.homes and loaded.adapter in self.homes[version.engine].used
        ]
        return sorted({*list(self.homes), *adapters})

    def health(self) -> list[EngineHealth]:
        """How each engine is."""
        return [home.engine.health() for home in list(self.homes.values())]

    def failures(self) -> list[str]:
        """Why engines are not well."""
        return [state.detail for state in self.health() if not state.ok]

    def load(self) -> dict[str, int]:
        """Requests that run and wait, and their tokens, over all engines."""
        states = self.health()
        return {
            "running": sum(state.num_running for state in states),
            "waiting": sum(state.num_waiting for state in states),
            "tokens": sum(state.num_tokens for state in states),
        }

    def close(self) -> None:
        for home in self.homes.values():
            with contextlib.suppress(ForgeError):
                home.engine.close()
