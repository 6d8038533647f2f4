"""A chat or text completion from its fields to its answer (no ray): choose a version, tokenise, admit, generate, reply.

When the client goes away the request is cancelled in the engine, with all its choices.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from forge_ray.errors import EngineError
from forge_ray.serve.admission import counted, sent_seats
from forge_ray.serve.choice import answer_choice
from forge_ray.serve.context import Admission, AnswerKeeper, Caller, Chosen, ServingContext
from forge_ray.serve.fields import ChatRequest, CompletionRequest
from forge_ray.serve.openai import ApiError
from forge_ray.serve.prologue import admitted, caller_of, routed
from forge_ray.serve.prompt import choices_of, clamped
from forge_ray.serve.reply import Part, Reply, answered_by, joined, new_id, sse, usage
from forge_ray.serve.shadow import Shadows
from forge_ray.serve.statuses import CLIENT_CLOSED
from forge_ray.serve.streams import Arrived, EventResponse, merged, unless_gone, writes

KEEP_ALIVE_S = 10.0  # proxies close idle connections, often after 30 s or 60 s

Parts = AsyncGenerator[Arrived[Part] | None, None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answering:
    """A request that was admitted: its version, its choices as they are generated, and the headers of the response."""

    chosen: Chosen
    parts: Parts
    num_choices: int
    num_prompt: int
    headers: dict[str, str]

    async def first(self, request: Request) -> Arrived[Part] | None:
        """The first parts of a stream. Headers are sent with it or with the first keep-alive: a failure before that has its
        own status."""
        return await unless_gone(request, anext(self.parts))

    async def whole(self, request: Request) -> list[Part]:
        """Each choice as one part."""
        return [joined(parts) for parts in await unless_gone(request, _collected(self.parts, self.num_choices))]

    def stream(self, events: AsyncGenerator[bytes, None]) -> Response:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **self.headers}
        return EventResponse(events, media_type="text/event-stream", headers=headers)


async def answering(
    context: ServingContext, shadows: Shadows, request: Request, body: ChatRequest | CompletionRequest, answer_id: str
) -> Answering:
    """Choose a version, tokenise, admit, begin to generate. `answer_id` is the id that the response will have."""
    started = time.monotonic()
    caller = caller_of(request)
    chosen, prompts = await routed(context, request, body)
    limits = context.config.limits
    choices = choices_of(limits, chosen.loaded, body, prompts)
    num_prompt = sum(len(prompt.ids) for prompt in prompts)
    max_new_tokens = sum(choice.generation.max_new_tokens for choice in choices)
    admission = await admitted(context, caller, chosen, num_prompt, max_new_tokens, started)
    caller.seats = seats = sent_seats(context, caller.holder, caller.seats, chosen.loaded, choices)
    shadows.start(body, chosen)
    streams = [counted(seats, k, answer_choice(chosen.loaded, body, choice)) for k, choice in enumerate(choices)]
    parts = _measured(context, chosen, merged(streams, KEEP_ALIVE_S), started, caller, admission, num_prompt)
    if context.keeper is not None and isinstance(body, ChatRequest):
        parts = _kept(context.keeper, parts, len(choices), answer_id, body, caller, chosen)
    return Answering(chosen, parts, len(choices), num_prompt, answered_by(chosen) | clamped(limits, body))


async def complete(
    context: ServingContext, shadows: Shadows, request: Request, body: ChatRequest | CompletionRequest
) -> Response:
    """A chat or a text: the whole answer, or a stream of it."""
    kind: Literal["chat", "text"] = "chat" if isinstance(body, ChatRequest) else "text"
    answer_id = new_id(kind)
    begun = await answering(context, shadows, request, body, answer_id)
    loaded, num_prompt = begun.chosen.loaded, begun.num_prompt
    reply = Reply(kind, body.model, loaded.fingerprint, loaded.tokenizer, body.num_logprobs, body.metadata, answer_id)
    if body.stream:
        first = await begun.first(request)
        return begun.stream(_events(reply, first, begun.parts, begun.num_choices, num_prompt, body.include_usage))
    answers = await begun.whole(request)
    num_reasoning = sum(answer.num_reasoning for answer in answers)
    whole = reply.whole(answers, usage(num_prompt, sum(answer.num_tokens for answer in answers), num_reasoning))
    return JSONResponse(whole, headers=begun.headers)


async def _collected(parts: Parts, num_choices: int) -> list[list[Part]]:
    by_choice: list[list[Part]] = [[] for _ in range(num_choices)]
    async with aclosing(parts):
        async for arrived in parts:
            for index, part in arrived.items if arrived else ():
                by_choice[index].append(part)
    return by_choice


def _events(
    reply: Reply,
    first: Arrived[Part] | None,
    parts: Parts,
    num_choices: int,
    num_prompt: int,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """Server-sent events; if the engine fails half-way, the stream ends with an error event and without `[DONE]`."""
    begun: set[int] = set()
    num_calls, num_tokens, num_reasoning = [0] * num_choices, [0] * num_choices, [0] * num_choices

    def events(index: int, part: Part) -> Iterator[bytes]:
        if reply.chat and index not in begun:
            begun.add(index)
            yield sse(reply.first_chunk(index))
        if part.has_content:
            yield sse(reply.chunk(index, part, num_calls[index]))
        num_calls[index] += len(part.calls)
        num_tokens[index], num_reasoning[index] = part.num_tokens, part.num_reasoning

    def ending() -> Iterator[bytes]:
        if include_usage:
            yield sse(reply.usage_chunk(usage(num_prompt, sum(num_tokens), sum(num_reasoning))))
        yield sse("[DONE]")

    return writes(first, parts, events, ending, lambda error: sse(failure(error).body()))


def failure(error: Exception) -> ApiError:
    """The error as a client sees it after the status was sent already."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return ApiError(503, error.message, code=error.code)
    log.error("a stream failed", exc_info=error)
    return ApiError(500, "internal error", code="internal_error")


