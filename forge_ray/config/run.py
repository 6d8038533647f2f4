"""The run file: the whole path from rows to endpoint in one YAML file."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config, SettingError
from forge_ray.config.classify import Classify, normalise
from forge_ray.config.data import DataConfig
from forge_ray.config.gate import LeakBounds
from forge_ray.config.measurements import GENERAL
from forge_ray.config.release import NAME, DeployConfig, EvalConfig, ReleaseConfig
from forge_ray.config.train import TrainConfig


class RunConfig(Config):
    """The whole path from rows to endpoint."""

    name: str = Field(
        pattern=NAME, description="Names the run, its folder and its records: a-z 0-9 . _ -, at most 64 characters"
    )
    base_model: str = Field(
        description="Model to start from: an alias or model version of the store (an adapter version with train.init_from),"
        " or a folder or GGUF file to import first"
    )
    licence: str = Field("", description="Licence of a base model that is imported from a path (SPDX identifier)")
    data: DataConfig
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()
    release: ReleaseConfig
    deploy: DeployConfig | None = Field(None, description="Endpoint to deploy after the release; null: none")

    @model_validator(mode="after")
    def _can_be_served(self) -> Self:
        """Check before training that the deployment can serve the adapter."""
        adapter, deploy = self.train.adapter, self.deploy
        if adapter is None or deploy is None or self.release.alias in deploy.merged:
            return self
        engine, merged = deploy.engine, f"or list {self.release.alias!r} in deploy.merged"
        if adapter.r > engine.max_lora_rank:
            raise SettingError(
                f"train.adapter.r={adapter.r} exceeds deploy.engine.max_lora_rank={engine.max_lora_rank}: it could not be"
                " served",
                f"lower r, raise max_lora_rank, {merged}",
            )
        if not engine.max_adapters:
            raise SettingError(
                "deploy.engine.max_adapters=0 serves no adapters, but train.adapter trains one", f"raise it, {merged}"
            )
        settings = {"target_parameters": adapter.target_parameters, "modules_to_save": adapter.modules_to_save}
        beyond = [f"{name}={list(value)}" for name, value in settings.items() if value]
        if adapter.method == "dora" or beyond:
            what, remedy = (beyond[0], "remove it") if beyond else ("method=dora", "use lora")
            raise SettingError(f"an adapter with {what} cannot share an engine with other adapters", f"{remedy}, {merged}")
        return self

    @model_validator(mode="after")
    def _labels_are_for_classifiers(self) -> Self:
        is_classifier, form = isinstance(self.train.method, Classify), self.data.form
        if is_classifier != (form == "labels"):
            raise SettingError(
                f"train.method={self.train.method_name} with data.form={form}: a head over labels reads prompts, and other"
                " methods train answers",
                "set data.form=labels" if is_classifier else "set data.form=answers, or train.method={kind: classify, …}",
            )
        return self

    @model_validator(mode="after")
    def _classifier_generates_nothing(self) -> Self:
        if not isinstance(self.train.method, Classify):
            return self
        generated = ("metrics", "json_schema", "safety", "general", "leak", "kl")
        unread = [f"eval.{name}" for name in generated if name in self.eval.model_fields_set and getattr(self.eval, name)]
        unread += ["release.gate.budgets.latency_ms_per_token"] if self.release.gate.budgets.latency_ms_per_token else []
        unread += ["eval.engine.kind=vllm"] if self.eval.engine.kind == "vllm" else []
        unread += ["deploy"] if self.deploy else []
        if unread:
            raise SettingError(
                f"{unread[0]} is for models that generate text, and train.method=classify trains one that does not",
                "remove it"
                + ("; transformers' AutoModelForSequenceClassification opens the version" if unread == ["deploy"] else ""),
            )
        return self

    @model_validator(mode="after")
    def _labels_are_those_of_targets(self) -> Self:
        if self.train.targets and isinstance(self.eval.labels, tuple):
            raise SettingError(
                f"eval.labels={list(self.eval.labels)} with train.method=classify, whose targets list the labels",
                "remove eval.labels",
            )
        return self

    @property
    def scoring(self) -> EvalConfig:
        """The settings of the run's evaluations: base and trained model are scored on the same labels, those of a
        classifier's only target."""
        targets = self.train.targets
        if len(targets) != 1 or targets[0].loss == "multi" or self.eval.labels:
            return self.eval
        return self.eval.model_copy(update={"labels": tuple(map(normalise, targets[0].labels))})

    @model_validator(mode="after")
    def _rows_can_be_shared(self) -> Self:
        length, size = self.data.sequence_length, self.train.sequence_parallel
        if length % size:
            raise SettingError(
                f"train.sequence_parallel={size} does not divide data.sequence_length={length}",
                f"use data.sequence_length={-(-length // size) * size}, or another number of workers per row",
            )
        return self

    @model_validator(mode="after")
    def _gate_has_what_it_bounds(self) -> Self:
        gate = self.release.gate
        if gate.leak != LeakBounds() and self.eval.leak is None:
            raise SettingError(
                "release.gate.leak has bounds for the leak audit, but eval.leak is not set", "set eval.leak={}"
            )
        judged = [*gate.thresholds, *(rule.metric for rule in gate.better_than)]
        judged += [rule.metric for rule in gate.no_worse_than]
        if self.eval.general is None and (unmeasured := [name for name in judged if name.startswith(GENERAL)]):
            raise SettingError(
                f"release.gate judges {unmeasured[0]}, but eval.general is not set", "set eval.general={rows: chats}"
            )
        if self.eval.kl is None and "kl" in judged:
            raise SettingError("release.gate judges kl, but eval.kl is not set", "set eval.kl={}")
        if "kl" in judged[len(gate.thresholds) :]:
            raise SettingError(
                "release.gate compares kl with another model's, which is of another start", "set thresholds: {kl: {max: …}}"
            )
        for rule in gate.no_worse_than:
            if rule.slices != "none" and rule.slices not in self.eval.slices:
                raise SettingError(
                    f"release.gate.no_worse_than compares slices={rule.slices}, but eval.slices={list(self.eval.slices)}"
                    " does not list it",
                    f"add {rule.slices} to eval.slices",
                )
        return self
