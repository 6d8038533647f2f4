"""Which headers a gateway passes on, and what it adds (no torch, no ray)."""

from __future__ import annotations

import hashlib
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

CREDENTIALS = ("authorization", "x-api-key")
HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)


def end_to_end(headers: Any, *drop: str) -> CIMultiDict[str]:
    """Headers that belong to the message and not to the connection, without `drop`."""
    named = {name.strip().lower() for value in headers.getall("connection", ()) for name in value.split(",")}
    dropped = HOP_BY_HOP | named | set(drop)
    return CIMultiDict((name, value) for name, value in headers.items() if name.lower() not in dropped)


def upstream_headers(request: web.BaseRequest, request_id: str) -> CIMultiDict[str]:
    """What an endpoint is sent: the client's headers that are meant for it, and who the client is."""
    headers = end_to_end(request.headers, "content-length", "expect", "host")  # the address has its own name
    headers["x-request-id"] = request_id
    before = ", ".join(headers.popall("x-forwarded-for", []))
    headers["x-forwarded-for"] = ", ".join(part for part in (before, request.remote or "") if part)
    headers.setdefault("x-forwarded-proto", "https" if request.secure else "http")
    hosts = [*headers.popall("x-forwarded-host", []), request.headers.get("host", "")]  # an endpoint without keys checks all
    headers["x-forwarded-host"] = ", ".join(filter(None, hosts))
    return headers


def caller_of(request: web.BaseRequest) -> str:
    """Whose share of the gateway's memory a request takes: the credentials', or the address's where it has none."""
    values = [request.headers.get(name, "") for name in CREDENTIALS]
    return hashlib.sha256("\0".join(values).encode()).hexdigest() if any(values) else str(request.remote)
