"""`data.tools: text`: what training writes of tools, calls and results is what serving sends and reads back."""

from __future__ import annotations

import json
import shutil
from functools import lru_cache
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.chat import ChatTokenizer, load_tokenizer_dir
from forge_ray.data.tokens.hf import HfTokenizer
from forge_ray.data.tokens.mistral import load_mistral
from forge_ray.data.tokens.text_tools import (
    FORM_FILE,
    as_text,
    refuse_unwritable,
    tools_of,
    with_tools,
    write_form,
)
from forge_ray.errors import ConfigError
from forge_ray.serve.fields import ChatRequest
from forge_ray.serve.prompt import chat_ids
from forge_ray.serve.reasoning import marks_of, splitter_of
from forge_ray.serve.text import Detokenizer
from forge_ray.serve.tools import Call, markers, parser_of
from tests.template_models import templates, tokenizer

pytest.importorskip("trl")
pytestmark = pytest.mark.unit
Turn = dict[str, Any]
WITHOUT = (
    "cohere",
    "deepseek_r1_distill",
    "deepseekv3",
    "gemma",
    "gemma3",
    "llama3",
    "phi3",
    "phi3_5",
    "lfm2",
    "qwen2_5_vl",
)
MARKS = [f"<{slash}tool{name}>" for slash in ("", "/") for name in ("s", "_call", "_response")]
NAMES = ("weather", "add-up", "now")


def tool(name: str) -> Turn:
    column = {"type": "string", "description": "Größe, 東京 </tools>"}
    schema = {"type": "object", "properties": {"place": column}}
    return {"type": "function", "function": {"name": name, "description": f"Of {name} <tools>", "parameters": schema}}


TOOLS = [tool(name) for name in NAMES]


def user(text: str) -> Turn:
    return {"role": "user", "content": text}


def says(text: str, **more: Any) -> Turn:
    return {"role": "assistant", "content": text, **more}


def calls(*signatures: tuple[str, str, Turn], **more: Any) -> Turn:
    functions = [
        {"id": i, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}}
        for i, name, arguments in signatures
    ]
    return {"role": "assistant", "tool_calls": functions, **more}


def result(call: str, text: str) -> Turn:
    return {"role": "tool", "tool_call_id": call, "content": text}


NESTED = {
    "place": "東京 🙂",
    "deep": {"list": [1, -2.5, None, True, {"": "a\n\tb \\ \" '"}], "e": {}},
    "n": 12345678901234567890,
}
MARKED = {"place": "</tool_call>\n<tool_call>", "html": "<b>&amp;</b> <tools> \\<tool_response>", "<tool_call>": "key"}
SYSTEM = {"role": "system", "content": "Be brief. Grüße."}
CASES: dict[str, list[Turn]] = {
    "unused": [user("hello"), says("hi there")],
    "one": [user("a?"), calls(("c1", "weather", NESTED)), result("c1", "12 °C"), says("It is 12 °C.")],
    "ends in a call": [user("a?"), calls(("c1", "now", {}))],
    "beside text": [user("a?"), calls(("c1", "weather", MARKED), content="Let me see.")],
    "parallel": [
        user("two"),
        calls(("c1", "weather", NESTED), ("c2", "weather", {"place": "B"}), ("c3", "now", MARKED)),
        result("c2", "two </tool_response>"),
        result("c1", '{"one": "<tool_response>",\n "list": [1]}'),
        result("c3", "[three"),
        says("done: <b> [1] {x}"),
    ],
    "rounds": [
        user("x"),
        calls(("c1", "add-up", {"a": 1})),
        result("c1", "4"),
        calls(("c1", "add-up", {"a": 2}), content="Once\n\nmore."),
        result("c1", ""),
        says("nine"),
    ],
    "question behind results": [
        user("x"),
        calls(("c1", "now", {})),
        result("c1", "noon"),
        user("And then?"),
        says("one"),
        user("then?"),
        says("two"),
    ],
    "not trained": [user("x"), calls(("c1", "now", {}), weight=0), result("c1", "noon"), says("It is noon.")],
    "system": [SYSTEM, user("x"), calls(("c1", "now", {})), result("c1", "noon"), says("It is noon.")],
}


@lru_cache
def model(name: str) -> ChatTokenizer:
    return with_tools(HfTokenizer(tokenizer(name, templates()[name])), "text")


def requested(messages: list[Turn]) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": messages, "tools": TOOLS})


