"""The access log: one JSON line per request, without prompts, answers or keys (no ray)."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from forge_ray.serve.context import Caller

LOG = logging.getLogger("forge_ray.access")
SERVE_LOG = logging.getLogger("ray.serve")


def write_access_log(stream: TextIO | None = None) -> None:
    """Write the log's lines, and only them, to `stream` (stderr); without this they go where `logging` sends them.

    Where Ray Serve has put its own log in the place of stderr (RAY_SERVE_LOG_TO_STDERR=0), they go to that log directly.
    They end in the same file either way, now whatever that log's level is; but for each line of stderr Serve searches the
    whole stack for who wrote it, which costs four times the rest of the line.
    """
    LOG.setLevel(logging.INFO)
    if stream is None and not isinstance(sys.stderr, io.TextIOBase):
        LOG.handlers.clear()
        LOG.parent, LOG.propagate = SERVE_LOG, True  # whatever handlers it has by then: Serve replaces them
        return
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOG.handlers[:] = [handler]
    LOG.propagate = False


def access_line(scope: Mapping[str, Any], caller: Caller, status: int, client_gone: bool, seconds: float) -> str:
    """One request as JSON. The route is the template that matched, never a path that a client made up."""
    first_token_s = caller.first_token_s
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": caller.request_id,
        "key": caller.key.id if caller.key else "",
        "method": scope["method"],
        "route": getattr(scope.get("route"), "path", "unknown"),
        "model": caller.name,
        "model_version": caller.version,
        "status": status,
        "prompt_tokens": caller.prompt_tokens,
        "completion_tokens": caller.completion_tokens,
        "first_token_ms": None if first_token_s is None else round(first_token_s * 1000, 1),
        "ms": round(seconds * 1000, 1),
        "client_gone": client_gone,
    }
    if status in (401, 403):  # whom to ask about a wrong key
        line["address"] = (scope.get("client") or ("",))[0]
    return json.dumps(line, ensure_ascii=False)
