"""`forge quickstart`: the whole path on this machine, with a real base model and real rows."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from forge_ray import pipeline
from forge_ray.client import Answer, Client
from forge_ray.config.base import load
from forge_ray.config.data import Source
from forge_ray.config.release import DeployConfig
from forge_ray.config.run import RunConfig
from forge_ray.errors import ConfigError
from forge_ray.evaluate.examples import examples
from forge_ray.machine.shipped import here_or_shipped
from forge_ray.models.import_model import import_model
from forge_ray.models.quickstart_base import base_model_file
from forge_ray.pipeline import Outcome
from forge_ray.progress import stage
from forge_ray.release import promotion
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

RUN_FILE = "jobs/quickstart.yaml"


@dataclass(frozen=True)
class QuickstartResult:
    """The outcome of the quick start, with its question and answer."""

    outcome: Outcome
    question: str
    expected: str
    answer: Answer | None
    url: str


def run_config(file: str, overrides: tuple[str, ...]) -> RunConfig:
    """The quick start's run file. It and its rows are read from the current folder, or else from the files shipped with
    forge_ray."""
    config = load(RunConfig, here_or_shipped(file), overrides)
    sources = tuple(_here_or_shipped(source) for source in config.data.sources)
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})


def _here_or_shipped(source: Source) -> Source:
    path = here_or_shipped(source.path)
    return source if path == source.path else source.model_copy(update={"path": path, "name": source.name or source.path})


def quickstart(config: RunConfig, store: Store, port: int) -> QuickstartResult:
    """Run every stage, ask the endpoint about a held-out row, and stop the server again."""
    with Catalog.open(store) as catalog, stage("import") as it:
        already_imported = config.base_model in catalog.aliases()
        if not already_imported:
            promotion.promote(
                catalog, import_model(catalog, base_model_file(), config.base_model, "Apache-2.0").id, config.base_model
            )
        version = catalog.model(config.base_model)
        it.done(f"{version.id}  {version.name}{', already imported' if already_imported else ''}")
    if config.deploy is None:
        hint = f"use {here_or_shipped(RUN_FILE)}, or add the section"
        raise ConfigError("the quick start's run file has no `deploy` section", hint=hint)
    deploy = config.deploy.model_copy(update={"port": port or free_port(config.deploy.port)})
    outcome = pipeline.run(config.model_copy(update={"deploy": deploy}), store)
    example = examples(store, outcome.dataset, config.eval)[0]
    messages = [{"role": message["role"], "content": message["content"]} for message in example.messages]
    url = f"http://{deploy.host}:{deploy.port}"
    answer = None
    if outcome.deployment:
        from forge_ray.serve.deploy import note_end

        try:
            answer = ask(url, messages, deploy)
        finally:
            note_end(outcome.deployment, store)
    return QuickstartResult(outcome, str(messages[-1]["content"]), example.answer, answer, url)


def ask(url: str, messages: list[dict[str, Any]], deploy: DeployConfig) -> Answer:
    with stage("ask") as it, Client(url) as client:
        answer = client.chat(deploy.models[0], messages, max_tokens=16, temperature=0)
        it.done(f"answered by {answer.model_version}, {answer.completion_tokens} tokens")
        return answer


def free_port(preferred: int) -> int:
    """`preferred` if it is free, else a free port that the system chooses."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigError("no free port on 127.0.0.1", hint="give one with --port")
