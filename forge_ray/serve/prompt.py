"""From a request body to prompts and generation requests, one per choice (no ray, no torch).

The checks that need the version's tokenizer or the engine's bounds are here; the others are in `openai`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from forge_ray.config.release import Limits
from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.adapt import with_short_ids
from forge_ray.data.tokens.chat import ChatTokenizer
from forge_ray.inference.engine import GenerationRequest
from forge_ray.serve.class_fields import ClassifyingRequest
from forge_ray.serve.conform import check_strict
from forge_ray.serve.fields import COMPLETION_MAX_TOKENS, ChatRequest, CompletionRequest, EmbeddingRequest, Message
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.replayed import without_thought
from forge_ray.serve.switches import switched
from forge_ray.serve.tool_fields import Tool
from forge_ray.serve.tools import Beginning, beginnings

DEFAULTS = {field.name: field.default for field in fields(GenerationRequest)}


@dataclass(frozen=True)
class Prompt:
    """The tokens that one or more choices continue. `prefix`: text that the answer begins with without being generated (by
    `echo` or `prefix`); `beginnings`: of a tool call that is required, else none; `json_schema`: of the whole answer."""

    ids: tuple[int, ...]
    prefix: str = ""
    beginnings: tuple[Beginning, ...] = ()
    json_schema: str = ""

    @property
    def num_beginning(self) -> int:
        """Tokens of the longest beginning."""
        return max((len(beginning.ids) for beginning in self.beginnings), default=0)


@dataclass(frozen=True)
class Choice:
    """One answer to generate; `generation` continues `prompt.ids`, before any beginning of a call is appended."""

    prompt: Prompt
    generation: GenerationRequest


Asking = ChatRequest | CompletionRequest | EmbeddingRequest | ClassifyingRequest


def prompts_of(tokenizer: ChatTokenizer, body: Asking) -> list[Prompt]:
    """The request's prompts as token ids: by the version's own chat template, of plain texts, or the ids that were sent."""
    if isinstance(body, EmbeddingRequest):
        return [Prompt(ids_of(tokenizer, text, "input")) for text in body.inputs]
    if isinstance(body, ClassifyingRequest):
        return [Prompt(_class_ids(tokenizer, messages)) for messages in body.conversations]
    if isinstance(body, ChatRequest):
        return [_chat_prompt(tokenizer, body)]
    prompts = body.prompts
    all_ids = [ids_of(tokenizer, prompt, "prompt") for prompt in prompts]
    if not body.echo:
        return [Prompt(ids) for ids in all_ids]
    texts = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]
    return [Prompt(ids, text) for ids, text in zip(all_ids, texts, strict=True)]


def _chat_prompt(tokenizer: ChatTokenizer, body: ChatRequest) -> Prompt:
    tokenizer = switched(tokenizer, body)
    messages = list(body.messages)
    prefix = messages.pop() if messages[-1].prefix else None
    ids = chat_ids(tokenizer, messages, body.offered)
    if prefix is not None:
        try:
            ids += tokenizer.piece_ids(prefix.text)
        except Reject as error:
            raise ApiError(400, str(error), param="messages") from None
    for tool in body.offered:
        if tool.function.strict:
            check_strict(tool.function)
    call_beginnings: tuple[Beginning, ...] = ()
    if body.forced:
        call_beginnings = beginnings(tokenizer, body.forced, several=body.parallel_tool_calls is not False)
        if not call_beginnings:
            rule = (
                "tool_choice: this model's template writes calls in a form that cannot be required; `auto` and `none` work"
            )
            raise ApiError(400, rule, param="tool_choice")
    schema = body.response_format.text if body.response_format is not None else ""
    return Prompt(tuple(ids), prefix.text if prefix else "", call_beginnings, schema)


def _class_ids(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> tuple[int, ...]:
    """The document that a classifier was trained on: up to where an answer would begin."""
    if messages[-1].prefix:
        raise ApiError(400, "input: a prefix is the beginning of an answer, and a classifier writes none", param="input")
    try:
        return tuple(chat_ids(tokenizer, messages, []))
    except ApiError as error:
        raise ApiError(400, f"input: {error.message}", param="input", code=error.code) from None


def chat_ids(tokenizer: ChatTokenizer, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
    """Ids up to where the assistant answers; `ApiError` 400 where the version's template refuses."""
    if not tokenizer.has_chat:
        raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
    if tools and not tokenizer.call_style:
        raise ApiError(400, "tools: this model's chat template has no supported format of tool calls", param="tools")
    if not messages:
        raise ApiError(400, "messages: the prefix must follow at least one other message", param="messages")
    try:
        turns = _with_ids([message.for_template() for message in messages])
        if (form := tokenizer.answer_form) is None:  # the model has no place for reasoning of earlier turns
            turns = [{key: item for key, item in turn.items() if key != "reasoning_content"} for turn in turns]
        elif form.has_reasoning:
            turns = [without_thought(turn, form.reasoning_closing.strip()) for turn in turns]
        return tokenizer.prompt_ids(turns, [tool.for_template() for tool in tools] or None)
    except Reject as error:
        raise ApiError(400, str(error), param="messages") from None


