"""Every row shape becomes one canonical record, or is refused with a reason that says what was wrong with it."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.config.data import Mapping, Shape
from forge_ray.data.record.columns import SPEAKERS
from forge_ray.data.record.schema import DataRecord, Reject, parse_line, parse_record, require_mistral_ids, texts, with_texts
from forge_ray.data.record.shapes import BOTH_IN_ONE, COLUMNS, CONVERTERS, detect
from forge_ray.data.record.tables import ARROW, from_arrow, to_arrow

pytestmark = [pytest.mark.unit, pytest.mark.slow]
FIXTURES = Path(__file__).parents[3] / "fixtures" / "shapes"
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=")
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()
MAPPING = Mapping(prompt="customer.question", answer="reply")
Row = dict[str, Any]


def user(content: Any = "2+2?", **more: Any) -> Row:
    return {"role": "user", "content": content, **more}


def said(content: Any = "4", **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


def call(name: str = "add", arguments: Any = '{"a": 2}', **more: Any) -> Row:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


def calls(*values: Any) -> Row:
    return {"role": "assistant", "tool_calls": list(values)}


def result(content: str = "4", **more: Any) -> Row:
    return {"role": "tool", "content": content, **more}


def older(name: str, arguments: Any = '{"a": 2}') -> Row:
    return {"role": "assistant", "content": None, "function_call": {"name": name, "arguments": arguments}}


def answered(name: str | None, content: str = "4") -> Row:
    return {"role": "function", "content": content} | ({"name": name} if name else {})


def chat(*messages: Any, **more: Any) -> Row:
    return {"messages": list(messages), **more}


def picture(source: Any, **more: Any) -> Row:
    return {"type": "image_url", "image_url": source, **more}


ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
SUB = {"type": "function", "function": {"name": "sub", "description": "Minus."}}


def fixture(name: str) -> list[bytes]:
    return (FIXTURES / f"{name}.jsonl").read_bytes().splitlines()


def records(name: str) -> list[DataRecord]:
    mapping = MAPPING if name == "unknown" else None
    return [parse_line(line, mapping=mapping, read_image=lambda path: PNG) for line in fixture(name)]


NAMES = sorted(path.stem for path in FIXTURES.glob("*.jsonl"))


# ---------------------------------------------------------------- detection


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("mistral", ["chat", "chat", "text"]),
        ("openai", ["chat"] * 2),
        ("images", ["chat"] * 2),
        ("sharegpt", ["sharegpt"] * 3),
        ("alpaca", ["alpaca"] * 3),
        ("prompt_completion", ["prompt_completion"] * 2),
        ("classification", ["classification"] * 4),
        ("preference", ["preference"] * 4),
        ("openai_preference", ["openai_preference"]),
        ("feedback", ["feedback"] * 2),
    ],
)
def test_shape_is_detected_from_the_columns(name: str, shapes: list[Shape]) -> None:
    assert [detect(json.loads(line)) for line in fixture(name)] == shapes
    for line, shape in zip(fixture(name), shapes, strict=True):
        forced = parse_line(line, shape, read_image=lambda path: PNG)
        assert forced == parse_line(line, read_image=lambda path: PNG)


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"text": "a", "score": 3, "source": "crm"}, "text"),
        ({"text": "a", "label": None}, "text"),
        ({"text": "a", "label": 0.5}, "text"),
        ({"text": "a", "labels": ["b"]}, "text"),
        ({"text": "a", "label": 0}, "classification"),
        ({"text": "a", "label": False}, "classification"),
        ({"prompt": "a", "completion": "b", "label": "greeting"}, "prompt_completion"),
        ({"prompt": "a", "completion": "b", "label": 0}, "feedback"),
        ({"prompt": "a", "completion": "b", "label": "True"}, "feedback"),
        (chat(user(), said(), label=True), "chat"),
        (chat(user(), said(), labels={"team": "x"}), "chat"),
        (chat(user(), said(), prompt="metadata"), "chat"),
        (chat(user(), chosen=[said()], rejected=[said("5")]), "preference"),
        (chat(user(), answer=[said()], label=True), "feedback"),
        ({"text": None, "messages": [user(), said()]}, "chat"),
    ],
)
def test_metadata_does_not_change_the_shape(row: Row, shape: str) -> None:
    assert detect(row) == shape


def test_every_configurable_shape_is_supported() -> None:
    shapes = set(Shape.__args__) - {"auto"}
    assert shapes == set(COLUMNS)
    assert shapes == {"chat", *CONVERTERS}


@pytest.mark.parametrize("shape", sorted(COLUMNS))
def test_row_of_another_shape_is_rejected(shape: Shape) -> None:
    with pytest.raises(Reject, match=rf"^no column `\w+`, which shape {shape} needs$"):
        parse_record({"question": "2+2?"}, shape)


# ---------------------------------------------------------------- good rows


@pytest.mark.parametrize("name", NAMES)
def test_parsing_canonical_content_is_idempotent(name: str) -> None:
    for record in records(name):
        again = parse_record(json.loads(record.json), read_image=lambda path: PNG)
        assert (again.id, again.content, again.kind) == (record.id, record.content, record.kind)


def contents(name: str) -> list[Row]:
    return [record.content for record in records(name)]


def test_mistral_and_openai_rows_are_unchanged() -> None:
    assert contents("mistral")[0] == json.loads(fixture("mistral")[0])
    weights = [message.get("weight", 1) for message in records("mistral")[1].messages]
    assert weights == [1, 1, 0, 1, 1]
    first, second = contents("openai")
    assert first["messages"][0]["role"] == "system"
    assert set(first) == {"messages", "tools"}
    assert second["messages"][0] == user("Summarise: the supplier delivers two weeks late.")


def test_sharegpt() -> None:
    first, second, third = contents("sharegpt")
    assert [message["role"] for message in first["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert second["messages"][1] == calls(call("leave_left", '{"employee": 18}'))
    assert second["messages"][2] == result("11")
    assert second["tools"][0]["type"] == "function"
    assert second["tools"][0]["function"]["name"] == "leave_left"
    assert third == chat(user("Is the canteen open on Friday?"), said("Until two o'clock."))
    for speaker, role in SPEAKERS.items():
        turns = [{"from": "human", "value": "a"}, {"from": speaker, "value": "b"}, {"from": "gpt", "value": "c"}]
        if role != "tool":
            assert parse_record({"conversations": turns}).messages[1]["role"] == role


def test_alpaca() -> None:
    first, second, third = contents("alpaca")
    asked = "Classify the urgency of this ticket.\nThe whole plant is standing still."
    assert first == chat(user(asked), said("critical"))
    assert second["messages"][0] == user("Name the three parts of an invoice number.")
    assert [message["role"] for message in third["messages"]] == ["system", "user", "assistant", "user", "assistant"]
    assert third["messages"][1]["content"] == "Is there an account for clubs?"


def test_prompt_and_completion() -> None:
    first, second = contents("prompt_completion")
    assert [message["role"] for message in first["messages"]] == ["user", "assistant"]
    assert [message.get("weight", 1) for message in second["messages"]] == [1, 0, 1, 1]  # what was asked is not learned


def test_classification() -> None:
    answers = [record.messages[-1]["content"] for record in records("classification")]
    assert answers == ["complaint", "3", "privacy", '{"team": "billing", "urgent": "true"}']
    assert parse_record({"text": "a", "label": False}).messages[1] == said("false")
    assert parse_record({"text": "a", "labels": ["late", "angry"]}, "classification").messages[1] == said("late, angry")


def test_preference() -> None:
    for content in contents("preference") + contents("openai_preference"):
        assert set(content) == {"messages", "chosen", "rejected"}
        assert content["messages"][-1]["role"] == "user"
        assert [turn["role"] for turn in content["chosen"] + content["rejected"]] == ["assistant"] * 2
    whole = {"chosen": [user(), said()], "rejected": [user(), said("5")]}
    assert parse_record(whole | {"prompt": "2+2?"}) == parse_record(whole)
    flat = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    assert parse_record(flat) == parse_record(whole)
    weighted = {"prompt": [user(), said(weight=0), user()], "chosen": [said(weight=1)], "rejected": [said("5", weight=0)]}
    assert "weight" not in parse_record(weighted).json


def test_feedback() -> None:
    first, second = contents("feedback")
    assert first["label"] is True
    assert second == {"messages": [user("Reset my password")], "answer": [said("I cannot do that.")], "label": False}
    whole = parse_record(chat(user(), said(), user("3+3?"), said("6"), label=1), "feedback")
    assert whole.content["answer"] == [said("6")]
    assert whole.content["label"] is True


def test_mapping() -> None:
    first, second = records("unknown")
    assert first.content == chat(user("Does the warranty cover batteries?"), said("For twelve months."))
    assert second.kind == "chat"
    row = {"s": "Be brief.", "q": "2+2?", "a": 4, "b": "5", "t": {"body": "plain"}, "log": [{"from": "human", "value": "x"}]}
    record = parse_record(row, mapping=Mapping(system="s", prompt="q", answer="a"))
    assert record.content == chat({"role": "system", "content": "Be brief."}, user(), said())
    assert parse_record(row, mapping=Mapping(text="t.body")).content == {"text": "plain"}
    pair = parse_record(row | {"a": "4"}, mapping=Mapping(prompt="q", chosen="a", rejected="b"))
    assert pair.content == {"messages": [user()], "chosen": [said()], "rejected": [said("5")]}
    log = row | {"log": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]}
    assert parse_record(log, mapping=Mapping(messages="log")).content == chat(user(), said())
    assert parse_record({"a.b": "dotted", "a": {"b": "inner"}}, mapping=Mapping(text="a.b")).content == {"text": "dotted"}


def test_kept_columns_become_text_metadata() -> None:
    row = chat(user(), said(), licence="CC-BY", agent={"id": 17, "name": None}, consent=True, parts=[1])
    keep = ("licence", "agent.id", "agent.name", "consent", "parts", "absent.too")
    record = parse_record(row, keep=keep)
    assert record.meta == {"licence": "CC-BY", "agent.id": "17", "consent": "true"}
    assert record.id == parse_record(chat(user(), said())).id
    for bad, reason in ((r"\ud800", "lone surrogate"), (r"\u0000", "a NUL character")):
        with pytest.raises(Reject, match=reason):
            parse_line(f'{{"text": "a", "who": "{bad}"}}'.encode(), keep=("who",))


# ---------------------------------------------------------------- images


def test_images_are_identified_by_their_digest() -> None:
    asked: list[str] = []

    def read(path: str) -> bytes:
        asked.append(path)
        return PNG

    first, second = (parse_line(line, read_image=read) for line in fixture("images"))
    (digest,) = first.images
    assert asked == ["scans/note-0012.png"]
    assert first.images == second.images == {digest: PNG}
    assert first.messages[0]["content"][1] == {"type": "image", "image": digest}
    assert texts(first) == ["What does the stamp on this delivery note say?", "Received 12 May."]
    shouted = with_texts(first, str.upper)
    assert shouted.images == first.images
    assert shouted.messages[0]["content"][0]["text"].startswith("WHAT DOES")
    assert shouted.messages[0]["content"][1]["image"] == digest


def no_file(path: str) -> bytes:
    raise FileNotFoundError(path)


@pytest.mark.parametrize(
    ("source", "read", "reason"),
    [
        ("https://example.com/a.png", None, "an image is a remote URL"),
        ({"url": "http://example.com/a.png"}, None, "an image is a remote URL"),
        ("s3://bucket/a.png", None, "an image is a remote URL"),
        ("data:image/png;base64,@@@", None, "an image's data URI is not base64"),
        ("data:image/png,abc", None, "an image's data URI is not base64"),
        ("data:image/png;base64,é", None, "an image's data URI is not base64"),
        ("data:image/png;base64,QUJD", None, "an image is not PNG, JPEG, GIF or WebP"),
        ("a.png", None, "an image cannot be read"),
        ("a.png", no_file, "an image cannot be read"),
        ("a.png", lambda path: b"<svg/>", "an image is not PNG, JPEG, GIF or WebP"),
        ("sha256:" + "0" * 64, lambda path: PNG, "an image differs from its digest"),
        *[
            (path, lambda path: PNG, "an image's path leads out of the folder of its rows")
            for path in ("/etc/a.png", "../a.png", "b/../../a.png", "C:\\a.png", "..\\a.png")
        ],
        (7, None, "a content part has no image"),
        ({"href": "a"}, None, "a content part has no image"),
    ],
    ids=range(18),
)
def test_invalid_images_are_rejected(source: Any, read: Callable[[str], bytes] | None, reason: str) -> None:
    with pytest.raises(Reject) as error:
        parse_record(chat(user([picture(source)]), said()), read_image=read)
    assert str(error.value) == reason


@pytest.mark.parametrize("head", [b"\xff\xd8\xff", b"GIF89a", b"GIF87a", b"RIFF\x00\x00\x00\x00WEBP", PNG[:8]])
def test_image_formats_are_detected_by_magic_bytes(head: bytes) -> None:
    record = parse_record(chat(user([picture("a")]), said()), read_image=lambda path: head + b"...")
    assert list(record.images.values()) == [head + b"..."]


def test_the_older_form_of_calls_is_the_same_record() -> None:
    newer = chat(user(), calls(call()), result(), calls(call("sub")), result("3"), said(), tools=[ADD, SUB])
    turns = [user(), older("add"), answered("add"), older("sub"), answered("sub", "3"), said()]
    functions = [ADD["function"], SUB["function"]]
    expected = parse_record(newer)
    for row in (
        chat(*turns, functions=functions),
        chat(*turns, functions=json.dumps(functions)),
        chat(*turns, functions=functions, tools=newer["tools"], function_call="auto"),
        chat(*turns[:2], turns[2] | {"name": None}, *turns[3:], functions=functions, tools=[]),
        chat(*turns[:1], older("add", {"a": 2}), turns[2] | {"role": "Function"}, *turns[3:], tools=newer["tools"]),
        {"prompt": turns[:3], "completion": turns[3:], "functions": functions},
        {"request": chat(*turns[:-1], functions=functions), "response": {"choices": [{"message": turns[-1]}]}},
    ):
        record = parse_record(row)
        trained = [{key: item for key, item in turn.items() if key != "weight"} for turn in record.messages]
        assert (trained, record.content["tools"]) == (expected.messages, expected.content["tools"])
    assert parse_record(chat(*turns, functions=functions)).id == expected.id
    assert parse_record(chat(*turns)) == parse_record({**newer, "tools": None})
    pair = {"prompt": turns[:1], "chosen": turns[1:], "rejected": [said("5")]}
    assert parse_record(pair).content["chosen"] == expected.messages[1:]


def test_other_columns_of_the_name_functions_are_metadata() -> None:
    for functions in ("def f(): ...", [{"name": "f", "code": "…"}], ["f"], [], {}, 3, "[", [{"description": "x"}]):
        assert parse_record(chat(user(), said(), functions=functions)) == parse_record(chat(user(), said()))


# ---------------------------------------------------------------- bad rows

PAIR = {"chosen": [user(), said()], "rejected": [user(), said("5")]}
OPENAI = {"input": chat(user()), "preferred_output": [said()], "non_preferred_output": [said("5")]}

REJECTED: list[tuple[Any, str]] = [
    ({"question": "2+2?"}, "no columns of a known shape: 'question'"),
    (chat(user(), said(), text="both"), "columns of two shapes: chat and text"),
    ({"instruction": "a", "output": "b", "text": "ab"}, "columns of two shapes: alpaca and text"),
    # turns
    (chat({"role": "system", "content": "x"}, said()), "no turn is the user's"),
    (chat(said(), user()), "no assistant turn to train on"),
    (chat(user(), calls(call()), {"role": "system", "content": "x"}, result(), said()), "a tool call is not answered"),
    (chat(user(), {"role": "function", "content": "4"}, said()), "a tool's message answers no call"),
    (chat(user(), older("add"), user()), "a tool call is not answered"),
    (chat(user(), older("add"), answered("add"), answered("add"), said()), "a tool's message answers no call"),
    (
        chat(user(), older("add"), answered("sum"), said()),
        "a function's result is not of the function that was called: 'sum'",
    ),
    (chat(user(), older("add", "{2"), answered("add"), said()), "a tool call's arguments are not a JSON object: a string"),
    (chat(user(), said(None, function_call="add")), "a tool call has no `function`"),
    (chat(user(), said(None, function_call={"arguments": "{}"})), "a tool call has no function name"),
    (chat(user(function_call={"name": "add"}), said()), "`tool_calls` is not a list of an assistant turn"),
    (
        chat(user(), calls(call()) | {"function_call": {"name": "add"}}, result(), said()),
        "a message has `tool_calls` and `function_call`",
    ),
    (
        chat(user(), older("sub"), answered("sub"), said(), functions=[ADD["function"]]),
        "a tool is called that `tools` does not declare: 'sub'",
    ),
    (
        chat(user(), said(), functions=[ADD["function"]], tools=[ADD | {"strict": True}]),
        "`tools` and `functions` are not the same",
    ),
    (chat(user(name=7), said()), "a message's `name` is not a string: a number"),
    (chat(user(), result(tool_call_id=7), said()), "a message's `tool_call_id` is not a string: a number"),
    (chat(user(7), said()), "a message's content is not a string: a number"),
    (chat(user([]), said()), "a message has no content"),
    (chat(user(["2+2?"]), said()), "a content part is not an object: a string"),
    (chat(user([{"type": "text"}]), said()), "a content part has no text"),
    (chat(user([{"type": "image"}]), said()), "a content part has no image"),
    (chat(user([{"type": "input_audio"}]), said()), "a content part is of an unknown type 'input_audio'"),
    (chat(user([{"type": "text", "text": "a", "train": 0}]), said()), "a content part has an unknown key 'train'"),
    (chat(user(), said([picture(URI)])), "an image is not in a user's turn"),
    (chat(user(), said([{"type": "text", "text": " "}])), "an assistant turn is empty"),
    ({"text": "a\u0000b"}, "a NUL character"),
    (chat(user("\\\u0000"), said()), "a NUL character"),
    # tools
    (chat(user(), said(), tools="add"), "`tools` is not a list: a string"),
    (chat(user(), said(), tools=["add"]), "a tool is not of type `function` with a name"),
    (chat(user(), said(), tools=[{"name": "add"}]), "a tool is not of type `function` with a name"),
    (chat(user(), said(), tools=[ADD, ADD]), "two tools have the same name: 'add'"),
    (chat(user(), calls(call("sub")), tools=[ADD]), "a tool is called that `tools` does not declare: 'sub'"),
    (chat(user(), calls({"name": "add"})), "a tool call has no `function`"),
    (chat(user(), calls("add")), "a tool call has no `function`"),
    (chat(user(), calls(call(score=1))), "a tool call has an unknown key 'score'"),
    (chat(user(), calls(call() | {"type": "code"})), "a tool call is not of type `function`: 'code'"),
    (chat(user(), calls(call(id=7))), "a tool call's id is not a string: a number"),
    (chat(user(), calls(call(id=""))), "a tool call's id is empty"),
    (chat(user(), calls(call(""))), "a tool call has no function name"),
    (chat(user(), calls(call(id="a"), call())), "a tool call has no id, others of its turn do"),
    (chat(user(), calls(call(id="a"), call(id="a"))), "two tool calls of a turn have the same id"),
    *[
        (chat(user(), calls(call(arguments=arguments))), f"a tool call's arguments are not a JSON object: {value}")
        for value, values in (("a string", ("{", '{"a": NaN}', '"add"')), ("a list", ("[1]", [1])), ("a number", ("2", 7)))
        for arguments in values
    ],
    (chat(user(), calls(call(arguments='{"a": 1, "a": 2}'))), "a key is written twice"),
    (chat(user(), calls(call(arguments='{"a": "\\ud800"}'))), "lone surrogate"),
    (chat(user(), calls(call(arguments='{"a": "\\u0000"}'))), "a NUL character"),
    (chat(user(), calls(call(arguments='{"a": 1e999}'))), "a number is not finite"),
    (chat(user(), calls(call(arguments='{"a": ' + "[" * 64 + "]" * 64 + "}"))), "nested too deeply"),
    (chat(user(), result(), said()), "a tool's message answers no call"),
    (chat(user(), said(), result()), "a tool's message answers no call"),
    (chat(user(), calls(call()), result(), result(), said()), "a tool's message answers no call"),
    (chat(user(), calls(call(id="a")), result(tool_call_id="b")), "a tool's message answers no call"),
    (chat(user(), calls(call(id="a")), result()), "a tool's message has no `tool_call_id`"),
    (chat(user(), calls(call()), said()), "a tool call is not answered"),
    (chat(user(), calls(call(id="a"), call(id="b")), result(tool_call_id="b"), user()), "a tool call is not answered"),
    # ShareGPT
    ({"conversations": "hi"}, "`conversations` is not a list: a string"),
    ({"conversations": []}, "`messages` is not a non-empty list"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "a message has no known role: 'narrator'"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "no assistant turn to train on"),
    ({"conversations": [{"from": "human", "value": "x", "mask": False}]}, "a message has an unknown key 'mask'"),
    (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "add(2)"}]},
        "a `function_call` turn is not a JSON call",
    ),
    # Alpaca
    ({"instruction": "", "output": "b"}, "`instruction` is empty"),
    ({"instruction": ["a"], "output": "b"}, "`instruction` is not a string: a list"),
    ({"instruction": "a", "output": " "}, "`output` is empty"),
    ({"instruction": "a", "output": "b", "input": 7}, "`input` is not a string: a number"),
    ({"instruction": "a", "output": "b", "history": [["a"]]}, "`history` is not a list of pairs"),
    ({"instruction": "a", "output": "b", "history": [["a", None]]}, "`history` is not a string: null"),
    ({"instruction": "a", "output": "b", "system": 7}, "`system` is not a string: a number"),
    # prompt and completion
    ({"prompt": "", "completion": "b"}, "`prompt` is empty"),
    ({"prompt": "a", "completion": 7}, "`completion` is not a string: a number"),
    ({"prompt": [user()], "completion": []}, "no assistant turn to train on"),
    # classification
    ({"text": "a", "label": ""}, "`label` is empty"),
    ({"text": "a", "labels": {}}, "`labels` is not a string: an object"),
    ({"text": "a", "labels": {"x": [1, ["b"]]}}, "`labels` is not a string: a list"),
    ({"text": " ", "label": "b"}, "`text` is empty"),
    # preference
    ({"prompt": "a", "chosen": "b", "rejected": "b"}, "`chosen` and `rejected` are the same"),
    ({"prompt": "a", "chosen": "b", "rejected": 7}, "`rejected` is not a string: a number"),
    ({"prompt": "a", "chosen": [], "rejected": "b"}, "`chosen` is not a non-empty list"),
    ({"chosen": "b", "rejected": "c"}, "`chosen` and `rejected` share no prompt"),
    ({"prompt": "a", "chosen": "b"}, f"`chosen` without `rejected`: {BOTH_IN_ONE}"),
    ({"prompt": "a", "rejected": "b", "margin": 1}, f"`rejected` without `chosen`: {BOTH_IN_ONE}"),
    (PAIR | {"rejected": [user("3+3?"), said("6")]}, "`chosen` and `rejected` share no prompt"),
    (PAIR | {"prompt": "3+3?"}, "`prompt` differs from the start of `chosen`"),
    ({"prompt": "a", "chosen": [said(), user(), said()], "rejected": "c"}, "`chosen` is not an assistant's answer"),
    (OPENAI | {"input": "2+2?"}, "`input` is not an object with `messages`"),
    (OPENAI | {"input": {}}, "`messages` is not a non-empty list: null"),
    (OPENAI | {"non_preferred_output": [user()]}, "`rejected` is not an assistant's answer"),
    # feedback
    ({"prompt": "a", "completion": [user()], "label": True}, "`answer` is not an assistant's answer"),
    ({"prompt": "a", "completion": [], "label": True}, "`answer` is not a non-empty list"),
]

FORCED: list[tuple[Shape, Any, str]] = [
    ("feedback", {"prompt": "a", "completion": "b", "label": "maybe"}, "`label` is not true or false: 'maybe'"),
    ("feedback", {"completion": "b", "label": True}, "no column `prompt`, which shape feedback needs"),
    ("classification", {"label": "b"}, "no column `text`, which shape classification needs"),
    ("alpaca", {"instruction": "a"}, "no column `output`, which shape alpaca needs"),
    ("chat", {"text": "a"}, "no column `messages`, which shape chat needs"),
]

MAPPED: list[tuple[Mapping, Any, str]] = [
    (MAPPING, {"customer": {"question": "a"}}, "no column `reply`, which the mapping names"),
    (MAPPING, {"customer": "a", "reply": "b"}, "no column `customer.question`, which the mapping names"),
    (MAPPING, {"customer": {"question": 7}, "reply": "b"}, "`customer.question` is not a string: a number"),
    (Mapping(messages="log"), {"log": "hi"}, "`log` is not a non-empty list: a string"),
]


@pytest.mark.parametrize(("row", "reason"), REJECTED, ids=range(len(REJECTED)))
def test_invalid_row_is_rejected_with_a_reason(row: Any, reason: str) -> None:
    with pytest.raises(Reject) as error:
        parse_record(row)
    assert str(error.value) == reason


@pytest.mark.parametrize(("shape", "row", "reason"), FORCED, ids=range(len(FORCED)))
def test_row_that_lacks_the_forced_shape_is_rejected_with_a_reason(shape: Shape, row: Any, reason: str) -> None:
    with pytest.raises(Reject) as error:
        parse_record(row, shape)
    assert str(error.value) == reason


@pytest.mark.parametrize(("mapping", "row", "reason"), MAPPED, ids=range(len(MAPPED)))
def test_invalid_mapped_row_is_rejected_with_a_reason(mapping: Mapping, row: Any, reason: str) -> None:
    with pytest.raises(Reject) as error:
        parse_record(row, mapping=mapping)
    assert str(error.value) == reason


@pytest.mark.parametrize(
    "row",
    [
        chat(user(), user("and 3+3?"), said()),
        chat(user(), said(), said("more")),
        chat(user(), said(), user()),
        chat(user(), calls(call(id="a"), call(id="b"))),
        chat(user(), calls(call(id="a"), call(id="b")), result(tool_call_id="b"), result(tool_call_id="a"), said()),
        chat(user(), calls(call(id="a")), result(tool_call_id="a"), calls(call(id="a")), result(tool_call_id="a"), said()),
        chat(user(), calls(call()), result(), user("thanks"), said()),
        chat(user("a \\u0000 written out"), said()),
    ],
    ids=range(8),
)
def test_content_that_templates_distinguish_is_preserved(row: Row) -> None:
    assert parse_line(json.dumps(row).encode()).content == row


def test_arguments_are_json_text() -> None:
    for arguments, text in (('{"b":1,"a":2}', '{"b":1,"a":2}'), ({"b": 1, "a": "é"}, '{"b": 1, "a": "é"}'), (None, "{}")):
        record = parse_record(chat(user(), calls(call(arguments=arguments))))
        assert record.messages[1]["tool_calls"][0]["function"]["arguments"] == text


def test_with_texts_changes_only_the_strings_in_arguments() -> None:
    arguments = '{"name":"Ada","n": 1.50, "tags": ["Ada", {"id": "Ada"}]}'
    record = parse_record(chat(user("Ada"), calls(call("Ada", arguments, id="Ada"))))
    assert texts(record) == ["Ada"] * 4
    assert with_texts(record, str.strip).id == record.id
    changed = with_texts(record, lambda text: 'B"')
    assert changed.messages[1]["tool_calls"][0] == call(
        "Ada", '{"name": "B\\"", "n": 1.5, "tags": ["B\\"", {"id": "B\\""}]}', id="Ada"
    )


@pytest.mark.parametrize("name", NAMES)
def test_texts_cover_every_kind(name: str) -> None:
    for record in records(name):
        strings = texts(record)
        assert strings
        assert texts(with_texts(record, str.upper)) == [text.upper() for text in strings]
        assert with_texts(record, str).id == record.id


def test_mistral_call_ids_are_validated() -> None:
    require_mistral_ids(records("mistral")[0])
    require_mistral_ids(records("feedback")[0])
    pair = parse_record({"prompt": "a", "chosen": [calls(call(id="call_1"))], "rejected": "b"})
    for record in (records("openai")[0], records("sharegpt")[1], pair):
        with pytest.raises(Reject, match="a tool call's id is not nine letters or digits"):
            require_mistral_ids(record)


# ---------------------------------------------------------------- tables


def test_arrow_tables_round_trip_every_kind() -> None:
    every = [record for name in NAMES for record in records(name)]
    for kind, schema in ARROW.items():
        of_kind = [record for record in every if record.kind == kind]
        assert of_kind
        table = to_arrow(of_kind)
        assert table.schema == schema
        assert table.column("id").to_pylist() == [record.id for record in of_kind]
        assert list(from_arrow(table)) == [record.content for record in of_kind]
        read = [parse_record(row, read_image=lambda path: PNG) for row in table.to_pylist()]  # as a source again
        assert [record.id for record in read] == [record.id for record in of_kind]


def test_table_of_mixed_kinds_is_rejected() -> None:
    with pytest.raises(ValueError, match="not of 2"):
        to_arrow(records("mistral"))


# ---------------------------------------------------------------- anything

WORDS = st.sampled_from(
    re.findall(
        r"\w+",
        """messages text conversations instruction input output prompt completion chosen rejected preferred_output label
        non_preferred_output labels answer tools tool_calls tool_call_id function name arguments type image_url image role
        url from value human gpt function_call observation user assistant tool system weight history parts id content""",
    )
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS | st.just("{}")
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=3), inner, max_size=5)
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": JSON},
    optional={"tool_calls": st.lists(st.builds(call, WORDS, JSON)), "tool_call_id": JSON, "weight": JSON},
)
TURNS = st.lists(TURN | JSON, max_size=4) | JSON
COLUMN = st.sampled_from(
    sorted({"messages", "answer", "label", "labels", "input", "tools", "prompt"}.union(*COLUMNS.values()))
)
ROWS = st.dictionaries(COLUMN, TURNS, max_size=4) | JSON


@given(
    row=ROWS, shape=st.sampled_from(Shape.__args__), mapping=st.none() | st.just(Mapping(prompt="prompt", answer="label"))
)
@settings(max_examples=400, deadline=None)
def test_any_json_gives_a_record_or_a_reject(row: Any, shape: Shape, mapping: Mapping | None) -> None:
    try:
        record = parse_line(json.dumps(row).encode(), shape, mapping, ("label", "a.b", "messages.role"), lambda path: PNG)
    except Reject:
        return
    assert parse_record(json.loads(record.json), read_image=lambda path: PNG).id == record.id
    assert with_texts(record, str).id == record.id
    assert list(from_arrow(to_arrow([record]))) == [record.content]


@given(st.binary(max_size=60) | st.text(max_size=40).map(lambda text: ('{"text": ' + text + "}").encode(errors="replace")))
@settings(max_examples=200, deadline=None)
def test_any_bytes_give_a_record_or_a_reject(raw: bytes) -> None:
    with suppress(Reject):
        parse_line(raw)


@pytest.mark.parametrize(
    "head",
    [
        '{"text": "a", "labels": ',
        '{"messages": [{"role": "user", "content": [{"type": ',
        '{"messages": [{"role": "user", "content": "a", "name": ',
        '{"messages": [{"role": "user", "content": "a", "weight": ',
        '{"prompt": "a", "label": true, "completion": ',
    ],
)
def test_nesting_of_any_depth_is_rejected(head: str) -> None:
    """Python's own limit must not come through, wherever it is met."""
    for depth in (60, 300, *range(850, 1000, 3)):
        for left, right in (("[", "]"), ('{"a":', "}")):
            line = head + left * depth + "1" + right * depth + _closed(head)
            with suppress(Reject):
                parse_line(line.encode())


def _closed(head: str) -> str:
    """The brackets that close what `head` leaves open."""
    return "".join({"{": "}", "[": "]"}[mark] for mark in reversed(head) if mark in "{[")
