"""HTTP in front of one engine: OpenAI's endpoints, /health and /metrics, as one ASGI app (level 4; no ray).

The engine lives in the same process, so a token crosses no network before it is sent. Nothing of a prompt or an answer is
logged. When the client goes away the request is cancelled in the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from forge_ray.config.release import DeployConfig
from forge_ray.data.chat import ChatTokenizer
from forge_ray.data.schema import Reject
from forge_ray.errors import EngineError
from forge_ray.inference.engine import Engine, GenerationRequest
from forge_ray.records import Deployment
from forge_ray.serve.metrics import Metrics
from forge_ray.serve.openai import (
    MAX_BODY_BYTES,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Reply,
    parse_request,
    sse,
    usage,
)
from forge_ray.serve.text import Delta, answer

CLIENT_CLOSED = 499  # nginx's number for a client that went away before the answer
AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


@dataclass(frozen=True)
class Served:
    """One model behind one replica's HTTP: everything that a request needs."""

    deployment: Deployment
    config: DeployConfig
    engine: Engine
    tokenizer: ChatTokenizer
    stop_token_ids: tuple[int, ...]
    max_request_tokens: int
    metrics: Metrics
    # Templates and tokenisation run here, off the event loop; one thread, for tokenizers are not safe to share
    tokenising: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenising"))

    @property
    def fingerprint(self) -> str:
        return "fp_" + self.deployment.model_digest.removeprefix("sha256:")[:16]

    @property
    def headers(self) -> dict[str, str]:
        return {
            "x-forge-model-version": self.deployment.model_version,
            "x-forge-model-digest": self.deployment.model_digest,
            "x-forge-deployment": self.deployment.id,
        }


