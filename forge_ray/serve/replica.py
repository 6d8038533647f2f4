"""One replica of a deployment: ingress and engine in one process (level 4).

It reads records and files from the store and never opens the catalogue. What it loads is checked against the model
version's own file list, byte by byte, before the first request.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray import serve

from forge_ray.config.base import parse
from forge_ray.config.release import DeployConfig
from forge_ray.data.chat import load_tokenizer_dir
from forge_ray.errors import EngineError, StoreError
from forge_ray.inference.transformers_engine import load_engine
from forge_ray.records import Deployment, ModelVersion
from forge_ray.serve.ingress import AsgiApp, Served, build_http
from forge_ray.serve.metrics import Metrics
from forge_ray.store import Store


def fetch_version(store: Store, version_id: str) -> tuple[ModelVersion, Path]:
    """A model version's record and its files in a local folder, verified against the record."""
    version = ModelVersion.model_validate(store.read_json(f"records/models/{version_id}.json"))
    where = f"models/{version.id}"
    folder = store.fetch_dir(where)
    listed = {entry.path: entry for entry in store.files(where)}
    for entry in version.files:
        if listed.get(entry.path) != entry:
            raise StoreError(
                f"{where}/{entry.path} is not the file that {version.id} names (sha256 {entry.sha256})",
                hint="restore the folder from a backup, or import the model again",
            )
    return version, folder


def model_dirs(store: Store, version_id: str) -> tuple[ModelVersion, Path, Path | None]:
    """The version with the folder of its base (or full) weights, and that of its adapter if it is one."""
    version, folder = fetch_version(store, version_id)
    if version.weights == "full":
        return version, folder, None
    _, base_dir = fetch_version(store, version.base_model)
    return version, base_dir, folder


def end_token_ids(tokenizer: Any, model_dir: Path) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's end token and those of generation_config.json."""
    found = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    path = model_dir / "generation_config.json"
    if path.is_file():
        more = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found += more if isinstance(more, list) else [] if more is None else [more]
    return tuple(sorted(set(found)))


def load_served(deployment: Deployment, store: Store, replica: str) -> Served:
    """Load the deployment's model version and start its engine."""
    config = parse(DeployConfig, deployment.config)
    version, model_dir, adapter_dir = model_dirs(store, deployment.model_version)
    if version.files_digest != deployment.model_digest:
        raise StoreError(
            f"{version.id} has digest {version.files_digest}, its deployment was made for {deployment.model_digest}",
            hint="deploy the version again",
        )
    tokenizer = load_tokenizer_dir(model_dir)
    engine = load_engine(model_dir, adapter_dir, config.engine, use_gpu=config.gpus_per_replica > 0)
    return Served(
        deployment=deployment,
        config=config,
        engine=engine,
        tokenizer=tokenizer,
        stop_token_ids=end_token_ids(tokenizer, model_dir),
        max_request_tokens=engine.max_request_tokens,
        metrics=Metrics(deployment.name, replica, lambda: [engine.health()]),
    )


@serve.ingress()
class Replica:
    """What Ray Serve runs: builds `Served`, answers its health checks, closes the engine at the end."""

    def __init__(self, record: dict[str, Any], store_uri: str) -> None:
        deployment = Deployment.model_validate(record)
        replica = serve.get_replica_context().replica_id.unique_id
        self.served = load_served(deployment, Store(store_uri), replica)

    def __serve_build_asgi_app__(self) -> AsgiApp:
        return build_http(self.served)

    def check_health(self) -> None:
        """Serve restarts the replica when this raises."""
        state = self.served.engine.health()
        if not state.ok:
            raise EngineError(state.detail, hint="the replica is restarted; its log has the cause")

    def __del__(self) -> None:
        if hasattr(self, "served"):  # not where loading failed
            self.served.engine.close()
