"""API keys: who may call an endpoint, for which models, and how much (no torch, no ray).

A key is `fk_<id>_<secret>`; the secret is 256 random bits that are shown once. The store keeps only its sha256: a slow hash
protects what a person could have chosen, and nobody can search 2^256. The state of a key follows from its events (`created`,
`changed`, `revoked`), which are appended and never edited, so the rights of any moment can be read afterwards.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import threading
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError

from forge_ray.errors import ConfigError, NotFound
from forge_ray.records import Event, Frozen
from forge_ray.store import pins
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.standing import Standing

Scope = Literal["chat", "metrics", "admin"]
SCOPES: tuple[str, ...] = get_args(Scope)
PATTERN = re.compile(r"(fk_[0-9a-f]{12})_[A-Za-z0-9_-]{43}")
LOG = logging.getLogger(__name__)
UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class ApiKey(Frozen):
    """A key after all its events. A limit of 0 is none; times are UTC in ISO 8601, "" where there is none."""

    id: str
    name: str
    sha256: str
    models: tuple[str, ...] = Field((), description="names that it may ask for, as shell patterns: `*` is every name")
    scopes: tuple[Scope, ...] = ("chat",)
    rpm: int = Field(0, ge=0, description="requests in any 60 seconds")
    tpm: int = Field(0, ge=0, description="tokens in any 60 seconds, prompts and answers")
    concurrency: int = Field(0, ge=0, description="requests at once")
    created_at: str = ""
    expires_at: str = ""
    revoked_at: str = ""

    def grants(self, name: str) -> bool:
        """Whether the key may ask for `name`, as the client writes it."""
        return any(fnmatchcase(name, pattern) for pattern in self.models)

    def refusal(self, now: datetime) -> str:
        """Why the key is not valid at `now`; "" if it is."""
        if self.revoked_at:
            return f"the API key {self.id} was revoked"
        if self.expires_at and datetime.fromisoformat(self.expires_at) <= now:
            return f"the API key {self.id} expired on {self.expires_at[:10]}"
        return ""


def sha256_of(text: str) -> str:
    """The digest under which the store keeps a key."""
    return hashlib.sha256(text.encode()).hexdigest()


def _secret(key_id: str) -> str:
    return f"{key_id}_{secrets.token_urlsafe(32)}"


def create(catalog: Catalog, name: str, **fields: Any) -> tuple[ApiKey, str]:
    """A new key and its text, which is not stored and cannot be shown again. `fields`: those of `ApiKey`."""
    if any(key.name == name and not key.revoked_at for key in list_keys(catalog)):
        raise ConfigError(
            f"a key named {name!r} exists already", hint="choose another name, or `forge keys rotate` for a new secret"
        )
    _check(name=name, **fields)
    key_id = f"fk_{secrets.token_hex(6)}"
    text = _secret(key_id)
    _append(catalog, key_id, "created", name=name, sha256=sha256_of(text), **fields)
    return find(catalog, key_id), text


def change(catalog: Catalog, reference: str, **fields: Any) -> ApiKey:
    """Change grants or limits of a key; only the given `fields` change."""
    key = _usable(catalog, reference)
    if not fields:
        raise ConfigError(f"no change given for {key.id}", hint="give --model, --scope, --rpm, …")
    _check(**key.model_dump(include={"name", "models", "scopes"}) | fields)
    _append(catalog, key.id, "changed", **fields)
    return find(catalog, key.id)


def rotate(catalog: Catalog, reference: str, grace: timedelta = timedelta(0)) -> tuple[ApiKey, str]:
    """A new secret for a key; the previous one stays valid for `grace`."""
    key = _usable(catalog, reference)
    text = _secret(key.id)
    until = (datetime.now(UTC) + grace).isoformat(timespec="milliseconds")
    _append(catalog, key.id, "changed", sha256=sha256_of(text), before_until=until)
    return find(catalog, key.id), text


def revoke(catalog: Catalog, reference: str, reason: str = "") -> ApiKey:
    """Revoke a key permanently. Revoking it again does nothing."""
    key = find(catalog, reference)
    if not key.revoked_at:
        _append(catalog, key.id, "revoked", reason=reason)
    return find(catalog, key.id)


def list_keys(catalog: Catalog) -> list[ApiKey]:
    """Every key ever created, oldest first."""
    keys = (_folded(catalog.events("key", subject))[0] for subject in catalog.subjects("key"))
    return [key for key in keys if key]


def find(catalog: Catalog, reference: str) -> ApiKey:
    """A key by its id, or a key that is not revoked by its name."""
    keys = list_keys(catalog)
    matches = [key for key in keys if key.id == reference] or [
        key for key in keys if key.name == reference and not key.revoked_at
    ]
    if not matches:
        raise NotFound(f"no API key {reference!r} in {catalog.store.place}", hint="`forge keys list`")
    return matches[0]


def keys_of(catalog: Catalog) -> dict[str, ApiKey]:
    """sha256 of a key's text → the key. Revoked and expired ones are included, so that their owners get the reason."""
    return _by_sha256(catalog.events("key", subject) for subject in catalog.subjects("key"))


