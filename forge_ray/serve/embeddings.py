"""The endpoints that do not generate: embeddings of texts, and texts as tokens (no ray, no torch)."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.chat import ChatTokenizer
from forge_ray.serve.context import Caller, ServingContext
from forge_ray.serve.fields import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from forge_ray.serve.limits import end_counting
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.prologue import admitted, begun, caller_of, routed, tokenised
from forge_ray.serve.prompt import Prompt, chat_ids, ids_of
from forge_ray.serve.reply import answered_by
from forge_ray.serve.statuses import CLIENT_CLOSED
from forge_ray.serve.streams import ClientGone, unless_gone

MAX_BATCH = 16  # inputs of one forward pass, and tokens with their padding
MAX_BATCH_TOKENS, FIRST_BATCH_TOKENS = 4096, 32
BATCH_S = 0.015  # a forward pass should take no longer: what generates meanwhile waits for its end
LONGEST_PAUSE_S = 1.0

Ids = tuple[int, ...]


async def embed(context: ServingContext, request: Request, body: EmbeddingRequest) -> Response:
    """One vector per input, as numbers or (what OpenAI's client asks for) as the bytes of little-endian float32."""
    chosen, prompts = await routed(context, request, body)
    loaded = chosen.loaded
    _check_embeddable(context, loaded, prompts)
    documents = [prompt.ids for prompt in prompts]
    num_tokens = sum(map(len, documents))
    started = time.monotonic()
    admission = await admitted(context, caller_of(request), chosen, num_tokens, 0, started)
    status, num_embedded = 503, 0
    vectors: list[list[float]] = []
    try:
        limit = FIRST_BATCH_TOKENS
        while len(vectors) < len(documents):
            batch = first_batch(documents[len(vectors) :], min(limit, MAX_BATCH_TOKENS))
            num_embedded += sum(map(len, batch))
            more, seconds = await unless_gone(request, _embedded(context, caller_of(request), loaded, batch))
            vectors += more
            limit = int(_padded(batch) * BATCH_S / max(seconds, 1e-6))
        status = 200
    except (ClientGone, asyncio.CancelledError):
        status = CLIENT_CLOSED
        raise
    finally:
        admission.close(num_embedded, 0, status)
        context.metrics.finished(chosen.name, loaded.version, time.monotonic() - started, status)
    embeddings = [
        {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    content = {
        "id": f"embd-{secrets.token_hex(12)}",  # Mistral's client requires one
        "object": "list",
        "data": embeddings,
        "model": body.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    if body.metadata:
        content["metadata"] = body.metadata
    return JSONResponse(content, headers=answered_by(chosen))


async def _embedded(
    context: ServingContext, caller: Caller, loaded: Loaded, batch: list[Ids]
) -> tuple[list[list[float]], float]:
    """The batch's vectors, and the seconds that they took. Generation stands still meanwhile, so that afterwards it has as
    long for itself, if it has work."""
    loop = asyncio.get_running_loop()
    async with context.turns.of(f"{caller.holder} embeds"):
        started = time.monotonic()
        vectors = await loop.run_in_executor(context.embedding, loaded.generator.embed, batch, loaded.adapter)
        seconds = time.monotonic() - started
        health = loaded.engine.health()
        if health.num_running or health.num_waiting:
            await asyncio.sleep(min(LONGEST_PAUSE_S, seconds))
        return vectors, seconds


def first_batch(documents: Sequence[Ids], limit: int, most: int = MAX_BATCH) -> list[Ids]:
    """The first inputs that one forward pass takes, at least one and `most`, of `limit` tokens with their padding; between
    two passes other work has its turn, and a client may have left."""
    batch: list[Ids] = []
    longest = 0
    for ids in documents[:most]:
        longest = max(longest, len(ids))
        if batch and (len(batch) + 1) * longest > limit:
            break
        batch.append(ids)
    return batch


def _padded(batch: Sequence[Ids]) -> int:
    """The tokens of a batch when all are as long as its longest."""
    return len(batch) * max(map(len, batch))


async def tokenize(context: ServingContext, request: Request, body: TokenizeRequest) -> Response:
    """vLLM's /tokenize, with the stable version's tokenizer and template. It counts as its tokens do in a prompt."""
    caller = caller_of(request)
    loaded = context.directory.stable(body.model, caller)
    size = await begun(context, caller, loaded, body)
    ids = await tokenised(context, request, loaded, _ids, body, size)
    await context.count(caller, len(ids))
    end_counting(caller, len(ids))
    names = [loaded.tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in ids]
    return JSONResponse(
        {
            "count": len(ids),
            "max_model_len": loaded.engine.max_request_tokens,
            "tokens": ids,
            "token_strs": names if body.return_token_strs else None,
        }
    )


async def detokenize(context: ServingContext, request: Request, body: DetokenizeRequest) -> Response:
    """vLLM's /detokenize: special tokens by their names. It counts as `tokenize` does."""
    caller = caller_of(request)
    loaded = context.directory.stable(body.model, caller)
    await begun(context, caller, loaded, body)
    ids = ids_of(loaded.tokenizer, body.tokens, "tokens")
    await context.count(caller, len(ids))
    text = await tokenised(context, request, loaded, _text, ids, len(ids))
    end_counting(caller, len(ids))
    return JSONResponse({"prompt": text})


def _ids(tokenizer: ChatTokenizer, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        return chat_ids(tokenizer, body.messages, body.tools or [])
    text = body.prompt or ""
    try:
        return list(ids_of(tokenizer, text, "prompt")) if body.add_special_tokens else tokenizer.piece_ids(text)
    except Reject as error:
        raise ApiError(400, str(error), param="prompt") from None


def _text(tokenizer: ChatTokenizer, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(ids)


def _check_embeddable(context: ServingContext, loaded: Loaded, prompts: Sequence[Prompt]) -> None:
    lacks = loaded.generator.lacks
    if "embeddings" in lacks:
        rule = f"this deployment's engine does not support embeddings; {lacks['embeddings']} does"
        raise ApiError(400, rule, param="model", code="unsupported_parameter")
    longest = loaded.engine.max_request_tokens
    limit = min(context.config.limits.max_prompt_tokens or longest, longest)
    for prompt in prompts:
        if not 1 <= len(prompt.ids) <= limit:
            rule = f"input: it has {len(prompt.ids)} tokens; 1 to {limit} are allowed"
            raise ApiError(400, rule, param="input", code="context_length_exceeded")


def _encoded(vector: list[float], encoding_format: str | None) -> Any:
    return base64.b64encode(np.array(vector, "<f4").tobytes()).decode() if encoding_format == "base64" else vector