async def _kept(
    keeper: AnswerKeeper,
    parts: Parts,
    num_choices: int,
    answer_id: str,
    body: ChatRequest,
    caller: Caller,
    chosen: Chosen,
) -> Parts:
    """The same parts; what they add up to is kept once all choices have ended."""
    by_choice: list[list[Part]] = [[] for _ in range(num_choices)]
    has_ended = False
    try:
        async with aclosing(parts):
            async for arrived in parts:
                for index, part in arrived.items if arrived else ():
                    by_choice[index].append(part)
                yield arrived
        has_ended = True
    finally:
        if has_ended:
            keeper.add(answer_id, body, caller, chosen, by_choice)
        else:
            keeper.unfinished()


async def _measured(
    context: ServingContext,
    chosen: Chosen,
    parts: Parts,
    started: float,
    caller: Caller,
    admission: Admission,
    num_prompt: int,
) -> Parts:
    """The same parts, with times and token counts recorded once they were sent; a cancelled request is charged for what was
    generated."""
    metrics, labels = context.metrics, (chosen.name, chosen.loaded.version)
    last: dict[int, float] = {}
    num_tokens: dict[int, int] = {}
    status = CLIENT_CLOSED
    try:
        async with aclosing(parts):
            async for arrived in parts:
                now, recorded = time.monotonic(), list[tuple[float | None, bool, int]]()
                for index, part in arrived.items if arrived else ():
                    if (new := part.num_tokens - num_tokens.get(index, 0)) > 0:
                        first = not last
                        since = started if first else last.get(index)
                        recorded.append((None if since is None else now - since, first, new))
                        if first:
                            caller.first_token_s = now - started
                        last[index], num_tokens[index] = now, part.num_tokens
                try:
                    yield arrived
                finally:  # behind the write, and for a client that left too
                    for seconds, first, new in recorded:
                        metrics.token(*labels, seconds, first=first, count=new)
        status = 200
    except ApiError as error:
        status = error.status
        raise
    except EngineError:
        status = 503
        raise
    except Exception:
        status = 500  # unlike a client that left, this counts against a canary
        raise
    finally:
        admission.close(num_prompt, sum(num_tokens.values()), status)
        metrics.finished(*labels, time.monotonic() - started, status)
