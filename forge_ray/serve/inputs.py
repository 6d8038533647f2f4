"""What is answered without generating: vectors of texts, and texts as tokens (no ray, no torch)."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.chat import ChatTokenizer
from forge_ray.serve.complete import answered_by
from forge_ray.serve.fields import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.prompt import chat_ids, ids_of
from forge_ray.serve.served import RoutingInputs, Served

T = TypeVar("T")


async def embed(served: Served, request: Request, wanted: EmbeddingRequest) -> Response:
    """One vector per input, as numbers or (what OpenAI's client asks for) as the bytes of little-endian float32."""
    stable = served.directory.stable(wanted.model)
    inputs = await _tokenising(served, _input_ids, stable, wanted)
    facts = RoutingInputs(request.headers, wanted.user or "", inputs[0])
    chosen = await served.directory.choose(wanted.model, facts)
    loaded = chosen.loaded
    if loaded.tokenizer is not stable.tokenizer:
        inputs = await _tokenising(served, _input_ids, loaded, wanted)
    if "embeddings" in loaded.engine.lacks:
        rule = f"this deployment's engine has no embeddings; {loaded.engine.lacks['embeddings']} does"
        raise ApiError(400, rule, param="model", code="unsupported_parameter")
    _check_lengths(served, loaded, inputs)
    num_tokens = sum(map(len, inputs))
    started = time.monotonic()
    admission = await served.admit(getattr(request.state, "caller", None), chosen, num_tokens, 0)
    served.metrics.accepted(chosen.name, loaded.version, num_tokens, time.monotonic() - started)
    status = 503
    try:
        vectors = await asyncio.to_thread(loaded.engine.embed, inputs, loaded.adapter)
        status = 200
    finally:
        admission.close(num_tokens, 0, status)
        served.metrics.finished(chosen.name, loaded.version, time.monotonic() - started, status)
    data = [
        {"object": "embedding", "index": index, "embedding": _written(vector, wanted.encoding_format)}
        for index, vector in enumerate(vectors)
    ]
    body = {
        "id": f"embd-{secrets.token_hex(12)}",  # Mistral's client wants one
        "object": "list",
        "data": data,
        "model": wanted.model,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
    if wanted.metadata:
        body["metadata"] = wanted.metadata
    return JSONResponse(body, headers=answered_by(chosen))


async def tokenize(served: Served, wanted: TokenizeRequest) -> Response:
    """vLLM's /tokenize, with the stable version's tokenizer and template."""
    loaded = served.directory.stable(wanted.model)
    ids = await _tokenising(served, _ids, loaded, wanted)
    names = [loaded.tokenizer.token_bytes(token_id).decode(errors="replace") for token_id in ids]
    return JSONResponse(
        {
            "count": len(ids),
            "max_model_len": loaded.engine.max_request_tokens,
            "tokens": ids,
            "token_strs": names if wanted.return_token_strs else None,
        }
    )


async def detokenize(served: Served, wanted: DetokenizeRequest) -> Response:
    """vLLM's /detokenize: special tokens by their names."""
    loaded = served.directory.stable(wanted.model)
    ids = ids_of(loaded.tokenizer, wanted.tokens, "tokens")
    text = await _tokenising(served, _text, loaded, ids)
    return JSONResponse({"prompt": text})


async def _tokenising(served: Served, function: Callable[[ChatTokenizer, Any], T], loaded: Loaded, wanted: Any) -> T:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(served.tokenising, function, loaded.tokenizer, wanted)


def _input_ids(tokenizer: ChatTokenizer, wanted: EmbeddingRequest) -> list[tuple[int, ...]]:
    return [ids_of(tokenizer, one, "input") for one in wanted.inputs]


def _ids(tokenizer: ChatTokenizer, wanted: TokenizeRequest) -> list[int]:
    if wanted.messages is not None:
        return chat_ids(tokenizer, wanted.messages, wanted.tools or [])
    text = wanted.prompt or ""
    try:
        return list(ids_of(tokenizer, text, "prompt")) if wanted.add_special_tokens else tokenizer.piece_ids(text)
    except Reject as error:
        raise ApiError(400, str(error), param="prompt") from None


def _text(tokenizer: ChatTokenizer, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(ids)


def _check_lengths(served: Served, loaded: Loaded, inputs: list[tuple[int, ...]]) -> None:
    most = min(served.config.limits.max_prompt_tokens or loaded.engine.max_request_tokens, loaded.engine.max_request_tokens)
    for ids in inputs:
        if not 1 <= len(ids) <= most:
            rule = f"input: it has {len(ids)} tokens; 1 to {most} are allowed"
            raise ApiError(400, rule, param="input", code="context_length_exceeded")


def _written(vector: list[float], encoding_format: str | None) -> Any:
    return base64.b64encode(np.array(vector, "<f4").tobytes()).decode() if encoding_format == "base64" else vector
