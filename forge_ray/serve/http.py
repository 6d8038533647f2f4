"""HTTP in front of what a replica serves: OpenAI's endpoints, /health and /metrics, as one ASGI app (no ray).

The engine lives in the same process, so a token crosses no network before it is sent. Nothing of a prompt or an answer is
logged.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from forge_ray.errors import EngineError
from forge_ray.serve.access import CLIENT_CLOSED, request_id_of
from forge_ray.serve.complete import complete
from forge_ray.serve.fields import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from forge_ray.serve.inputs import detokenize, embed, tokenize
from forge_ray.serve.metrics import CONTENT_TYPE
from forge_ray.serve.openai import ApiError, R, parse_request
from forge_ray.serve.served import Served
from forge_ray.serve.shadow import Shadows
from forge_ray.serve.streams import ClientGone

log = logging.getLogger(__name__)

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


def build_http(served: Served) -> AsgiApp:
    """The ASGI app of one replica."""
    app = FastAPI(title="forge_ray", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    shadows = Shadows(served)
    _add_error_answers(app)

    async def read(model: type[R], request: Request) -> R:
        return parse_request(model, await _body(served, request), served.config.limits)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await complete(served, shadows, request, await read(ChatRequest, request))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await complete(served, shadows, request, await read(CompletionRequest, request))

    @app.post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await embed(served, request, await read(EmbeddingRequest, request))

    @app.post("/tokenize")
    @app.post("/v1/tokenize")
    async def tokens_of(request: Request) -> Response:
        return await tokenize(served, await read(TokenizeRequest, request))

    @app.post("/detokenize")
    @app.post("/v1/detokenize")
    async def text_of(request: Request) -> Response:
        return await detokenize(served, await read(DetokenizeRequest, request))

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": served.directory.cards()})

    @app.get("/v1/models/{model:path}")
    async def model_card(model: str) -> Response:
        loaded = served.directory.stable(model)
        unlisted = {"id": model, "object": "model", "created": 0, "owned_by": "forge_ray", "model_version": loaded.version}
        return JSONResponse(next((card for card in served.directory.cards() if card["id"] == model), unlisted))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "deployment": served.deployment})

    @app.get("/metrics")
    async def metrics() -> Response:
        text = await served.exposition() if served.exposition else served.metrics.text()
        return Response(text, media_type=CONTENT_TYPE)

    return _counted(app, served)


def _add_error_answers(app: FastAPI) -> None:
    """Every error in OpenAI's shape, none with a traceback."""

    def reply(error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return reply(error)

    @app.exception_handler(EngineError)
    async def engine_failed(_: Request, error: EngineError) -> Response:
        return reply(ApiError(503, error.message, code=error.code))

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        problem = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return reply(ApiError(error.status_code, problem, headers=error.headers))

    @app.exception_handler(ClientDisconnect)
    @app.exception_handler(ClientGone)
    async def client_gone(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return reply(ApiError(500, "internal error", code="internal_error"))


def _counted(app: AsgiApp, served: Served) -> AsgiApp:
    """Name the request and the deployment on every response, and count it by route and status."""

    async def asgi(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        status = CLIENT_CLOSED
        state = scope.setdefault("state", {})
        request_id = state.setdefault("request_id", request_id_of(Headers(scope=scope).get("x-request-id", "")))
        extra = [(b"x-request-id", request_id.encode()), (b"x-forge-deployment", served.deployment.encode())]

        async def send_signed(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        try:
            await app(scope, receive, send_signed)
        except Exception:  # answered above; to the server it would be a reason to close the connection
            log.exception("request %s failed", request_id)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")  # never the path sent: labels must be few
            served.metrics.request(route, status)

    return asgi


async def _body(served: Served, request: Request) -> bytes:
    """The body, read no further than the limit."""
    most, body = served.config.limits.max_body_bytes, bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise ApiError(413, f"the body exceeds {most} bytes", code="request_too_large")
    return bytes(body)
