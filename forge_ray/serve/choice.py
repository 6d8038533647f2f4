"""One choice of an answer: the engine's tokens as text, tool calls and a finish reason (no ray, no torch)."""

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
from forge_ray.serve.reasoning import marks_of, splitter_of
from forge_ray.serve.reply import Part
from forge_ray.serve.switches import switched
from forge_ray.serve.text import Piece, answer
from forge_ray.serve.tools import Beginning, Call, markers, parser_of

ALLOW_ONLY = 100.0  # a logit bias so large that the other tokens have no chance


async def answer_choice(loaded: Loaded, body: ChatRequest | CompletionRequest, choice: Choice) -> AsyncGenerator[Part, None]:
    """Its text, its calls and its finish reason as they are generated; closing the iterator cancels the request."""
    prompt, generation = choice.prompt, choice.generation
    parser = splitter = None
    marks: dict[int, str] = {}
    if isinstance(body, ChatRequest):
        tokenizer = switched(loaded.tokenizer, body)
        if body.offered:
            functions = [tool.function for tool in body.offered]
            parser = parser_of(tokenizer, functions, body.parallel_tool_calls is not False)
            marks = markers(tokenizer)
        splitter = None if prompt.prefix else splitter_of(tokenizer)
        if splitter is not None:
            marks |= marks_of(tokenizer)
    if prompt.beginnings and parser is not None:
        beginning = await _chosen_beginning(loaded.generator, generation, prompt.beginnings)
        generation = replace(generation, prompt_ids=(*prompt.ids, *beginning.ids), json_schema=beginning.json_schema)
        parser.push(beginning.text)
        splitter = None  # the answer begins with the call
    if prompt.prefix:
        yield Part(prompt.prefix)
    num_calls = num_reasoning = 0
    stream = answer(loaded.generator, loaded.tokenizer, generation, body.stops, marks)
    async with _refusals(prompt), aclosing(stream) as deltas:
        async for delta in deltas:
            pieces = tuple(Piece(piece.token, piece.offset + len(prompt.prefix)) for piece in delta.pieces)
            reasoning, new = splitter.push(delta.text) if splitter else ("", delta.text)
            num_reasoning += bool(splitter and splitter.is_reasoning)
            if splitter and delta.finish_reason is not None:
                more = splitter.flush()
                reasoning, new = reasoning + more[0], new + more[1]
            if parser is None:
                yield Part(new, (), pieces, delta.num_tokens, delta.finish_reason, reasoning, num_reasoning)
                continue
            parsed = parser.push(new)
            if delta.finish_reason is not None:
                parsed += parser.flush()
            calls = tuple(part for part in parsed if isinstance(part, Call))
            num_calls += len(calls)
            ended = "stop" if parser.finished else delta.finish_reason
            text = "".join(part for part in parsed if isinstance(part, str))
            finish = "tool_calls" if ended == "stop" and num_calls else ended
            yield Part(text, calls, pieces, delta.num_tokens, finish, reasoning, num_reasoning)
            if parser.finished:
                return


@asynccontextmanager
async def _refusals(prompt: Prompt) -> AsyncGenerator[None, None]:
    """A request that the engine refuses is answered 400: the client has to change it."""
    try:
        yield
    except RequestError as error:
        param = "tools" if prompt.beginnings else "response_format" if prompt.json_schema else None
        raise ApiError(400, error.message, param=param) from error


async def _chosen_beginning(engine: Engine, request: GenerationRequest, candidates: Sequence[Beginning]) -> Beginning:
    """The beginning that the model prefers: where the candidates differ, it picks among their next tokens."""
    at = 0
    while len(candidates) > 1:
        allowed = sorted({candidate.ids[at] for candidate in candidates if len(candidate.ids) > at})
        token_id: int | None = allowed[0]
        if len(allowed) > 1:
            step = replace(
                request,
                prompt_ids=(*request.prompt_ids, *candidates[0].ids[:at]),
                max_new_tokens=1,
                stop_token_ids=(),
                logit_bias=tuple((token, ALLOW_ONLY) for token in allowed),
                num_logprobs=None,
                json_schema="",
            )
            async with aclosing(engine.stream(step)) as tokens:  # type: ignore[type-var]
                async for token in tokens:
                    token_id = token.token_id
                    break
        # If it generated another token in spite of the bias, take the first candidate: one must be chosen
        matching = [candidate for candidate in candidates if len(candidate.ids) > at and candidate.ids[at] == token_id]
        candidates = matching or candidates[:1]
        at += 1
    return candidates[0]
