"""Every parameter of the `openai` client, and every field inside one, set to values of the client's own types, one at a
time: honoured, without a meaning as documented, or a 400 that names it."""

from __future__ import annotations

import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Required, Union

import pytest
from openai.types import completion_create_params, embedding_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from scripted_api import CALL, TEMPLATE, TOOLS, USER, Api, reset, running_with
from typing_extensions import is_typeddict

pytestmark = pytest.mark.unit

ABSENT = object()
JSON = '{"a": 1}'  # of arguments
DEPTH = 5  # of optional fields inside a value
DOCUMENT = Path(__file__).parents[3] / "docs/reference/serving-api.md"
ITEM: Any = {"type": "function", "name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}
FORMS: dict[str, tuple[Any, dict[str, Any]]] = {
    "/v1/chat/completions": (chat_create_params.CompletionCreateParamsBase, {"messages": USER}),
    "/v1/responses": (response_create_params.ResponseCreateParamsBase, {"input": "hi"}),
    "/v1/completions": (completion_create_params.CompletionCreateParamsBase, {"prompt": "hi"}),
    "/v1/embeddings": (embedding_create_params.EmbeddingCreateParams, {"input": "hi"}),
}
# What a parameter needs in order to say something
ALONG: dict[str, dict[str, Any]] = {
    "/v1/chat/completions stream_options": {"stream": True},
    "/v1/chat/completions top_logprobs": {"logprobs": True},
    "/v1/chat/completions tool_choice": {"tools": TOOLS},
    "/v1/chat/completions parallel_tool_calls": {"tools": TOOLS},
    "/v1/responses stream_options": {"stream": True},
    "/v1/responses tool_choice": {"tools": [ITEM]},
    "/v1/responses parallel_tool_calls": {"tools": [ITEM]},
    "/v1/completions stream_options": {"stream": True},
}
# Values that ask for what happens anyway
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "access_programs": ({},),
    "access_programs.cyber": ("standard",),
    "background": (False,),
    "background_options": ({},),
    "background_options.completion_window": ("soonest",),
    "context_management": ([],),
    "echo": (False,),
    "encoding_format": ("float",),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "image": ({},),
    "image.context_compression": ("auto",),
    "include": ([],),
    "input.async": (False,),
    "input.caller": ({"type": "direct"},),
    "input.type": ("message",),
    "logprobs": (False,),
    "modalities": ([], "text"),
    "parallel_tool_calls": (True,),
    "reasoning": ({},),
    "reasoning.context": ("auto",),
    "reasoning.mode": ("standard",),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "response_format.json_schema.schema": ({"type": "object"},),
    "stop": ([],),
    "store": (False,),
    "stream_options": ({},),
    "stream_options.include_obfuscation": (False,),
    "stream_options.include_usage": (False,),
    "text": ({},),
    "text.format": ({"type": "text"},),
    "text.verbosity": ("medium",),
    "tool_choice": ("auto",),
    "tools": ([],),
    "tools.allowed_callers": ([],),
    "tools.async": (False,),
    "tools.defer_loading": (False,),
    "truncation": ("disabled",),
    "verbosity": ("medium",),
}
# Read and without a meaning here, which the document says
IGNORED = (
    "include",
    "input.content.logprobs",
    "input.content.prompt_cache_breakpoint",
    "input.id",
    "input.output.prompt_cache_breakpoint",
    "input.phase",
    "input.status",
    "messages.content.prompt_cache_breakpoint",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning.generate_summary",
    "reasoning.summary",
    "response_format.json_schema.description",
    "safety_identifier",
    "service_tier",
)
# Honoured where a script shows nothing of it: what routes look at; and how strictly a schema binds, see test_tools.py
UNSEEN = ("user", "tools.function.strict", "response_format.json_schema.strict")
NAMES = [
    (path, name)
    for path, (form, _) in FORMS.items()
    for name in typing.get_type_hints(form, include_extras=True)
    if name != "model"
]
SHOWN = TEMPLATE.replace("<|im_start|>{{ m.role }}", "<|im_start|>{{ m.role }}{{ m.name }}{{ m.tool_call_id }}")


@dataclass(frozen=True)
class Case:
    """A value, and the same value without the field at `path`, which has `leaf`."""

    value: Any
    before: Any
    path: tuple[str, ...]
    leaf: Any


