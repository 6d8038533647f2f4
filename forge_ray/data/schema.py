"""What a record may be: a chat (`messages`, `tools`) or plain `text`; validation and identity (level 2)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from forge_ray.records import canonical_json

KINDS = ("chat", "text", "preference", "feedback")
ROLES = ("system", "user", "assistant", "tool")
MESSAGE_KEYS = {"role", "content", "weight", "name", "tool_calls", "tool_call_id"}
LABELS = {"role", "id", "type", "tool_call_id", "name", "tools", "image", "weight"}  # never free text
RECORD_HEX = 24
MAX_DEPTH = 64  # of nested lists and objects; Python's own limit depends on the version and on the caller


class Reject(ValueError):
    """A row that cannot be used; the text is the reason that the quarantine counts."""


@dataclass(frozen=True)
class DataRecord:
    """Normalised content of one row, and `meta`: columns that the run file names (licence, consent, subject), which are
    neither trained nor part of the record's identity."""

    content: dict[str, Any]
    kind: str = "chat"
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """`rec_<24 hex>`: a hash of the content, the same wherever the row is found."""
        return "rec_" + hashlib.sha256(canonical_json(self.content)).hexdigest()[:RECORD_HEX]

    @property
    def json(self) -> str:
        return canonical_json(self.content).decode()

    @property
    def messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = self.content.get("messages", [])
        return messages


def texts(record: DataRecord) -> list[str]:
    """Every string that a person wrote in the record, in order: message contents, answers, tool arguments, plain text."""
    found: list[str] = []
    _walk(record.content, lambda text: found.append(text) or text)  # type: ignore[func-returns-value]
    return found


def with_texts(record: DataRecord, change: Callable[[str], str]) -> DataRecord:
    """The same record with each of its `texts` replaced by `change(text)`."""
    return replace(record, content=_walk(record.content, change))


def _walk(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_walk(item, change) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: item if key in LABELS else _walk(item, change) for key, item in value.items()}


def parse_line(raw: bytes) -> DataRecord:
    """One JSONL line to a record; raises `Reject`."""
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise Reject("not UTF-8") from None
    except Reject:
        raise
    except ValueError:
        raise Reject("not JSON") from None
    except RecursionError:
        raise Reject("nested too deeply") from None
    return parse_record(value)


def _no_constant(name: str) -> Any:
    raise Reject("not JSON")  # NaN and Infinity are Python's, not JSON's


def parse_record(value: Any) -> DataRecord:
    """A decoded row to a record; columns other than `messages`, `tools` and `text` are metadata and not trained on."""
    if not isinstance(value, dict):
        raise Reject("not an object")
    messages, text = value.get("messages"), value.get("text")
    if (messages is None) == (text is None):
        raise Reject("needs either `messages` or `text`")
    if text is not None:
        if not isinstance(text, str):
            raise Reject("`text` is not a string")
        if not text.strip():
            raise Reject("`text` is empty")
        record = DataRecord({"text": text}, "text")
    else:
        if not isinstance(messages, list) or not messages:
            raise Reject("`messages` is not a non-empty list")
        content: dict[str, Any] = {"messages": [_message(message) for message in messages]}
        if tools := value.get("tools"):
            if not isinstance(tools, list):
                raise Reject("`tools` is not a list")
            content["tools"] = tools
        record = DataRecord(content)
        if not any(message["role"] == "assistant" and message.get("weight", 1) for message in record.messages):
            raise Reject("no assistant turn to train on")
    if _too_deep(record.content):
        raise Reject("nested too deeply")
    try:
        canonical_json(record.content)
    except UnicodeEncodeError:
        raise Reject("lone surrogate") from None
    except ValueError:
        raise Reject("a number is not finite") from None
    except TypeError:  # a date or bytes in a Parquet column
        raise Reject("a value is of a type that JSON lacks") from None
    return record


def _too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [child for children in nested for child in children]
        if not level:
            return False
    return True


def _message(value: Any) -> dict[str, Any]:
    """One message without its empty fields, so that a Parquet row and a JSON line of the same chat are the same record."""
    if not isinstance(value, dict):
        raise Reject("a message is not an object")
    message = {key: item for key, item in value.items() if item is not None and (key, item) != ("tool_calls", [])}
    if unknown := set(message) - MESSAGE_KEYS:
        raise Reject(f"a message has an unknown key {sorted(unknown)[0][:40]!r}")
    if message.get("role") not in ROLES:
        raise Reject("a message has no known role")
    content, calls = message.get("content"), message.get("tool_calls")
    if calls is not None and (message["role"] != "assistant" or not isinstance(calls, list)):
        raise Reject("`tool_calls` is not a list of an assistant turn")
    if content is None and not calls:
        raise Reject("a message has no content")
    if content is not None and not isinstance(content, str):
        raise Reject("a message's content is not a string")
    if message["role"] == "assistant" and not calls and not str(content).strip():
        raise Reject("an assistant turn is empty")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise Reject("a message's weight is not 0 or 1")
    message.pop("weight", None)
    return message if weight else {**message, "weight": 0}  # a Parquet column may say 0.0
