"""Every row shape that people have → the columns of one kind of record.

A converter only moves: which column is which turn. What a turn must be is `turns`' to check, for all shapes alike.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from forge_ray.config.data import Mapping, Shape
from forge_ray.data.read.strict_json import Reject
from forge_ray.data.record.columns import (
    Row,
    listed,
    lookup,
    number_of,
    quoted,
    role_of,
    scalar_text,
    string_of,
    system_turns,
    turns_of,
    type_name,
    untrained,
)
from forge_ray.data.record.older_calls import declared_tools
from forge_ray.data.record.turns import tools_list

Converted = tuple[str, Row]  # kind, and a row whose columns have the canonical names

# What makes a row one of a shape; the first of two that both fit is the one that holds more.
COLUMNS: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "openai_preference": ("preferred_output", "non_preferred_output"),
    "chat": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "feedback": ("label",),
    "classification": (),
}
MAIN = frozenset(column for columns in COLUMNS.values() for column in columns) - {"label"}
COLUMNS_SHOWN = 5
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"))
BOTH_IN_ONE = "a pair is one row with both answers; join the files or datasets on their prompt"
VERDICTS = {True: True, False: False, "true": True, "false": False}  # 1 and 0 equal True and False


def convert(row: Row, shape: Shape, mapping: Mapping | None) -> Converted:
    """Kind and columns of the row; a mapping says it all, else `shape`, else the row's own columns."""
    if mapping is not None:
        return _mapped(row, mapping)
    row = of_export(_with_lists(row))
    name = detect(row) if shape == "auto" else shape
    if name == "chat" and row.get("messages") is not None:
        return "chat", row | _tools(row) if row.get("functions") else row
    for column in COLUMNS[name]:
        if row.get(column) is None:
            raise Reject(f"no column `{column}`, which shape {name} needs")
    return CONVERTERS[name](row)


def detect(row: Row) -> str:
    """The shape that the columns tell. Two at once are refused: which of them to train on would be a guess."""
    filled = {column for column in MAIN.intersection(row) if row[column] is not None}
    names = [name for name, columns in COLUMNS.items() if columns and filled.issuperset(columns)]
    if "preference" in names:  # whose prompt may be a conversation
        names = [name for name in names if name not in ("chat", "sharegpt")]
    if len(names) != 1:
        if names:
            raise Reject(f"columns of two shapes: {names[0]} and {names[1]}")
        for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
            if row.get(one) is not None and row.get(other) is None:
                raise Reject(f"`{one}` without `{other}`: {BOTH_IN_ONE}")
        columns = ", ".join(repr(str(column)[:30]) for column in sorted(row, key=str)[:COLUMNS_SHOWN])
        raise Reject(f"no columns of a known shape: {columns or 'none'}{', …' if len(row) > COLUMNS_SHOWN else ''}")
    (name,) = names
    label = row.get("label")
    if name == "prompt_completion" and _verdict(label) is not None:
        return "feedback"
    if name == "chat" and row.get("answer") is not None and isinstance(label, bool):
        return "feedback"  # our own form
    if name == "text" and (isinstance(label, (str, int)) or isinstance(row.get("labels"), dict)):
        return "classification"
    if name == "chat" and isinstance(row.get("labels"), dict) and not _has_answer(row["messages"]):
        return "classification"
    return name


def _has_answer(messages: Any) -> bool:
    return isinstance(messages, list) and any(
        isinstance(turn, dict) and role_of(turn.get("role", turn.get("from"))) == "assistant" for turn in messages
    )


def _with_lists(row: Row) -> Row:
    columns = [name for name in ("messages", "conversations") if isinstance(row.get(name), (str, dict))]
    return row | {name: listed(row[name]) for name in columns} if columns else row


def of_export(row: Row) -> Row:
    """The conversation of an exported exchange, the answer behind its request: OpenAI's stored completions and batches, logs
    of vLLM. Other rows are themselves."""
    request, response = row.get("request"), row.get("response", row)
    if not isinstance(response, dict) or ("response" in row and not isinstance(request, dict) and "messages" not in row):
        return row
    asked = request if isinstance(request, dict) else row
    asked, response = (part["body"] if isinstance(part.get("body"), dict) else part for part in (asked, response))
    choices = response.get("choices")
    if not isinstance(choices, list) or not isinstance(asked.get("messages"), list):
        return row
    if len(choices) != 1 or not isinstance(choices[0], dict) or not isinstance(choices[0].get("message"), dict):
        raise Reject(f"`choices` is not one answer with a `message`: {len(choices)} of them")
    messages = [*untrained(turns_of(asked["messages"], "messages", "user")), choices[0]["message"]]
    return {**row, **_tools(asked), "functions": None, "messages": messages}


