"""The run file: the whole path from rows to endpoint in one YAML file."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config, SettingError
from forge_ray.config.classify import (
    OF_ALL_CLASSES,
    OF_CLASSIFIERS,
    OF_WHOLE_SPLIT,
    Classify,
    Reward,
    Target,
    class_names,
    metrics_of,
)
from forge_ray.config.data import DataConfig
from forge_ray.config.gate import LeakBounds
from forge_ray.config.measurements import GENERAL
from forge_ray.config.release import NAME, DeployConfig, EvalConfig, Moderation, ReleaseConfig
from forge_ray.config.thresholds import goals_of
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
        if adapter is None or deploy is None or self.release.alias in deploy.merged or self.train.targets:
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
        if not self.train.targets:
            return self
        generated = ("metrics", "json_schema", "safety", "general", "leak", "kl")
        unread = [f"eval.{name}" for name in generated if name in self.eval.model_fields_set and getattr(self.eval, name)]
        unread += ["release.gate.budgets.latency_ms_per_token"] if self.release.gate.budgets.latency_ms_per_token else []
        unread += ["eval.engine.kind=vllm"] if self.eval.engine.kind == "vllm" else []
        unread += ["deploy"] if self.deploy and isinstance(self.train.method, Reward) else []
        if unread:
            raise SettingError(
                f"{unread[0]} is for models that generate text, and train.method={self.train.method_name} trains"
                " one that does not",
                "remove it",
            )
        return self

    @model_validator(mode="after")
    def _gate_has_its_metrics(self) -> Self:
        """Refused before training, not at the release."""
        targets, gate = self.train.targets, self.release.gate
        slices = {rule.metric for rule in gate.no_worse_than if rule.slices != "none"}
        judged = [*gate.thresholds, *(rule.metric for rule in gate.comparisons)]
        if not targets:
            unmeasured = [name for name in judged if name in OF_CLASSIFIERS]
        else:
            unmeasured = [name for name in judged if name not in metrics_of(targets)]
        if unmeasured:
            raise SettingError(
                f"release.gate judges {unmeasured[0]}, which the evaluation of train.method={self.train.method_name} does"
                " not measure",
                f"judge one of {', '.join(sorted(metrics_of(targets)))}"
                if targets
                else "remove it, or train a head over labels with train.method={kind: classify, …}",
            )
        of_targets = {f"{target.name}_temperature" for target in targets if len(targets) > 1}
        if whole := sorted(slices & {*OF_ALL_CLASSES, *OF_WHOLE_SPLIT, *of_targets}):
            raise SettingError(
                f"release.gate.no_worse_than compares {whole[0]} of slices, which do not have it",
                "compare exact_match, or set slices: none",
            )
        return self

    @model_validator(mode="after")
    def _settings_of_classifiers(self) -> Self:
        names = class_names(self.train.targets) if isinstance(self.train.method, Classify) else ()
        for name, is_set in (("eval.thresholds", self.eval.thresholds), ("release.moderation", self.release.moderation)):
            if is_set is not None and is_set != {} and not names:
                raise SettingError(
                    f"{name} is for classifiers, and train.method={self.train.method_name} trains none",
                    f"remove {name}, or set train.method={{kind: classify, …}}",
                )
        if names:
            goals_of(self.eval.thresholds, names)
        if moderation := self.release.moderation:
            if unknown := [name for name in moderation.safe if name not in names]:
                raise SettingError(
                    f"release.moderation.safe names {unknown[0]!r}, which is not one of the labels {list(names[:8])}",
                    "correct the name",
                )
            if not flags_of(self.train.targets, moderation):
                raise SettingError(
                    f"release.moderation.safe={list(moderation.safe)} leaves no label that flags a text", "list fewer"
                )
        return self

    @property
    def flags(self) -> tuple[str, ...]:
        """Labels for which the version flags a text; () where it is no moderation model."""
        return flags_of(self.train.targets, self.release.moderation) if self.release.moderation else ()

    @model_validator(mode="after")
    def _labels_are_those_of_targets(self) -> Self:
        is_reward = isinstance(self.train.method, Reward)
        if (is_reward and self.eval.labels) or (self.train.targets and isinstance(self.eval.labels, tuple)):
            raise SettingError(
                f"eval.labels={self.eval.labels} with train.method={self.train.method_name}: the targets of a classifier"
                " list the labels, and a reward model has none",
                "remove eval.labels",
            )
        return self

    @property
    def scoring(self) -> EvalConfig:
        """The settings of the run's evaluations: base and trained model are scored on the same labels, those of a
        classifier's only target as the rows write them."""
        targets = self.train.targets
        if len(targets) != 1 or targets[0].loss != "single" or self.eval.labels:
            return self.eval
        return self.eval.model_copy(update={"labels": targets[0].labels})

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


def flags_of(targets: tuple[Target, ...], moderation: Moderation) -> tuple[str, ...]:
    return tuple(name for name in class_names(targets) if name not in moderation.safe)
