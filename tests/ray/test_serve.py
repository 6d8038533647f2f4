"""A deployment on Ray Serve, driven by the official OpenAI client and by our own."""

from __future__ import annotations

import re
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from serving import MESSAGES, WAIT_S, Endpoint

from forge_ray.client import Client
from forge_ray.errors import ConfigError, NotFound
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def offline(store: Store, endpoint: Endpoint) -> Any:
    """(messages, max_new_tokens) → greedy text, prompt length and token ids, by plain transformers."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = store.fetch_dir(f"models/{endpoint.version.id}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer(messages: Any, max_new_tokens: int) -> tuple[str, int, list[int]]:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        ids = model.generate(prompt, do_sample=False, max_new_tokens=max_new_tokens)[0, prompt.shape[1] :].tolist()
        ids = ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids
        return tokenizer.decode(ids, skip_special_tokens=True), prompt.shape[1], ids

    return answer


def test_deployment_writes_a_record_and_an_event(endpoint: Endpoint, store: Store) -> None:
    with Catalog.open(store) as catalog:
        assert catalog.get(endpoint.deployment.id) == endpoint.deployment
        (event,) = catalog.events("deployment", endpoint.deployment.id)
    assert event.data["state"] == "running"
    assert event.data["url"] == endpoint.url
    assert endpoint.deployment.model_digest == endpoint.version.files_digest


def test_models(client: openai.OpenAI, endpoint: Endpoint) -> None:
    assert {"tiny", endpoint.version.id} <= {card.id for card in client.models.list()}
    assert client.models.retrieve("tiny").owned_by == "forge_ray"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_greedy_chat_matches_transformers_and_names_its_version(
    client: openai.OpenAI, endpoint: Endpoint, offline: Any
) -> None:
    text, num_prompt, ids = offline(MESSAGES, 24)
    raw = client.chat.completions.with_raw_response.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=24)
    answer = raw.parse()
    assert answer.choices[0].message.content == text
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (num_prompt, len(ids))
    assert answer.usage.total_tokens == num_prompt + len(ids)
    assert answer.choices[0].finish_reason == ("length" if len(ids) == 24 else "stop")
    digest = endpoint.version.files_digest
    assert answer.system_fingerprint == "fp_" + digest.removeprefix("sha256:")[:16]
    assert raw.headers["x-forge-model-version"] == endpoint.version.id
    assert raw.headers["x-forge-model-digest"] == digest
    assert raw.headers["x-forge-deployment"] == endpoint.deployment.id


def test_stream_equals_the_whole_answer(client: openai.OpenAI, offline: Any) -> None:
    text, num_prompt, ids = offline(MESSAGES, 24)
    chunks = list(
        client.chat.completions.create(
            model="tiny",
            messages=MESSAGES,
            temperature=0,
            max_completion_tokens=24,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("length", "stop")
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt, len(ids))


def test_concurrent_requests_keep_their_sampling_settings(client: openai.OpenAI) -> None:
    variants: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 1.5, "seed": 1},
        {"temperature": 1.5, "seed": 2},
        {"temperature": 0.9, "top_p": 0.5, "seed": 1},
    ]

    def ask(options: dict[str, Any]) -> str:
        answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=30, **options)
        return answer.choices[0].message.content or ""

    alone = [ask(options) for options in variants]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(ask, variants * 2))
    assert together == alone * 2
    assert len(set(alone)) == len(variants)


def test_forge_client(endpoint: Endpoint, offline: Any) -> None:
    text, num_prompt, ids = offline(MESSAGES, 12)
    with Client(endpoint.url) as own:
        assert {"tiny", endpoint.version.id} <= set(own.models())
        assert own.health()["status"] == "ok"
        answer = own.chat("tiny", MESSAGES, temperature=0, max_tokens=12)
        assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == (text, num_prompt, len(ids))
        assert answer.model_version == endpoint.version.id
        assert "".join(own.stream_chat("tiny", MESSAGES, temperature=0, max_tokens=12)) == text
        with pytest.raises(NotFound):
            own.chat("nobody", MESSAGES)
        with pytest.raises(ConfigError, match="typical_p"):
            list(own.stream_chat("tiny", MESSAGES, typical_p=0.5))


NAMES = ("forge_prompt_tokens_total", "forge_completion_tokens_total", "forge_requests_running")


def metrics(endpoint: Endpoint) -> list[float]:
    """`NAMES`, summed over both replicas; what the other one counted is up to five seconds old."""
    lines = httpx.get(f"{endpoint.url}/metrics", timeout=WAIT_S).text.splitlines()
    return [sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{")) for name in NAMES]


def settled(endpoint: Endpoint) -> list[float]:
    """Once they have not changed for longer than they travel."""
    values, since = metrics(endpoint), time.monotonic()
    while time.monotonic() - since < 6:
        time.sleep(0.5)
        if (now := metrics(endpoint)) != values:
            values, since = now, time.monotonic()
    return values


def test_metrics_of_both_replicas_and_a_cancelled_request(endpoint: Endpoint, client: openai.OpenAI) -> None:
    before = settled(endpoint)
    answers = [
        client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=7, temperature=0).usage for _ in range(8)
    ]
    body = {"model": "tiny", "prompt": "The quick brown fox", "temperature": 0, "max_tokens": 400}
    url = f"{endpoint.url}/v1/completions"
    whole = httpx.post(url, json=body, timeout=WAIT_S).json()["usage"]
    prompt_tokens = before[0] + sum(usage.prompt_tokens for usage in answers if usage) + whole["prompt_tokens"]
    completion_tokens = before[1] + sum(usage.completion_tokens for usage in answers if usage) + whole["completion_tokens"]
    deadline = time.monotonic() + WAIT_S
    while (now := metrics(endpoint)[:2]) != [prompt_tokens, completion_tokens]:
        assert time.monotonic() < deadline, (now, prompt_tokens, completion_tokens)
        time.sleep(0.5)
    text = httpx.get(f"{endpoint.url}/metrics", timeout=WAIT_S).text
    assert 'route="/v1/chat/completions",status="200"' in text
    assert f'deployment="bot",model="tiny",model_version="{endpoint.version.id}"' in text
    assert len(set(re.findall(r'replica="([^"]+)"', text)) - {"coordinator"}) == 2
    assert 'forge_log_lines_without_effect{replica="coordinator",deployment="bot"} 0.0' in text
    assert "forge_time_to_first_token_seconds_bucket" in text
    assert "password" not in text

    assert whole["completion_tokens"] > 200  # a long answer: only cancelling makes it short
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=WAIT_S) as response:
        assert next(response.iter_lines()).startswith("data: ")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=body, timeout=0.15)
    last = settled(endpoint)
    assert 0 < last[1] - completion_tokens < 2 * whole["completion_tokens"]
    assert (last[0], last[2]) == (prompt_tokens + 2 * whole["prompt_tokens"], 0)
