"""A replica's HTTP with keys, limits, ledger and log in front of it, over a real server with OpenAI's client."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from forge_ray.serve import keys
from forge_ray.serve.access_log import LOG, write_access_log
from forge_ray.serve.context import Caller
from forge_ray.serve.http import replica_app
from forge_ray.serve.keys import KeyTail
from forge_ray.serve.ledger import Ledger, Used, lines
from forge_ray.serve.limits import Counters
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from tests.http_server import running, served

pytestmark = pytest.mark.e2e

PROMPT = "one two three four five six"
WAIT_S = 60


@dataclass(frozen=True)
class Endpoint:
    url: str
    catalog: Catalog
    log: io.StringIO
    ledger: Ledger
    scrape: str

    def key(self, name: str, **fields: Any) -> tuple[str, str]:
        """A new key's id and text."""
        key, text = keys.create(self.catalog, name, **{"models": ("tiny",), **fields})
        return key.id, text

    def client(self, text: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=text, max_retries=0, timeout=WAIT_S)

    def used(self, key_id: str) -> list[Used]:
        self.ledger.flush()
        return [line for line in lines(self.catalog.store) if line.key == key_id]

    def generated(self) -> float:
        """Tokens so far, as the metrics have it."""
        text = httpx.get(f"{self.url}/metrics", headers={"x-api-key": self.scrape}, timeout=WAIT_S).text
        return sum(
            float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith("forge_completion_tokens_total{")
        )

    def logged(self, key_id: str) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.log.getvalue().splitlines()) if line["key"] == key_id]


@pytest.fixture(scope="module")
def endpoint(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    store = Store(str(tmp_path_factory.mktemp("access")))
    ready = served(tiny_model_dir, limits={"max_new_tokens": 400})
    engine = ready.directory.stable("tiny", Caller("test")).engine
    counters, tail, ledger = Counters(), KeyTail(store), Ledger(store, "r0", flush_s=1e6)
    before, stream = (LOG.handlers[:], LOG.level, LOG.propagate), io.StringIO()
    write_access_log(stream)
    health = lambda: [engine.health()]  # noqa: E731
    app = replica_app(ready, tail.refresh, counters.take, counters.settle, "r0", health, ledger)
    with Catalog.open(store) as catalog, running(app) as url:
        _, scrape = keys.create(catalog, "prometheus", scopes=("metrics",))
        yield Endpoint(url, catalog, stream, ledger, scrape)
    ledger.close()
    engine.close()
    LOG.handlers[:], LOG.propagate = before[0], before[2]
    LOG.setLevel(before[1])


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def complete(client: openai.OpenAI, max_tokens: int = 4, **more: Any) -> Any:
    return client.completions.with_raw_response.create(
        model="tiny", prompt=PROMPT, max_tokens=max_tokens, temperature=0, **more
    )


def test_key_is_accepted_until_revoked(endpoint: Endpoint) -> None:
    key_id, text = endpoint.key("open")
    with endpoint.client(text) as client:
        answer = complete(client)
        assert not [name for name in answer.headers if name.startswith("x-ratelimit")]  # it has no limits
        usage = answer.parse().usage
        assert usage is not None
        (line,) = endpoint.used(key_id)
        assert (line.prompt_tokens, line.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
        assert (line.model, line.model_version, line.status) == ("tiny", "mv_0", 200)
        (logged,) = endpoint.logged(key_id)
        assert logged["request_id"] == line.request_id
        assert (logged["model"], logged["model_version"], logged["route"]) == ("tiny", "mv_0", "/v1/completions")
        assert (logged["prompt_tokens"], logged["completion_tokens"]) == (usage.prompt_tokens, usage.completion_tokens)
        assert 0 < logged["first_token_ms"] <= logged["ms"]
        assert not logged["client_gone"]
        keys.revoke(endpoint.catalog, "open")
        with pytest.raises(openai.AuthenticationError, match="was revoked"):
            complete(client)
    with endpoint.client("sk-nonsense") as client, pytest.raises(openai.AuthenticationError, match="not valid here"):
        client.models.list()


def test_requests_per_minute_limit_holds_under_concurrency(endpoint: Endpoint) -> None:
    key_id, text = endpoint.key("per-minute", rpm=5)

    def ask(_: int) -> Any:
        with endpoint.client(text) as client:
            try:
                return complete(client, max_tokens=1)
            except openai.RateLimitError as error:
                return error

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(ask, range(20)))
    refused = [one for one in results if isinstance(one, openai.RateLimitError)]
    assert len(refused) == 15
    assert len(endpoint.used(key_id)) == 5
    answered = sorted(int(one.headers["x-ratelimit-remaining-requests"]) for one in results if one not in refused)
    assert answered == [0, 1, 2, 3, 4]
    for error in refused:
        assert error.code == "rate_limit_exceeded"
        assert 0 < int(error.response.headers["retry-after"]) <= 60
        assert error.response.headers["x-ratelimit-limit-requests"] == "5"
    metrics = httpx.get(f"{endpoint.url}/metrics", headers={"x-api-key": endpoint.scrape}, timeout=WAIT_S)
    assert 'forge_refused_total{replica="r0",deployment="bot",reason="requests"} 15.0' in metrics.text
    assert 'model="tiny",model_version="mv_0",status="200"' in metrics.text


def test_concurrency_limit_and_refunded_tokens(endpoint: Endpoint) -> None:
    key_id, text = endpoint.key("narrow", concurrency=1, tpm=1000)
    with endpoint.client(text) as client:
        stream = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=400, temperature=0, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError, match="1 requests at once"):
            complete(client)
        stream.close()
        until(lambda: len(endpoint.used(key_id)) == 1)
        (line,) = endpoint.used(key_id)
        spent = line.prompt_tokens + line.completion_tokens
        answer = complete(client)
        reserved = line.prompt_tokens + 4
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) == 1000 - spent - reserved
        narrower = keys.change(endpoint.catalog, "narrow", tpm=100)
        with pytest.raises(openai.RateLimitError, match=f"{narrower.id} is limited to 100 a minute") as size:
            complete(client, max_tokens=200)
        assert size.value.response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("stream", [True, False])
