"""The steps that every request to a model passes before it reaches an engine: choose a version, tokenise, admit (no ray)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

from fastapi import Request

from forge_ray.data.tokens.chat import ChatTokenizer
from forge_ray.serve.context import Admission, Caller, Chosen, ServingContext
from forge_ray.serve.fields import ChatRequest, CompletionRequest, EmbeddingRequest
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.prompt import Prompt, prompts_of
from forge_ray.serve.routing import RoutingInputs

A = TypeVar("A")
T = TypeVar("T")


def caller_of(request: Request) -> Caller:
    """The caller that the outermost ASGI layer has put into the request's state."""
    caller: Caller = request.state.caller
    return caller


async def tokenise(context: ServingContext, loaded: Loaded, function: Callable[[ChatTokenizer, A], T], argument: A) -> T:
    """`function(tokenizer, argument)` with the version's tokenizer, in the thread for tokenisation."""
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(context.tokenising, function, loaded.tokenizer, argument)


async def routed(
    context: ServingContext, request: Request, body: ChatRequest | CompletionRequest | EmbeddingRequest
) -> tuple[Chosen, list[Prompt]]:
    """The version that answers, and the request's prompts by that version's tokenizer and template.

    The route may depend on the prompt's length, so the stable version's tokenizer encodes it first.
    """
    caller = caller_of(request)
    stable = context.directory.stable(body.model, caller)
    prompts = await tokenise(context, stable, prompts_of, body)
    inputs = RoutingInputs(request.headers, body.user or "", prompts[0].ids)
    chosen = await context.directory.choose(body.model, caller, inputs)
    if chosen.loaded.tokenizer is not stable.tokenizer:
        prompts = await tokenise(context, chosen.loaded, prompts_of, body)
    return chosen, prompts


async def admitted(
    context: ServingContext, caller: Caller, chosen: Chosen, num_prompt: int, max_new_tokens: int, started: float
) -> Admission:
    """Leave to answer, counted in the metrics; `ApiError` where limits or grants refuse. `started`: for the waiting time."""
    admission = await context.admit(caller, chosen, num_prompt, max_new_tokens)
    context.metrics.accepted(chosen.name, chosen.loaded.version, num_prompt, time.monotonic() - started)
    return admission
