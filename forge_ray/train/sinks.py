"""Metrics in TensorBoard and MLflow: written by the driver, which reads what the workers wrote for themselves.

What a sink has already is asked of the sink itself, so a run that was killed and resumed writes no step twice, whatever the
moment at which it was killed. Steps that are done again, after a kill or a roll back, keep the values of the first time.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError
from forge_ray.progress import visible
from forge_ray.store import paths
from forge_ray.store.files import Store
from forge_ray.train import metrics, validation

EVERY_S = 2.0  # how often what is new is written
NAMES = ("loss", "lr", "grad_norm", "tokens_per_s", "trained_tokens_per_s", "mfu", "seconds", "wait_s", "compute_s")
Key = tuple[str, int]  # name, step


class Sink(Protocol):
    """`written`: what it held when it was opened."""

    written: set[Key]

    def write(self, step: int, values: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self, failed: bool) -> None: ...


class TensorBoard:
    """Event files below `runs/<id>/tensorboard`: `tensorboard --logdir <store>/runs` shows all runs."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
        from torch.utils.tensorboard import SummaryWriter

        self.written: set[Key] = set()
        if folder.is_dir():
            existing = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0}).Reload()
            self.written = {(tag, event.step) for tag in existing.Tags()["scalars"] for event in existing.Scalars(tag)}
        self._writer = SummaryWriter(str(folder))

    def write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class MlFlow:
    """A run of MLflow per run of ours, found again by its tag; at MLFLOW_TRACKING_URI, else in `mlflow.db` of the store."""

    def __init__(self, uri: str, run: str, name: str, config: TrainConfig, tags: dict[str, str]) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # where --json prints one object
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")  # a server that is gone must not hold up the end of a run
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = MlflowClient(tracking_uri=uri)
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        existing = self.client.search_runs([number], filter_string=f"tags.`forge.run` = '{run}'")
        if existing:
            self.run_id = existing[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            self.run_id = self.client.create_run(number, tags={"forge.run": run, **tags}, run_name=run).info.run_id
            self.client.log_batch(self.run_id, params=[Param(key, value) for key, value in flat(config.identity()).items()])
        names = self.client.get_run(self.run_id).data.metrics
        self.written = {(key, item.step) for key in names for item in self.client.get_metric_history(self.run_id, key)}

    def write(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def flush(self) -> None:
        pass

    def close(self, failed: bool) -> None:
        self.client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED")


def flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as `a.b` → text."""
    if not isinstance(value, dict):
        return {prefix: str(value)}
    texts: dict[str, str] = {}
    for key, item in value.items():
        texts |= flat(item, f"{prefix}.{key}" if prefix else key)
    return texts


class Sinks:
    """All sinks of a run. One that fails is said once and tried again at the next look; it never harms the training."""

    def __init__(self, store: Store, run: str, sinks: dict[str, Sink]) -> None:
        self.store, self.run, self.sinks = store, run, sinks
        self._looked = 0.0
        self._complained: set[str] = set()

    def write(self, is_over: bool = False) -> None:
        """What is new. The newest step waits until there is another one, or the run is over: its line may yet change."""
        if not self.sinks or (not is_over and time.monotonic() - self._looked < EVERY_S):
            return
        self._looked = time.monotonic()
        lines = metrics.read(self.store.local(paths.run(self.run, metrics.METRICS)))
        points = series(self.store, self.run, lines if is_over else lines[:-1])
        for name, sink in self.sinks.items():
            self._tried(name, lambda sink=sink: _write(sink, points))  # type: ignore[misc]

    def close(self, failed: bool) -> None:
        self.write(is_over=not failed)
        for name, sink in self.sinks.items():
            self._tried(name, lambda sink=sink: sink.close(failed))  # type: ignore[misc]

    def _tried(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # whatever a foreign library raises
            if name not in self._complained:
                self._complained.add(name)
                print(
                    f"  train.sinks: {name} failed, training goes on: {type(error).__name__}: {visible(str(error))}",
                    file=sys.stderr,
                )


def series(store: Store, run: str, lines: list[dict[str, Any]]) -> list[tuple[int, dict[str, float]]]:
    """(step, values) of the lines of `metrics.jsonl`, then those of the validations."""
    scores = [(result.step, result.loss) for result in validation.read(store, run)]
    points = [(line["step"], _values(line)) for line in lines]
    return points + [(step, {"validation_loss": loss}) for step, loss in scores if loss is not None and math.isfinite(loss)]


def _values(line: dict[str, Any]) -> dict[str, float]:
    values = {name: float(line[name]) for name in NAMES if name in line and math.isfinite(line[name])}
    if line.get("peak_bytes"):
        values["peak_bytes"] = float(max(line["peak_bytes"]))
    return values


def _write(sink: Sink, points: list[tuple[int, dict[str, float]]]) -> None:
    for step, values in points:
        missing = {name: value for name, value in values.items() if (name, step) not in sink.written}
        if missing:
            sink.write(step, missing)
            sink.written |= {(name, step) for name in missing}
    sink.flush()


def open_sinks(store: Store, run: str, name: str, config: TrainConfig, tags: dict[str, str]) -> Sinks:
    """Those of `train.sinks`. Raises `ConfigError` where one cannot be had: before the run starts, not after."""
    if config.sinks and not store.is_local:
        raise ConfigError(
            f"train.sinks={list(config.sinks)}: the metrics of a run in {store.place} cannot be followed while it goes on",
            hint="use a store that this machine mounts, or remove train.sinks",
        )
    sinks: dict[str, Sink] = {}
    for kind in config.sinks:
        try:
            if kind == "tensorboard":
                sinks[kind] = TensorBoard(store.local(paths.run(run, "tensorboard")))
            else:
                uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{store.local(paths.MLFLOW_FILE)}"
                sinks[kind] = MlFlow(uri, run, name, config, tags)
        except ImportError as error:
            raise ConfigError(
                f"train.sinks: {kind} is not installed ({error})",
                hint=f"pip install 'forge-ray[{kind}]', or remove it there",
            ) from None
        except Exception as error:
            raise ConfigError(
                f"train.sinks: {kind} cannot be opened: {type(error).__name__}: {error}",
                hint="check MLFLOW_TRACKING_URI"
                if kind == "mlflow"
                else f"check {store.place}/{paths.run(run)}/tensorboard",
            ) from None
    return Sinks(store, run, sinks)