class KeyTail:
    """`keys_of` for a replica, which opens no catalogue. `keys` is replaced as a whole and never modified."""

    def __init__(self, store: Store, genesis: str = "", log_head: str = "") -> None:
        self.keys: Mapping[str, ApiKey] = {}
        self.standing = Standing(store, "key")
        self._held = genesis, log_head

    def refresh(self) -> Mapping[str, ApiKey]:
        is_first = not self.standing.reader.number
        lines = self.standing.refresh()
        if is_first:
            pins.require(self.standing, *self._held, "the deployment holds")
        if lines or is_first:
            subjects = self.standing.subjects("key")
            self.keys = _by_sha256(self.standing.events("key", subject) for subject in subjects)
        return self.keys

    def follow(self, closing: threading.Event) -> None:
        """Refresh until `closing` is set. While the store cannot be read, the keys read before stay in force."""
        while not closing.wait(self.standing.poll_s):
            try:
                self.refresh()
            except Exception:
                LOG.exception("keys cannot be read")


def _by_sha256(subjects: Iterable[list[Event]]) -> dict[str, ApiKey]:
    by_sha256: dict[str, ApiKey] = {}
    for events in subjects:
        key, previous = _folded(events)
        if key:
            by_sha256 |= {old.sha256: old for old in previous} | {key.sha256: key}
    return by_sha256


def _folded(events: list[Event]) -> tuple[ApiKey | None, list[ApiKey]]:
    """The key after its events, in the order of the log, and the same key with each previous secret, which expires after its
    grace period. Nothing changes a revoked key; an event that would make no key of it is passed over and named in the
    log."""
    key: ApiKey | None = None
    before: list[tuple[str, str]] = []
    for event in events:
        if key and key.revoked_at:
            break
        try:
            key, grace = _after(key, event)
        except (ValidationError, ValueError, TypeError, LookupError):
            LOG.warning("an event of the key %r of %r has no effect: its content is not valid", event.subject, event.at)
            continue
        before += grace
    if key is None:
        return None, []
    # the grace ends a secret, and so does whatever ends the key
    ends = [(sha256, min(filter(None, (until, key.expires_at)))) for sha256, until in before]
    return key, [key.model_copy(update={"sha256": sha256, "expires_at": until}) for sha256, until in ends]


def _after(key: ApiKey | None, event: Event) -> tuple[ApiKey | None, list[tuple[str, str]]]:
    """The key after one event, and its previous secret with the end of its grace where the event replaces it."""
    data = {name: value for name, value in event.data.items() if name not in ("action", "reason", "before_until")}
    match event.data["action"]:
        case "created" if key is None:
            data |= {"id": event.subject, "created_at": event.at}
        case "changed" if key:
            data = key.model_dump() | data
        case "revoked" if key:
            data = key.model_dump() | {"revoked_at": event.at}
        case _:
            raise ValueError
    until = event.data.get("before_until", "")
    after = ApiKey.model_validate(data)
    for end in filter(None, (until, after.expires_at)):
        if datetime.fromisoformat(end).tzinfo is None:
            raise ValueError
    return after, [(key.sha256, until)] if key and until else []


def _usable(catalog: Catalog, reference: str) -> ApiKey:
    key = find(catalog, reference)
    if key.revoked_at:
        raise ConfigError(f"{key.id} was revoked at {key.revoked_at}", hint="create another key")
    return key


def _append(catalog: Catalog, key_id: str, action: str, **data: Any) -> None:
    catalog.append(Event(kind="key", subject=key_id, data={"action": action, **data}))


def _check(name: str, models: tuple[str, ...] = (), scopes: tuple[str, ...] = ("chat",), **limits: Any) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", name) or name.startswith("fk_"):
        raise ConfigError(
            f"invalid key name {name!r}: use up to 64 letters, digits and . _ @ -, not beginning with fk_",
            hint="name the application, for example support-portal",
        )
    if unknown := [scope for scope in scopes if scope not in SCOPES] or ([] if scopes else ["none"]):
        raise ConfigError(f"scope {unknown[0]!r} of key {name!r} is not one of {', '.join(SCOPES)}", hint="--scope chat")
    if "chat" in scopes and not models:
        raise ConfigError(
            f"key {name!r} has the scope chat but no model", hint="--model 'support@prod', or --model '*' for all of them"
        )
    if negative := [f"{limit}={value}" for limit, value in limits.items() if isinstance(value, int) and value < 0]:
        raise ConfigError(f"{negative[0]} of key {name!r} is negative", hint="0 means no limit")


def duration(text: str) -> timedelta:
    """`90d`, `12h`, `30m`, `45s`."""
    match = re.fullmatch(r"(\d{1,9})([smhd])", text)
    if match is None:
        raise ConfigError(f"{text!r} is not a duration", hint="a number and one of s, m, h, d: 90d")
    return timedelta(**{UNITS[match[2]]: int(match[1])})


def moment(text: str) -> str:
    """When a key expires: a duration from now, or a date (its first moment, UTC). "" stays ""."""
    if not text:
        return ""
    if re.match(r"\d{4}-", text):
        try:
            at = datetime.fromisoformat(text)
        except ValueError:
            raise ConfigError(f"{text!r} is not a date", hint="90d, or a date like 2027-06-30") from None
        at = at.astimezone(UTC) if at.tzinfo else at.replace(tzinfo=UTC)
    else:
        try:
            at = datetime.now(UTC) + duration(text)
        except OverflowError:
            raise ConfigError(f"{text!r} is too long", hint="leave out the expiry: the key then never expires") from None
    if at <= datetime.now(UTC):
        raise ConfigError(
            f"expiry {text!r} is not in the future", hint="90d, or a later date; `forge keys revoke` ends a key"
        )
    return at.isoformat(timespec="milliseconds")
