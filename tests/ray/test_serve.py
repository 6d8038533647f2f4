"""A deployment on Ray Serve, driven by the official OpenAI client and by our own."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from endpoint import MESSAGES, WAIT_S, Endpoint

from forge_ray.catalog import Catalog
from forge_ray.client import Client
from forge_ray.errors import ConfigError, NotFound
from forge_ray.store import Store

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


def test_deploying_leaves_a_record_and_an_event(endpoint: Endpoint, store: Store) -> None:
    with Catalog(store) as catalog:
        assert catalog.get(endpoint.deployment.id) == endpoint.deployment
        (event,) = catalog.events("deployment", endpoint.deployment.id)
    assert event.data["state"] == "running"
    assert event.data["url"] == endpoint.url
    assert endpoint.deployment.model_digest == endpoint.version.files_digest


def test_models(client: openai.OpenAI, endpoint: Endpoint) -> None:
    assert [card.id for card in client.models.list()] == ["tiny", endpoint.version.id]
    assert client.models.retrieve("tiny").owned_by == "forge_ray"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_greedy_chat_equals_offline_and_names_its_version(client: openai.OpenAI, endpoint: Endpoint, offline: Any) -> None:
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


def test_a_stream_equals_the_whole_answer(client: openai.OpenAI, offline: Any) -> None:
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


def test_completions_of_text_and_of_ids(client: openai.OpenAI) -> None:
    by_text = client.completions.create(model="tiny", prompt="one two three", temperature=0)
    assert by_text.usage is not None
    assert by_text.usage.completion_tokens <= 16  # OpenAI's default for this endpoint
    streamed = client.completions.create(model="tiny", prompt="one two three", temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == by_text.choices[0].text
    by_ids = client.completions.create(model="tiny", prompt=[40, 50, 60], temperature=0, max_tokens=3)
    assert by_ids.usage is not None
    assert by_ids.usage.prompt_tokens == 3


def test_a_stop_string_ends_the_answer_before_it(client: openai.OpenAI, offline: Any) -> None:
    text, _, ids = offline(MESSAGES, 40)
    stop = text[10:13]
    cut = text[: text.index(stop)]
    options: Any = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 40, "stop": [stop, "never said"]}
    answer = client.chat.completions.create(**options)
    assert answer.choices[0].message.content == cut
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens < len(ids)
    streamed = client.chat.completions.create(**options, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == cut


def test_concurrent_requests_get_their_own_sampling(client: openai.OpenAI) -> None:
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


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 2}, "n"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"extra_body": {"repetition_penalty": 1.1}}, "repetition_penalty"),
        ({"user": "someone"}, "user"),
        ({"temperature": 3}, "temperature"),
        ({"max_tokens": 100_000}, "max_tokens"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(client: openai.OpenAI, options: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, **options)
    assert caught.value.param == param
    assert param in caught.value.message


def test_other_refusals(client: openai.OpenAI, endpoint: Endpoint) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="tiny", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    long: Any = [{"role": "user", "content": "jumps over the lazy dog " * 300}]
    with pytest.raises(openai.BadRequestError) as too_long:
        client.chat.completions.create(model="tiny", messages=long)
    assert too_long.value.code == "context_length_exceeded"
    huge: Any = [{"role": "user", "content": "x" * (5 << 20)}]
    with pytest.raises(openai.APIStatusError) as too_big:
        client.chat.completions.create(model="tiny", messages=huge)
    assert too_big.value.status_code == 413
    assert httpx.post(f"{endpoint.url}/v1/embeddings", json={}).json()["error"]["type"] == "invalid_request_error"


def test_our_own_client(endpoint: Endpoint, offline: Any) -> None:
    text, num_prompt, ids = offline(MESSAGES, 12)
    with Client(endpoint.url) as own:
        assert own.models() == ["tiny", endpoint.version.id]
        assert own.health()["status"] == "ok"
        answer = own.chat("tiny", MESSAGES, temperature=0, max_tokens=12)
        assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == (text, num_prompt, len(ids))
        assert answer.model_version == endpoint.version.id
        assert "".join(own.stream_chat("tiny", MESSAGES, temperature=0, max_tokens=12)) == text
        with pytest.raises(NotFound):
            own.chat("nobody", MESSAGES)
        with pytest.raises(ConfigError, match="top_k"):
            list(own.stream_chat("tiny", MESSAGES, top_k=5))


def metric(endpoint: Endpoint, name: str) -> float:
    lines = httpx.get(f"{endpoint.url}/metrics", timeout=WAIT_S).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels_its_request(endpoint: Endpoint, stream: bool) -> None:
    # an answer of this request is long: only cancelling makes it short
    body = {"model": "tiny", "prompt": "The quick brown fox", "temperature": 0, "max_tokens": 400}
    whole = httpx.post(f"{endpoint.url}/v1/completions", json=body, timeout=WAIT_S).json()
    num_whole = whole["usage"]["completion_tokens"]
    assert num_whole > 200
    before = metric(endpoint, "forge_completion_tokens_total")
    left = metric(endpoint, "forge_request_seconds_count")
    if stream:
        url = f"{endpoint.url}/v1/completions"
        with httpx.stream("POST", url, json=body | {"stream": True}, timeout=WAIT_S) as response:
            assert next(response.iter_lines()).startswith("data: ")
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{endpoint.url}/v1/completions", json=body, timeout=0.15)
    deadline = time.monotonic() + WAIT_S
    while metric(endpoint, "forge_request_seconds_count") == left and time.monotonic() < deadline:
        time.sleep(0.05)
    assert metric(endpoint, "forge_requests_running") == 0
    assert metric(endpoint, "forge_completion_tokens_total") - before < num_whole


def test_metrics_say_what_happened(endpoint: Endpoint, client: openai.OpenAI) -> None:
    before = {name: metric(endpoint, name) for name in ("forge_prompt_tokens_total", "forge_completion_tokens_total")}
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=7, temperature=0)
    assert answer.usage is not None
    gained = {name: metric(endpoint, name) - value for name, value in before.items()}
    assert list(gained.values()) == [answer.usage.prompt_tokens, answer.usage.completion_tokens]
    text = httpx.get(f"{endpoint.url}/metrics").text
    assert 'route="/v1/chat/completions",status="200"' in text
    assert 'route="/v1/chat/completions",status="400"' in text
    assert 'route="unknown",status="404"' in text
    assert f'deployment="bot",model="tiny",model_version="{endpoint.version.id}"' in text
    assert "forge_time_to_first_token_seconds_bucket" in text
    assert "password" not in text
