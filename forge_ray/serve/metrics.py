"""Prometheus metrics of one replica, and merging the expositions of several (no ray).

`model` is the name that the client sent (often an alias), `model_version` the version that answered; `forge_model_info` has
the digest and adapter of a version. Requests are counted by route and status, answers by name and version.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from forge_ray.inference.engine import EngineHealth

if TYPE_CHECKING:
    from forge_ray.serve.loaded import Loaded

M = TypeVar("M", Counter, Histogram)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
ANSWER = ("deployment", "model", "model_version")
VERSION = ("model_version", "digest", "adapter")
UNKNOWN = "unknown"
MAX_SERIES = 500  # (name, version) pairs; they accumulate while a replica lives, and each costs some 60 lines

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_TOKENS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2.5)
ADMITTED_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 5)
EXPECTED_WAIT_S = (0.01, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
WHOLE_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """The metrics of one replica. `health` gives the load of its engines, `ready` the versions that can answer; both are
    called at each scrape.

    It has its own registry, so that two replicas in one process (in a test) do not clash.
    """

    def __init__(
        self,
        deployment: str,
        replica: str,
        health: Callable[[], Iterable[EngineHealth]] = tuple,
        ready: Callable[[], Iterable[Loaded]] = tuple,
    ) -> None:
        self.deployment, self.replica = deployment, replica
        self._health, self._ready = health, ready
        self._pairs: set[tuple[str, str]] = set()
        self._series: dict[tuple[Counter | Histogram, str, str], Any] = {}
        self._registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"forge_{name}", what, labels, registry=self._registry)

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"forge_{name}_seconds", what, ANSWER, buckets=buckets, registry=self._registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"forge_{name}", what, ("deployment", *labels), registry=self._registry)

        self._requests = counter("requests", "HTTP requests by route and status", "deployment", "route", "status")
        self._refused = counter("refused", "Requests refused, by reason", "deployment", "reason")
        self._answers = counter(
            "answers", "Answers that ended; 499: the client left, 503: the engine failed", *ANSWER, "status"
        )
        self._shadows = counter("shadow_answers", "Answers of shadow versions, which no client sees", *ANSWER, "status")
        self._shadow_tokens = counter("shadow_tokens", "Tokens of answers of shadow versions", *ANSWER)
        self._prompt = counter("prompt_tokens", "Prompt tokens admitted", *ANSWER)
        self._completion = counter("completion_tokens", "Tokens generated, also for clients that left", *ANSWER)
        self._admitted = histogram("admission", "Time from request to the engine: template, tokeniser, limits", ADMITTED_S)
        what = "Wait for the engine that a request expects when it arrives, whether it is admitted or not"
        buckets = EXPECTED_WAIT_S
        self._expected = Histogram(
            "forge_expected_wait_seconds", what, ("deployment",), buckets=buckets, registry=self._registry
        )
        self._first = histogram("time_to_first_token", "Time from request to first token", FIRST_TOKEN_S)
        self._between = histogram("inter_token", "Time between two tokens of a request", BETWEEN_TOKENS_S)
        self._whole = histogram("request", "Time from request to last token", WHOLE_REQUEST_S)
        self._shadowed = histogram("shadow_request", "Time from request to last token of shadow versions", WHOLE_REQUEST_S)
        what = "Answers that are kept in the store, dropped because the queue was full, not kept because unfinished, removed"
        self._kept = counter("kept_answers", what, "deployment", "outcome")
        self._running = gauge("requests_running", "Sequences in the batch")
        self._waiting = gauge("requests_waiting", "Sequences that wait in the engine's queue")
        self._held = gauge("tokens_held", "Tokens of sequences that run or wait: prompts and what may still be generated")
        self._info = gauge("model_info", "1 for each version that can answer; adapter: its name in the engine", *VERSION)

    def request(self, route: str, status: int) -> None:
        """An HTTP request that ended. `route` is the template that matched, never the path that was sent."""
        self._requests.labels(self.deployment, route, str(status)).inc()

    def refused(self, reason: str) -> None:
        """`reason`: key, scope; requests, tokens, size, concurrency; queue, wait."""
        self._refused.labels(self.deployment, reason).inc()

    def expected_wait(self, seconds: float) -> None:
        """Of a request that arrived."""
        self._expected.labels(self.deployment).observe(seconds)

    def accepted(self, name: str, version: str, prompt_tokens: int, seconds: float) -> None:
        """A prompt goes to the engine, `seconds` after its request arrived."""
        labels = self._labels(name, version)
        self._prompt.labels(*labels).inc(prompt_tokens)
        self._admitted.labels(*labels).observe(seconds)

    def token(self, name: str, version: str, seconds: float | None, first: bool, count: int = 1) -> None:
        """`count` tokens arrived, `seconds` after the request (the first) or after the previous ones; None where neither
        applies, as with the first token of a second choice."""
        self._of(self._completion, name, version).inc(count)
        if seconds is not None:
            self._of(self._first if first else self._between, name, version).observe(seconds)

    def finished(self, name: str, version: str, seconds: float, status: int) -> None:
        """An answer ended after `seconds`: 200, 499 where the client left, 503 where the engine failed."""
        labels = self._labels(name, version)
        self._answers.labels(*labels, str(status)).inc()
        self._whole.labels(*labels).observe(seconds)

    def shadowed(self, name: str, version: str, seconds: float, status: int, tokens: int) -> None:
        """An answer of a shadow version of `name`: counted only here, for no client asked for its tokens. 429: dropped."""
        labels = self._labels(name, version)
        self._shadows.labels(*labels, str(status)).inc()
        self._shadow_tokens.labels(*labels).inc(tokens)
        self._shadowed.labels(*labels).observe(seconds)

    def kept(self, outcome: str, count: int = 1) -> None:
        """`outcome`: kept, dropped (the queue was full), unfinished; removed_days and removed_size of those kept before."""
        self._kept.labels(self.deployment, outcome).inc(count)

    def text(self) -> str:
        """The exposition format, with the engines' current load; each sample has the label `replica`."""
        loads = list(self._health())
        self._running.labels(self.deployment).set(sum(load.num_running for load in loads))
        self._waiting.labels(self.deployment).set(sum(load.num_waiting for load in loads))
        self._held.labels(self.deployment).set(sum(load.num_tokens for load in loads))
        self._info.clear()
        for loaded in self._ready():
            self._info.labels(self.deployment, loaded.version, loaded.digest, loaded.adapter).set(1)
        return merged({self.replica: generate_latest(self).decode()})

    def collect(self) -> Iterator[Metric]:
        """The families without the creation times of their series, which double the text; for `generate_latest`."""
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family

    def _of(self, metric: M, name: str, version: str) -> M:
        """The series of an answer, kept: for each token, looking it up by its labels would take longer than counting."""
        deployment, name, version = self._labels(name, version)
        key = metric, name, version
        if key not in self._series:
            self._series[key] = metric.labels(deployment, name, version)
        series: M = self._series[key]
        return series

    def _labels(self, name: str, version: str) -> tuple[str, str, str]:
        if (name, version) not in self._pairs:
            if len(self._pairs) >= MAX_SERIES:
                return self.deployment, UNKNOWN, UNKNOWN
            self._pairs.add((name, version))
        return self.deployment, name, version