def cases_of(hint: Any, depth: int = DEPTH) -> Iterator[Case]:
    """Typical values of a type, as JSON: every literal, every member of a union, every optional field by itself."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Required, Annotated):
        yield from cases_of(arguments[0], depth)
    elif origin in (Union, UnionType):
        for member in arguments:
            yield from cases_of(member, depth)
    elif is_typeddict(hint):
        yield from _objects(hint, depth)
    elif origin in (list, Iterable, Sequence):
        yield Case([], ABSENT, (), [])
        for case in cases_of(arguments[0], depth):
            yield replace(case, value=[case.value], before=[] if case.before is ABSENT else [case.before])
    else:
        for value in _plain(hint, origin, arguments):
            yield Case(value, ABSENT, (), value)


def _plain(hint: Any, origin: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if origin is Literal:
        return arguments
    if origin in (dict, Mapping):
        return ({"type": "object"} if arguments[1] is object else {"40": next(cases_of(arguments[1])).value},)
    kinds: dict[Any, tuple[Any, ...]] = {type(None): (None,), bool: (True, False), int: (2,), float: (0.5,), str: ("x",)}
    return kinds.get(hint, ({"x": "x"},))


def _objects(hint: Any, depth: int) -> Iterator[Case]:
    fields = typing.get_type_hints(hint, include_extras=True)
    required = {name: hint for name, hint in fields.items() if typing.get_origin(hint) is Required}
    whole = {name: JSON if name == "arguments" else next(cases_of(field, 0)).value for name, field in required.items()}
    yield Case(whole, ABSENT, (), whole)
    if not depth:
        return
    for name, field in fields.items():
        for case in (Case(JSON, ABSENT, (), JSON),) if name == "arguments" else cases_of(field, depth - 1):
            before = whole if case.before is ABSENT else whole | {name: case.before}
            if (value := whole | {name: case.value}) != before:
                yield Case(value, before, (name, *case.path), case.leaf)


@pytest.fixture(scope="module")
def running_api(tiny_model_dir: Path) -> Iterator[Api]:
    with running_with(tiny_model_dir, SHOWN) as api:
        yield api


@pytest.fixture
def api(running_api: Api) -> Api:
    api = reset(running_api)
    api.says(f"no x, or y: {CALL}{CALL}")
    return api


def outcome(api: Api, path: str, body: dict[str, Any]) -> tuple[Any, Any]:
    """(error, None), or (None, everything that a request can change: what the engine was asked, and the answer)."""
    api.engine.requests.clear()
    response = api.post(path, **body)
    if response.status_code != 200:
        assert response.status_code == 400, (body, response.text)
        return response.json()["error"], None
    if body.get("stream"):
        return None, (list(api.engine.requests), response.text.count("data: "), response.text.count('"usage"'))
    answer = response.json()
    for part in (answer, *answer.get("choices", ()), *answer.get("output", ())):
        for name in ("id", "call_id", "created", "created_at"):
            part.pop(name, None)
        for call in part.get("message", {}).get("tool_calls", ()):
            del call["id"]
    return None, (list(api.engine.requests), answer)


def is_refused_kind(value: Any, kinds: set[str]) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) and item.get("type") in kinds for item in value)


def has_no_effect(name: str, case: Case) -> bool:
    """Whether it is written down that the case changes nothing."""
    path = ".".join((name, *case.path))
    is_written = any(path == other or path.startswith(f"{other}.") for other in (*IGNORED, *UNSEEN))
    return case.leaf is None or is_written or case.leaf in DEFAULTS.get(path, ())


@pytest.mark.parametrize(("path", "name"), NAMES)
def test_a_parameter_is_honoured_or_documented_or_refused_by_name(api: Api, path: str, name: str) -> None:
    form, base = FORMS[path]
    base = base | ALONG.get(f"{path} {name}", {})
    befores: dict[str, Any] = {}
    kinds: set[str] = set()  # of items and tools that are refused whole
    num_cases = 0
    for case in cases_of(typing.get_type_hints(form, include_extras=True)[name]):
        if is_refused_kind(case.value, kinds):
            continue
        num_cases += 1
        error, after = outcome(api, path, base | {name: case.value})
        if error is not None:
            assert error["param"] == name or error["param"].startswith(f"{name}."), (case, error)
            if error["param"] in (f"{name}.0", f"{name}.0.type") and not case.path:
                kinds |= {item["type"] for item in case.value if isinstance(item, dict) and "type" in item}
            continue
        key = repr(case.before)
        if key not in befores:
            befores[key] = outcome(api, path, base if case.before is ABSENT else base | {name: case.before})[1]
        if befores[key] == after:
            assert has_no_effect(name, case), f"{'.'.join((name, *case.path))}={case.leaf!r} changes nothing"
    assert num_cases


def test_the_document_names_every_parameter() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    names = {name for _, name in NAMES} | {path.rpartition(".")[2] for path in (*IGNORED, *UNSEEN)}
    missing = sorted(name for name in names if f"`{name}" not in text and f".{name}`" not in text)
    assert not missing
