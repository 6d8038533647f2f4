"""From a request to what the engine is asked: prompts, and one generation per choice (no ray, no torch).

What needs the version's tokenizer or the engine's bounds is checked here; the rest is checked in `openai`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from forge_ray.config.release import Limits
from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.chat import ChatTokenizer
from forge_ray.inference.engine import GenerationRequest
from forge_ray.serve.conform import check_strict
from forge_ray.serve.fields import COMPLETION_MAX_TOKENS, ChatRequest, CompletionRequest, Message, Tool
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.tools import Beginning, beginnings

DEFAULTS = {field.name: field.default for field in fields(GenerationRequest)}


@dataclass(frozen=True)
class Prompt:
    """What one or more choices continue. `said`: what the answer begins with though nobody generates it (`echo`, `prefix`);
    `beginnings`: of a call that must be made, else none; `json_schema`: of the whole answer."""

    ids: tuple[int, ...]
    said: str = ""
    beginnings: tuple[Beginning, ...] = ()
    json_schema: str = ""

    @property
    def num_begun(self) -> int:
        return max((len(beginning.ids) for beginning in self.beginnings), default=0)


@dataclass(frozen=True)
class Choice:
    """One answer to be generated; `generation` continues `prompt.ids`, before any beginning of a call."""

    prompt: Prompt
    generation: GenerationRequest


def prompts_of(tokenizer: ChatTokenizer, wanted: ChatRequest | CompletionRequest) -> list[Prompt]:
    """The request's prompts as token ids: by the version's own chat template, of plain texts, or the ids that were sent."""
    if isinstance(wanted, ChatRequest):
        return [_chat_prompt(tokenizer, wanted)]
    prompts = wanted.prompts
    all_ids = [ids_of(tokenizer, prompt, "prompt") for prompt in prompts]
    if not wanted.echo:
        return [Prompt(ids) for ids in all_ids]
    said = [prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in prompts]
    return [Prompt(ids, text) for ids, text in zip(all_ids, said, strict=True)]


def _chat_prompt(tokenizer: ChatTokenizer, wanted: ChatRequest) -> Prompt:
    messages = list(wanted.messages)
    said = messages.pop() if messages[-1].prefix else None
    ids = chat_ids(tokenizer, messages, wanted.offered)
    if said is not None:
        try:
            ids += tokenizer.piece_ids(said.text)
        except Reject as error:
            raise ApiError(400, str(error), param="messages") from None
    for tool in wanted.offered:
        if tool.function.strict:
            check_strict(tool.function)
    begun: tuple[Beginning, ...] = ()
    if wanted.forced:
        begun = beginnings(tokenizer, wanted.forced, several=wanted.parallel_tool_calls is not False)
    schema = wanted.response_format.text if wanted.response_format is not None else ""
    return Prompt(tuple(ids), said.text if said else "", begun, schema)


def chat_ids(tokenizer: ChatTokenizer, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
    """Ids up to where the assistant answers; `ApiError` 400 where the version's template refuses."""
    if not tokenizer.has_chat:
        raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
    if tools and not tokenizer.call_style:
        raise ApiError(400, "tools: this model's chat template has no tool calls that are known here", param="tools")
    if not messages:
        raise ApiError(400, "messages: there is none before the prefix", param="messages")
    try:
        said = [message.for_template() for message in messages]
        return tokenizer.prompt_ids(said, [tool.for_template() for tool in tools] or None)
    except Reject as error:
        raise ApiError(400, str(error), param="messages") from None


def ids_of(tokenizer: ChatTokenizer, text: str | Sequence[int], param: str) -> tuple[int, ...]:
    """Ids of a plain text, or the ids themselves if the vocabulary has them."""
    if isinstance(text, str):
        return tuple(tokenizer.text_ids([text])[0])
    outside = [token_id for token_id in text if not 0 <= token_id < tokenizer.vocab_size]
    if outside:
        raise ApiError(400, f"{param}: token id {outside[0]} is not in 0..{tokenizer.vocab_size - 1}", param=param)
    return tuple(text)


