"""Proxies in the environment (`http_proxy` and the like): this machine and the cluster are never asked through one.

forge_ray's own HTTP clients read no proxy from the environment. Ray's do (Jobs, the dashboard's states), in this process and
in those that it starts, so the hosts go into `no_proxy`.
"""

from __future__ import annotations

import os
import urllib.request
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def bypass(*addresses: str) -> None:
    """Ask loopback and the hosts of these addresses (`http://head:8265`, `10.0.0.1:6379`) without a proxy, in this process
    and those that it starts from now on. Nothing changes where the environment names no proxy, or excludes every host."""
    if not set(urllib.request.getproxies_environment()) - {"no"}:
        return
    for name in ("NO_PROXY", "no_proxy"):
        hosts = _hosts(os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or "")
        if hosts != ["*"]:
            os.environ[name] = ",".join(dict.fromkeys([*hosts, *LOOPBACK, *filter(None, map(host_of, addresses))]))


def _hosts(text: str) -> list[str]:
    return [host.strip() for host in text.split(",") if host.strip()]


def host_of(address: str) -> str:
    """The host of a URL or of HOST:PORT; "" for names such as `auto`."""
    whole = address if "://" in address else f"//{address}"
    try:
        parts = urlsplit(whole)
        return parts.hostname or "" if "://" in address or parts.port is not None else ""
    except ValueError:  # not an address; whoever connects to it says so
        return ""