def build_http(served: Served) -> AsgiApp:
    """The ASGI app of one replica."""
    app = FastAPI(title="forge_ray", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(EngineError)
    async def engine_failed(_: Request, error: EngineError) -> Response:
        return JSONResponse(ApiError(503, error.message, code=error.code).body(), 503)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        problem = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(problem.body(), error.status_code)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _complete(served, parse_request(ChatRequest, await _body(request)))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await _complete(served, parse_request(CompletionRequest, await _body(request)))

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(served)]})

    @app.get("/v1/models/{model:path}")
    async def model_card(model: str) -> Response:
        _check_model(served, model)
        return JSONResponse(_model_card(served))

    @app.get("/health")
    async def health() -> Response:
        state = served.engine.health()
        body = {
            "status": "ok" if state.ok else "failed",
            "detail": state.detail,
            "running": state.num_running,
            "waiting": state.num_waiting,
            "model": served.config.name,
            "model_version": served.deployment.model_version,
            "deployment": served.deployment.id,
        }
        return JSONResponse(body, 200 if state.ok else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        state = served.engine.health()
        text = served.metrics.text(state.num_running, state.num_waiting)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    return _signed_and_counted(app, served)


def _signed_and_counted(app: AsgiApp, served: Served) -> AsgiApp:
    """Put the model's identity on every response and count it by route and status."""
    extra = [(name.encode(), value.encode()) for name, value in served.headers.items()]

    async def asgi(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        status = CLIENT_CLOSED

        async def send_signed(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            await app(scope, receive, send_signed)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")  # never the path sent: labels must be few
            served.metrics.requests.labels(*served.metrics.labels, route, str(status)).inc()

    return asgi


async def _body(request: Request) -> bytes:
    """The body, read no further than the limit."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body exceeds {MAX_BODY_BYTES} bytes", code="request_too_large")
    return bytes(body)


async def _complete(served: Served, wanted: ChatRequest | CompletionRequest) -> Response:
    """Both endpoints: tokenise, generate, and answer whole or as a stream."""
    started = time.monotonic()
    _check_model(served, wanted.model)
    request = await _generation_request(served, wanted)
    num_prompt = len(request.prompt_ids)
    served.metrics.prompt_tokens.labels(*served.metrics.labels).inc(num_prompt)
    reply = Reply("chat" if isinstance(wanted, ChatRequest) else "text", wanted.model, served.fingerprint)
    deltas = _measured(served, answer(served.engine, served.tokenizer, request, wanted.stops), started)
    if wanted.stream:
        return StreamingResponse(
            _events(reply, deltas, num_prompt, wanted.include_usage),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )
    texts: list[str] = []
    async with aclosing(deltas):
        async for delta in deltas:
            texts.append(delta.text)
    return JSONResponse(reply.whole("".join(texts), delta.finish_reason or "length", usage(num_prompt, delta.num_tokens)))


async def _events(reply: Reply, deltas: AsyncIterator[Delta], num_prompt: int, include_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events; an engine that fails half-way ends the stream with an error event and without `[DONE]`."""
    first, num_tokens = True, 0
    try:
        async with aclosing(deltas):  # type: ignore[type-var]
            async for delta in deltas:
                num_tokens = delta.num_tokens
                if first or delta.text or delta.finish_reason:
                    yield sse(reply.chunk(delta.text, delta.finish_reason, first))
                    first = False
    except EngineError as error:
        yield sse(ApiError(503, error.message, code=error.code).body())
        return
    if include_usage:
        yield sse(reply.usage_chunk(usage(num_prompt, num_tokens)))
    yield sse("[DONE]")


async def _measured(served: Served, deltas: AsyncIterator[Delta], started: float) -> Any:
    """The same deltas, their times and numbers noted; a cancelled request is charged for what was generated."""
    metrics, labels = served.metrics, served.metrics.labels
    last, num_tokens = started, 0
    try:
        async with aclosing(deltas):  # type: ignore[type-var]
            async for delta in deltas:
                if delta.num_tokens > num_tokens:
                    now = time.monotonic()
                    family = metrics.between_tokens if num_tokens else metrics.first_token
                    family.labels(*labels).observe(now - last)
                    last, num_tokens = now, delta.num_tokens
                yield delta
    finally:
        metrics.completion_tokens.labels(*labels).inc(num_tokens)
        metrics.latency.labels(*labels).observe(time.monotonic() - started)


async def _generation_request(served: Served, wanted: ChatRequest | CompletionRequest) -> GenerationRequest:
    ids = await asyncio.get_running_loop().run_in_executor(served.tokenising, _prompt_ids, served.tokenizer, wanted)
    return GenerationRequest(
        prompt_ids=tuple(ids),
        max_new_tokens=_max_new_tokens(served, wanted, len(ids)),
        temperature=1.0 if wanted.temperature is None else wanted.temperature,
        top_p=1.0 if wanted.top_p is None else wanted.top_p,
        seed=wanted.seed,
        stop_token_ids=served.stop_token_ids,
    )


def _prompt_ids(tokenizer: ChatTokenizer, wanted: ChatRequest | CompletionRequest) -> list[int]:
    """The prompt as token ids: the version's own chat template, or plain text, or the ids that were sent."""
    if isinstance(wanted, ChatRequest):
        if not tokenizer.has_chat:
            raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
        try:
            return tokenizer.prompt_ids([message.for_template() for message in wanted.messages])
        except Reject as error:
            raise ApiError(400, str(error), param="messages") from None
    prompt = wanted.prompt[0] if isinstance(wanted.prompt, list) and isinstance(wanted.prompt[0], str) else wanted.prompt
    if isinstance(prompt, str):
        return tokenizer.text_ids([prompt])[0]
    ids = [int(token_id) for token_id in prompt]
    outside = [token_id for token_id in ids if not 0 <= token_id < tokenizer.vocab_size]
    if outside:
        raise ApiError(400, f"prompt: token id {outside[0]} is not in 0..{tokenizer.vocab_size - 1}", param="prompt")
    return ids


def _max_new_tokens(served: Served, wanted: ChatRequest | CompletionRequest, num_prompt: int) -> int:
    """The request's limit, or all that the deployment and the context leave."""
    name, asked = wanted.token_limit
    most, room = served.config.max_new_tokens, served.max_request_tokens - num_prompt
    param = "messages" if isinstance(wanted, ChatRequest) else "prompt"
    if num_prompt < 1:
        raise ApiError(400, f"{param}: the prompt has no tokens", param=param)
    if asked is not None and asked > most:
        raise ApiError(400, f"{name}: {asked} exceeds this deployment's limit of {most}", param=name)
    if room < (asked or 1):
        raise ApiError(
            400,
            f"the prompt has {num_prompt} tokens and {asked or 1} more are asked for;"
            f" the context holds {served.max_request_tokens}",
            param=param,
            code="context_length_exceeded",
        )
    return asked or min(most, room)


def _check_model(served: Served, name: str) -> None:
    if name != served.config.name:
        raise ApiError(
            404, f"model {name!r} is not served here; this is {served.config.name!r}", param="model", code="model_not_found"
        )


def _model_card(served: Served) -> dict[str, Any]:
    created = int(datetime.fromisoformat(served.deployment.created_at).timestamp())
    return {
        "id": served.config.name,
        "object": "model",
        "created": created,
        "owned_by": "forge_ray",
        "model_version": served.deployment.model_version,
        "model_digest": served.deployment.model_digest,
        "max_model_len": served.max_request_tokens,
    }