def test_cancelled_request_is_charged_for_generated_tokens(endpoint: Endpoint, stream: bool) -> None:
    key_id, text = endpoint.key(f"leaver-{stream}")
    before = endpoint.generated()
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 400, "temperature": 0, "stream": stream}
    url, headers = f"{endpoint.url}/v1/completions", {"x-api-key": text}
    if stream:
        with httpx.stream("POST", url, json=body, headers=headers) as response:
            pieces = response.iter_lines()
            while not next(pieces).startswith("data: "):
                pass
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=body, headers=headers, timeout=0.15)
    until(lambda: bool(endpoint.logged(key_id)))
    (line,) = endpoint.used(key_id)
    assert line.status == 499
    assert int(stream) <= line.completion_tokens < 400
    assert line.completion_tokens == endpoint.generated() - before
    (logged,) = endpoint.logged(key_id)
    assert (logged["status"], logged["client_gone"]) == (200 if stream else 499, True)
    assert logged["completion_tokens"] == line.completion_tokens


def test_logs_and_ledger_contain_no_prompt_or_answer(endpoint: Endpoint) -> None:
    key_id, text = endpoint.key("private")
    with endpoint.client(text) as client:
        answer = complete(client, max_tokens=30, extra_headers={"x-request-id": "mine"}).parse().choices[0].text
    endpoint.used(key_id)
    stored = "".join(path.read_text() for path in Path(endpoint.catalog.store.root).rglob("*.json*"))
    for written in (endpoint.log.getvalue(), stored):
        assert key_id in written
        assert PROMPT not in written
        assert json.dumps(answer)[1:-1] not in written
        assert text not in written
    assert [line["request_id"] for line in endpoint.logged(key_id)] == ["mine"]
