"""The endpoints of classifiers: texts or conversations → probabilities of labels, and moderations (no ray, no torch).

A request's texts go to the engine in groups, one after the other, each of what one forward pass takes; between two groups a
client may have left, and other requests have their turn.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from forge_ray.inference.classifier import Logits
from forge_ray.serve.calibration import ClassHead
from forge_ray.serve.class_fields import ClassifyingRequest
from forge_ray.serve.class_results import classification, logits_of_group, moderation, refuse_unreadable
from forge_ray.serve.context import Chosen, ServingContext
from forge_ray.serve.embeddings import first_batch
from forge_ray.serve.openai import ApiError
from forge_ray.serve.prologue import admitted, caller_of, routed
from forge_ray.serve.reply import answered_by
from forge_ray.serve.shadow import Shadows
from forge_ray.serve.statuses import CLIENT_CLOSED
from forge_ray.serve.streams import ClientGone, unless_gone

Result = Callable[[ClassHead, Logits], dict[str, Any]]


async def classify(context: ServingContext, shadows: Shadows, request: Request, body: ClassifyingRequest) -> Response:
    """Mistral's response: for each text, each target's probabilities by label; also the labels that hold."""
    return await _answered(context, shadows, request, body, "clsf", classification, check=None)


async def moderate(context: ServingContext, shadows: Shadows, request: Request, body: ClassifyingRequest) -> Response:
    """OpenAI's response, which Mistral's client reads too; of versions alone that are declared as moderation models."""
    return await _answered(context, shadows, request, body, "modr", moderation, check=_refuse_undeclared)


def _refuse_undeclared(chosen: Chosen) -> None:
    _, head = chosen.loaded.classifier
    if not head.flags:
        rule = (
            f"model {chosen.name!r} ({chosen.loaded.version}) is not declared as a moderation model: send the texts to"
            " /v1/classifications, or release it with release.moderation"
        )
        raise ApiError(400, rule, param="model", code="wrong_kind_of_model")


async def _answered(
    context: ServingContext,
    shadows: Shadows,
    request: Request,
    body: ClassifyingRequest,
    prefix: str,
    result: Result,
    check: Callable[[Chosen], None] | None,
) -> Response:
    started, caller = time.monotonic(), caller_of(request)
    chosen, prompts = await routed(context, request, body)
    if check is not None:
        check(chosen)
    loaded, (engine, head) = chosen.loaded, chosen.loaded.classifier
    documents = [prompt.ids for prompt in prompts]
    refuse_unreadable(loaded, documents, context.config.limits.max_prompt_tokens)
    num_tokens = sum(map(len, documents))
    admission = await admitted(context, caller, chosen, num_tokens, 0, started)
    shadows.start(body, chosen)
    status, num_read = 503, 0
    results: list[dict[str, Any]] = []
    try:
        while len(results) < len(documents):
            group = first_batch(documents[len(results) :], engine.max_batch_tokens, engine.max_batch_tokens)
            num_read += sum(map(len, group))
            logits = await unless_gone(request, logits_of_group(loaded, group, caller.holder))
            results += [result(head, of_text) for of_text in logits]
        status = 200
    except (ClientGone, asyncio.CancelledError):
        status = CLIENT_CLOSED
        raise
    finally:
        admission.close(num_read, 0, status)
        context.metrics.finished(chosen.name, loaded.version, time.monotonic() - started, status)
    content = {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "model": body.model,
        "results": results,
        "usage": {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens},
    }
    if body.metadata:
        content["metadata"] = body.metadata
    return JSONResponse(content, headers=answered_by(chosen))
