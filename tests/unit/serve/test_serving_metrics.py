"""What a replica counts, and several replicas' expositions as one text, read by Prometheus's own parser."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import Counter, Histogram
from prometheus_client.parser import text_string_to_metric_families

from forge_ray.inference.engine import EngineHealth
from forge_ray.serve import metrics as metrics_module
from forge_ray.serve.metrics import Metrics, merged

pytestmark = pytest.mark.unit


READY: list[Any] = [SimpleNamespace(version="mv_1", digest="sha256:0", adapter="a1")]


def used(replica: str = "r0", name: str = "support@prod") -> Metrics:
    """Metrics in which everything happened once."""
    loads = [EngineHealth(True, "", 3, 2, 500), EngineHealth(True, "", 1, 0, 20)]
    metrics = Metrics("bot", replica, lambda: loads, lambda: READY)
    metrics.request("/v1/models", 200)
    metrics.refused("tokens")
    metrics.expected_wait(0.7)
    metrics.accepted(name, "mv_1", 12, 0.003)
    metrics.token(name, "mv_1", 0.2, first=True)
    metrics.token(name, "mv_1", 0.03, first=False, count=2)
    metrics.finished(name, "mv_1", 0.23, 200)
    metrics.token(name, "mv_1", None, first=True)  # of a second choice
    metrics.shadowed(name, "mv_2", 0.4, 503, 9)
    metrics.kept("dropped")
    return metrics


def values(text: str) -> dict[tuple[str, ...], float]:
    """Sample → value; the key is the sample's name and its label values in alphabetical order of the labels."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_exposition_has_every_metric() -> None:
    samples = values(used().text())
    answer = ("bot", "support@prod", "mv_1", "r0")
    assert samples[("forge_prompt_tokens_total", *answer)] == 12
    assert samples[("forge_completion_tokens_total", *answer)] == 4
    assert samples[("forge_time_to_first_token_seconds_sum", *answer)] == 0.2
    assert samples[("forge_inter_token_seconds_count", *answer)] == 1
    assert samples[("forge_answers_total", *answer, "200")] == 1
    assert samples["forge_requests_total", "bot", "r0", "/v1/models", "200"] == 1
    assert samples["forge_refused_total", "bot", "tokens", "r0"] == 1
    assert samples["forge_requests_running", "bot", "r0"] == 4
    assert samples["forge_requests_waiting", "bot", "r0"] == 2
    assert samples["forge_tokens_held", "bot", "r0"] == 520
    assert samples["forge_model_info", "a1", "bot", "sha256:0", "mv_1", "r0"] == 1
    # a shadow costs nobody tokens and counts as no answer
    assert samples["forge_shadow_answers_total", "bot", "support@prod", "mv_2", "r0", "503"] == 1
    assert samples["forge_shadow_tokens_total", "bot", "support@prod", "mv_2", "r0"] == 9
    assert not [key for key in samples if key[0] == "forge_answers_total" and "mv_2" in key]


def test_unloaded_version_is_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = used()
    assert "forge_model_info{" in metrics.text()
    monkeypatch.setattr(sys.modules[__name__], "READY", [])
    assert "forge_model_info{" not in metrics.text()


def test_replicas_are_joined_with_each_family_once() -> None:
    texts = {"r0": used("r0").text(), "r1": used("r1").text()}
    both = merged(texts)
    families = [line.split(" ")[2] for line in both.splitlines() if line.startswith("# TYPE")]
    assert len(families) == len(set(families)) > 10
    assert values(both) == values(texts["r0"]) | values(texts["r1"])
    assert merged({"r0": texts["r0"]}) == texts["r0"]


def test_a_sample_without_labels_or_with_odd_ones_gets_its_replica() -> None:
    text = '# TYPE a gauge\na 1\na{} 2\na{b="x,replica=\\"y}"} 3\na{replica="own",b="z"} 4\n'
    samples = merged({'r"0': text}).splitlines()[1:]
    assert samples == [
        r'a{replica="r\"0"} 1',
        r'a{replica="r\"0"} 2',
        r'a{replica="r\"0",b="x,replica=\"y}"} 3',
        'a{replica="own",b="z"} 4',
    ]


def test_series_are_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics, looked_up = Metrics("bot", "r0"), list[tuple[str, ...]]()
    for metric in (Counter, Histogram):

        def labels(self: Any, *names: str, own: Any = metric.labels) -> Any:
            looked_up.append(names)
            return own(self, *names)

        monkeypatch.setattr(metric, "labels", labels)
    for _ in range(3):
        for name in ("first", "second"):
            metrics.token(name, "mv_1", 0.2, first=True)
            metrics.token(name, "mv_1", 0.03, first=False)
    assert sorted(looked_up) == [("bot", "first", "mv_1")] * 3 + [("bot", "second", "mv_1")] * 3
    samples = values(metrics.text())
    for name in ("first", "second"):
        assert samples["forge_completion_tokens_total", "bot", name, "mv_1", "r0"] == 6
        assert samples["forge_time_to_first_token_seconds_count", "bot", name, "mv_1", "r0"] == 3
        assert samples["forge_inter_token_seconds_count", "bot", name, "mv_1", "r0"] == 3


def test_names_beyond_the_bound_share_one_series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "MAX_SERIES", 2)
    metrics = Metrics("bot", "r0")
    for name in ("a", "b", "c", "d", "a"):
        metrics.accepted(name, "mv_1", 1, 0.0)
    samples = values(metrics.text())
    assert samples["forge_prompt_tokens_total", "bot", "a", "mv_1", "r0"] == 2
    assert samples["forge_prompt_tokens_total", "bot", "unknown", "unknown", "r0"] == 2


# ---------------------------------------------------------------- the dashboard

DASHBOARD = Path(__file__).parents[3] / "cluster" / "grafana" / "forge-serving.json"
SELECTED = re.compile(r"(forge_\w+)(?:\{([^}]*)\})?")


def expressions(board: Any) -> list[str]:
    queries = [variable["query"]["query"] for variable in board["templating"]["list"] if variable["type"] == "query"]
    return queries + [target["expr"] for panel in board["panels"] for target in panel["targets"]]


def test_every_metric_and_label_of_the_dashboard_exists() -> None:
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(used().text()):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    asked = expressions(json.loads(DASHBOARD.read_text()))
    assert len(asked) > 20
    seen = set()
    for expression in asked:
        assert expression.count("(") == expression.count(")")
        selections = SELECTED.findall(expression)
        assert selections, expression
        for name, selectors in selections:
            assert name in labels, expression
            assert set(re.findall(r"(\w+)=~?\"", selectors)) <= labels[name], expression
            seen.add(name)
        grouped = {label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")}
        assert grouped <= set.union(*(labels[name] for name, _ in selections)), expression
    # and nothing that is counted is left unseen
    plotted = {name.removesuffix("_bucket").removesuffix("_total") for name in seen}
    families = {family.name for family in text_string_to_metric_families(used().text())}
    assert families == plotted


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    covered = [(x, y) for at in places for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])]
    assert len(covered) == len(set(covered))
    assert max(x for x, _ in covered) < 24
