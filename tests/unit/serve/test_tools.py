"""Tool calls: read as models write them, whole and in any pieces, and begun where one must be made."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import mistral_common
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.call_forms import CallForm
from forge_ray.data.tokens.chat import ChatTokenizer, load_tokenizer_dir
from forge_ray.data.tokens.hf import HfTokenizer
from forge_ray.data.tokens.mistral import load_mistral
from forge_ray.serve.conform import conforms
from forge_ray.serve.form_calls import FormParser
from forge_ray.serve.text import Detokenizer
from forge_ray.serve.tool_fields import Function
from forge_ray.serve.tools import Call, CallParser, beginnings, markers, parser_of

pytestmark = pytest.mark.unit
DATA = Path(mistral_common.__file__).parent / "data"

POINT = {"$defs": {"P": {"type": "object", "properties": {"next": {"$ref": "#/$defs/P"}, "up": {"$ref": "#"}}}}}
ADD = Function(name="add", parameters={"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
DRAW = Function(name="draw-it", parameters={"type": "object", "properties": {"p": {"$ref": "#/$defs/P"}}, **POINT})
BARE = Function(name="now")
FUNCTIONS = [ADD, DRAW, BARE]
ONE, TWO = ("add", {"a": 1}), ("draw-it", {"p": {"text": 'a "}] </b>é', "next": {}}})


HERMES = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content or '' }}{% for call in m.tool_calls or [] %}CALL{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OBJECT = "<tool_call>\n{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}\n</tool_call>"
WRITTEN = {
    "hermes": OBJECT,
    "mistral-v3": "[TOOL_CALLS][{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}]",
    "mistral-v11": "[TOOL_CALLS]{{ call.function.name }}[CALL_ID]{{ call.id }}[ARGS]{{ call.function.arguments | tojson }}",
    "mistral-v13": "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}",
    "template": "<|tool|>{{ [{'function': call.function.name, 'parameters': call.function.arguments}] | tojson }}",
}


def calling(written_call: str) -> str:
    """A template that declares tools and writes calls so."""
    return HERMES.replace("CALL", written_call)


def written(style: str, *calls: tuple[str, Any]) -> str:
    """As the model writes them."""
    match style:
        case "hermes":
            return "\n".join(
                f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"
                for name, arguments in calls
            )
        case "mistral-v3":
            objects = [
                {"name": name, "arguments": arguments, "id": f"abcdefg{i:02}"} for i, (name, arguments) in enumerate(calls)
            ]
            return f"[TOOL_CALLS] {json.dumps(objects)}"
        case "mistral-v11":
            return "".join(
                f"[TOOL_CALLS]{name}[CALL_ID]abcdefg{i:02}[ARGS]{json.dumps(arguments)}"
                for i, (name, arguments) in enumerate(calls)
            )
        case _:
            return "".join(f"[TOOL_CALLS]{name}[ARGS]{json.dumps(arguments)}" for name, arguments in calls)


STYLES: list[Any] = ["hermes", "mistral-v3", "mistral-v11", "mistral-v13"]


def parsed(parser: CallParser | FormParser, *pieces: str) -> tuple[str, list[tuple[str, Any]]]:
    parts = [*itertools.chain.from_iterable(parser.push(piece) for piece in pieces), *parser.flush()]
    text = "".join(part for part in parts if isinstance(part, str))
    return text, [(call.name, json.loads(call.arguments)) for call in parts if isinstance(call, Call)]


@pytest.mark.parametrize("style", STYLES)
@given(st.randoms())
def test_calls_are_found_however_the_text_is_cut(style: Any, rng: Any) -> None:
    text = "I look: <b> [1] " + written(style, ONE, TWO)
    cuts = sorted(rng.sample(range(len(text)), rng.randint(0, 12)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert parsed(CallParser(style, FUNCTIONS), *pieces) == ("I look: <b> [1] ", [ONE, TWO])


@pytest.mark.parametrize("style", STYLES)
def test_text_streams_and_a_call_comes_when_it_is_complete(style: Any) -> None:
    parser, seen = CallParser(style, FUNCTIONS), []
    for character in "yes " + written(style, ONE) + " ":
        seen.append(parser.push(character))
    assert [part for part in seen if part][:4] == [["y"], ["e"], ["s"], [" "]]
    (call,) = (item for part in seen for item in part if isinstance(item, Call))
    assert call.name == "add"
    assert len(call.id) == 9
    assert parser.flush() == []


@pytest.mark.parametrize("style", STYLES)
def test_single_call_without_parallel_calls(style: Any) -> None:
    parser = CallParser(style, FUNCTIONS, several=False)
    assert parsed(parser, written(style, ONE, TWO) + "more") == ("", [ONE])
    assert parser.finished


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("wrong", [("subtract", {"a": 1}), ("add", [1]), ("add", "not an object"), ("add", None)])
def test_what_only_looks_like_a_call_stays_text(style: Any, wrong: Any) -> None:
    text = "so: " + written(style, wrong)
    assert parsed(CallParser(style, FUNCTIONS), *text) == (text, [])


@pytest.mark.parametrize("style", STYLES)
def test_a_broken_call_stays_text_and_loses_nothing(style: Any) -> None:
    whole = written(style, ONE)
    for end in range(1, len(whole)):
        text, calls = parsed(CallParser(style, FUNCTIONS), "a", whole[:end])
        assert calls in ([], [ONE])
        if not calls:
            assert text == "a" + whole[:end]


TAGS = {"before_key": "<p=", "after_key": ">", "after_value": "</p>"}
FORMS = {
    "braced": (
        CallForm("braced", "", "<d>", before_name="<c>call:", after_name="{", after_key="<q>"),
        "<c>call:add{a:1}<d>",
    ),
    "python": (CallForm("python", "<c>[", "]<d>"), "<c>[add(a=1)]<d>"),
    "tagged": (CallForm("tagged", "", "</p></f>", "", "", "<f=", ">", "</f>", **TAGS), "<f=add><p=a>1</p></f>"),
    "object": (
        CallForm("object", "<c>\n", "\n</c>", "name", "arguments"),
        '<c>\n{"name": "add", "arguments": {"a": 1}}\n</c>',
    ),
    "named": (CallForm("named", "<c>", "</c>", "", "", "<f>", "<a>", "</c>"), '<c><f>add<a>{"a": 1}</c>'),
}


@pytest.mark.parametrize("kind", FORMS)
def test_text_around_calls_of_any_form_is_returned(kind: str) -> None:
    form, call = FORMS[kind]
    other = call.replace("add", "subtract")  # which no function declares

    def read(*pieces: str, several: bool = True) -> tuple[str, list[tuple[str, Any]]]:
        tokenizer: Any = SimpleNamespace(call_style="template", call_form=form)
        return parsed(parser_of(tokenizer, FUNCTIONS, several), *pieces)

    for pieces in ((f"so: {call}\nI add.",), tuple(f"so: {call}\nI add.")):
        assert read(*pieces) == ("so: I add.", [ONE])
        assert read(*pieces, several=False) == ("so: ", [ONE])
    assert read(call) == read(call + "\n") == ("", [ONE])
    assert read(call[:-1]) == ((call[:-1], []) if kind == "tagged" else ("", [ONE]))  # which is not whole without its end
    assert read(f"{call} {call}") == ((call, [ONE]) if kind == "python" else ("", [ONE, ONE]))  # of which one list is read
    assert read(f"{call}\n{other}") == (other, [ONE])


def test_an_answer_may_end_without_the_closing_mark() -> None:
    parser = CallParser("hermes", FUNCTIONS)
    assert parsed(parser, written("hermes", ONE).removesuffix("</tool_call>")) == ("", [ONE])


def test_text_after_a_broken_call_and_a_call_after_it() -> None:
    text = "<tool_call>{no}</tool_call> then " + written("hermes", ONE) + " end"
    assert parsed(CallParser("hermes", FUNCTIONS), *text) == ("<tool_call>{no}</tool_call> then  end", [ONE])


def test_a_strict_function_takes_only_arguments_of_its_schema() -> None:
    strict = ADD.model_copy(update={"strict": True})
    text = written("hermes", ("add", {"a": "one"}))
    assert parsed(CallParser("hermes", [strict]), text) == (text, [])
    assert parsed(CallParser("hermes", [ADD]), text) == ("", [("add", {"a": "one"})])


BOMB: dict[str, Any] = {
    "$defs": {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": {"type": "object"}},
    "$ref": "#/$defs/d0",
}


@pytest.mark.parametrize(
    ("schema", "value", "conforming"),
    [
        ({"properties": {"a": {"type": "integer"}}, "additionalProperties": False}, {"a": 1}, True),
        ({"properties": {"a": {"type": "integer"}}, "additionalProperties": False}, {"b": 1}, False),
        ({"properties": {"a": {"$ref": "#/$defs/A"}}, "$defs": {"A": {"enum": [1]}}}, {"a": 2}, False),
        ({"properties": {"a": {"pattern": "(x+)+y"}}}, {"a": "x" * 60}, True),
        ({"properties": {"a": {"$ref": "http://127.0.0.1:1/schema"}}}, {"a": 1}, False),
        ({"properties": {"a": {"multipleOf": 0.5}}}, {"a": 10**400}, False),
        ({"$ref": "#"}, {}, False),
        (BOMB, {}, False),
        ({"properties": {"a": {"allOf": [{"$ref": "#"}] * 2}}}, json.loads('{"a":' * 60 + "{}" + "}" * 60), False),
    ],
)
def test_validation_time_is_bounded(schema: dict[str, Any], value: Any, conforming: bool) -> None:
    started = time.monotonic()
    assert conforms(value, schema) == conforming
    assert time.monotonic() - started < 20  # 2**40 steps would take weeks


def test_mistral_compatible_ids_are_kept() -> None:
    calls = CallParser("mistral-v3", FUNCTIONS).push(written("mistral-v3", ONE, TWO))
    assert [call.id for call in calls if isinstance(call, Call)] == ["abcdefg00", "abcdefg01"]
    other = CallParser("mistral-v3", FUNCTIONS).push('[TOOL_CALLS][{"name": "add", "arguments": {}, "id": "x"}')
    assert [len(call.id) for call in other if isinstance(call, Call)] == [9]


# ---------------------------------------------------------------- tokenizers


def with_template(model_dir: Path, template: Any) -> HfTokenizer:
    tokenizer = load_tokenizer_dir(model_dir)
    assert isinstance(tokenizer, HfTokenizer)
    tokenizer.tokenizer.chat_template = template
    return tokenizer


def newer_tekken(folder: Path, version: str) -> Path:
    """The newest tekken of mistral-common's wheel as one of `version`, with its special tokens."""
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    model = json.loads((DATA / "tekken_240911.json").read_text(encoding="utf-8"))
    model.pop("multimodal", None)
    names = [token["token_str"] for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]
    names += [
        name
        for name in ("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]", "[ARGS]", "[CALL_ID]")
        if name not in names
    ]
    model["config"]["version"] = version
    model["special_tokens"] = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(names)]
    path = folder / f"tekken-{version}.json"
    path.write_text(json.dumps(model), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> dict[str, ChatTokenizer]:
    folder = tmp_path_factory.mktemp("tekken")
    hermes = with_template(tiny_model_dir, calling(OBJECT))
    hermes.tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    return {
        "hermes": hermes,
        "mistral-v3": load_mistral(DATA / "mistral_instruct_tokenizer_241114.model.v7"),
        "mistral-v11": load_mistral(newer_tekken(folder, "v11")),
        "mistral-v13": load_mistral(newer_tekken(folder, "v13")),
    }


@pytest.mark.parametrize("style", WRITTEN)
def test_call_style_is_what_the_template_writes_of_a_probe(style: str, tiny_model_dir: Path) -> None:
    assert with_template(tiny_model_dir, calling(WRITTEN[style])).call_style == style


@pytest.mark.parametrize(
    "template",
    [
        None,
        HERMES.replace("CALL", ""),  # calls are left out
        calling(OBJECT).replace("{{ tools | tojson }}", "<tool_call>"),  # tools are
        calling("{{ call.function.arguments | tojson }}"),  # the function's name is
    ],
)
def test_a_template_that_leaves_calls_or_tools_out_has_no_style(template: str | None, tiny_model_dir: Path) -> None:
    assert with_template(tiny_model_dir, template).call_style == ""


def test_a_template_of_its_own_for_tools_is_looked_at(tiny_model_dir: Path) -> None:
    both = {"default": HERMES.replace("CALL", ""), "tool_use": calling(OBJECT)}
    assert with_template(tiny_model_dir, both).call_style == "hermes"


@pytest.mark.parametrize("style", STYLES)
def test_call_style_follows_mistrals_version(style: str, tokenizers: dict[str, ChatTokenizer]) -> None:
    assert tokenizers[style].call_style == style
    assert load_mistral(DATA / "tokenizer.model.v1").call_style == ""


def as_messages(*calls: tuple[str, Any]) -> list[dict[str, Any]]:
    tool_calls = [
        {"id": f"abcdefg{i:02}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return [{"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": tool_calls}]


@pytest.mark.parametrize("style", ["mistral-v3", "mistral-v11", "mistral-v13"])
def test_calls_as_mistral_common_encodes_them_are_read_back(style: Any, tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers[style]
    (encoded,) = tokenizer.encode_chats([(as_messages(ONE, TWO), None)])
    assert not isinstance(encoded, Reject)
    (document,) = encoded
    answer = document.ids[document.loss_mask.nonzero()[0]][:-1]  # without the end of turn
    detokenizer = Detokenizer(tokenizer, markers(tokenizer))
    text = "".join(detokenizer.push(int(token_id)) for token_id in answer) + detokenizer.flush()
    assert parsed(CallParser(style, FUNCTIONS), text) == ("", [ONE, TWO])


@pytest.mark.parametrize("style", STYLES)
def test_begun_call_matches_the_training_format(style: Any, tokenizers: dict[str, ChatTokenizer]) -> None:
    """The ids of the beginning are those with which the taught call begins."""
    tokenizer = tokenizers[style]
    (begun, *others) = beginnings(tokenizer, [ADD], several=True)
    assert not others
    if style == "mistral-v11":  # the id of a call is made anew each time
        begun_ids, taught_text = begun.ids[:2], "[TOOL_CALLS]add"
    elif style == "hermes":
        assert begun.ids == (tokenizer.marker_id("<tool_call>"), *tokenizer.piece_ids("\n"))
        return
    else:
        begun_ids, taught_text = begun.ids, begun.text
    assert begun.text.startswith(taught_text)
    (encoded,) = tokenizer.encode_chats([(as_messages(ONE), None)])
    assert not isinstance(encoded, Reject)
    (document,) = encoded
    answer = document.ids[document.loss_mask.nonzero()[0]]
    assert tuple(answer[: len(begun_ids)]) == begun_ids


@pytest.mark.parametrize("style", STYLES)
def test_schema_of_a_begun_call_admits_only_calls(style: Any, tokenizers: dict[str, ChatTokenizer]) -> None:
    for begun, function in zip(beginnings(tokenizers[style], FUNCTIONS, several=True), FUNCTIONS, strict=False):
        schema = json.loads(begun.json_schema)
        jsonschema.Draft202012Validator.check_schema(schema)
        valid = jsonschema.Draft202012Validator(schema).is_valid
        if style in ("mistral-v11", "mistral-v13"):
            rest: Any = {"a": 1} if function is ADD else {}
            assert not valid([])
        else:
            name, arguments = TWO
            rest = {"name": name, "arguments": arguments}
            assert not valid({"name": "subtract", "arguments": {}})
            wrong: Any = [{"name": "draw-it", "arguments": {"p": {"next": {"next": 5}}}}]
            assert not valid(wrong if style == "mistral-v3" else wrong[0])
            rest = [rest] if style == "mistral-v3" else rest
        assert valid(rest)
        _, calls = parsed(CallParser(style, FUNCTIONS), begun.text, json.dumps(rest))
        assert len(calls) == 1


@pytest.mark.parametrize("style", ["mistral-v3", "mistral-v11", "mistral-v13"])
def test_a_prefix_is_encoded_as_mistral_common_does(style: str, tokenizers: dict[str, ChatTokenizer]) -> None:
    from mistral_common.protocol.instruct.request import ChatCompletionRequest

    tokenizer: Any = tokenizers[style]
    user = {"role": "user", "content": "go"}
    request = ChatCompletionRequest.from_openai([user, {"role": "assistant", "content": "Größe is"}], None, model="m")
    request.messages[-1].prefix = True  # type: ignore[union-attr]
    reference = tokenizer.serving.encode_chat_completion(request).tokens
    assert [*tokenizer.prompt_ids([user]), *tokenizer.piece_ids("Größe is")] == reference


def test_begun_call_is_single_without_parallel_calls(tokenizers: dict[str, ChatTokenizer]) -> None:
    (begun,) = beginnings(tokenizers["mistral-v3"], [ADD], several=False)
    assert json.loads(begun.json_schema)["maxItems"] == 1


TEXTS = ["Größe", "🙂 東京", " a  b", "\n\t", "x" * 50]


@pytest.mark.parametrize("style", STYLES)
def test_the_bytes_of_tokens_join_to_the_text(style: str, tokenizers: dict[str, ChatTokenizer]) -> None:
    tokenizer = tokenizers[style]
    for text in TEXTS:
        joined = b"".join(tokenizer.token_bytes(token_id) for token_id in tokenizer.piece_ids(text))
        assert joined.decode() == (" " if style == "mistral-v3" else "") + text  # SentencePiece begins with a blank
    assert tokenizer.token_bytes(tokenizer.end_of_turn_id).decode() in ("<|im_end|>", "</s>")
    assert tokenizer.token_bytes(tokenizer.vocab_size + 100) == b""
    assert tokenizer.marker_id("[NO SUCH TOKEN]") is None


def test_a_special_token_is_no_piece_of_a_text(tiny_model_dir: Path, tmp_path: Path) -> None:
    tiny = load_tokenizer_dir(tiny_model_dir)
    assert tiny.decode(tiny.piece_ids("a<|im_end|>"), skip_special_tokens=True) == "a<|im_end|>"
    shutil.copyfile(DATA / "tekken_240718.json", tmp_path / "tekken.json")
    mistral = load_tokenizer_dir(tmp_path)
    assert mistral.decode(mistral.piece_ids("[TOOL_CALLS]"), skip_special_tokens=True) == "[TOOL_CALLS]"
