"""The steps of every request to a model before it reaches an engine: choose a version, count, tokenise, admit (no ray)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from starlette.requests import Request

from forge_ray.data.tokens.chat import ChatTokenizer
from forge_ray.serve.admission import take_seats
from forge_ray.serve.class_fields import ClassifyingRequest
from forge_ray.serve.context import Admission, Caller, Chosen, ServingContext
from forge_ray.serve.fields import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Message,
    TokenizeRequest,
)
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.prompt import Asking, Prompt, prompts_of
from forge_ray.serve.routing import RoutingInputs
from forge_ray.serve.short import is_short
from forge_ray.serve.streams import unless_gone
from forge_ray.serve.tool_fields import Tool

A = TypeVar("A")
T = TypeVar("T")
TOKEN_CHARACTERS = 128  # the longest token of the vocabularies in use, a run of blanks; no prompt that fits has more of each
LONG_CHARACTERS = 1 << 15  # tokenised in the other thread; some 30 ms

Texts = Asking | TokenizeRequest | DetokenizeRequest
USE_CLASSIFICATIONS = "send texts to /v1/classifications, or conversations to /v1/chat/classifications"


def caller_of(request: Request) -> Caller:
    """The caller that the outermost ASGI layer has put into the request's state."""
    caller: Caller = request.state.caller
    return caller


async def tokenise(
    context: ServingContext, loaded: Loaded, function: Callable[[ChatTokenizer, A], T], argument: A, holder: str, size: int
) -> T:
    """`function(tokenizer, argument)` with the version's tokenizer, in the thread for texts of `size` characters; one at a
    time for each `holder`."""
    loop = asyncio.get_running_loop()
    executor = context.long_texts if size > LONG_CHARACTERS else context.tokenising
    async with context.turns.of(holder):
        return await loop.run_in_executor(executor, function, loaded.tokenizer, argument)


async def tokenised(
    context: ServingContext,
    request: Request,
    loaded: Loaded,
    function: Callable[[ChatTokenizer, A], T],
    argument: A,
    size: int,
) -> T:
    """As `tokenise`, for a client who may leave before it is done."""
    return await unless_gone(request, tokenise(context, loaded, function, argument, caller_of(request).holder, size))


async def begun(context: ServingContext, caller: Caller, loaded: Loaded, body: Texts) -> int:
    """Characters of the request's texts. `ApiError` 400 for one that cannot fit, which no tokenizer sees, and 429 where it
    would wait too long for an engine, or the limits of the caller's key refuse another request."""
    sizes = sizes_of(body)
    most = loaded.engine.max_request_tokens
    for param, characters, tokens in sizes:
        if characters > most * TOKEN_CHARACTERS or tokens > most:
            amount = f"{tokens} tokens" if tokens else f"{characters} characters"
            bound = f"{most} tokens" if tokens else f"{most * TOKEN_CHARACTERS} characters"
            raise ApiError(
                400,
                f"{param}: {amount} cannot fit into the context of {most} tokens; at most {bound} are read",
                param=param,
                code="context_length_exceeded",
            )
    if isinstance(body, ChatRequest | CompletionRequest):
        take_seats(context, caller, loaded, body, sizes)
    await context.count(caller, 0)
    return sum(characters for _, characters, _ in sizes)


def sizes_of(body: Texts) -> list[tuple[str, int, int]]:
    """(field, characters, token ids) of each text of a request."""
    if isinstance(body, ChatRequest):
        return [("messages", _characters(body.messages, body.offered), 0)]
    if isinstance(body, ClassifyingRequest):
        return [("input", _characters(messages, ()), 0) for messages in body.conversations]
    if isinstance(body, DetokenizeRequest):
        return [("tokens", 0, len(body.tokens))]
    if isinstance(body, TokenizeRequest):
        if body.messages is not None:
            return [("messages", _characters(body.messages, body.tools or []), 0)]
        return [("prompt", len(body.prompt or ""), 0)]
    texts, param = (body.inputs, "input") if isinstance(body, EmbeddingRequest) else (body.prompts, "prompt")
    return [(param, len(text), 0) if isinstance(text, str) else (param, 0, len(text)) for text in texts]


def _characters(messages: Iterable[Message], tools: Iterable[Tool]) -> int:
    calls = [call.function for message in messages for call in message.tool_calls or []]
    called = sum(len(call.name) + len(str(call.arguments)) for call in calls)
    described = sum(len(json.dumps(tool.for_template())) for tool in tools)
    written = sum(len(message.text) + len(message.reasoning_content or "") for message in messages)
    return written + called + described


async def routed(context: ServingContext, request: Request, body: Asking) -> tuple[Chosen, list[Prompt]]:
    """The version that answers, and the request's prompts by that version's tokenizer and template.

    The route may depend on the prompt's length, so the stable version's tokenizer encodes it first. `ApiError` 400 where the
    version is a classifier and the request asks for text, or the other way round.
    """
    caller = caller_of(request)
    stable = context.directory.stable(body.model, caller)
    refuse_other_kind(stable, body)
    size = await begun(context, caller, stable, body)
    prompts = await _prompts(context, request, stable, body, size)
    context.seating.tokenised(size, sum(len(prompt.ids) for prompt in prompts) if size else 0)

    async def prompt_by(loaded: Loaded) -> tuple[int, ...]:
        if loaded.tokenizer is stable.tokenizer:
            return prompts[0].ids
        return (await _prompts(context, request, loaded, body, size))[0].ids

    inputs = RoutingInputs(request.headers, getattr(body, "user", "") or "", prompts[0].ids, prompt_by=prompt_by)
    chosen = await context.directory.choose(body.model, caller, inputs)
    refuse_other_kind(chosen.loaded, body)
    if chosen.loaded.tokenizer is not stable.tokenizer:
        prompts = await _prompts(context, request, chosen.loaded, body, size)
    return chosen, prompts


async def _prompts(context: ServingContext, request: Request, loaded: Loaded, body: Asking, size: int) -> list[Prompt]:
    if is_short(body):
        return prompts_of(loaded.tokenizer, body)
    return await tokenised(context, request, loaded, prompts_of, body, size)


def refuse_other_kind(loaded: Loaded, body: Asking) -> None:
    """`ApiError` 400 for text of a classifier, and for labels of a model that generates text."""
    asks_for_labels = isinstance(body, ClassifyingRequest)
    if asks_for_labels == (loaded.head is not None):
        return
    if asks_for_labels:
        rule = f"model {body.model!r} generates text: send conversations to /v1/chat/completions"
    else:
        rule = f"model {body.model!r} is a classifier, which generates no text: {USE_CLASSIFICATIONS}"
    raise ApiError(400, rule, param="model", code="wrong_kind_of_model")


async def admitted(
    context: ServingContext, caller: Caller, chosen: Chosen, num_prompt: int, max_new_tokens: int, started: float
) -> Admission:
    """Leave to answer, counted in the metrics; `ApiError` where limits or grants refuse. `started`: for the waiting time."""
    admission = await context.admit(caller, chosen, num_prompt, max_new_tokens)
    context.metrics.accepted(chosen.name, chosen.loaded.version, num_prompt, time.monotonic() - started)
    return admission
