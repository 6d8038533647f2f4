"""Which requests are tokenised in the event loop: a few plain texts, in a fraction of a millisecond, which is less than to
hand them to a thread and to hear of them again (no ray).

Whatever may take longer than its characters say is not among them: tools, schemas, switches of a template, calls, reasoning,
and texts that may spell a special token (the first one makes a copy of the tokenizer).
"""

from __future__ import annotations

from collections.abc import Sequence

from forge_ray.serve.fields import ChatRequest, CompletionRequest, Message
from forge_ray.serve.prompt import Asking

MAX_TEXTS, MAX_CHARACTERS = 16, 2048  # characters or ids, of all texts
OPENINGS = ("<", "[")  # with which special tokens begin


def is_short(body: Asking) -> bool:
    """Whether the prompts of a request are made of few, short and plain texts."""
    if isinstance(body, ChatRequest):
        has_more = body.tools or body.response_format or body.reasoning_effort or body.chat_template_kwargs
        return not has_more and all(map(_is_plain, body.messages)) and _are_few([one.text for one in body.messages])
    return isinstance(body, CompletionRequest) and _are_few(body.prompts)


def _is_plain(message: Message) -> bool:
    more = message.name, message.tool_call_id, message.tool_calls, message.reasoning_content
    return isinstance(message.content, str) and not message.prefix and not any(more)


def _are_few(texts: Sequence[str | Sequence[int]]) -> bool:
    if len(texts) > MAX_TEXTS or sum(map(len, texts)) > MAX_CHARACTERS:
        return False
    return not any(isinstance(text, str) and opening in text for text in texts for opening in OPENINGS)
