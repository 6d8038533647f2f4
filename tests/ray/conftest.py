"""One endpoint for all serving tests: its start takes twenty seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from endpoint import MESSAGES, WAIT_S, Endpoint, config, free_port

from forge_ray.catalog import Catalog
from forge_ray.store import Store


@pytest.fixture(scope="session")
def endpoint(ray_cluster: None, store: Store) -> Iterator[Endpoint]:
    from ray import serve

    from forge_ray.serve.deploy import base_url, deploy

    wanted = config(free_port())
    with Catalog(store) as catalog:
        deployment = deploy(wanted, catalog, wait_s=WAIT_S)
        yield Endpoint(base_url(wanted), deployment, catalog.model("tiny"))
    serve.shutdown()


@pytest.fixture(scope="session")
def client(endpoint: Endpoint) -> Iterator[Any]:
    import openai

    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0, timeout=WAIT_S) as client:
        yield client


@pytest.fixture(scope="session")
def greedy(client: Any) -> Any:
    """name → its greedy answer to `MESSAGES`, and which version and route gave it."""

    def ask(name: str, **more: Any) -> tuple[str, str, str]:
        raw = client.chat.completions.with_raw_response.create(
            model=name, messages=MESSAGES, temperature=0, max_tokens=16, **more
        )
        text = raw.parse().choices[0].message.content or ""
        return text, raw.headers["x-forge-model-version"], raw.headers.get("x-forge-route", "")

    return ask