def served(model: ChatTokenizer, ids: list[int], functions: list[Any]) -> Turn:
    """The message that an endpoint makes of generated ids, in single tokens."""
    parser, splitter = parser_of(model, functions, several=True), splitter_of(model)
    detokenizer = Detokenizer(model, {**markers(model), **marks_of(model)})
    parts: list[Any] = []
    for text in (*(detokenizer.push(token) for token in ids if token not in model.end_ids), detokenizer.flush()):
        parts += parser.push(splitter.push(text)[1] if splitter else text)
    parts += parser.push(splitter.flush()[1]) if splitter else []
    parts += parser.flush()
    text = "".join(part for part in parts if isinstance(part, str))
    return {"content": text, "calls": [(one.name, json.loads(one.arguments)) for one in parts if isinstance(one, Call)]}


def message(turn: Turn) -> Turn:
    functions = [call["function"] for call in turn.get("tool_calls", ())]
    return {
        "content": turn.get("content", ""),
        "calls": [(function["name"], json.loads(function["arguments"])) for function in functions],
    }


def check_round_trip(model: ChatTokenizer, messages: list[Turn]) -> None:
    (documents,) = model.encode_chats([(messages, TOOLS)])
    assert not isinstance(documents, Reject), str(documents)
    answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("weight", 1)]
    starts = [(one, int(start)) for one in documents for start in np.flatnonzero(np.diff(one.loss_mask, prepend=0) == 1)]
    assert len(starts) == len(answers)
    request = requested([{key: item for key, item in turn.items() if key != "weight"} for turn in messages])
    for (document, start), number in zip(starts, answers, strict=True):
        assert document.ids[:start].tolist() == chat_ids(model, request.messages[:number], request.offered)
        end = start + int(np.argmin(np.append(document.loss_mask[start:], 0)))
        answer = document.ids[start:end].tolist()
        assert answer[-1] in model.end_ids
        functions = [one.function for one in request.offered]
        assert served(model, answer, functions) == message(messages[number])


@pytest.mark.parametrize("name", WITHOUT)
def test_what_training_writes_serving_sends_and_reads_back(name: str) -> None:
    for case, messages in CASES.items():
        if case == "system" and name == "gemma":  # its template refuses system prompts
            continue
        check_round_trip(model(name), messages)


def test_also_with_mistrals_own_tokenizer() -> None:
    first = load_mistral(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1")
    assert not first.call_style
    for messages in CASES.values():
        check_round_trip(with_tools(first, "text"), messages)


TEXTS = st.lists(st.sampled_from([*MARKS, "<", "\\", '"', "\n", "u003c", "é", "東", "}", "a"]), max_size=6).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.dictionaries(TEXTS, VALUES, max_size=3)), min_size=1, max_size=3), TEXTS
)
@settings(max_examples=25, deadline=None)
def test_any_arguments_and_results_come_back(signatures: list[tuple[str, Turn]], text: str) -> None:
    asks = calls(*((f"c{i}", name, arguments) for i, (name, arguments) in enumerate(signatures)))
    results = [result(f"c{i}", text) for i in reversed(range(len(signatures)))]
    check_round_trip(model("phi3"), [user("go"), asks, *results, says("done")])


def test_the_form() -> None:
    asks = calls(("c1", "weather", {"place": "a <tool_call>"}), ("c2", "now", {}), content="Wait.")
    system, question, answer, results = as_text(
        [SYSTEM, user("Q"), asks, result("c2", "noon"), result("c1", '{"°C": [1,  2]}'), user("And?")], TOOLS
    )
    assert system["content"].startswith("Be brief. Grüße.\n\n# Tools\n")
    declared = system["content"].split("<tools>\n")[1].split("\n</tools>")[0].split("\n")
    assert [json.loads(line) for line in declared] == TOOLS
    assert "</tools>" not in "".join(declared)
    assert question == user("Q")
    assert answer == says(
        'Wait.\n<tool_call>\n{"name": "weather", "arguments": {"place": "a \\u003ctool_call>"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    )
    assert results == user(
        '<tool_response>\n{"name": "weather", "content": {"°C": [1,  2]}}\n</tool_response>\n'
        '<tool_response>\n{"name": "now", "content": "noon"}\n</tool_response>\nAnd?'
    )


def test_a_row_and_a_request_that_declare_the_same_come_to_the_same_text() -> None:
    (declared,) = [tool("now")]
    function = dict(reversed(declared["function"].items())) | {"strict": True}
    other = {"function": function, "type": "function"}
    assert as_text([user("Q")], [declared]) == as_text([user("Q")], [other])


def test_a_conversation_without_tools_stays_as_it_is() -> None:
    chat = [SYSTEM, user("what is <tools> or </tool_response>?"), says("a <tool_call> {}")]
    own, text = HfTokenizer(tokenizer("phi3", templates()["phi3"])), model("phi3")
    assert text.prompt_ids(chat[:2]) == own.prompt_ids(chat[:2])
    (documents,), (others,) = text.encode_chats([(chat, None)]), own.encode_chats([(chat, None)])
    assert not isinstance(documents, Reject)
    assert not isinstance(others, Reject)
    assert documents[0].ids.tolist() == others[0].ids.tolist()


@pytest.mark.parametrize("mark", [mark for mark in MARKS if "call" not in mark])
@pytest.mark.parametrize("role", ["user", "system"])
def test_nobody_forges_a_result_or_a_tool(mark: str, role: str) -> None:
    forged = [{"role": role, "content": f"x {mark} y"}, user("Q")]
    with pytest.raises(Reject, match=f"a message contains {mark}, with which tools are written as text"):
        model("phi3").prompt_ids(forged, TOOLS)
    (outcome,) = model("phi3").encode_chats([([*forged, says("A")], TOOLS)])
    assert isinstance(outcome, Reject)


def test_an_answer_that_would_be_read_as_a_call_is_not_trained() -> None:
    text = 'So: <tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for turn in (says(text), calls(("c1", "now", {}), content="see <tool_call>")):
        (outcome,) = model("phi3").encode_chats([([user("Q"), turn], TOOLS)])
        assert str(outcome) == "the text of an answer contains <tool_call>, so it would be read as a tool call"
    chat = [user("Q"), says(text), user("and?")]  # as an endpoint answered it where the function was not declared
    assert model("phi3").prompt_ids(chat, TOOLS)
    check_round_trip(model("phi3"), [user("Q"), says("a <tool_call> is a tag")])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [("{", "a tool call's arguments are not JSON"), ("[1]", "a tool call's arguments are not a JSON object")],
)
def test_arguments_that_are_no_object_are_refused(arguments: str, reason: str) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    with pytest.raises(Reject, match=reason):
        as_text([user("Q"), {"role": "assistant", "tool_calls": [call]}], TOOLS)


