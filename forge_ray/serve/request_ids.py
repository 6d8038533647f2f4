"""Names of requests, which stand in logs."""

from __future__ import annotations

import re
import secrets

REQUEST_ID = re.compile(r"[\w.:/+=-]{1,128}", re.ASCII)


def request_id_of(header: str) -> str:
    """The client's own id for the request if it is safe in a log line, else a new one."""
    return header if REQUEST_ID.fullmatch(header) else f"req_{secrets.token_hex(12)}"
