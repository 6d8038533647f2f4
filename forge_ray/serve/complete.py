"""One request from its fields to its answer (level 4; no ray): tokenise, choose who answers, generate, reply.

When the client goes away the request is cancelled in the engine.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from forge_ray.data.chat import ChatTokenizer
from forge_ray.data.schema import Reject
from forge_ray.errors import EngineError
from forge_ray.inference.engine import GenerationRequest
from forge_ray.serve.openai import ApiError, ChatRequest, CompletionRequest, Reply, sse, usage
from forge_ray.serve.served import Admission, Caller, Chosen, Facts, Loaded, Served
from forge_ray.serve.text import Delta, answer


async def complete(served: Served, request: Request, wanted: ChatRequest | CompletionRequest) -> Response:
    """Both endpoints: the whole answer, or a stream of it."""
    started = time.monotonic()
    stable = served.directory.stable(wanted.model)
    prompt_ids = tuple(await _tokenised(served, stable, wanted))
    chosen = await served.directory.choose(wanted.model, Facts(request.headers, "", prompt_ids))
    loaded = chosen.loaded
    if loaded.tokenizer is not stable.tokenizer:
        prompt_ids = tuple(await _tokenised(served, loaded, wanted))
    generation = _generation_request(served, loaded, wanted, prompt_ids)
    num_prompt = len(prompt_ids)
    caller: Caller | None = getattr(request.state, "caller", None)
    admission = await served.admit(caller, chosen, num_prompt, generation.max_new_tokens)
    served.metrics.accepted(chosen.name, loaded.version, num_prompt, time.monotonic() - started)
    reply = Reply("chat" if isinstance(wanted, ChatRequest) else "text", wanted.model, loaded.fingerprint)
    deltas = answer(loaded.engine, loaded.tokenizer, generation, wanted.stops)
    deltas = _measured(served, chosen, deltas, started, caller, admission, num_prompt)
    headers = answered_by(chosen)
    if wanted.stream:
        return StreamingResponse(
            _events(reply, deltas, num_prompt, wanted.include_usage),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers},
        )
    texts: list[str] = []
    async with aclosing(deltas):
        async for delta in deltas:
            texts.append(delta.text)
    whole = reply.whole("".join(texts), delta.finish_reason or "length", usage(num_prompt, delta.num_tokens))
    return JSONResponse(whole, headers=headers)


def answered_by(chosen: Chosen) -> dict[str, str]:
    """Response headers: which version answers, and by which route."""
    loaded = chosen.loaded
    route = {"x-forge-route": chosen.route} if chosen.route else {}
    return {"x-forge-model-version": loaded.version, "x-forge-model-digest": loaded.digest, **route}


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


async def _measured(
    served: Served,
    chosen: Chosen,
    deltas: AsyncIterator[Delta],
    started: float,
    caller: Caller | None,
    admission: Admission,
    num_prompt: int,
) -> Any:
    """The same deltas, their times and numbers noted; a cancelled request is charged for what was generated."""
    metrics, who = served.metrics, (chosen.name, chosen.loaded.version)
    last, num_tokens, status = started, 0, 499
    try:
        async with aclosing(deltas):  # type: ignore[type-var]
            async for delta in deltas:
                if delta.num_tokens > num_tokens:
                    now = time.monotonic()
                    metrics.token(*who, now - last, first=num_tokens == 0, count=delta.num_tokens - num_tokens)
                    if caller is not None and num_tokens == 0:
                        caller.first_token_s = now - started
                    last, num_tokens = now, delta.num_tokens
                yield delta
        status = 200
    except EngineError:
        status = 503
        raise
    finally:
        admission.close(num_prompt, num_tokens, status)
        metrics.finished(*who, time.monotonic() - started, status)


async def _tokenised(served: Served, loaded: Loaded, wanted: ChatRequest | CompletionRequest) -> list[int]:
    return await asyncio.get_running_loop().run_in_executor(served.tokenising, _prompt_ids, loaded.tokenizer, wanted)


def _generation_request(
    served: Served, loaded: Loaded, wanted: ChatRequest | CompletionRequest, prompt_ids: tuple[int, ...]
) -> GenerationRequest:
    return GenerationRequest(
        prompt_ids=prompt_ids,
        max_new_tokens=_max_new_tokens(served, loaded, wanted, len(prompt_ids)),
        temperature=1.0 if wanted.temperature is None else wanted.temperature,
        top_p=1.0 if wanted.top_p is None else wanted.top_p,
        seed=wanted.seed,
        stop_token_ids=loaded.stop_token_ids,
        adapter=loaded.adapter,
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


def _max_new_tokens(served: Served, loaded: Loaded, wanted: ChatRequest | CompletionRequest, num_prompt: int) -> int:
    """The request's limit, or all that the deployment and the context leave."""
    name, asked = wanted.token_limit
    context = loaded.engine.max_request_tokens
    most, room = served.config.limits.max_new_tokens, context - num_prompt
    param = "messages" if isinstance(wanted, ChatRequest) else "prompt"
    if num_prompt < 1:
        raise ApiError(400, f"{param}: the prompt has no tokens", param=param)
    if asked is not None and asked > most:
        raise ApiError(400, f"{name}: {asked} exceeds this deployment's limit of {most}", param=name)
    if room < (asked or 1):
        raise ApiError(
            400,
            f"the prompt has {num_prompt} tokens and {asked or 1} more are asked for; the context holds {context}",
            param=param,
            code="context_length_exceeded",
        )
    return asked or min(most, room)