def store_metrics(deployment: str, num_without_effect: int, is_unreadable: bool) -> str:
    """What a deployment's coordinator sees of the store, in the exposition format."""
    registry = CollectorRegistry()
    what = "Lines of the audit log that have no effect"
    lines = Gauge("forge_log_lines_without_effect", what, ["deployment"], registry=registry)
    lines.labels(deployment).set(num_without_effect)
    what = "1 while the store's log cannot be read, or was cut: what was read before is in force"
    unreadable = Gauge("forge_store_unreadable", what, ["deployment"], registry=registry)
    unreadable.labels(deployment).set(is_unreadable)
    return generate_latest(registry).decode()


LABEL = re.compile(r'([a-zA-Z_]\w*)="(?:[^"\\]|\\.)*"')


def merged(texts: Mapping[str, str]) -> str:
    """The expositions of several replicas as one: each family once, each sample with a label `replica`.

    Where two replicas describe a family differently (a roll-out) the first one's text stays.
    """
    families: dict[str, tuple[dict[str, str], list[str]]] = {}
    for replica, text in texts.items():
        escaped = replica.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        label, samples = f'{{replica="{escaped}"', list[str]()
        for line in text.split("\n"):
            if line.startswith(("# HELP ", "# TYPE ")):
                _, kind, name, *_ = line.split(" ", 3)
                head, samples = families.setdefault(name, ({}, []))
                head.setdefault(kind, line)
            elif line and not line.startswith("#"):
                samples.append(_labelled(line, label))
    lines = [line for head, samples in families.values() for line in (*head.values(), *samples)]
    return "".join(line + "\n" for line in lines)


def _labelled(sample: str, label: str) -> str:
    """`sample` with `label` (`{replica="…"`) as its first, unless it has the label `replica` already."""
    space, brace = sample.index(" "), sample.find("{")
    if not 0 <= brace < space:
        return f"{sample[:space]}{label}}}{sample[space:]}"
    if sample.startswith('{replica="', brace):  # as `Metrics.text` writes it
        return sample
    if sample.startswith("{}", brace):
        return f"{sample[:brace]}{label}{sample[brace + 1 :]}"
    if 'replica="' in sample and "replica" in LABEL.findall(sample):
        return sample
    return f"{sample[:brace]}{label},{sample[brace + 1 :]}"
