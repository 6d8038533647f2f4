"""A replica's HTTP application: OpenAI's endpoints, /health and /metrics, as one ASGI app (no ray).

The engine is a child of this process, so a token crosses no network before it is sent. Nothing of a prompt or an answer is
logged.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from forge_ray.errors import EngineError
from forge_ray.inference.engine import EngineHealth
from forge_ray.serve.access import GrantedDirectory, Site
from forge_ray.serve.bodies import BodyMiddleware
from forge_ray.serve.class_fields import (
    ChatClassificationRequest,
    ChatModerationRequest,
    ClassificationRequest,
    ModerationRequest,
)
from forge_ray.serve.classifications import classify, moderate
from forge_ray.serve.complete import complete
from forge_ray.serve.context import ServingContext
from forge_ray.serve.embeddings import detokenize, embed, tokenize
from forge_ray.serve.fields import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from forge_ray.serve.keys import ApiKey
from forge_ray.serve.ledger import Ledger
from forge_ray.serve.limits import LimitVerdict, admission, counting
from forge_ray.serve.metrics import CONTENT_TYPE
from forge_ray.serve.middleware import AdmissionMiddleware, AuthMiddleware, RequestMetricsMiddleware
from forge_ray.serve.openai import ApiError, R, parse_request
from forge_ray.serve.prologue import caller_of
from forge_ray.serve.response_fields import ResponsesRequest
from forge_ray.serve.responses import respond
from forge_ray.serve.shadow import Shadows
from forge_ray.serve.statuses import CLIENT_CLOSED
from forge_ray.serve.streams import ClientGone

Endpoint = Callable[[Request], Awaitable[Response]]

# What a page may read of an answer besides its body
PAGE_HEADERS = (
    "retry-after",
    "x-forge-max-tokens",
    "x-forge-model-digest",
    "x-forge-model-version",
    "x-forge-route",
    "x-request-id",
)


def replica_app(
    context: ServingContext,
    keys: Callable[[], Mapping[str, ApiKey]] | None,
    take: Callable[..., Awaitable[LimitVerdict]],
    settle: Callable[..., Awaitable[None]],
    replica: str,
    health: Callable[[], Iterable[EngineHealth]],
    ledger: Ledger | None,
    is_public: bool = False,
) -> ASGIApp:
    """The whole ASGI app of a replica: the endpoints behind admission control, behind authentication.

    `keys`: sha256 → key as of now; None where no key is required. `take` and `settle`: see `limits.admission`.
    `context.admit` is asked last, after the caller's grants and limits. `is_public`: whether others than this machine reach
    it, whatever the deployment's `host` says.
    """
    admit = admission(take, settle, replica, context.metrics, ledger, context.admit)
    directory = context.directory if keys is None else GrantedDirectory(context.directory)
    count = counting(take, settle, replica, context.metrics)
    app = build_http(replace(context, directory=directory, admit=admit, count=count))
    config, limits = context.config, context.config.limits
    site = Site(config.hosts, config.is_loopback and not is_public, config.cors)
    admitting = AdmissionMiddleware(app, health, limits.max_queued_requests, context.metrics)
    app = BodyMiddleware(admitting, limits.max_body_bytes, context.metrics, admitting.check)
    app = AuthMiddleware(app, keys, context.metrics, {"x-forge-deployment": context.deployment}, site)
    return for_pages(app, config.cors) if config.cors else app


def for_pages(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """`app` for web pages of `origins` too: a browser asks before each request, without a key, whether it may send it."""
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=PAGE_HEADERS,
        max_age=600,
    )


def build_http(context: ServingContext) -> ASGIApp:
    """The endpoints, with request metrics and without access control."""
    app = Starlette()  # `parse_request` checks the bodies: FastAPI would add nothing but time
    app.router.redirect_slashes = False
    shadows = Shadows(context)
    _add_error_answers(app)
    get, post = (partial(_add_route, app, method) for method in ("GET", "POST"))

    async def read(model: type[R], request: Request) -> R:
        return parse_request(model, await _body(context, request), context.config.limits)

    @post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await complete(context, shadows, request, await read(ChatRequest, request))

    @post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await complete(context, shadows, request, await read(CompletionRequest, request))

    @post("/v1/responses")
    async def responses(request: Request) -> Response:
        return await respond(context, shadows, request, await read(ResponsesRequest, request))

    @post("/v1/embeddings")
    async def embeddings(request: Request) -> Response:
        return await embed(context, request, await read(EmbeddingRequest, request))

    @post("/v1/classifications")
    async def classifications(request: Request) -> Response:
        return await classify(context, shadows, request, await read(ClassificationRequest, request))

    @post("/v1/chat/classifications")
    async def chat_classifications(request: Request) -> Response:
        return await classify(context, shadows, request, await read(ChatClassificationRequest, request))

    @post("/v1/moderations")
    async def moderations(request: Request) -> Response:
        return await moderate(context, shadows, request, await read(ModerationRequest, request))

    @post("/v1/chat/moderations")
    async def chat_moderations(request: Request) -> Response:
        return await moderate(context, shadows, request, await read(ChatModerationRequest, request))

    @post("/tokenize", "/v1/tokenize")
    async def tokens_of(request: Request) -> Response:
        return await tokenize(context, request, await read(TokenizeRequest, request))

    @post("/detokenize", "/v1/detokenize")
    async def text_of(request: Request) -> Response:
        return await detokenize(context, request, await read(DetokenizeRequest, request))

    @get("/v1/models")
    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": context.directory.cards(caller_of(request))})

    @get("/v1/models/{model:path}")
    async def model_card(request: Request) -> Response:
        caller, model = caller_of(request), request.path_params["model"]
        loaded = context.directory.stable(model, caller)
        unlisted = {"id": model, "object": "model", "created": 0, "owned_by": "forge_ray", "model_version": loaded.version}
        return JSONResponse(next((card for card in context.directory.cards(caller) if card["id"] == model), unlisted))

    @get("/health")
    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "deployment": context.deployment})

    @get("/metrics")
    async def metrics(_: Request) -> Response:
        text = await context.exposition() if context.exposition else context.metrics.text()
        return Response(text, media_type=CONTENT_TYPE)

    return RequestMetricsMiddleware(app, context.metrics, context.deployment)


def _add_route(app: Starlette, method: str, *paths: str) -> Callable[[Endpoint], Endpoint]:
    """Answers `method` at these paths with what is decorated, and HEAD at none of them."""

    def add(endpoint: Endpoint) -> Endpoint:
        for path in paths:
            route = Route(path, endpoint, methods=[method])
            route.methods = {method}  # a GET has HEAD too otherwise
            app.router.routes.append(route)
        return endpoint

    return add


def _add_error_answers(app: Starlette) -> None:
    """Answer every error in OpenAI's format, none with a traceback."""

    def reply(error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    async def refused(_: Request, error: Any) -> Response:
        return reply(error)

    async def engine_failed(_: Request, error: Any) -> Response:
        return reply(ApiError(503, error.message, code=error.code))

    async def no_such_route(request: Request, error: Any) -> Response:
        problem = f"{request.method} {request.url.path[:200]}: {error.detail}"
        return reply(ApiError(error.status_code, problem, headers=error.headers))

    async def client_gone(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED)

    async def failed(_: Request, __: Exception) -> Response:
        return reply(ApiError(500, "internal error", code="internal_error"))

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(EngineError, engine_failed)
    app.add_exception_handler(HTTPException, no_such_route)
    app.add_exception_handler(ClientDisconnect, client_gone)
    app.add_exception_handler(ClientGone, client_gone)
    app.add_exception_handler(Exception, failed)


async def _body(context: ServingContext, request: Request) -> bytes:
    """The body, read no further than the limit."""
    limit, body = context.config.limits.max_body_bytes, bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > limit:
            raise ApiError(413, f"the body exceeds {limit} bytes", code="request_too_large")
    return bytes(body)
