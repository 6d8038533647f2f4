"""Export a run and its version to an MLflow server. The records of the store stay authoritative.

The run is identified by its tag `forge.run`, the version by `forge.version`: a second export writes nothing twice, and
resumes an interrupted one.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError, NotFound, PolicyError, StoreError
from forge_ray.records import EvalReport, ModelVersion, RunRecord
from forge_ray.release.promotion import require_signed
from forge_ray.store import exports, paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.out_of_use import refuse_withdrawn
from forge_ray.store.uris import shown
from forge_ray.train import metrics
from forge_ray.train.sinks import MlFlow, series

BATCH = 1000  # MLflow's maximum of values per request
NO_ALIAS = re.compile(r"[^A-Za-z0-9_-]")  # characters that MLflow does not allow in an alias


@dataclass(frozen=True)
class Exported:
    """Where the run and the version are in MLflow. `aliases`: alias of the store → alias in MLflow."""

    run: str
    mlflow_run: str
    experiment: str
    metrics: int
    version: str = ""
    registered: str = ""
    registered_version: str = ""
    aliases: dict[str, str] | None = None


def export(catalog: Catalog, reference: str, uri: str, experiment: str, with_weights: bool) -> Exported:
    """Export a run by its id, or a version by its id or alias together with its run. Raises `ConfigError` if MLflow is not
    installed or its server refuses."""
    version, run = _found(catalog, reference)
    if with_weights:
        if version is None:
            raise ConfigError(
                f"--with-weights: {run.id} is a run, its weights belong to a version", hint="export the version"
            )
        refuse_withdrawn(catalog, version.id)
        require_signed(catalog, version)
        exports.refuse_export(catalog, version)
    try:
        import mlflow  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"mlflow is not installed ({error})", hint="pip install 'forge-ray[mlflow]'") from None
    try:
        return _export(catalog, version, run, uri, experiment or run.name, with_weights)
    except (ConfigError, StoreError, NotFound, PolicyError):
        raise
    except Exception as error:  # MLflow raises errors of many libraries
        raise ConfigError(
            f"MLflow at {uri} failed: {type(error).__name__}: {error}",
            hint="check that the server is up and that you may write to it",
        ) from None


def _found(catalog: Catalog, reference: str) -> tuple[ModelVersion | None, RunRecord]:
    if catalog.has(reference) and isinstance(record := catalog.get(reference), RunRecord):
        return None, record
    version = catalog.model(reference)
    if not catalog.has(version.run):
        raise NotFound(
            f"{version.id} has no run on record: {version.run or 'it was imported'}",
            hint="export a version that was trained",
        )
    return version, catalog.get_as(RunRecord, version.run)


def _export(
    catalog: Catalog, version: ModelVersion | None, run: RunRecord, uri: str, experiment: str, with_weights: bool
) -> Exported:
    store = catalog.store
    tags = {"forge.dataset": run.dataset, "forge.base_model": run.base_model, "forge.code_digest": run.code_digest}
    tags |= {"forge.initial_adapter": run.initial_adapter} if run.initial_adapter else {}
    tags |= {"forge.config_digest": run.config_digest, "forge.order_digest": run.order_digest}
    sink = MlFlow(uri, run.id, experiment, parse(TrainConfig, run.config["train"]), tags)
    path = paths.run(run.id, metrics.METRICS)
    steps = series(store, run.id, metrics.parse(store.read(path).decode()) if store.exists(path) else [])
    _log(sink, steps)
    sink.close(failed=False)
    exported = Exported(run.id, sink.run_id, experiment, sum(len(values) for _, values in steps))
    return exported if version is None else _register(catalog, version, exported, sink.client, uri, with_weights)


def _log(sink: MlFlow, steps: list[tuple[int, dict[str, float]]]) -> None:
    """Log the values that MLflow lacks, in batches of MLflow's limit; a request per step would take hours for a long run."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    missing = [
        Metric(name, value, now, step)
        for step, values in steps
        for name, value in values.items()
        if (name, step) not in sink.written
    ]
    for first in range(0, len(missing), BATCH):
        sink.client.log_batch(sink.run_id, metrics=missing[first : first + BATCH])


def _register(
    catalog: Catalog, version: ModelVersion, exported: Exported, client: Any, uri: str, with_weights: bool
) -> Exported:
    from mlflow.exceptions import MlflowException

    name = version.name
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name)
    registered = client.search_model_versions(f"name = '{name}' and tags.`forge.version` = '{version.id}'")
    number = str(registered[0].version) if registered else ""
    if not number:
        source = f"forge:/models/{version.id}#{version.files_digest}"
        if with_weights:
            exports.record_export(catalog, version, "mlflow", "", f"MLflow at {shown(uri)}", version.files)
            source = _weights(catalog.store, version, exported.mlflow_run, client)
        tags = _tags(catalog, version)
        number = str(client.create_model_version(name, source, exported.mlflow_run, tags=tags).version)
    aliases = {alias: NO_ALIAS.sub("-", alias) for alias, target in catalog.aliases().items() if target == version.id}
    for theirs in aliases.values():
        client.set_registered_model_alias(name, theirs, number)
    client.set_model_version_tag(name, number, "forge.aliases", ", ".join(sorted(aliases)))
    fields = vars(exported) | {"version": version.id, "registered": name, "registered_version": number, "aliases": aliases}
    return Exported(**fields)


def _weights(store: Store, version: ModelVersion, run: str, client: Any) -> str:
    client.log_artifacts(run, str(store.fetch_dir(paths.model(version.id), files=version.files)), f"models/{version.id}")
    return f"runs:/{run}/models/{version.id}"


def _tags(catalog: Catalog, version: ModelVersion) -> dict[str, str]:
    """The ids of the version as tags, and the scores of its evaluation."""
    tags = {
        "forge.version": version.id,
        "forge.run": version.run,
        "forge.status": version.status,
        "forge.files_digest": version.files_digest,
        "forge.base_model": version.base_model,
        "forge.licence": version.licence,
        "forge.evals": ", ".join(version.evals),
    }
    if version.evals and catalog.has(version.evals[0]):
        scores = catalog.get_as(EvalReport, version.evals[0]).metrics
        tags |= {f"forge.eval.{name}": f"{value:.10g}" for name, value in scores.items()}
    return tags
