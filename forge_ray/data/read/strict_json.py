"""JSON as a row may hold it: what two readers could read differently is refused, not guessed."""

from __future__ import annotations

import json
import re
from typing import Any

from forge_ray.records import canonical_json

MAX_DEPTH = 64  # of nested lists and objects; Python's own limit depends on the version and on the caller
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")  # a NUL as JSON escapes it; `\\u0000` is a backslash and five letters


PADDING = "a line of NUL bytes: the file is padded, or its end was never written"


class Reject(ValueError):
    """A row that cannot be used; the text is the reason that the quarantine counts."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):  # which of the two counts depends on the reader
        raise Reject("a key is written twice")
    return value


def _no_constant(name: str) -> Any:
    raise Reject("not JSON")  # NaN and Infinity are Python's, not JSON's


_DECODE = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_constant).decode  # made once: 3 µs each


def decode(raw: bytes) -> Any:
    """The value of one line; a byte order mark is skipped."""
    if raw[:1] == b"\0" and not raw.strip(b"\0 \t\r\n"):
        raise Reject(PADDING)
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        raise Reject("not UTF-8") from None
    return loads(text.removeprefix("\ufeff"))


def loads(text: str) -> Any:
    try:
        return _DECODE(text)
    except Reject:
        raise
    except ValueError:
        raise Reject("not JSON") from None
    except RecursionError:
        raise Reject("nested too deeply") from None


def checked(value: Any) -> bytes:
    """The canonical JSON of `value`, which a hash, a table and a tokenizer must all be able to hold; nesting is the caller's
    to check where it is not bounded."""
    try:
        data = canonical_json(value)
    except UnicodeEncodeError:
        raise Reject("lone surrogate") from None
    except RecursionError:
        raise Reject("nested too deeply") from None
    except ValueError:
        raise Reject("a number is not finite") from None
    except TypeError:  # a date or bytes in a Parquet column
        raise Reject("a value is of a type that JSON lacks") from None
    if b"\\u0000" in data and _NUL.search(data):
        raise Reject("a NUL character")
    return data


def reject_deep(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        nested = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list)))
        level = [child for children in nested for child in children]
        if not level:
            return
    raise Reject("nested too deeply")
