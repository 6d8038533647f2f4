"""Origins of URLs: scheme, host and port, in the one form in which two of them are compared (pure)."""

from __future__ import annotations

import ipaddress
from urllib.parse import SplitResult, urlsplit

from forge_ray.config.base import SettingError

PORTS = {"https": 443, "http": 80}
EXAMPLE = "for example https://api.vendor.example/v1"


def parts_of(url: str) -> SplitResult:
    """The parts of an https URL, or of an http one of this machine's loopback. Raises `SettingError` for any other text: one
    with a user name, a query or a fragment has a place for secrets, which records and logs would keep."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        host = ""
    if not host or not url.isprintable() or " " in url or parts.scheme not in PORTS:
        raise SettingError(f"{url[:200]!r} is not an https URL", EXAMPLE)
    if parts.username is not None or parts.password is not None or "?" in url or "#" in url:
        raise SettingError(
            f"the URL of {host} has a user name, a query or a fragment", f"scheme, host, port and path alone; {EXAMPLE}"
        )
    if parts.scheme == "http" and not is_loopback(host):
        raise SettingError(
            f"{url[:200]!r} is not encrypted: http is for this machine's loopback alone", f"use https{url[4:200]}"
        )
    return parts


def origin_of(url: str) -> str:
    """`scheme://host`, with the port where it is not the scheme's own; raises `SettingError` as `parts_of`."""
    parts = parts_of(url)
    host = parts.hostname or ""
    name = f"[{host}]" if ":" in host else host.rstrip(".")
    is_own = parts.port in (None, PORTS[parts.scheme])
    return f"{parts.scheme}://{name}" + ("" if is_own else f":{parts.port}")


def is_loopback(host: str) -> bool:
    """Whether a host of a URL is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
