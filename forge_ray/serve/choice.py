"""One choice of an answer: what the engine generates as text, tool calls and an end (no ray, no torch)."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace

from forge_ray.errors import RequestError
from forge_ray.inference.engine import Engine, GenerationRequest
from forge_ray.serve.fields import ChatRequest, CompletionRequest
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.prompt import Choice, Prompt
from forge_ray.serve.reply import Part
from forge_ray.serve.text import Piece, answer
from forge_ray.serve.tools import Beginning, Call, CallParser, markers

ONLY_THESE = 100.0  # a bias that leaves the others no chance


async def answer_choice(
    loaded: Loaded, wanted: ChatRequest | CompletionRequest, choice: Choice
) -> AsyncGenerator[Part, None]:
    """Its text, its calls and why it ended, as they come; closing the iterator cancels it."""
    prompt, generation = choice.prompt, choice.generation
    parser = None
    marks = {}
    if isinstance(wanted, ChatRequest) and wanted.offered:
        functions = [tool.function for tool in wanted.offered]
        parser = CallParser(loaded.tokenizer.call_style, functions, wanted.parallel_tool_calls is not False)
        marks = markers(loaded.tokenizer)
    if prompt.beginnings and parser is not None:
        begun = await _chosen_beginning(loaded.engine, generation, prompt.beginnings)
        generation = replace(generation, prompt_ids=(*prompt.ids, *begun.ids), json_schema=begun.json_schema)
        parser.push(begun.text)
    if prompt.said:
        yield Part(prompt.said)
    num_calls = 0
    stream = answer(loaded.engine, loaded.tokenizer, generation, wanted.stops, marks)
    async with _refusals(prompt), aclosing(stream) as deltas:
        async for delta in deltas:
            pieces = tuple(Piece(piece.token, piece.offset + len(prompt.said)) for piece in delta.pieces)
            if parser is None:
                yield Part(delta.text, (), pieces, delta.num_tokens, delta.finish_reason)
                continue
            found = parser.push(delta.text)
            if delta.finish_reason is not None:
                found += parser.flush()
            calls = tuple(part for part in found if isinstance(part, Call))
            num_calls += len(calls)
            ended = "stop" if parser.finished else delta.finish_reason
            text = "".join(part for part in found if isinstance(part, str))
            yield Part(text, calls, pieces, delta.num_tokens, "tool_calls" if ended == "stop" and num_calls else ended)
            if parser.finished:
                return


@asynccontextmanager
async def _refusals(prompt: Prompt) -> AsyncGenerator[None, None]:
    """What the engine cannot do with a request is the client's to change."""
    try:
        yield
    except RequestError as error:
        param = "tools" if prompt.beginnings else "response_format" if prompt.json_schema else None
        raise ApiError(400, error.message, param=param) from error


async def _chosen_beginning(engine: Engine, request: GenerationRequest, ways: Sequence[Beginning]) -> Beginning:
    """The one that the model itself would write: where they part, it picks among their next tokens."""
    at = 0
    while len(ways) > 1:
        allowed = sorted({way.ids[at] for way in ways if len(way.ids) > at})
        token_id: int | None = allowed[0]
        if len(allowed) > 1:
            step = replace(
                request,
                prompt_ids=(*request.prompt_ids, *ways[0].ids[:at]),
                max_new_tokens=1,
                stop_token_ids=(),
                logit_bias=tuple((token, ONLY_THESE) for token in allowed),
                num_logprobs=None,
                json_schema="",
            )
            async with aclosing(engine.stream(step)) as tokens:  # type: ignore[type-var]
                async for token in tokens:
                    token_id = token.token_id
                    break
        # A token that none of them has, in spite of the bias: the first way, for one must be gone
        ways = [way for way in ways if len(way.ids) > at and way.ids[at] == token_id] or ways[:1]
        at += 1
    return ways[0]
