"""The fields of each request: OpenAI's, with Mistral's aliases (no ray, no torch)."""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from forge_ray.serve.replayed import as_ours
from forge_ray.serve.tool_fields import AllowedChoice, AllowedTools, Function, NamedChoice, Tool, ToolChoice
from forge_ray.serve.wire import NAME, Wire

COMPLETION_MAX_TOKENS = 16  # OpenAI's default for /v1/completions
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TextPart(Wire):
    type: Literal["text"]
    text: str


class CalledFunction(Wire):
    """`arguments`: JSON text."""

    name: str
    arguments: str


class ReplayedCall(Wire):
    """A call of an earlier answer; one without an id is followed by its result."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # a part of a stream that was sent back

    def for_template(self) -> dict[str, Any]:
        named = {} if self.id is None else {"id": self.id}
        return named | {"type": "function", "function": self.function.model_dump()}


class Message(Wire):
    """One turn. `tool_call_id` belongs to a tool's answer, `tool_calls`, `reasoning_content` and `prefix` to the
    assistant."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = Field(None, max_length=64)
    tool_call_id: str | None = None
    tool_calls: list[ReplayedCall] | None = None
    reasoning_content: str | None = None
    prefix: bool = False

    @model_validator(mode="before")
    @classmethod
    def _from_any_client(cls, message: Any) -> Any:
        return as_ours(message)

    @model_validator(mode="after")
    def _of_its_role(self) -> Self:
        for field, role in (
            ("tool_call_id", "tool"),
            ("tool_calls", "assistant"),
            ("reasoning_content", "assistant"),
            ("prefix", "assistant"),
        ):
            if getattr(self, field) and self.role != role:
                raise ValueError(f"{field}: only allowed in messages of role {role}, not {self.role}")
        if self.content is None and not (self.tool_calls or self.reasoning_content or self.role == "tool"):
            raise ValueError("content: missing")
        return self

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or [])

    def for_template(self) -> dict[str, Any]:
        turn: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role}
        if self.content is not None or not self.tool_calls:
            turn["content"] = self.text
        if self.tool_calls:
            turn["tool_calls"] = [call.for_template() for call in self.tool_calls]
        others = ("reasoning_content", "tool_call_id", "name")
        return turn | {key: value for key in others if (value := getattr(self, key)) is not None}


class JsonSchema(Wire):
    name: str = Field(pattern=NAME)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: required with the type json_schema, and only allowed with it")
        return self

    @property
    def text(self) -> str:
        """The schema of the whole answer as JSON text; "" for free text."""
        if self.type == "text":
            return ""
        schema = self.json_schema.schema_ if self.json_schema else None
        return json.dumps({"type": "object"} if schema is None else schema, ensure_ascii=False)


class StreamOptions(Wire):
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class PromptCache(Wire):
    """Where and how long a cache keeps the prompt: no answer depends on it, unless none is to be generated."""

    mode: Literal["implicit", "explicit"] | None = None
    ttl: str | None = None
    prewarm: Literal[False] | None = None


