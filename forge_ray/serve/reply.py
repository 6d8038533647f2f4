"""OpenAI's response objects, whole and in chunks, and the headers of an answer (no ray, no torch)."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from forge_ray.data.tokens.template import ChatTokenizer
from forge_ray.serve.context import Chosen
from forge_ray.serve.text import Piece
from forge_ray.serve.tools import Call

FinishReason = Literal["stop", "length", "tool_calls"]
IMPOSSIBLE = -9999.0
LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\u0085\u2028\u2029"}


@dataclass(frozen=True)
class Part:
    """New text, calls and tokens of one choice; the last has a finish reason. `num_tokens`: generated so far,
    `num_reasoning` of them as reasoning."""

    text: str = ""
    calls: tuple[Call, ...] = ()
    pieces: tuple[Piece, ...] = ()
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    reasoning: str = ""
    num_reasoning: int = 0

    @property
    def has_content(self) -> bool:
        return bool(self.text or self.reasoning or self.calls or self.pieces or self.finish_reason)


def joined(parts: Sequence[Part]) -> Part:
    """All parts of a choice as one."""
    return Part(
        "".join(part.text for part in parts),
        tuple(call for part in parts for call in part.calls),
        tuple(piece for part in parts for piece in part.pieces),
        parts[-1].num_tokens,
        parts[-1].finish_reason or "length",
        "".join(part.reasoning for part in parts),
        parts[-1].num_reasoning,
    )


class Reply:
    """Builds the response objects of one request: same id, time, model and fingerprint in each.

    `num_logprobs` None: without log-probabilities. `answer_id`: its id; empty: a new one. `metadata`
    is returned with the whole answer and the first chunk.
    """

    def __init__(
        self,
        kind: Literal["chat", "text"],
        model: str,
        fingerprint: str,
        tokenizer: ChatTokenizer | None = None,
        num_logprobs: int | None = None,
        metadata: Mapping[str, str] | None = None,
        answer_id: str = "",
    ) -> None:
        self.chat = kind == "chat"
        self._tokenizer = tokenizer
        self._num_logprobs = num_logprobs
        self._metadata = {"metadata": dict(metadata)} if metadata else {}
        self._head = {
            "id": answer_id or new_id(kind),
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, choices: Sequence[Part], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request that does not stream: one part per choice, in order."""
        kind = {"object": "chat.completion" if self.chat else "text_completion"}
        objects = [self._choice(index, part) for index, part in enumerate(choices)]
        return self._head | self._metadata | kind | {"choices": objects, "usage": usage}

    def _choice(self, index: int, part: Part) -> dict[str, Any]:
        choice = {"index": index, "finish_reason": part.finish_reason, "logprobs": self._logprobs(part.pieces)}
        if not self.chat:
            return choice | {"text": part.text}
        return choice | {"message": message_of(part) | {"refusal": None}}

    def first_chunk(self, index: int) -> dict[str, Any]:
        """The chunk with the role; the first one of each choice of a chat."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) | self._metadata

    def chunk(self, index: int, part: Part, num_calls: int = 0) -> dict[str, Any]:
        """One chunk of a stream; `num_calls`: the calls that this choice made before."""
        logprobs = self._logprobs(part.pieces) if part.pieces else None
        if not self.chat:
            return self._piece([self._choice(index, part) | {"logprobs": logprobs}])
        delta: dict[str, Any] = {"content": part.text} if part.text or part.pieces else {}
        if part.reasoning:
            delta["reasoning_content"] = part.reasoning
        if part.calls:
            delta["tool_calls"] = [{"index": num_calls + i} | _call(call) for i, call in enumerate(part.calls)]
        return self._chunk(index, delta, part.finish_reason, logprobs)

    def usage_chunk(self, usage: dict[str, Any]) -> dict[str, Any]:
        return self._piece([]) | {"usage": usage}

    def _chunk(self, index: int, delta: dict[str, Any], finish_reason: str | None, logprobs: Any = None) -> dict[str, Any]:
        return self._piece([{"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}])

    def _piece(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": "chat.completion.chunk" if self.chat else "text_completion", "choices": choices}

    def _logprobs(self, pieces: Iterable[Piece]) -> dict[str, Any] | None:
        if self._num_logprobs is None or self._tokenizer is None:
            return None
        return chat_logprobs(self._tokenizer, pieces) if self.chat else text_logprobs(self._tokenizer, pieces)


def new_id(kind: Literal["chat", "text"]) -> str:
    """The id of a new answer."""
    return ("chatcmpl-" if kind == "chat" else "cmpl-") + secrets.token_hex(12)


def message_of(part: Part) -> dict[str, Any]:
    """A whole choice as an assistant's message."""
    message: dict[str, Any] = {"role": "assistant", "content": part.text}
    if part.reasoning:
        message["reasoning_content"] = part.reasoning
    if part.calls:
        message |= {"content": part.text or None, "tool_calls": [_call(call) for call in part.calls]}
    return message


def _call(call: Call) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def chat_logprobs(tokenizer: ChatTokenizer, pieces: Iterable[Piece]) -> dict[str, Any]:
    """Chat's log-probabilities. `bytes` are exact where a token is a part of a character; its `token` then shows U+FFFD."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id)
        return {"token": raw.decode(errors="replace"), "bytes": list(raw), "logprob": _finite(logprob)}

    content = [
        entry(piece.token.token_id or 0, piece.token.logprob)
        | {"top_logprobs": [entry(*top) for top in piece.token.top_logprobs]}
        for piece in pieces
    ]
    return {"content": content, "refusal": None}


def text_logprobs(tokenizer: ChatTokenizer, pieces: Iterable[Piece]) -> dict[str, Any]:
    """The older format, in columns; a token that is a part of a character is written `bytes:\\xe2\\x82`, as OpenAI does."""

    def name(token_id: int) -> str:
        raw = tokenizer.token_bytes(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    tokens = list(pieces)
    return {
        "tokens": [name(piece.token.token_id or 0) for piece in tokens],
        "token_logprobs": [_finite(piece.token.logprob) for piece in tokens],
        "top_logprobs": [{name(token): _finite(logprob) for token, logprob in piece.token.top_logprobs} for piece in tokens],
        "text_offset": [piece.offset for piece in tokens],
    }


def _finite(logprob: float | None) -> float:
    """JSON has no infinity: an impossible token gets the number that OpenAI uses."""
    return IMPOSSIBLE if logprob is None or logprob == float("-inf") else logprob


def usage(num_prompt: int, num_completion: int, num_reasoning: int = 0) -> dict[str, Any]:
    """Tokens of a request; those of reasoning are among the completion's."""
    details = {"completion_tokens_details": {"reasoning_tokens": num_reasoning}} if num_reasoning else {}
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
        "total_tokens": num_prompt + num_completion,
        **details,
    }


def answered_by(chosen: Chosen) -> dict[str, str]:
    """Response headers: which version answers, and by which route."""
    loaded = chosen.loaded
    route = {"x-forge-route": chosen.route} if chosen.route else {}
    return {"x-forge-model-version": loaded.version, "x-forge-model-digest": loaded.digest, **route}


def sse(payload: dict[str, Any] | Literal["[DONE]"], event: str = "") -> bytes:
    """One server-sent event, with a name or without. Characters that some clients take for the end of a line are escaped;
    JSON has them in strings alone."""
    text = payload if isinstance(payload, str) else json.dumps(payload, ensure_ascii=False, separators=(",", ":"))
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {text.translate(LINE_ENDS)}\n\n".encode()
