"""Prometheus metrics of one replica (level 4): each replica counts its own requests, a scrape sees one of them."""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LABELS = ("deployment", "model_version", "replica")
SCOPE = "of this replica only; sum over the label `replica`"
FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
BETWEEN_TOKENS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2.5)
WHOLE_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True)
class Metrics:
    """The registry and its families; `labels` are the values of `LABELS`, in order."""

    registry: CollectorRegistry
    labels: tuple[str, str, str]
    requests: Counter
    prompt_tokens: Counter
    completion_tokens: Counter
    first_token: Histogram
    between_tokens: Histogram
    latency: Histogram
    running: Gauge
    waiting: Gauge

    def text(self, running: int, waiting: int) -> bytes:
        """The exposition format, with the engine's load as it is now."""
        self.running.labels(*self.labels).set(running)
        self.waiting.labels(*self.labels).set(waiting)
        return generate_latest(self.registry)


def make_metrics(deployment: str, model_version: str, replica: str) -> Metrics:
    """Fresh metrics in a registry of their own, so that two replicas in one process (a test) do not clash."""
    registry = CollectorRegistry()

    def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"forge_{name}_seconds", f"{what}, {SCOPE}", LABELS, buckets=buckets, registry=registry)

    return Metrics(
        registry=registry,
        labels=(deployment, model_version, replica),
        requests=Counter(
            "forge_requests", f"HTTP requests by route and status, {SCOPE}", (*LABELS, "route", "status"), registry=registry
        ),
        prompt_tokens=Counter("forge_prompt_tokens", f"Prompt tokens accepted, {SCOPE}", LABELS, registry=registry),
        completion_tokens=Counter("forge_completion_tokens", f"Tokens generated, {SCOPE}", LABELS, registry=registry),
        first_token=histogram("time_to_first_token", "Time from request to first token", FIRST_TOKEN_S),
        between_tokens=histogram("inter_token", "Time between two tokens of a request", BETWEEN_TOKENS_S),
        latency=histogram("request", "Time from request to last token", WHOLE_REQUEST_S),
        running=Gauge("forge_requests_running", f"Requests in the batch, {SCOPE}", LABELS, registry=registry),
        waiting=Gauge("forge_requests_waiting", f"Requests queued in the engine, {SCOPE}", LABELS, registry=registry),
    )
