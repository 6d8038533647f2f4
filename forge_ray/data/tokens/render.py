"""Chat template → text.

The template comes from the model's folder alone, never from a row or a request. It is compiled once, by transformers' own
sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from itertools import groupby
from typing import Any

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.adapt import arguments_of
from forge_ray.data.tokens.answers import common_start
from forge_ray.data.tokens.template import Messages


@dataclass(frozen=True)
class ControlTokens:
    """`special`: the special tokens; `names`: these and the added tokens that the template writes."""

    special: frozenset[str]
    names: frozenset[str]

    @cached_property
    def special_may_be_spelled(self) -> re.Pattern[str]:
        return any_of(_quoted(self.special))

    @cached_property
    def may_be_spelled(self) -> re.Pattern[str]:
        """Found wherever a token is spelled, also in JSON, and maybe elsewhere."""
        return any_of(_quoted(self.names))


@dataclass(frozen=True, eq=False)
class Rendering:
    """The chat template of a transformers tokenizer; what it compiles is kept."""

    tokenizer: Any
    date: str = ""  # that a template prints; "": today's
    _compilations: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    _controls: dict[str, ControlTokens] = field(default_factory=dict)

    def source(self, tools: list[Any] | None) -> str:
        """The template for a conversation with these tools: a model may have one of its own for them. Raises `Reject` where
        there is none."""
        template = self.tokenizer.chat_template
        if not template:
            raise Reject("this model has no chat template")
        return template if isinstance(template, str) else str(self.tokenizer.get_chat_template(None, tools or None))

    def _compiled(self, template: str) -> tuple[Any, dict[str, Any]]:
        """The template in transformers' sandbox, and what it sees besides a conversation. Jinja's own `render` copies
        the latter for each text, which takes longer than to render."""
        if template not in self._compilations:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            compiled = _compile_jinja_template(template)
            fixed = {"strftime_now": datetime.fromisoformat(self.date).strftime} if self.date else {}
            variables = {**compiled.globals, **fixed, "documents": None, **self.tokenizer.special_tokens_map}
            self._compilations[template] = compiled, variables
        return self._compilations[template]

    @cached_property
    def _alias_reasoning(self) -> Callable[[Any], Any]:
        from transformers.utils.chat_template_utils import _alias_reasoning_fields

        alias: Callable[[Any], Any] = _alias_reasoning_fields
        return alias

    def seen(self, messages: Messages, tools: list[Any] | None, control: ControlTokens) -> tuple[Messages, bool]:
        """What the template sees of the messages: no `weight`, arguments of calls as objects; and whether a text may spell a
        control token (`spelled`), which as a text would become the token itself, so that a row or a request could forge
        turns. An answer may hold what the model writes itself (`<think>`), but never a special token."""
        special_may_be_spelled, may_be_spelled = control.special_may_be_spelled, control.may_be_spelled
        seen, is_spelled = [], bool(tools and may_be_spelled.search(_all_text(tools)))
        for message in messages:
            text = message.get("content")
            if len(message) == 2 and text is not None:  # role and content: nearly all
                seen.append(message)
            else:
                message = {key: item for key, item in message.items() if key != "weight" and item is not None}
                if calls := message.get("tool_calls"):
                    message["tool_calls"] = [with_object(call) for call in calls]
                seen += self._alias_reasoning([message])
                text = _all_text(message)
            pattern = special_may_be_spelled if message["role"] == "assistant" else may_be_spelled
            is_spelled = is_spelled or pattern.search(text) is not None
        return seen, is_spelled

    def control(self, tools: list[Any] | None) -> ControlTokens:
        """The tokens that no content may make, of the template for a conversation with these tools."""
        template = self.source(tools)
        if template not in self._controls:
            special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
            try:
                written = special.union(self.tokenizer._get_control_tokens(template))  # as transformers itself finds them
            except Exception as error:
                raise _refused(error) from error
            self._controls[template] = ControlTokens(frozenset(special), frozenset(written))
        return self._controls[template]

    def render(self, messages: Messages, tools: list[Any] | None, for_answer: bool) -> str:
        """`apply_chat_template`'s text; `for_answer` ends where the assistant starts to speak."""
        try:
            if not messages:
                raise ValueError("no turn before the answer")
            compiled, variables = self._compiled(self.source(tools))
            seen = {**variables, "messages": messages, "tools": tools, "add_generation_prompt": for_answer}
            context = compiled.environment.context_class(compiled.environment, seen, compiled.name, compiled.blocks)
            return "".join(compiled.root_render_func(context))
        except Exception as error:  # jinja errors of many kinds: the template refuses these roles
            raise _refused(error) from error


def _refused(error: Exception) -> Reject:
    return Reject(f"the chat template refuses the conversation: {str(error)[:80]}")


def any_of(words: Collection[str]) -> re.Pattern[str]:
    """The longest of the words at a place. Words that begin alike share a branch, so that thousands of them are looked for
    in hardly more time than one."""
    ordered = sorted(set(words) - {""})
    try:
        return re.compile(_branches(ordered) or r"(?!)")
    except RecursionError:  # hundreds of words, each the beginning of the next
        return re.compile("|".join(map(re.escape, reversed(ordered))))


def _branches(words: list[str]) -> str:
    """A pattern of sorted words, none of them twice; what follows the first character is a pattern of its own."""
    if len(words) == 1:
        return re.escape(words[0])
    shared = len(common_start(words[0], words[-1])) if words else 0
    if shared:
        rests = [word[shared:] for word in words]
        ends = not rests[0]  # one of the words is the beginning of the others
        return re.escape(words[0][:shared]) + f"(?:{_branches(rests[ends:])}){'?' * ends}"
    return "|".join(_branches(list(group)) for _, group in groupby(words, key=lambda word: word[0]))


def _quoted(tokens: frozenset[str]) -> frozenset[str]:
    return tokens | {json.dumps(token, ensure_ascii=False)[1:-1] for token in tokens}


def _all_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def with_object(call: Any) -> Any:
    """Templates expect a call's arguments as an object; records hold OpenAI's JSON string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": arguments_of(function)}}