# ---------------------------------------------------------------- shapes


def _text(row: Row) -> Converted:
    return "text", {"text": string_of(row["text"], "text")}


def _sharegpt(row: Row) -> Converted:
    if not isinstance(row["conversations"], list):
        raise Reject(f"`conversations` is not a list: {type_name(row['conversations'])}")
    turns = turns_of(row["conversations"], "conversations", "user")
    return "chat", {"messages": [*system_turns(row.get("system")), *turns], "tools": _bare_tools(declared_tools(row))}


def _bare_tools(value: Any) -> Any:
    """ShareGPT declares functions, often as JSON text; OpenAI wraps each."""
    tools = tools_list(value) if value else None
    if not isinstance(tools, list):
        return tools
    return [{"type": "function", "function": t} if isinstance(t, dict) and "function" not in t else t for t in tools]


def _alpaca(row: Row) -> Converted:
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in history):
        raise Reject("`history` is not a list of pairs")
    turns = system_turns(row.get("system"))
    for asked, answered in history:
        turns += [
            *turns_of(string_of(asked, "history"), "history", "user"),
            *turns_of(string_of(answered, "history"), "", "assistant"),
        ]
    prompt, more = string_of(row["instruction"], "instruction"), row.get("input")
    if more not in (None, ""):
        prompt += "\n" + string_of(more, "input")
    return "chat", {"messages": [*turns, *_user(prompt), *_said(string_of(row["output"], "output"))]}


def _user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def _said(text: str) -> list[Any]:
    return [{"role": "assistant", "content": text}]


def _prompt_completion(row: Row) -> Converted:
    prompt = untrained(turns_of(row["prompt"], "prompt", "user"))
    return "chat", {**_tools(row), "messages": [*prompt, *turns_of(row["completion"], "completion", "assistant")]}


def _tools(row: Row) -> Row:
    return {"tools": declared_tools(row)}


def _classification(row: Row) -> Converted:
    column = "label" if row.get("label") is not None else "labels"
    if row.get(column) is None:
        raise Reject("no column `label`, which shape classification needs")
    if row.get("text") is not None:
        asked = _user(string_of(row["text"], "text"))
    elif isinstance(row.get("messages"), list):
        asked = untrained(turns_of(row["messages"], "messages", "user"))
    else:
        raise Reject("no column `text`, which shape classification needs")
    return "chat", {"messages": [*asked, *_said(_label(row[column], column))]}


def _label(value: Any, column: str) -> str:
    """A class as the text that the model learns to say; several named ones as a JSON object, as they are given."""
    if isinstance(value, dict) and len(value) == 1:
        return _label(next(iter(value.values())), column)
    if isinstance(value, dict) and value:
        return json.dumps({name: _label(item, column) for name, item in value.items()}, ensure_ascii=False)
    if isinstance(value, list) and value and not any(isinstance(item, (dict, list)) for item in value):
        return ", ".join(_label(item, column) for item in value)
    return scalar_text(value, column)


def _preference(row: Row) -> Converted:
    prompt = next((column for column in ("prompt", "messages", "conversations") if row.get(column) is not None), None)
    turns = turns_of(row[prompt], prompt, "user") if prompt else None
    chosen, rejected = (turns_of(row[column], column, "assistant") for column in ("chosen", "rejected"))
    if turns is None or _role(chosen) not in (None, "assistant"):
        shared, chosen, rejected = _split_prompt(chosen, rejected)
        if turns is not None and any(turn not in shared for turn in turns):
            raise Reject("`prompt` differs from the start of `chosen`")
        turns = shared
    return "preference", {**_tools(row), **_margin(row), "messages": turns, "chosen": chosen, "rejected": rejected}


