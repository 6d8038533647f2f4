"""A classifier on Ray Serve, next to chat models: keys, the ledger, metrics and an alias that moves.

It takes the cluster from the endpoints that other files share, as `test_serve_keys.py` does.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from classifiers import TOPIC, TOXIC, make_classifier
from mistralai.client import Mistral
from serving import WAIT_S, config, free_port, register

from forge_ray.release import promotion
from forge_ray.serve import keys
from forge_ray.serve.ledger import lines
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.ray
TEXTS = ["How do I reset my password?", "one two three"]


@pytest.fixture(scope="module")
def catalog(store: Store) -> Iterator[Catalog]:
    with Catalog.open(store) as catalog:
        yield catalog


@pytest.fixture(scope="module")
def versions(catalog: Catalog, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two classifiers with other labels; the alias `topics` stands for the first."""
    folder = tmp_path_factory.mktemp("classifiers")
    targets = {"one": (TOPIC,), "two": (TOPIC, TOXIC)}
    folders = {name: make_classifier(tiny_model_dir, folder / name, *those) for name, those in targets.items()}
    ids = [register(catalog, path, None, name).id for name, path in folders.items()]
    promotion.promote(catalog, ids[0], "topics")
    return ids


@pytest.fixture(scope="module")
def url(ray_cluster: None, catalog: Catalog, versions: list[str]) -> Iterator[str]:
    from ray import serve

    from forge_ray.serve.deploy import base_url, deploy

    serve.shutdown()  # one endpoint at a time has the cluster
    replicas = {"min": 1, "max": 1}
    deploy_config = config(free_port(), name="labels", models=["tiny", "topics"], auth="keys", replicas=replicas)
    deploy(deploy_config, catalog, wait_s=WAIT_S)
    yield base_url(deploy_config)
    serve.shutdown()


def test_classifier_answers_under_its_alias_key_and_ledger(url: str, catalog: Catalog, versions: list[str]) -> None:
    key, text = keys.create(catalog, "labels", models=("topics",), scopes=("chat", "metrics"))
    headers = {"authorization": f"Bearer {text}"}
    deadline = time.monotonic() + WAIT_S
    while httpx.get(f"{url}/v1/models", headers=headers).status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with Mistral(api_key=text, server_url=url) as mistral:
        answer = mistral.classifiers.classify(model="topics", inputs=TEXTS)
        assert [list(result) for result in answer.results] == [["topic"], ["topic"]]
        assert sum(answer.results[0]["topic"].scores.values()) == pytest.approx(1.0)
    with openai.OpenAI(base_url=f"{url}/v1", api_key=text, max_retries=0) as client:
        (card,) = client.models.list()
        assert (card.id, card.model_version) == ("topics", versions[0])  # type: ignore[attr-defined]
        with pytest.raises(openai.BadRequestError, match="is a classifier"):
            client.chat.completions.create(model="topics", messages=[{"role": "user", "content": "x"}])
        with pytest.raises(openai.NotFoundError):
            client.moderations.create(model="tiny", input="x")  # which the key does not grant
    used: list[Any] = []
    while not used and time.monotonic() < deadline:
        time.sleep(0.1)
        used = [line for line in lines(catalog.store) if line.key == key.id and line.status == 200]
    assert (used[0].model, used[0].model_version, used[0].completion_tokens) == ("topics", versions[0], 0)
    assert used[0].prompt_tokens > 0
    text = httpx.get(f"{url}/metrics", headers=headers).text
    assert 'route="/v1/classifications",status="200"' in text
    assert f'model="topics",model_version="{versions[0]}",status="200"' in text

    promotion.promote(catalog, versions[1], "topics")
    body = {"model": "topics", "input": TEXTS[0]}
    while True:
        moved = httpx.post(f"{url}/v1/classifications", json=body, headers=headers, timeout=WAIT_S)
        assert moved.status_code == 200
        if list(moved.json()["results"][0]) == ["topic", "toxic"]:
            break
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert moved.headers["x-forge-model-version"] == versions[1]