def _with_ids(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns as they are; where a call or a result has no id, each gets one."""
    calls = [call for turn in turns for call in turn.get("tool_calls", ())]
    results = [turn for turn in turns if turn["role"] == "tool"]
    is_named = all(call.get("id") for call in calls) and all(result.get("tool_call_id") for result in results)
    return turns if is_named or not calls else with_short_ids(turns)


def ids_of(tokenizer: ChatTokenizer, text: str | Sequence[int], param: str) -> tuple[int, ...]:
    """Ids of a plain text, no part of which becomes a special token, or the ids themselves if the vocabulary has them."""
    if isinstance(text, str):
        (ids,) = tokenizer.text_ids([text])
        if isinstance(ids, Reject):
            raise ApiError(400, f"{param}: {ids}", param=param)
        return tuple(ids)
    outside = [token_id for token_id in text if not 0 <= token_id < tokenizer.vocab_size]
    if outside:
        raise ApiError(400, f"{param}: token id {outside[0]} is not in 0..{tokenizer.vocab_size - 1}", param=param)
    return tuple(text)


def choices_of(
    limits: Limits, loaded: Loaded, body: ChatRequest | CompletionRequest, prompts: Sequence[Prompt]
) -> list[Choice]:
    """`n` per prompt, in order; the k-th of a prompt has seed + k. `ApiError` 400 for what the engine does not support."""
    bias = tuple(sorted((int(token), value) for token, value in (body.logit_bias or {}).items()))
    if bias and bias[-1][0] >= loaded.tokenizer.vocab_size:
        last = loaded.tokenizer.vocab_size - 1
        raise ApiError(400, f"logit_bias: token id {bias[-1][0]} is not in 0..{last}", param="logit_bias")
    seed = body.first_seed
    choices = [
        Choice(
            prompt,
            GenerationRequest(
                prompt_ids=prompt.ids,
                max_new_tokens=_max_new_tokens(limits, loaded, body, prompt),
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                top_k=max(body.top_k or 0, 0),
                seed=None if seed is None else _signed_64(seed + number),
                stop_token_ids=loaded.stop_token_ids,
                min_p=body.min_p or 0.0,
                repetition_penalty=body.repetition_penalty or 1.0,
                presence_penalty=body.presence_penalty or 0.0,
                frequency_penalty=body.frequency_penalty or 0.0,
                logit_bias=bias,
                num_logprobs=body.num_logprobs,
                json_schema=prompt.beginnings[0].json_schema if prompt.beginnings else prompt.json_schema,
                adapter=loaded.adapter,
            ),
        )
        for prompt in prompts
        for number in range(body.num_choices)
    ]
    _check_supported(loaded, body, choices[0])
    return choices


def _signed_64(seed: int) -> int:
    """Wrap around: the largest seed is followed by the smallest."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _check_supported(loaded: Loaded, body: ChatRequest | CompletionRequest, choice: Choice) -> None:
    """`ApiError` 400 for a field that the engine does not support; it names the engine that does."""
    call = bool(choice.prompt.beginnings)
    names = {"num_logprobs": "logprobs", "json_schema": "tool_choice" if call else "response_format"}
    if body.first_seed is not None and getattr(body, "seed", None) is None:
        names["seed"] = "random_seed"
    lacks = loaded.generator.lacks
    if len(choice.prompt.beginnings) > 1 and "logit_bias" in lacks:  # `choice` picks the function by it
        raise _unsupported("tool_choice", lacks["logit_bias"])
    for name, engine in lacks.items():
        if name in DEFAULTS and getattr(choice.generation, name) != DEFAULTS[name]:
            raise _unsupported(names.get(name, name), engine)


def _unsupported(param: str, engine: str) -> ApiError:
    rule = f"{param}: this deployment's engine does not support it; {engine} does"
    return ApiError(400, rule, param=param, code="unsupported_parameter")


def clamped(limits: Limits, body: ChatRequest | CompletionRequest) -> dict[str, str]:
    """The header that says how many tokens an answer may have where the request asked for more; none where it did not."""
    _, requested = body.token_limit
    limit = limits.max_new_tokens
    return {"x-forge-max-tokens": str(limit)} if requested is not None and requested > limit else {}


def _max_new_tokens(limits: Limits, loaded: Loaded, body: ChatRequest | CompletionRequest, prompt: Prompt) -> int:
    """The request's limit, or as many as the deployment and the context length allow. More than the deployment allows is cut
    to what it does; `ApiError` 400 for more than the context holds."""
    name, requested = body.token_limit
    context_length, num_prompt = loaded.engine.max_request_tokens, len(prompt.ids)
    limit, remaining = limits.max_new_tokens, context_length - num_prompt - prompt.num_beginning
    param = "messages" if isinstance(body, ChatRequest) else "prompt"
    if num_prompt < 1:
        raise ApiError(400, f"{param}: the prompt has no tokens", param=param)
    if limits.max_prompt_tokens and num_prompt > limits.max_prompt_tokens:
        rule = f"{param}: {num_prompt} tokens exceed this deployment's limit of {limits.max_prompt_tokens}"
        raise ApiError(400, rule, param=param, code="context_length_exceeded")
    if requested is not None and requested > context_length:
        rule = f"{name}: {requested} tokens are requested; the context length is {context_length}"
        raise ApiError(400, rule, param=name, code="context_length_exceeded")
    num_new = min(requested or 1, limit)
    if remaining < num_new:
        raise ApiError(
            400,
            f"the prompt has {num_prompt} tokens and {num_new} more are requested; the context length is {context_length}",
            param=param,
            code="context_length_exceeded",
        )
    return min(longest_answer(limits, body), remaining)


def longest_answer(limits: Limits, body: ChatRequest | CompletionRequest) -> int:
    """The tokens that each answer to the request may have where the context holds them."""
    default = COMPLETION_MAX_TOKENS if isinstance(body, CompletionRequest) else limits.max_new_tokens
    return min(body.token_limit[1] or default, limits.max_new_tokens)
