"""An endpoint that asks for keys: two replicas, one count, one ledger.

It takes the cluster from the endpoint without keys that other files share, and sorts behind them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from serving import WAIT_S, config, free_port

from forge_ray.serve import keys
from forge_ray.serve.ledger import lines
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def url(ray_cluster: None, store: Store) -> Iterator[str]:
    from ray import serve

    from forge_ray.serve.deploy import base_url, deploy

    serve.shutdown()  # one endpoint at a time has the cluster
    deploy_config = config(free_port(), name="closed", auth="keys")
    with Catalog.open(store) as catalog:
        deploy(deploy_config, catalog, wait_s=WAIT_S)
        yield base_url(deploy_config)
    serve.shutdown()


@pytest.fixture(scope="module")
def catalog(store: Store) -> Iterator[Catalog]:
    with Catalog.open(store) as catalog:
        yield catalog


def complete(url: str, text: str) -> Any:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=text, max_retries=0, timeout=WAIT_S) as client:
        return client.completions.with_raw_response.create(model="tiny", prompt="one two", max_tokens=2, temperature=0)


def answered(url: str, text: str) -> int:
    return httpx.get(f"{url}/health", headers={"x-api-key": text}, timeout=WAIT_S).status_code


def until_opened(url: str, text: str, status: int = 200) -> None:
    """Both replicas have looked at the store: many answers in a row."""
    deadline, in_a_row = time.monotonic() + WAIT_S, 0
    while in_a_row < 20:
        assert time.monotonic() < deadline
        in_a_row = in_a_row + 1 if answered(url, text) == status else 0


def test_every_route_needs_a_key(url: str) -> None:
    for path in ("/health", "/metrics", "/v1/models", "/v1/chat/completions", "/docs", "/nothing"):
        answer = httpx.get(url + path, timeout=WAIT_S)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key"), path
        assert answer.headers["x-forge-deployment"]
    # Serve's proxy answers these itself; all that they tell is the endpoint's name
    assert httpx.get(f"{url}/-/healthz", timeout=WAIT_S).text == "success"
    assert httpx.get(f"{url}/-/routes", timeout=WAIT_S).json() == {"/": "closed"}


def test_one_limit_over_two_replicas_and_every_answer_in_the_ledger(url: str, catalog: Catalog) -> None:
    key, text = keys.create(catalog, "counted", models=("tiny",), rpm=10)
    until_opened(url, text)

    def ask(_: int) -> Any:
        try:
            return complete(url, text)
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(ask, range(48)))
    passed = [one for one in results if not isinstance(one, openai.RateLimitError)]
    assert len(passed) == 10
    assert sorted(int(one.headers["x-ratelimit-remaining-requests"]) for one in passed) == list(range(10))
    deadline, used = time.monotonic() + WAIT_S, []
    while len(used) < 10 and time.monotonic() < deadline:
        time.sleep(0.1)
        used = [line for line in lines(catalog.store) if line.key == key.id]
    assert len(used) == 10
    assert sum(line.completion_tokens for line in used) == sum(one.parse().usage.completion_tokens for one in passed)


def test_revoked_key_is_refused_without_redeployment(url: str, catalog: Catalog) -> None:
    _, text = keys.create(catalog, "leaving", models=("tiny",))
    until_opened(url, text)
    assert complete(url, text).parse().usage is not None
    keys.revoke(catalog, "leaving")
    until_opened(url, text, status=401)
