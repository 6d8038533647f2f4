"""What a process and the engine that it started in another one say to each other (imports no torch).

Messages are JSON over a socket that only these two processes hold, so that neither side runs what the other one sent. To
the engine: [what, number, arguments…], where `number` names the request. From it, in one message a step: for each request
its tokens; and the results and errors of calls.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple
from multiprocessing.connection import Connection
from typing import Any

from pydantic import TypeAdapter

from forge_ray import errors
from forge_ray.errors import EngineError, ForgeError
from forge_ray.inference.engine import GenerationRequest, Token

REQUESTS = TypeAdapter(list[GenerationRequest])


def send(connection: Connection, message: Sequence[Any]) -> None:
    connection.send_bytes(json.dumps(message, separators=(",", ":")).encode())


def receive(connection: Connection) -> Any:
    """The next message; `EOFError` or `OSError` where the other side is gone."""
    return json.loads(connection.recv_bytes())


def from_requests(requests: Sequence[GenerationRequest]) -> Any:
    return REQUESTS.dump_python(list(requests), mode="json")


def to_requests(values: Any) -> list[GenerationRequest]:
    return REQUESTS.validate_json(json.dumps(values))


def from_token(token: Token) -> list[Any]:
    """A token that has no log-probabilities, which most have not, as its id alone."""
    return list(astuple(token)) if token.token_id is None or token.logprob is not None else [token.token_id]


def to_token(values: list[Any]) -> Token:
    token_id, *rest = values
    if not rest:
        return Token(token_id)
    finish_reason, logprob, best = rest
    return Token(token_id, finish_reason, logprob, tuple((other, value) for other, value in best))


def from_error(error: Exception) -> list[str]:
    if isinstance(error, ForgeError):
        return [type(error).__name__, error.message, error.hint]
    cause = f"{type(error).__name__}: {error}"
    return ["EngineError", f"the engine failed: {cause}", "look for the cause in the log of this process"]


def to_error(values: list[str]) -> ForgeError:
    name, message, hint = values
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, ForgeError):
        return kind(message, hint)
    return EngineError(message, hint)
