"""The endpoints that do not generate: embeddings of texts, and texts as tokens (no ray, no torch)."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.chat import ChatTokenizer
from forge_ray.serve.context import Caller, ServingContext
from forge_ray.serve.fields import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.prologue import admitted, caller_of, routed, tokenise
from forge_ray.serve.prompt import Prompt, chat_ids, ids_of
from forge_ray.serve.reply import answered_by


async def embed(context: ServingContext, request: Request, body: EmbeddingRequest) -> Response:
    """One vector per input, as numbers or (what OpenAI's client asks for) as the bytes of little-endian float32."""
    chosen, prompts = await routed(context, request, body)
    loaded = chosen.loaded
    _check_embeddable(context, loaded, prompts)
    num_tokens = sum(len(prompt.ids) for prompt in prompts)
    started = time.monotonic()
    admission = await admitted(context, caller_of(request), chosen, num_tokens, 0, started)
    status = 503
    try:
        vectors = await asyncio.to_thread(loaded.engine.embed, [prompt.ids for prompt in prompts], loaded.adapter)
        status = 200
    finally:
        admission.close(num_tokens, 0, status)
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


async def tokenize(context: ServingContext, caller: Caller, body: TokenizeRequest) -> Response:
    """vLLM's /tokenize, with the stable version's tokenizer and template."""
    loaded = context.directory.stable(body.model, caller)
    ids = await tokenise(context, loaded, _ids, body)
    names = [loaded.tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in ids]
    return JSONResponse(
        {
            "count": len(ids),
            "max_model_len": loaded.engine.max_request_tokens,
            "tokens": ids,
            "token_strs": names if body.return_token_strs else None,
        }
    )


async def detokenize(context: ServingContext, caller: Caller, body: DetokenizeRequest) -> Response:
    """vLLM's /detokenize: special tokens by their names."""
    loaded = context.directory.stable(body.model, caller)
    ids = ids_of(loaded.tokenizer, body.tokens, "tokens")
    text = await tokenise(context, loaded, _text, ids)
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
    if "embeddings" in loaded.engine.lacks:
        rule = f"this deployment's engine does not support embeddings; {loaded.engine.lacks['embeddings']} does"
        raise ApiError(400, rule, param="model", code="unsupported_parameter")
    longest = loaded.engine.max_request_tokens
    limit = min(context.config.limits.max_prompt_tokens or longest, longest)
    for prompt in prompts:
        if not 1 <= len(prompt.ids) <= limit:
            rule = f"input: it has {len(prompt.ids)} tokens; 1 to {limit} are allowed"
            raise ApiError(400, rule, param="input", code="context_length_exceeded")


def _encoded(vector: list[float], encoding_format: str | None) -> Any:
    return base64.b64encode(np.array(vector, "<f4").tobytes()).decode() if encoding_format == "base64" else vector
