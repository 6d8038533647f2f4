"""The switches of Ray Serve behind HAProxy."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

import pytest
from ray.serve._private import constants, replica

from forge_ray.serve.haproxy import SWITCHES, set_haproxy

pytestmark = pytest.mark.unit
GUIDE = Path(__file__).parents[3] / "docs/guides/serving.md"


def test_the_guide_lists_every_switch() -> None:
    listed = dict(re.findall(r"^(RAY_SERVE_[A-Z_]+)=(.*)$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == SWITCHES


def test_ray_serve_reads_every_switch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    set_haproxy()
    assert environment.keys() > SWITCHES.keys()
    assert [name for name in environment if not hasattr(constants, name)] == []


def test_replicas_count_the_requests_that_haproxy_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SWITCHES["RAY_SERVE_HAPROXY_METRICS_ENABLED"] == "0"
    metrics = replica.ReplicaMetricsManager.__new__(replica.ReplicaMetricsManager)
    metrics._ingress = True
    for name in ("RAY_SERVE_ENABLE_DIRECT_INGRESS", "RAY_SERVE_ENABLE_HA_PROXY"):
        monkeypatch.setattr(replica, name, True)
    for by_haproxy in (True, False):
        monkeypatch.setattr(replica, "RAY_SERVE_HAPROXY_METRICS_ENABLED", by_haproxy)
        assert metrics._should_emit_request_ingress_metrics(replica.RequestProtocol.HTTP) is not by_haproxy
