"""The fields of `/v1/responses`, and the chat that they stand for (no ray, no torch).

The items of an input are turns and parts of turns: reasoning, a text and calls that follow each other are one answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from forge_ray.serve.fields import Effort, GeneratingRequest
from forge_ray.serve.replayed import UNREADABLE, is_empty
from forge_ray.serve.tool_fields import BY_TYPE
from forge_ray.serve.wire import NAME, Sparse, Wire

KINDS = "message, function_call, function_call_output or reasoning"
STATELESS = "answers are not stored here; send the whole conversation with each request"


class Item(Sparse):
    """One item of an input. An id or a status of an earlier answer has no meaning."""

    KEPT = ("content", "output", "text", "summary")

    id: str | None = None
    status: str | None = None


class TextItem(Item):
    """A part of a content. The log-probabilities of an earlier answer are not part of it; a refusal is its text."""

    @model_validator(mode="before")
    @classmethod
    def _of_an_answer(cls, part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if part.get("type") == "refusal":
            return {"type": "output_text", "text": part.get("refusal")}
        return {key: value for key, value in part.items() if key != "logprobs"}

    type: Literal["input_text", "output_text", "summary_text", "reasoning_text", "text"]
    text: str


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextItem]
    phase: str | None = None


class Direct(Wire):
    """A call by the model itself, and not by a program that it wrote."""

    type: Literal["direct"]


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str | None = None
    caller: Direct | None = None
    name: str
    arguments: str = "{}"


class OutputItem(Item):
    type: Literal["function_call_output"]
    call_id: str | None = None
    caller: Direct | None = None
    name: str | None = None
    output: str | list[TextItem]


class ReasoningItem(Item):
    """`content` is the reasoning itself; where there is none, the summary of it is."""

    type: Literal["reasoning"]
    summary: list[TextItem] = []
    content: list[TextItem] | None = None
    encrypted_content: str | None = None

    @field_validator("encrypted_content")
    @classmethod
    def _readable(cls, text: str | None) -> str | None:
        if text:
            raise ValueError(UNREADABLE)
        return text


class ReferenceItem(Wire):
    """An item of an earlier answer by its id, which nothing here knows."""

    @model_validator(mode="before")
    @classmethod
    def _refused(cls, item: Any) -> Any:
        raise ValueError(f"an item_reference: {STATELESS}, as most clients do with `store: false`")


def _kind(item: Any) -> str | None:
    if not isinstance(item, dict):
        return None
    kind = item.get("type") or ("message" if "role" in item else "")
    return f"{kind} item"


InputItem = MessageItem | CallItem | OutputItem | ReasoningItem | ReferenceItem
Included = Literal[
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "reasoning.encrypted_content",
]
AnyItem = Annotated[
    Annotated[MessageItem, Tag("message item")]
    | Annotated[CallItem, Tag("function_call item")]
    | Annotated[OutputItem, Tag("function_call_output item")]
    | Annotated[ReasoningItem, Tag("reasoning item")]
    | Annotated[ReferenceItem, Tag("item_reference item")],
    Discriminator(_kind, "item_kind", f"An item is an object of type {KINDS}"),
]


class FunctionTool(Item):
    type: Literal["function"]
    name: str = Field(pattern=NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    allowed_callers: list[Literal["direct"]] | None = None


class ForcedFunction(Wire):
    type: Literal["function"]
    name: str


class AllowedFunctions(Wire):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[ForcedFunction] = Field(min_length=1)


FunctionChoice = Annotated[
    Annotated[ForcedFunction, Tag("function choice")] | Annotated[AllowedFunctions, Tag("allowed_tools choice")], BY_TYPE
]


class TextFormat(Wire):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, pattern=NAME)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextSettings(Wire):
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ReasoningSettings(Wire):
    """A summary is what is asked for where the reasoning itself is secret; here it comes as it is."""

    effort: Effort | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class ResponsesRequest(GeneratingRequest):
    """`include` may name what only tools of a server would add to an answer; reasoning comes in the clear."""

    input: str | list[AnyItem] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    include: list[Included] | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None

    def chat(self) -> dict[str, Any]:
        """The body of the same request to `/v1/chat/completions`."""
        body = {
            "model": self.model,
            "messages": self._messages(),
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [_function(tool) for tool in self.tools or []] or None,
            "tool_choice": _choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": _format(self.text.format if self.text else None),
            "reasoning_effort": self.reasoning.effort if self.reasoning else None,
            "user": self.user,
        }
        return {name: value for name, value in body.items() if value is not None}

    def _messages(self) -> list[dict[str, Any]]:
        first = [{"role": "system", "content": self.instructions}] if self.instructions else []
        if isinstance(self.input, str):
            return [*first, {"role": "user", "content": self.input}]
        return first + turns_of(self.input)


def turns_of(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """Turns of a chat, in order. An answer begins with its reasoning, or with its text where it has none."""
    turns: list[dict[str, Any]] = []
    for item in items:
        open_turn = turns[-1] if turns and turns[-1]["role"] == "assistant" else None
        if isinstance(item, OutputItem):
            named = {"tool_call_id": item.call_id, "name": item.name}
            turns.append({"role": "tool", "content": _text(item.output), **named})
        elif isinstance(item, MessageItem) and item.role != "assistant":
            turns.append({"role": item.role, "content": _text(item.content)})
        else:
            key, value = _of_answer(item)
            if open_turn is None or not _continues(open_turn, key):
                open_turn = {"role": "assistant", "content": None}
                turns.append(open_turn)
            if key == "tool_calls":
                open_turn.setdefault(key, []).append(value)
            elif key == "reasoning_content":
                open_turn[key] = open_turn.get(key, "") + value
            else:
                open_turn[key] = value
    return [turn for turn in turns if turn["role"] != "assistant" or not is_empty({**turn, "role": ""})]


def _of_answer(item: InputItem) -> tuple[str, Any]:
    """(field of the assistant's turn, what it holds)."""
    if isinstance(item, CallItem):
        return "tool_calls", {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
    if isinstance(item, ReasoningItem):
        return "reasoning_content", _text(item.content or item.summary)
    return "content", _text(item.content if isinstance(item, MessageItem) else "")


def _continues(turn: dict[str, Any], key: str) -> bool:
    """Whether the item belongs to the answer so far: reasoning, then one text, then calls."""
    order = ("reasoning_content", "content", "tool_calls")
    later = order[order.index(key) + (key != "content") :]
    return key == "tool_calls" or all(turn.get(name) is None for name in later)


def _text(content: str | Sequence[TextItem]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _function(tool: FunctionTool) -> dict[str, Any]:
    function = tool.model_dump(include={"name", "description", "parameters", "strict"}, exclude_none=True)
    return {"type": "function", "function": function}


def _choice(choice: str | ForcedFunction | AllowedFunctions | None) -> Any:
    match choice:
        case ForcedFunction():
            return {"type": "function", "function": {"name": choice.name}}
        case AllowedFunctions():
            return {"type": choice.type, choice.type: {"mode": choice.mode, "tools": [_choice(one) for one in choice.tools]}}
        case _:
            return choice


def _format(form: TextFormat | None) -> dict[str, Any] | None:
    if form is None or form.type != "json_schema":
        return None if form is None else {"type": form.type}
    schema = {"name": form.name, "description": form.description, "schema": form.schema_, "strict": form.strict}
    return {"type": form.type, "json_schema": {key: value for key, value in schema.items() if value is not None}}
