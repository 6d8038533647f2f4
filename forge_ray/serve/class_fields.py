"""The fields of requests to a classifier: Mistral's, and OpenAI's of moderations (no ray, no torch)."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field, model_validator

from forge_ray.serve.fields import Message, TextPart
from forge_ray.serve.wire import Wire


class Conversation(Wire):
    messages: list[Message] = Field(min_length=1)


class ForClassifier(Wire):
    """What the requests have in common. `conversations`: one for each result, in order; a text is read as a user's message,
    as in training."""

    model: str
    metadata: dict[str, str] | None = Field(None, max_length=16)


class ClassificationRequest(ForClassifier):
    """Of `/v1/classifications`."""

    input: str | list[str]

    @model_validator(mode="after")
    def _has_texts(self) -> ClassificationRequest:
        if not self.input or any(not text for text in self.input):
            raise ValueError("input: empty; send a text, or a list of texts")
        return self

    @property
    def conversations(self) -> Sequence[Sequence[Message]]:
        texts = [self.input] if isinstance(self.input, str) else self.input
        return [[Message(role="user", content=text)] for text in texts]


class ModerationRequest(ForClassifier):
    """Of `/v1/moderations`. Parts of text are one input together, as at OpenAI."""

    input: str | list[str] | list[TextPart]

    @model_validator(mode="after")
    def _has_texts(self) -> ModerationRequest:
        if not self.input or not all(one.text if isinstance(one, TextPart) else one for one in self.input):
            raise ValueError("input: empty; send a text, a list of texts, or a list of parts of one text")
        return self

    @property
    def conversations(self) -> Sequence[Sequence[Message]]:
        if isinstance(self.input, str):
            return [[Message(role="user", content=self.input)]]
        if parts := [one for one in self.input if isinstance(one, TextPart)]:
            return [[Message(role="user", content="".join(part.text for part in parts))]]
        return [[Message(role="user", content=text)] for text in self.input if isinstance(text, str)]


class ChatClassificationRequest(ForClassifier):
    """Of `/v1/chat/classifications`."""

    input: Conversation | list[Conversation]

    @model_validator(mode="after")
    def _has_conversations(self) -> ChatClassificationRequest:
        if not self.input:
            raise ValueError("input: empty; send {messages: […]}, or a list of them")
        return self

    @property
    def conversations(self) -> Sequence[Sequence[Message]]:
        return [one.messages for one in ([self.input] if isinstance(self.input, Conversation) else self.input)]


class ChatModerationRequest(ForClassifier):
    """Of `/v1/chat/moderations`."""

    input: list[Message] | list[list[Message]]

    @model_validator(mode="after")
    def _has_messages(self) -> ChatModerationRequest:
        if not self.input or any(not one for one in self.input):
            raise ValueError("input: empty; send a list of messages, or a list of such lists")
        return self

    @property
    def conversations(self) -> Sequence[Sequence[Message]]:
        of_one = [one for one in self.input if isinstance(one, Message)]
        return [of_one] if of_one else [one for one in self.input if not isinstance(one, Message)]


ClassifyingRequest = ClassificationRequest | ModerationRequest | ChatClassificationRequest | ChatModerationRequest
