"""Switches of a chat template or a tokenizer (`reasoning_effort`, `enable_thinking`), set by a request (no ray, no torch).

A template's switches are the variables that it reads and that a conversation does not fill. The template with a switch set
is a template of its own: asked anew how it writes answers and calls, and kept with the tokenizer that it belongs to.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from weakref import WeakKeyDictionary

import jsonschema

from forge_ray.data.tokens.chat import ChatTokenizer
from forge_ray.data.tokens.hf import HfTokenizer
from forge_ray.data.tokens.mistral import MistralChat
from forge_ray.data.tokens.text_tools import TextTools
from forge_ray.serve.fields import ChatRequest, ResponseFormat
from forge_ray.serve.openai import ApiError

Value = bool | int | float | str | None

MAX_SETTINGS = 16  # templates kept per tokenizer; each has been compiled and probed
# What a template has from the conversation and from its tokenizer
CONVERSATION = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
OPTIONAL = ("defined", "undefined", "default", "d")  # tests and filters by which a template asks whether a switch is set
ON_OFF = ("enable_thinking", "thinking")
TEXT = re.compile(r"[\w .,:+/-]{0,64}", re.ASCII)
_KEPT: WeakKeyDictionary[HfTokenizer, dict[str, HfTokenizer]] = WeakKeyDictionary()


def switched(tokenizer: ChatTokenizer, body: ChatRequest) -> ChatTokenizer:
    """The tokenizer with its template's switches as the request sets them. `ApiError` 400 for a switch that the template
    does not have, unless the request switches off what is not there."""
    if isinstance(tokenizer, TextTools):
        inner = switched(tokenizer.inner, body)
        return tokenizer if inner is tokenizer.inner else replace(tokenizer, inner=inner)
    if isinstance(tokenizer, MistralChat):
        tokenizer = _with_format(tokenizer, body.response_format)
    if body.reasoning_effort is None and not body.chat_template_kwargs:
        return tokenizer
    names = switches_of(tokenizer)
    values = dict(_effort(body.reasoning_effort, names))
    for name, value in (body.chat_template_kwargs or {}).items():
        param = f"chat_template_kwargs.{name}"
        if name in names:
            if isinstance(value, str) and not TEXT.fullmatch(value):
                raise ApiError(400, f"{param}: a switch takes up to 64 letters, digits, blanks and .,:+/-", param=param)
            if values.get(name, value) != value:
                rule = f"{param}: {json.dumps(value)} contradicts reasoning_effort {body.reasoning_effort!r}; send one"
                raise ApiError(400, rule, param=param)
            values[name] = value
        elif value not in (None, False):
            raise _no_switch(param, name, names)
    chosen = {name: value for name, value in values.items() if value is not None}
    if not chosen:
        return tokenizer
    if isinstance(tokenizer, MistralChat):
        return _with_effort(tokenizer, chosen["reasoning_effort"], "" if body.reasoning_effort else "chat_template_kwargs.")
    return _set(tokenizer, chosen) if isinstance(tokenizer, HfTokenizer) else tokenizer


def _with_effort(tokenizer: MistralChat, effort: Value, place: str) -> MistralChat:
    if effort not in tokenizer.efforts:
        param = f"{place}reasoning_effort"
        rule = f"{param}: {json.dumps(effort)} is not one of this model's: {', '.join(tokenizer.efforts)}"
        raise ApiError(400, rule, param=param)
    return replace(tokenizer, settings={**tokenizer.settings, "reasoning_effort": effort})


def _with_format(tokenizer: MistralChat, form: ResponseFormat | None) -> MistralChat:
    """The tokenizer that shows the model the schema of its answer, where its file has a place for it."""
    if form is None or form.type == "text" or not tokenizer.shows_formats:
        return tokenizer
    sent: dict[str, object] = {"type": form.type}
    if form.json_schema is not None:
        schema = json.loads(form.text)
        try:
            jsonschema.Draft7Validator.check_schema(schema)
        except jsonschema.SchemaError as error:
            rule = f"response_format: not a JSON schema of draft 7, as this model is shown it: {error.message[:200]}"
            raise ApiError(400, rule, param="response_format") from None
        sent["json_schema"] = {"name": form.json_schema.name, "schema": schema}
    return replace(tokenizer, settings={**tokenizer.settings, "response_format": sent})


def switches_of(tokenizer: ChatTokenizer) -> frozenset[str]:
    """The variables of the chat template that a request may set; of Mistral's own tokenizers, the effort of the newer."""
    if isinstance(tokenizer, MistralChat):
        return frozenset({"reasoning_effort"} if tokenizer.efforts else ())
    if not isinstance(tokenizer, HfTokenizer) or not tokenizer.has_chat:
        return frozenset()
    filled = {*CONVERSATION, *TOKENS, *tokenizer.tokenizer.special_tokens_map}
    return frozenset().union(*map(_variables, _sources(tokenizer).values())) - filled


