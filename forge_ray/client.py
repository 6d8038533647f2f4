"""A small Python client of a served model, over REST (no torch, no ray).

with Client("http://127.0.0.1:8000") as client:
    print(client.chat("support-bot", [{"role": "user", "content": "Hello"}]).text)
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx2

from forge_ray.errors import ConfigError, EngineError, ForgeError, NotFound, PolicyError

TIMEOUT_S = 600.0
CONNECT_TIMEOUT_S = 10.0
Messages = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class ToolCall:
    """A tool call by the model; `arguments` is JSON text. Reply with a message of role `tool` and this `id`."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Answer:
    """A complete answer with the model version that gave it. `route` is `canary`, `fallback` and so on, "" for the stable
    version."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    model_version: str
    route: str = ""
    calls: tuple[ToolCall, ...] = ()


class Client:
    """A connection to one endpoint; `base_url` without `/v1`, `api_key` defaults to FORGE_API_KEY.

    Options are those of OpenAI's API, such as temperature, max_tokens, stop and tools, but not `n`: answers have one choice.
    """

    def __init__(self, base_url: str, timeout_s: float = TIMEOUT_S, api_key: str = "") -> None:
        # trust_env is off because a local endpoint is not reached through a proxy
        timeout = httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S)
        key = api_key or os.environ.get("FORGE_API_KEY", "")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            self._http = httpx2.Client(base_url=base_url.rstrip("/"), timeout=timeout, trust_env=False, headers=headers)
        except httpx2.InvalidURL as error:
            raise ConfigError(
                f"{base_url[:200]!r} is not the URL of an endpoint: {error}", hint="for example http://127.0.0.1:8000"
            ) from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def health(self) -> dict[str, Any]:
        """The replica's state. Raises `EngineError` if it is unhealthy or unreachable."""
        return self._json("GET", "/health")

    def models(self) -> list[str]:
        """Names that `chat` accepts."""
        return [str(card["id"]) for card in self._json("GET", "/v1/models")["data"]]

    def model(self, name: str) -> dict[str, Any]:
        """What `name` refers to: version, base model, dataset, run."""
        return self._json("GET", f"/v1/models/{name}")

    def chat(self, model: str, messages: Messages, **options: Any) -> Answer:
        """The complete answer to `messages`."""
        response = self._send("POST", "/v1/chat/completions", {"model": model, "messages": list(messages), **options})
        body = _body(response)
        (choice,) = body["choices"]
        return Answer(
            text=choice["message"]["content"] or "",
            finish_reason=choice["finish_reason"],
            prompt_tokens=body["usage"]["prompt_tokens"],
            completion_tokens=body["usage"]["completion_tokens"],
            model_version=response.headers.get("x-forge-model-version", ""),
            route=response.headers.get("x-forge-route", ""),
            calls=tuple(
                ToolCall(call["id"], call["function"]["name"], call["function"]["arguments"])
                for call in choice["message"].get("tool_calls") or ()
            ),
        )

    def stream_chat(self, model: str, messages: Messages, **options: Any) -> Iterator[str]:
        """The answer piece by piece; closing the iterator cancels the request on the server."""
        body = {"model": model, "messages": list(messages), "stream": True, **options}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != httpx2.codes.OK or _is_page(response):
                    response.read()
                    raise _error(response)
                yield from _pieces(response)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    def _json(self, method: str, path: str) -> dict[str, Any]:
        return _body(self._send(method, path))

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> httpx2.Response:
        try:
            response = self._http.request(method, path, json=body)
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error
        if response.status_code != httpx2.codes.OK:
            raise _error(response)
        return response

    def _unreachable(self, error: httpx2.TransportError) -> EngineError:
        return EngineError(f"{self._http.base_url} does not answer: {error}", hint="check that a model is deployed there")


def _lines(response: httpx2.Response) -> Iterator[str]:
    """Lines of a stream, which end with LF alone: the texts in it may hold other characters that Python takes for ends."""
    rest = b""
    for data in response.iter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        yield from (line.decode().removesuffix("\r") for line in lines)


def _pieces(response: httpx2.Response) -> Iterator[str]:
    for line in _lines(response):
        if not line.startswith("data: "):
            continue
        if line == "data: [DONE]":
            return
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise EngineError(chunk["error"]["message"], hint="send the request again")
        for choice in chunk["choices"]:
            if text := choice["delta"].get("content"):
                yield str(text)
    raise EngineError("the stream ended early, without its end marker", hint="send the request again")


def foreign(response: httpx2.Response) -> str:
    """Who answered, where that is a proxy or another server and its answer a page for people; "" where the answer may come
    from an endpoint of forge_ray."""
    if not (_is_page(response) or response.status_code == httpx2.codes.PROXY_AUTHENTICATION_REQUIRED):
        return ""
    signs = [f"{name}: {response.headers[name][:80]}" for name in ("server", "via") if name in response.headers]
    title = re.search(r"<title>(.*?)</title>", response.text, re.DOTALL | re.IGNORECASE)
    signs += [" ".join(title[1].split())[:80]] if title else []
    return f"a proxy or another server ({'; '.join(signs)})" if signs else "a proxy or another server"


def _is_page(response: httpx2.Response) -> bool:
    """Whether a response is HTML, which neither forge_ray nor Ray's interfaces for programs write."""
    return response.headers.get("content-type", "").startswith("text/html")


def _body(response: httpx2.Response) -> dict[str, Any]:
    try:
        body = response.json()
    except ValueError:
        raise _error(response) from None
    if not isinstance(body, dict):
        raise EngineError(f"{response.request.url} answered {str(body)[:80]!r}, not an object", hint="check the address")
    return body


def _error(response: httpx2.Response) -> ForgeError:
    """The error that corresponds to the server's response."""
    try:
        body = response.json()
        message = str(body["error"]["message"] if "error" in body else body["detail"])
    except (ValueError, KeyError, TypeError):
        if stranger := foreign(response):
            return EngineError(
                f"{response.request.url} was answered {response.status_code} by {stranger}, not by forge_ray",
                hint="give the endpoint's own address: this client uses no proxy of the environment; ask whoever runs the"
                " other server why it answers there",
            )
        message = response.text[:200]
    text = f"{response.request.url} answered {response.status_code}: {message}"
    match response.status_code:
        case 404 | 410:
            return NotFound(text, hint="ask for a name that `models()` lists")
        case 401 | 403:
            return PolicyError(text, hint="pass `api_key`, or set FORGE_API_KEY, to a key that may do this")
        case 429:
            return EngineError(text, hint=f"send the request again after {response.headers.get('retry-after', 1)} s")
        case status if 400 <= status < 500:
            return ConfigError(text, hint="change the request")
        case _:
            return EngineError(text, hint="send the request again; if it fails again, see the replica's log")
