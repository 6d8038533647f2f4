"""Errors of connecting to a cluster that does not answer, and of a local Ray that does not start."""

from __future__ import annotations

from typing import Any

import pytest

from forge_ray.errors import ClusterError, ConfigError
from forge_ray.machine.cluster import connect

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("address", "raised", "expected", "message", "hint"),
    [
        (None, Exception("The current node timed out during startup."), ClusterError, "timed out during startup", "at load"),
        (
            "10.0.0.1:6379",
            ConnectionError("refused"),
            ConfigError,
            "no Ray cluster answers at '10.0.0.1:6379': refused",
            "token",
        ),
    ],
)
def test_a_ray_that_does_not_answer(
    address: str | None,
    raised: Exception,
    expected: type[Exception],
    message: str,
    hint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    def init(**_: Any) -> None:
        raise raised

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(expected, match=message) as caught:
        connect(address)
    assert hint in caught.value.hint