def _effort(effort: str | None, names: frozenset[str]) -> Mapping[str, Value]:
    """The switch that `reasoning_effort` sets. One that only turns reasoning on and off is turned off by `none`."""
    if effort is None:
        return {}
    if "reasoning_effort" in names:
        return {"reasoning_effort": effort}
    if effort == "none":
        return {name: False for name in ON_OFF if name in names}
    raise _no_switch("reasoning_effort", "reasoning_effort", names)


def _no_switch(param: str, name: str, names: frozenset[str]) -> ApiError:
    others = f"; it has {', '.join(sorted(names))}, which `chat_template_kwargs` sets" if names else ""
    rule = f"{param}: this model's chat template has no switch {name[:80]!r}{others}"
    return ApiError(400, rule, param=param[:100], code="unsupported_parameter")


def _sources(tokenizer: HfTokenizer) -> dict[str, str]:
    """The templates of a tokenizer by name; "" where it has one."""
    template = tokenizer.tokenizer.chat_template
    return {"": template} if isinstance(template, str) else dict(template or {})


@lru_cache(maxsize=64)
def _variables(source: str) -> frozenset[str]:
    """Variables that a template reads and does not bind itself, other than as the default of one that is not defined."""
    from jinja2 import TemplateError, meta, nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        environment = _compile_jinja_template(source).environment
        tree = environment.parse(source)
        variables: set[str] = meta.find_undeclared_variables(tree) - environment.globals.keys()
        names = list(tree.find_all(nodes.Name))
        variables -= {name.name for name in names if name.ctx == "param"}
        bound = {name.name for name in names if name.ctx == "store"}
        checks = (*tree.find_all(nodes.Test), *tree.find_all(nodes.Filter))
        optional = {check.node.name for check in checks if check.name in OPTIONAL and isinstance(check.node, nodes.Name)}
        return frozenset(variables - (bound - optional))
    except TemplateError:
        return frozenset()  # what is wrong with it is said when a conversation is rendered


def _set(tokenizer: HfTokenizer, values: Mapping[str, Value]) -> HfTokenizer:
    """The tokenizer whose template begins by setting the switches."""
    # Each line ends with its tag, and jinja trims the line's end
    head = "".join(f"{{% set {name} = {_literal(value)} %}}\n" for name, value in sorted(values.items()))
    kept = _KEPT.setdefault(tokenizer, {})
    one = kept.get(head)
    if one is None:
        own = copy.copy(tokenizer.tokenizer)
        sources = {name: head + source for name, source in _sources(tokenizer).items()}
        own.chat_template = sources[""] if sources.keys() == {""} else sources
        if len(kept) >= MAX_SETTINGS:
            kept.clear()
        one = kept[head] = replace(tokenizer, tokenizer=own, _formats={})
    return one  # another thread may have cleared the others meanwhile


def _literal(value: Value) -> str:
    """As jinja reads it; texts hold nothing that needs an escape (`TEXT`)."""
    return f'"{value}"' if isinstance(value, str) else json.dumps(value)