def choices_of(
    limits: Limits, loaded: Loaded, wanted: ChatRequest | CompletionRequest, prompts: Sequence[Prompt]
) -> list[Choice]:
    """`n` per prompt, in order; the k-th of a prompt has seed + k. `ApiError` 400 for what the engine cannot do."""
    bias = tuple(sorted((int(token), value) for token, value in (wanted.logit_bias or {}).items()))
    if bias and bias[-1][0] >= loaded.tokenizer.vocab_size:
        last = loaded.tokenizer.vocab_size - 1
        raise ApiError(400, f"logit_bias: token id {bias[-1][0]} is not in 0..{last}", param="logit_bias")
    seed = wanted.first_seed
    choices = [
        Choice(
            prompt,
            GenerationRequest(
                prompt_ids=prompt.ids,
                max_new_tokens=_max_new_tokens(limits, loaded, wanted, prompt),
                temperature=1.0 if wanted.temperature is None else wanted.temperature,
                top_p=1.0 if wanted.top_p is None else wanted.top_p,
                top_k=max(wanted.top_k or 0, 0),
                seed=None if seed is None else _signed_64(seed + number),
                stop_token_ids=loaded.stop_token_ids,
                presence_penalty=wanted.presence_penalty or 0.0,
                frequency_penalty=wanted.frequency_penalty or 0.0,
                logit_bias=bias,
                num_logprobs=wanted.num_logprobs,
                json_schema=prompt.beginnings[0].json_schema if prompt.beginnings else prompt.json_schema,
                adapter=loaded.adapter,
            ),
        )
        for prompt in prompts
        for number in range(wanted.num_choices)
    ]
    _refuse_what_is_lacking(loaded, wanted, choices[0])
    return choices


def _signed_64(seed: int) -> int:
    """The largest seed is followed by the smallest."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _refuse_what_is_lacking(loaded: Loaded, wanted: ChatRequest | CompletionRequest, choice: Choice) -> None:
    """A 400 that names the field and the engine that has it."""
    call = bool(choice.prompt.beginnings)
    names = {"num_logprobs": "logprobs", "json_schema": "tool_choice" if call else "response_format"}
    if wanted.first_seed is not None and getattr(wanted, "seed", None) is None:
        names["seed"] = "random_seed"
    lacks = loaded.engine.lacks
    if len(choice.prompt.beginnings) > 1 and "logit_bias" in lacks:  # the name is chosen by it, see `complete`
        raise _lacking("tool_choice", lacks["logit_bias"])
    for name, engine in lacks.items():
        if name in DEFAULTS and getattr(choice.generation, name) != DEFAULTS[name]:
            raise _lacking(names.get(name, name), engine)


def _lacking(param: str, engine: str) -> ApiError:
    rule = f"{param}: the engine of this deployment does not have it; {engine} does"
    return ApiError(400, rule, param=param, code="unsupported_parameter")


def _max_new_tokens(limits: Limits, loaded: Loaded, wanted: ChatRequest | CompletionRequest, prompt: Prompt) -> int:
    """The request's limit, or all that the deployment and the context leave."""
    name, asked = wanted.token_limit
    context, num_prompt = loaded.engine.max_request_tokens, len(prompt.ids)
    most, room = limits.max_new_tokens, context - num_prompt - prompt.num_begun
    param = "messages" if isinstance(wanted, ChatRequest) else "prompt"
    if num_prompt < 1:
        raise ApiError(400, f"{param}: the prompt has no tokens", param=param)
    if limits.max_prompt_tokens and num_prompt > limits.max_prompt_tokens:
        rule = f"{param}: {num_prompt} tokens exceed this deployment's limit of {limits.max_prompt_tokens}"
        raise ApiError(400, rule, param=param, code="context_length_exceeded")
    if asked is not None and asked > most:
        raise ApiError(400, f"{name}: {asked} exceeds this deployment's limit of {most}", param=name)
    if room < (asked or 1):
        raise ApiError(
            400,
            f"the prompt has {num_prompt} tokens and {asked or 1} more are asked for; the context holds {context}",
            param=param,
            code="context_length_exceeded",
        )
    usual = COMPLETION_MAX_TOKENS if isinstance(wanted, CompletionRequest) else most
    return asked or min(usual, most, room)
