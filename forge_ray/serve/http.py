"""HTTP in front of what a replica serves: OpenAI's endpoints, /health and /metrics, as one ASGI app (level 4; no ray).

The engine lives in the same process, so a token crosses no network before it is sent. Nothing of a prompt or an answer is
logged.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from forge_ray.errors import EngineError
from forge_ray.serve.complete import complete
from forge_ray.serve.metrics import CONTENT_TYPE
from forge_ray.serve.openai import ApiError, ChatRequest, CompletionRequest, parse_request
from forge_ray.serve.served import Served

CLIENT_CLOSED = 499  # nginx's number for a client that went away before the answer
AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


def build_http(served: Served) -> AsgiApp:
    """The ASGI app of one replica."""
    app = FastAPI(title="forge_ray", docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(EngineError)
    async def engine_failed(_: Request, error: EngineError) -> Response:
        return JSONResponse(ApiError(503, error.message, code=error.code).body(), 503)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        problem = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(problem.body(), error.status_code)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await complete(served, request, parse_request(ChatRequest, await _body(served, request)))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await complete(served, request, parse_request(CompletionRequest, await _body(served, request)))

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": served.directory.cards()})

    @app.get("/v1/models/{model:path}")
    async def model_card(model: str) -> Response:
        served.directory.stable(model)
        return JSONResponse(next(card for card in served.directory.cards() if card["id"] == model))

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": "ok", "deployment": served.deployment})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type=CONTENT_TYPE)

    return _counted(app, served)


def _counted(app: AsgiApp, served: Served) -> AsgiApp:
    """Name the deployment on every response and count it by route and status."""
    extra = [(b"x-forge-deployment", served.deployment.encode())]

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