def _margin(row: Row) -> Row:
    """By how much the preferred answer is better, where the row says it: `margin`, or the difference of two scores. One that
    is not a finite number stays as what it is: the losses that read margins refuse the pair, and the others do not."""
    if row.get("margin") is not None:
        margin = number_of(row["margin"])
        return {"unusable_margin": _number_or_type(row["margin"])} if margin is None else {"margin": margin}
    for better, worse in SCORES:
        if row.get(better) is not None and row.get(worse) is not None:
            high, low = number_of(row[better]), number_of(row[worse])
            margin = None if high is None or low is None else number_of(high - low)
            as_text = f"{_number_or_type(row[better])} less {_number_or_type(row[worse])}"
            return {"unusable_margin": as_text} if margin is None else {"margin": margin}
    return {}


def _number_or_type(value: Any) -> str:
    """A text may say anything, so it is not kept."""
    return quoted(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else type_name(value)


def _role(turns: list[Any]) -> Any:
    return turns[0].get("role") if turns and isinstance(turns[0], dict) else None


def _split_prompt(chosen: list[Any], rejected: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Two whole conversations → what they share and the two ends, each of at least one turn."""
    most = min(len(chosen), len(rejected)) - 1
    shared = next((n for n in range(most) if chosen[n] != rejected[n]), max(most, 0))
    if not shared or _role(chosen[shared:]) != "assistant" or _role(rejected[shared:]) != "assistant":
        raise Reject("`chosen` and `rejected` share no prompt")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _openai_preference(row: Row) -> Converted:
    asked = row.get("input")
    if not isinstance(asked, dict):
        raise Reject("`input` is not an object with `messages`")
    chosen, rejected = row["preferred_output"], row["non_preferred_output"]
    return "preference", {**_tools(asked), "messages": asked.get("messages"), "chosen": chosen, "rejected": rejected}


def _feedback(row: Row) -> Converted:
    label = _verdict(row["label"])
    if label is None:
        raise Reject(f"`label` is not true or false: {quoted(row['label'])}")
    answer = row["completion"] if row.get("completion") is not None else row.get("answer")
    asked = row["prompt"] if row.get("prompt") is not None else row.get("messages")
    if asked is None:
        raise Reject("no column `prompt`, which shape feedback needs")
    turns = turns_of(asked, "prompt", "user")
    if answer is None:  # a whole conversation: its end is the answer
        users = [number for number, turn in enumerate(turns) if isinstance(turn, dict) and turn.get("role") == "user"]
        cut = users[-1] + 1 if users else 0
        turns, answers = turns[:cut], turns[cut:]
    else:
        answers = turns_of(answer, "completion", "assistant")
    return "feedback", {**_tools(row), "messages": turns, "answer": answers, "label": label}


def _verdict(value: Any) -> bool | None:
    """Thumbs up or down; a CSV file has no booleans, only their names."""
    if isinstance(value, (bool, int, str)):
        return VERDICTS.get(value.strip().lower() if isinstance(value, str) else value)
    return None


CONVERTERS: dict[str, Callable[[Row], Converted]] = {
    "text": _text,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt_completion": _prompt_completion,
    "classification": _classification,
    "preference": _preference,
    "openai_preference": _openai_preference,
    "feedback": _feedback,
}


def _mapped(row: Row, mapping: Mapping) -> Converted:
    def column(path: str) -> Any:
        if (value := lookup(row, path)) is None:
            raise Reject(f"no column `{path}`, which the mapping names")
        return value

    if mapping.text:
        return "text", {"text": string_of(column(mapping.text), mapping.text)}
    system = system_turns(lookup(row, mapping.system)) if mapping.system else []
    if mapping.messages:
        messages = listed(column(mapping.messages))
        if not isinstance(messages, list):
            raise Reject(f"`{mapping.messages}` is not a non-empty list: {type_name(messages)}")
        return "chat", {**_tools(row), "messages": [*system, *turns_of(messages, mapping.messages, "user")]}
    asked = {"prompt": [*system, *turns_of(column(mapping.prompt), mapping.prompt, "user")]} if mapping.prompt else {}
    if mapping.chosen and mapping.rejected:
        chosen, rejected = column(mapping.chosen), column(mapping.rejected)
        margin = {"margin": column(mapping.margin)} if mapping.margin else {}
        return _preference({**_tools(row), **asked, **margin, "chosen": chosen, "rejected": rejected})
    answer = column(mapping.answer)
    answer = answer if isinstance(answer, (list, dict)) else scalar_text(answer, mapping.answer)  # a class may be a number
    return _prompt_completion({**_tools(row), **asked, "completion": answer})
