"""One request from its fields to its answer (no ray): tokenise, choose who answers, generate, reply.

When the client goes away the request is cancelled in the engine, with all its choices.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from forge_ray.errors import EngineError
from forge_ray.serve.choice import answer_choice
from forge_ray.serve.fields import ChatRequest, CompletionRequest
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.prompt import Prompt, choices_of, prompts_of
from forge_ray.serve.reply import KEEP_ALIVE, Part, Reply, joined, sse, usage
from forge_ray.serve.served import Admission, Caller, Chosen, RoutingInputs, Served
from forge_ray.serve.shadow import Shadows
from forge_ray.serve.streams import merged, unless_gone

KEEP_ALIVE_S = 10.0  # proxies close what is silent for longer, often after 30 s or 60 s

Parts = AsyncGenerator[tuple[int, Part] | None, None]

log = logging.getLogger(__name__)


async def complete(served: Served, shadows: Shadows, request: Request, wanted: ChatRequest | CompletionRequest) -> Response:
    """Both endpoints: the whole answer, or a stream of it."""
    started = time.monotonic()
    stable = served.directory.stable(wanted.model)
    prompts = await _prompts(served, stable, wanted)
    chosen = await served.directory.choose(wanted.model, RoutingInputs(request.headers, wanted.user or "", prompts[0].ids))
    loaded = chosen.loaded
    if loaded.tokenizer is not stable.tokenizer:
        prompts = await _prompts(served, loaded, wanted)
    choices = choices_of(served.config.limits, loaded, wanted, prompts)
    num_prompt = sum(len(prompt.ids) for prompt in prompts)
    most_new = sum(choice.generation.max_new_tokens for choice in choices)
    caller: Caller | None = getattr(request.state, "caller", None)
    admission = await served.admit(caller, chosen, num_prompt, most_new)
    shadows.start(wanted, chosen)
    served.metrics.accepted(chosen.name, loaded.version, num_prompt, time.monotonic() - started)
    chat = isinstance(wanted, ChatRequest)
    reply = Reply(
        "chat" if chat else "text",
        wanted.model,
        loaded.fingerprint,
        loaded.tokenizer,
        wanted.num_logprobs,
        wanted.metadata,
    )
    streams = [answer_choice(loaded, wanted, choice) for choice in choices]
    parts = _measured(served, chosen, merged(streams, KEEP_ALIVE_S), started, caller, admission, num_prompt)
    headers = answered_by(chosen)
    if wanted.stream:
        # Headers go with the first token, or with the first sign of life: what fails before that has its own status
        first = await unless_gone(request, anext(parts))
        return StreamingResponse(
            _events(reply, first, parts, len(choices), num_prompt, wanted.include_usage),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers},
        )
    found = [joined(of_choice) for of_choice in await unless_gone(request, _collected(parts, len(choices)))]
    whole = reply.whole(found, usage(num_prompt, sum(part.num_tokens for part in found)))
    return JSONResponse(whole, headers=headers)


def answered_by(chosen: Chosen) -> dict[str, str]:
    """Response headers: which version answers, and by which route."""
    loaded = chosen.loaded
    route = {"x-forge-route": chosen.route} if chosen.route else {}
    return {"x-forge-model-version": loaded.version, "x-forge-model-digest": loaded.digest, **route}


async def _prompts(served: Served, loaded: Loaded, wanted: ChatRequest | CompletionRequest) -> list[Prompt]:
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(served.tokenising, prompts_of, loaded.tokenizer, wanted)


async def _collected(parts: Parts, num_choices: int) -> list[list[Part]]:
    found: list[list[Part]] = [[] for _ in range(num_choices)]
    async with aclosing(parts):
        async for item in parts:
            if item is not None:
                found[item[0]].append(item[1])
    return found


async def _events(
    reply: Reply,
    first: tuple[int, Part] | None,
    parts: Parts,
    num_choices: int,
    num_prompt: int,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """Server-sent events; an engine that fails half-way ends the stream with an error event and without `[DONE]`."""
    begun: set[int] = set()
    num_calls, num_tokens = [0] * num_choices, [0] * num_choices
    try:
        async with aclosing(parts):
            item: tuple[int, Part] | None = first
            while True:
                if item is None:
                    yield KEEP_ALIVE
                else:
                    index, part = item
                    if reply.chat and index not in begun:
                        begun.add(index)
                        yield sse(reply.first_chunk(index))
                    if part.says_something:
                        yield sse(reply.chunk(index, part, num_calls[index]))
                    num_calls[index] += len(part.calls)
                    num_tokens[index] = part.num_tokens
                try:
                    item = await anext(parts)
                except StopAsyncIteration:
                    break
    except Exception as error:
        yield sse(_failure(error).body())
        return
    if include_usage:
        yield sse(reply.usage_chunk(usage(num_prompt, sum(num_tokens))))
    yield sse("[DONE]")


def _failure(error: Exception) -> ApiError:
    """What a client sees of an error whose status was sent already."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return ApiError(503, error.message, code=error.code)
    log.error("a stream failed", exc_info=error)
    return ApiError(500, "internal error", code="internal_error")


async def _measured(
    served: Served,
    chosen: Chosen,
    parts: Parts,
    started: float,
    caller: Caller | None,
    admission: Admission,
    num_prompt: int,
) -> Parts:
    """The same parts, their times and numbers noted; a cancelled request is charged for what was generated."""
    metrics, who = served.metrics, (chosen.name, chosen.loaded.version)
    last: dict[int, float] = {}
    num_tokens: dict[int, int] = {}
    status = 499
    try:
        async with aclosing(parts):
            async for item in parts:
                if item is not None and (new := item[1].num_tokens - num_tokens.get(item[0], 0)) > 0:
                    index, now = item[0], time.monotonic()
                    first = not last
                    since = started if first else last.get(index)
                    metrics.token(*who, None if since is None else now - since, first=first, count=new)
                    if first and caller is not None:
                        caller.first_token_s = now - started
                    last[index], num_tokens[index] = now, item[1].num_tokens
                yield item
        status = 200
    except ApiError as error:
        status = error.status
        raise
    except EngineError:
        status = 503
        raise
    except Exception:
        status = 500  # not the client's leaving: a canary is judged by it
        raise
    finally:
        admission.close(num_prompt, sum(num_tokens.values()), status)
        metrics.finished(*who, time.monotonic() - started, status)
