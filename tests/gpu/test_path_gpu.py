"""The whole path on one GPU: DeepSpeed and the torch engine under Ray Train, evaluation and an endpoint on the GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forge_ray import pipeline
from forge_ray.client import Client
from forge_ray.config.base import load
from forge_ray.config.run import RunConfig
from forge_ray.governance.reproduce import reproduce
from forge_ray.store.files import Store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("ray_cluster"),
]
RUN = Path(__file__).parents[1] / "e2e" / "run.yaml"
ROWS = RUN.parent / "colours.jsonl"
ONE_GPU = (
    f"data.sources=[{{path: {ROWS}}}]",
    "train.precision=bf16",
    "train.micro_batch_size=4",
    "train.scaling={num_workers: 1, gpus_per_worker: 1, cpus_per_worker: 1}",
    "eval.gpus=1",
    "eval.engine.precision=bf16",
)


def config(*overrides: str) -> RunConfig:
    return load(RunConfig, RUN, (*ONE_GPU, *overrides))


def test_from_rows_to_an_answer_on_a_gpu(store: Store) -> None:
    from ray import serve
    from serving import free_port

    port = free_port()
    on_gpu = ("deploy.gpus_per_replica=1", "deploy.engine.precision=bf16", f"deploy.port={port}")
    outcome = pipeline.run(config("name=on-gpu", "release.alias=colours", *on_gpu), store)
    try:
        assert outcome.version.status == "accepted", outcome.version.reasons
        assert outcome.deployment is not None
        with Client(f"http://127.0.0.1:{port}") as client:
            answer = client.chat("colours", [{"role": "user", "content": "Colour of an emerald, number 1?"}], max_tokens=6)
        assert answer.model_version == outcome.version.id
    finally:
        serve.shutdown()


@pytest.mark.parametrize("engine", ["{engine: torch, zero_stage: 0}", "{engine: deepspeed, zero_stage: 3}"])
@pytest.mark.parametrize("adapter", ["null", "{r: 4, alpha: 8}"])
def test_each_engine_trains_and_the_same_run_gives_the_same_weights(store: Store, engine: str, adapter: str) -> None:
    settings = engine.strip("{}").split(", ")
    overrides = tuple(f"train.{setting.replace(': ', '=')}" for setting in settings)
    name = f"name=gpu-{settings[0].split()[1]}-{'full' if adapter == 'null' else 'lora'}"
    record = pipeline.train(config(name, f"train.adapter={adapter}", "train.max_steps=6", *overrides), store)
    assert record.num_steps == 6
    comparison = reproduce(store, record.id)
    assert comparison["verdict"] == "equal", comparison
