"""The JSON object that a benchmark prints last."""

from __future__ import annotations

import json
from typing import Any


def last_object(text: str) -> dict[str, Any]:
    """The last JSON object that a line of `text` begins. Raises ValueError where no line begins one."""
    start = text.rindex("\n{") + 1 if "\n{" in text else text.index("{")
    report: dict[str, Any] = json.JSONDecoder().raw_decode(text, start)[0]
    return report
