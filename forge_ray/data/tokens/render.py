"""Chat template → text.

The template comes from the model's folder alone, never from a row or a request. It is compiled once, by transformers' own
sandbox.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

from forge_ray.data.record.schema import Reject
from forge_ray.data.tokens.adapt import arguments_of
from forge_ray.data.tokens.template import Chat, Messages


@dataclass(frozen=True, eq=False)
class Rendering:
    """The chat template of a transformers tokenizer; what it compiles is kept."""

    tokenizer: Any
    date: str = ""  # that a template prints; "": today's
    _compilations: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    _patterns: dict[str, tuple[re.Pattern[str], re.Pattern[str]]] = field(default_factory=dict)

    def source(self, tools: list[Any] | None) -> str:
        """The template for a conversation with these tools: a model may have one of its own for them."""
        template = self.tokenizer.chat_template
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

    def checked(self, messages: Messages, tools: list[Any] | None) -> Chat:
        """What the template sees: no `weight`, arguments of calls as objects; raises where a text holds a control token.

        As a text it would become the token itself, and a row or a request could forge turns. An answer may hold what
        the model writes itself (`<think>`), but never a special token.
        """
        special, control = self._control(self.source(tools))
        seen = []
        for message in messages:
            text = message.get("content")
            if len(message) == 2 and text is not None:  # role and content: nearly all
                seen.append(message)
            else:
                message = {key: item for key, item in message.items() if key != "weight" and item is not None}
                if calls := message.get("tool_calls"):
                    message["tool_calls"] = [_with_object(call) for call in calls]
                seen += self._alias_reasoning([message])
                text = _all_text(message)
            if match := (special if message["role"] == "assistant" else control).search(text):
                raise Reject(f"a message contains the special token {match[0]!r}")
        if tools and (match := control.search(_all_text(tools))):
            raise Reject(f"a tool contains the special token {match[0]!r}")
        return seen, tools or None

    def _control(self, template: str) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """Patterns of the special tokens, and of these with the added tokens that the template writes."""
        if template not in self._patterns:
            special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
            try:
                written = special.union(self.tokenizer._get_control_tokens(template))  # as transformers itself finds them
            except Exception as error:
                raise _refused(error) from error
            self._patterns[template] = (any_of(special), any_of(written))
        return self._patterns[template]

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


def any_of(words: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)) or r"(?!)")


def _all_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _with_object(call: Any) -> Any:
    """Templates expect a call's arguments as an object; records hold OpenAI's JSON string."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    return {**call, "function": {**function, "arguments": arguments_of(function)}}