def test_deep_arguments_and_results_end_in_no_error_of_python() -> None:
    deep = "[" * 200_000 + "]" * 200_000
    assert json.dumps(deep) in as_text([user("Q"), calls(("c1", "now", {})), result("c1", deep)], TOOLS)[-1]["content"]
    with pytest.raises(Reject, match="a tool call's arguments are not JSON"):
        as_text([user("Q"), {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": deep}}]}], TOOLS)


def test_marks_that_are_tokens_of_the_models_own_template_are_refused_by_name() -> None:
    for name in ("phi3", "gemma", "llama3_1"):
        refuse_unwritable(HfTokenizer(tokenizer(name, templates()[name])), name)
    with pytest.raises(ConfigError, match=r"data\.tools=text cannot be written for mv_1: .*'<tool_call>'") as caught:
        refuse_unwritable(HfTokenizer(tokenizer("qwen3", templates()["qwen3"])), "mv_1")
    assert "leave data.tools at `template`" in caught.value.hint
    with pytest.raises(ConfigError, match=r"data\.tools=text cannot be written for mv_2: it has no chat template"):
        refuse_unwritable(HfTokenizer(tokenizer("plain", "")), "mv_2")


def test_a_folder_says_how_its_model_was_trained(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    write_form(folder, "template")
    assert not (folder / FORM_FILE).exists()
    assert tools_of(folder) == "template"
    assert load_tokenizer_dir(folder).call_style == ""
    write_form(folder, "text")
    loaded = load_tokenizer_dir(folder)
    assert loaded.call_style == "hermes"
    check_round_trip(loaded, CASES["parallel"])
    for broken in ('{"tools": "json"}', '{"tools": "text", "more": 1}', "[", "\ufeff"):
        (folder / FORM_FILE).write_text(broken, encoding="utf-8")
        with pytest.raises(ConfigError, match=f'{FORM_FILE} of model is not {{"tools": "text"}}') as caught:
            load_tokenizer_dir(folder)
        assert "take the file as `forge train` wrote it" in caught.value.hint


OWN_CALLS = ("gemma4_v5", "glm4moe", "gptoss", "lfm2_v2", "llama3_1", "nemotron_3_nano", "qwen3", "qwen3_5_nothink")


@pytest.mark.parametrize("name", OWN_CALLS)
def test_calls_of_a_templates_own_form_are_read_in_single_tokens(name: str) -> None:
    own = HfTokenizer(tokenizer(name, templates()[name]))
    assert own.call_style
    asks = calls(("c1", "weather", {"place": "東京 {x}", "n": "1.5"}))
    (documents,) = own.encode_chats([([user("a?"), asks], TOOLS)])
    assert not isinstance(documents, Reject), str(documents)
    answer = documents[-1].ids[documents[-1].loss_mask > 0].tolist()
    read = served(own, answer, [one.function for one in requested([user("a?")]).offered])
    assert (read["content"].strip("\n"), [name for name, _ in read["calls"]]) == ("", ["weather"])
    assert read["calls"][0][1]["place"] == "東京 {x}"
