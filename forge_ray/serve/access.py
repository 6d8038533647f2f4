"""Access control: which key a request carries, which routes and which models it is for (no ray)."""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from forge_ray.serve.context import Caller, Chosen, Directory
from forge_ray.serve.keys import PATTERN, ApiKey, sha256_of
from forge_ray.serve.loaded import Loaded
from forge_ray.serve.openai import ApiError
from forge_ray.serve.routing import RoutingInputs

LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
AUTHORITY = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s/@:?#\[\]]+)(?::\d{1,5})?")


def authenticated(headers: Mapping[str, str], keys: Mapping[str, ApiKey], now: datetime) -> ApiKey:
    """The key that a request carries, as `Authorization: Bearer` or `x-api-key`; `ApiError` 401 without a valid one."""
    scheme, _, text = headers.get("authorization", "").partition(" ")
    text = text.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
    if not text:
        raise _unauthorised("no API key was given: send one as `Authorization: Bearer fk_…`", "")
    # Looked up by a hash of 256 random bits, so the time of the look-up reveals nothing of any secret
    digest = sha256_of(text) if PATTERN.fullmatch(text) else ""
    key = keys.get(digest)
    if key is None or not hmac.compare_digest(key.sha256, digest):
        raise _unauthorised("the API key is not valid here", "invalid_token")
    if problem := key.refusal(now):
        raise _unauthorised(problem, "invalid_token")
    return key


def check_single_key(scope: Mapping[str, Any]) -> None:
    """`ApiError` 401 where a request carries the same credential header twice: two servers on its way may read different
    ones."""
    names = [name.lower() for name, _ in scope["headers"]]
    for name in ("authorization", "x-api-key"):
        if (count := names.count(name.encode())) > 1:
            raise _unauthorised(f"the request has {count} {name} headers: send one", "invalid_request")


@dataclass(frozen=True)
class Site:
    """What requests to an endpoint without keys must name, so that no web page works with it from a user's browser.

    `names`: those allowed besides this machine's loopback names, with any port. `check_host`: whether `Host` is checked
    too; only where nothing but loopback reaches the endpoint. `origins`: of pages that may call it.
    """

    names: tuple[str, ...] = ()
    check_host: bool = True
    origins: tuple[str, ...] = ()

    def allows(self, authority: str) -> bool:
        """Whether `authority` (`name` or `name:port`) is one of them."""
        match = AUTHORITY.fullmatch(authority.strip())
        names = {*LOOPBACK, *(name.lower() for name in self.names)}
        return match is not None and match[1].lower().rstrip(".") in names


def check_site(scope: Mapping[str, Any], site: Site) -> None:
    """`ApiError` where the request names another host (421), comes from a page of another origin or by a proxy from another
    machine (403), or is a POST that a page may send without asking (415: its content is not `application/json`)."""
    headers = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in scope["headers"]]
    remedy = "; add the name to the deployment's `hosts`, or require keys (`auth: keys`)"
    for name, value in headers:
        if name == "origin" and value not in site.origins and not site.allows(value.partition("://")[2]):
            rule = f"the origin {value[:100]!r} may not use this endpoint; add it to the deployment's `cors`, or its name to"
            raise ApiError(403, f"{rule} `hosts`", code="foreign_origin")
        if site.check_host and name in ("host", "x-forwarded-host"):
            foreign = [part for part in value.split(",") if not site.allows(part)]
            if foreign:
                raise ApiError(
                    421, f"{name} {foreign[0].strip()[:100]!r} is not a name of this endpoint{remedy}", code="foreign_host"
                )
        if name == "x-forwarded-for" and site.check_host and not site.names and (client := _foreign_address(value)):
            rule = f"a client on another machine ({client[:100]!r}) may not use this endpoint without keys{remedy}"
            raise ApiError(403, rule, code="foreign_client")
    kinds = [value.partition(";")[0].strip().lower() for name, value in headers if name == "content-type"]
    if scope["method"] == "POST" and kinds != ["application/json"]:
        rule = f"content-type is {', '.join(kinds)[:100] or 'not given'}: send application/json"
        raise ApiError(415, rule, code="unsupported_media_type")


def _foreign_address(value: str) -> str:
    """The first of some addresses that is not one of this machine's loopback; "" where all are."""
    for part in map(str.strip, value.split(",")):
        try:
            if not ipaddress.ip_address(part).is_loopback:
                return part
        except ValueError:
            return part or "unknown"
    return ""


def scope_of(path: str) -> str:
    """The scope that a route requires; "" for none. A route that is not listed here requires `admin`."""
    if path == "/health":
        return ""
    if path == "/metrics":
        return "metrics"
    return "chat" if path.startswith("/v1/") or path in ("/tokenize", "/detokenize") else "admin"


def check_scope(key: ApiKey, scope: Mapping[str, Any]) -> None:
    """`ApiError` 403 unless the key has the scope that the route of this ASGI scope requires."""
    path = str(scope["path"])
    path = path.removeprefix(scope.get("root_path", "")) or "/"
    required = scope_of(path)
    if required and required not in key.scopes:
        raise ApiError(
            403,
            f"the API key {key.id} has the scopes {', '.join(key.scopes)}; this route requires {required} "
            "(OpenAI's begin with /v1/)",
            code="insufficient_scope",
        )


def check_grant(caller: Caller, name: str) -> None:
    """`ApiError` 404 unless the caller's key grants `name`; the answer is the same whether such a model exists or not."""
    if caller.key is None or not caller.key.grants(name):
        raise ApiError(404, f"model {name!r} is not served here", param="model", code="model_not_found")


class GrantedDirectory:
    """A directory restricted to what the caller's key grants. A name that is not granted does not exist for the caller."""

    def __init__(self, directory: Directory) -> None:
        self.directory = directory

    def stable(self, name: str, caller: Caller) -> Loaded:
        check_grant(caller, name)
        return self.directory.stable(name, caller)

    async def choose(self, name: str, caller: Caller, inputs: RoutingInputs) -> Chosen:
        check_grant(caller, name)
        return await self.directory.choose(name, caller, inputs)

    def cards(self, caller: Caller) -> list[dict[str, Any]]:
        key = caller.key
        return [card for card in self.directory.cards(caller) if key is not None and key.grants(str(card["id"]))]


def _unauthorised(message: str, problem: str) -> ApiError:
    challenge = 'Bearer realm="forge_ray"' + (f', error="{problem}"' if problem else "")
    return ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": challenge})
