"""TensorBoard and MLflow have each step once, also after a kill; what fails there harms no training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError
from forge_ray.store.files import Store
from forge_ray.train import metrics, sinks, validation
from forge_ray.train.sinks import Sinks, open_sinks

pytestmark = [pytest.mark.unit, pytest.mark.slow]
RUN = "run_0123456789abcdef"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(sinks, "EVERY_S", 0.0)
    return Store(str(tmp_path))


def say(store: Store, *steps: int, factor: float = 1.0) -> None:
    folder = store.local(f"runs/{RUN}")
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        line: dict[str, Any] = {"step": step, "loss": factor / step, "lr": 0.1, "peak_bytes": [5, 7]}
        metrics.append(folder, line if step != 3 else {"step": 3, "left_out": "spike", "lr": 0.1})


def opened(store: Store, *kinds: str) -> Sinks:
    config = parse(TrainConfig, {"sinks": kinds, "optimizer": {"lr": 0.5}})
    return open_sinks(store, RUN, "counting", config, {"forge.dataset": "ds_1"})


def tensorboard(store: Store, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(store.local(f"runs/{RUN}/tensorboard"))).Reload()
    return [(event.step, round(event.value, 4)) for event in events.Scalars(tag)]


def mlflow_run(store: Store) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{store.local('mlflow.db')}")
    (run,) = client.search_runs([client.get_experiment_by_name("counting").experiment_id])
    return client, run


def mlflow_values(store: Store, key: str) -> list[tuple[int, float]]:
    client, run = mlflow_run(store)
    return [(item.step, round(item.value, 4)) for item in client.get_metric_history(run.info.run_id, key)]


def test_sinks_log_each_step_once_after_resume(store: Store) -> None:
    first = opened(store, "tensorboard", "mlflow")
    say(store, 1, 2, 3, 4, 5)
    first.write()
    assert tensorboard(store, "loss") == [(1, 1.0), (2, 0.5), (4, 0.25)]  # the newest line may yet change
    # killed here: neither closed nor told; the resumed run does steps 3 to 5 again
    say(store, 3, 4, 5, 6)
    again = opened(store, "tensorboard", "mlflow")
    again.write()
    say(store, 7)
    validation.write(store, RUN, validation.Result(6, loss=0.75, background=True))
    validation.write(store, RUN, validation.Result(7))
    again.close(failed=False)
    losses = [(1, 1.0), (2, 0.5), (4, 0.25), (5, 0.2), (6, 0.1667), (7, 0.1429)]
    for read in (tensorboard, mlflow_values):
        assert read(store, "loss") == losses
        assert read(store, "lr") == [(step, 0.1) for step in range(1, 8)]
        assert read(store, "peak_bytes")[0] == (1, 7.0)
        assert read(store, "validation_loss") == [(6, 0.75)]
    _, run = mlflow_run(store)
    assert run.info.status == "FINISHED"
    assert (run.data.tags["forge.run"], run.data.tags["forge.dataset"]) == (RUN, "ds_1")
    assert run.data.params["optimizer.lr"] == "0.5"


def test_unavailable_sink_is_refused_before_training(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert opened(store).sinks == {}
    for kind, module in (("tensorboard", "tensorboard.backend.event_processing.event_accumulator"), ("mlflow", "mlflow")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ConfigError, match=f"{kind} is not installed") as caught:
                opened(store, kind)
            assert f"forge-ray[{kind}]" in caught.value.hint
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://here")
    with pytest.raises(ConfigError, match="cannot be opened") as caught:
        opened(store, "mlflow")
    assert "MLFLOW_TRACKING_URI" in caught.value.hint
    with pytest.raises(ConfigError, match="cannot be followed"):
        opened(Store("mock:///store"), "tensorboard")


def test_failing_sink_is_reported_once_and_retried(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    class Down:
        def __init__(self) -> None:
            self.written: set[tuple[str, int]] = set()
            self.is_up, self.steps = False, list[int]()

        def write(self, step: int, values: dict[str, float]) -> None:
            if not self.is_up:
                raise OSError("no route to host")
            self.steps.append(step)

        def flush(self) -> None: ...

        def close(self, failed: bool) -> None: ...

    say(store, 1, 2, 4)
    down = Down()
    run_sinks = Sinks(store, RUN, {"mlflow": down})
    run_sinks.write()
    run_sinks.write()
    assert capsys.readouterr().err.count("no route to host") == 1
    down.is_up = True
    run_sinks.close(failed=False)
    assert down.steps == [1, 2, 4]