class GeneratingRequest(Wire):
    """The fields of every request that generates. The last five have no meaning here: no answer depends on them."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512)
    metadata: dict[str, str] | None = Field(None, max_length=16)
    prompt_cache_key: str | None = None
    prompt_cache_options: PromptCache | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None


class CompletionOptions(GeneratingRequest):
    """The fields of chats and completions. `random_seed` is Mistral's name for `seed`; `top_k` 0 or -1 keeps every token."""

    max_tokens: int | None = Field(None, ge=1)
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    random_seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, float] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if "" in self.stops:
            raise ValueError("stop: an empty string would end every answer")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only allowed when stream is true")
        if None not in (self.seed, self.random_seed) and self.seed != self.random_seed:
            raise ValueError(f"random_seed: {self.random_seed} contradicts seed {self.seed}; send one")
        for token, bias in (self.logit_bias or {}).items():
            if not (token.isascii() and token.isdigit()) or not -100 <= bias <= 100:
                raise ValueError(f"logit_bias: {token[:20]!r}: {bias} is not a token id with a bias in -100..100")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def first_seed(self) -> int | None:
        return self.random_seed if self.seed is None else self.seed

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(CompletionOptions):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required", "any"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = Field(None, max_length=16)

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError(
                f"max_completion_tokens: {self.max_completion_tokens} contradicts max_tokens {self.max_tokens}; send one"
            )
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only allowed when logprobs is true")
        if any(message.prefix for message in self.messages[:-1]):
            raise ValueError("messages: only the last one may be a prefix")
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) != len(names):
            raise ValueError("tools: two of them have the same name")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice: a call requires `tools`")
        if unknown := sorted(self._chosen - set(names)):
            raise ValueError(f"tool_choice: {unknown[0]!r} is not one of `tools`")
        if self.offered and self.response_format and self.response_format.type != "text":
            raise ValueError("response_format: not supported with tools that may be called; set tool_choice to none")
        if self.offered and self.messages[-1].prefix:
            raise ValueError("messages: a prefix is not supported with tools that may be called")
        return self

    @property
    def token_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def _chosen(self) -> set[str]:
        """Functions that `tool_choice` names."""
        match self.tool_choice:
            case NamedChoice():
                return {self.tool_choice.function.name}
            case AllowedChoice():
                return {tool.function.name for tool in self.tool_choice.allowed_tools.tools}
            case _:
                return set()

    @property
    def offered(self) -> list[Tool]:
        """Tools that the model sees and may call."""
        if isinstance(self.tool_choice, AllowedChoice):
            return [tool for tool in self.tools or [] if tool.function.name in self._chosen]
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced(self) -> list[Function]:
        """Functions of which one must be called; empty where the model may answer with text."""
        match self.tool_choice:
            case "required" | "any" | AllowedChoice(allowed_tools=AllowedTools(mode="required")):
                return [tool.function for tool in self.offered]
            case NamedChoice():
                return [tool.function for tool in self.offered if tool.function.name in self._chosen]
            case _:
                return []


class CompletionRequest(CompletionOptions):
    """`prompt`: a text or a list of token ids, or a list of either."""

    prompt: str | list[str] | list[int] | list[list[int]]
    logprobs: int | None = Field(None, ge=0)
    echo: bool | None = None

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        if not self.prompts or any(not prompt for prompt in self.prompts):
            raise ValueError("prompt: empty; send a text or token ids")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo: log-probabilities of the prompt are not supported; leave out echo or logprobs")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        return as_list(self.prompt)

    @property
    def token_limit(self) -> tuple[str, int | None]:
        return "max_tokens", self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class EmbeddingRequest(Wire):
    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    user: str | None = Field(None, max_length=512)
    metadata: dict[str, str] | None = Field(None, max_length=16)

    @model_validator(mode="after")
    def _has_inputs(self) -> Self:
        if not self.inputs or any(not one for one in self.inputs):
            raise ValueError("input: empty; send a text or token ids")
        return self

    @property
    def inputs(self) -> list[str] | list[list[int]]:
        return as_list(self.input)


class TokenizeRequest(Wire):
    """vLLM's: either a `prompt` or `messages`."""

    model: str
    prompt: str | None = None
    messages: list[Message] | None = Field(None, min_length=1)
    tools: list[Tool] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: Literal[True] = True
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: send either prompt or messages")
        if self.messages is None and self.tools:
            raise ValueError("tools: only allowed together with messages")
        return self


class DetokenizeRequest(Wire):
    model: str
    tokens: list[int]


def as_list(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """A text, a list of ids, or a list of either → the list."""
    if isinstance(prompt, str):
        return [prompt]
    return [prompt] if prompt and isinstance(prompt[0], int) else prompt  # type: ignore[return-value]
