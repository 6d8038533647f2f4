"""`forge keys …`, `forge usage`: API keys with their limits, and the usage of each key."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb

if TYPE_CHECKING:
    from forge_ray.serve.keys import ApiKey
    from forge_ray.store.files import Store

COLUMNS = ("key", "name", "state", "models", "scopes", "rpm", "tpm", "at once", "expires")


@click.group()
def top() -> None:
    """Top-level verbs; `forge` registers them."""


@click.group(cls=Verbs)
def keys() -> None:
    """Create, list, change, rotate and revoke API keys."""


def _bounds(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options for scopes and limits of a key; one that is left out is None, so that `change` keeps the value."""
    for option in (
        click.option("--expires", metavar="WHEN", help="Expiry: 90d, 12h, or a date. Default: never."),
        click.option("--concurrency", type=int, help="Concurrent requests; 0: no limit."),
        click.option("--tpm", type=int, help="Prompt and answer tokens in any 60 s; 0: no limit."),
        click.option("--rpm", type=int, help="Requests in any 60 s; 0: no limit."),
        click.option(
            "--scope",
            "scopes",
            multiple=True,
            help="Scope: chat (/v1), metrics (/metrics) or admin. Default: chat. Repeatable.",
        ),
        click.option(
            "--model", "models", multiple=True, help="Model that the key may use, or a pattern: 'team-*'. Repeatable."
        ),
    ):
        function = option(function)
    return function


@verb(keys, "create", "forge keys create --name support-portal --model 'support@*' --rpm 60")
@click.option("--name", required=True, help="User or application of the key, e.g. support-portal.")
@_bounds
def keys_create(store: Store, as_json: bool, name: str, **bounds: Any) -> Any:
    """Create an API key; its secret is printed once, never stored."""
    from forge_ray.serve import keys as api_keys
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        key, text = api_keys.create(index, name, **_fields(**bounds))
    return _with_secret(key, text, as_json)


@verb(keys, "list", "forge keys list")
def keys_list(store: Store, as_json: bool) -> Any:
    """List every key, including revoked and expired ones."""
    from forge_ray.cli.show import print_table
    from forge_ray.serve import keys as api_keys
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        all_keys = api_keys.list_keys(index)
    if not as_json:
        print_table("API keys", COLUMNS, [_row(key) for key in all_keys])
    return [_with_state(key) for key in all_keys]


@verb(keys, "show", "forge keys show support-portal")
@click.argument("reference", metavar="KEY|NAME")
def keys_show(store: Store, as_json: bool, reference: str) -> Any:
    """Show one key and its history."""
    from forge_ray.serve import keys as api_keys
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        key = api_keys.find(index, reference)
        history = [{"at": event.at, **event.data} for event in index.events("key", key.id)]
    if not as_json:
        _print(key)
        for event in history:
            what = ", ".join(f"{name}={value}" for name, value in event.items() if name not in ("at", "action", "sha256"))
            echo(f"  {event['at']}  {event['action']}  {what}")
    return _with_state(key) | {"history": history}


@verb(keys, "change", "forge keys change support-portal --rpm 120")
@click.argument("reference", metavar="KEY|NAME")
@_bounds
def keys_change(store: Store, as_json: bool, reference: str, **bounds: Any) -> Any:
    """Change the models, scopes or limits of a key.

    Options that are left out stay unchanged."""
    from forge_ray.serve import keys as api_keys
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        key = api_keys.change(index, reference, **_fields(**bounds))
    if not as_json:
        _print(key)
    return _with_state(key)


@verb(keys, "rotate", "forge keys rotate support-portal --grace 24h")
@click.argument("reference", metavar="KEY|NAME")
@click.option("--grace", default="0s", show_default=True, help="How long the old secret stays valid, e.g. 24h.")
def keys_rotate(store: Store, as_json: bool, reference: str, grace: str) -> Any:
    """Replace the secret of a key; scopes and limits stay."""
    from forge_ray.serve import keys as api_keys
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        key, text = api_keys.rotate(index, reference, api_keys.duration(grace))
    return _with_secret(key, text, as_json)


@verb(keys, "revoke", "forge keys revoke support-portal --reason 'secret leaked'")
@click.argument("reference", metavar="KEY|NAME")
@click.option("--reason", default="", help="Reason, kept in the key's history.")
def keys_revoke(store: Store, as_json: bool, reference: str, reason: str) -> Any:
    """Revoke a key permanently.

    Endpoints refuse it within seconds."""
    from forge_ray.serve import keys as api_keys
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        key = api_keys.revoke(index, reference, reason)
    if not as_json:
        _print(key)
    return _with_state(key)


@verb(top, "usage", "forge usage --by model --since 2026-01-01")
@click.option(
    "--by", type=click.Choice(["key", "model", "version", "day"]), default="key", show_default=True, help="Sum by this."
)
@click.option("--since", default="", metavar="YYYY-MM-DD", help="First day (UTC) to include. Default: all.")
def usage(store: Store, as_json: bool, by: Literal["key", "model", "version", "day"], since: str) -> Any:
    """Report requests and tokens by key, model, version or day."""
    from forge_ray.cli.show import print_table
    from forge_ray.serve import keys as api_keys
    from forge_ray.serve.ledger import usage as sums
    from forge_ray.store.catalog import Catalog

    rows = sums(store, by, since)
    if by == "key":
        with Catalog.read_only(store) as index:
            names = {key.id: key.name for key in api_keys.list_keys(index)}
        rows = [{**row, "name": names.get(str(row["key"]), "")} for row in rows]
    if not as_json:
        header = [
            by,
            *(["name"] if by == "key" else []),
            "requests",
            "prompt_tokens",
            "completion_tokens",
            "cancelled",
            "failed",
        ]
        table = [[str(row[column]) or "(no key)" * (column == "key") for column in header] for row in rows]
        print_table("Usage", tuple(name.replace("_", " ") for name in header), table)
    return rows


ACCESS: tuple[click.Command, ...] = (keys, top.commands["usage"])


def _fields(expires: str | None, **bounds: Any) -> dict[str, Any]:
    """The options that are set, as fields of a key."""
    from forge_ray.serve.keys import moment

    fields = {name: value for name, value in bounds.items() if value not in (None, ())}
    return fields | ({} if expires is None else {"expires_at": moment(expires)})


def _with_state(key: ApiKey) -> dict[str, Any]:
    return key.model_dump(mode="json") | {"state": _state(key)}


def _with_secret(key: ApiKey, text: str, as_json: bool) -> dict[str, Any]:
    if not as_json:
        _print(key)
        echo("store it now, it is not shown again:", err=True)
        echo(text)
    return _with_state(key) | {"secret": text}


def _state(key: ApiKey) -> str:
    from datetime import UTC, datetime

    if key.revoked_at:
        return "revoked"
    return "expired" if key.refusal(datetime.now(UTC)) else "valid"


def _row(key: ApiKey) -> tuple[str, ...]:
    limits = (str(limit or "") for limit in (key.rpm, key.tpm, key.concurrency))
    return key.id, key.name, _state(key), ", ".join(key.models), ", ".join(key.scopes), *limits, key.expires_at[:16]


def _print(key: ApiKey) -> None:
    for name, value in zip(COLUMNS, _row(key), strict=True):
        if value:
            echo(f"{name + ':':9} {value}", err=True)
