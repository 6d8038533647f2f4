"""`forge keys …`, `forge usage`: who may call an endpoint, what for, how much, and how much they did."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import click

from forge_ray.cli.verbs import Verbs, verb

if TYPE_CHECKING:
    from forge_ray.serve.keys import ApiKey
    from forge_ray.store.files import Store

COLUMNS = ("key", "name", "state", "models", "scopes", "rpm", "tpm", "at once", "expires")


@click.group()
def top() -> None:
    """Verbs of `forge` itself."""


@click.group(cls=Verbs)
def keys() -> None:
    """API keys of the endpoints: create, list, show, change, rotate, revoke."""


def _bounds(function: Callable[..., Any]) -> Callable[..., Any]:
    """What a key may do; an option that is not given is None, so that `change` leaves it."""
    for option in (
        click.option("--expires", metavar="WHEN", help="90d, 12h, or a date; default: never."),
        click.option("--concurrency", type=int, help="Requests at once; 0: no limit."),
        click.option("--tpm", type=int, help="Tokens in any 60 s, prompts and answers; 0: no limit."),
        click.option("--rpm", type=int, help="Requests in any 60 s; 0: no limit."),
        click.option("--scope", "scopes", multiple=True, help="chat (/v1), metrics (/metrics), admin; default: chat."),
        click.option("--model", "models", multiple=True, help="A name that it may ask for, or a pattern: 'team-*'."),
    ):
        function = option(function)
    return function


@verb(keys, "create")
@click.option("--name", required=True, help="Who will use it, e.g. support-portal.")
@_bounds
def keys_create(store: Store, as_json: bool, name: str, **bounds: Any) -> Any:
    """A new key; its text is printed once and stored nowhere."""
    from forge_ray.serve import keys as api_keys
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        key, text = api_keys.create(index, name, **_given(**bounds))
    return _with_secret(key, text, as_json)


@verb(keys, "list")
def keys_list(store: Store, as_json: bool) -> Any:
    """Every key, the revoked and expired ones too."""
    from forge_ray.cli.show import print_table
    from forge_ray.serve import keys as api_keys
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        found = api_keys.list_keys(index)
    if not as_json:
        print_table("API keys", COLUMNS, [_row(key) for key in found])
    return [_shown(key) for key in found]


@verb(keys, "show")
@click.argument("reference", metavar="KEY|NAME")
def keys_show(store: Store, as_json: bool, reference: str) -> Any:
    """One key and what happened to it."""
    from forge_ray.serve import keys as api_keys
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        key = api_keys.find(index, reference)
        history = [{"at": event.at, **event.data} for event in index.events("key", key.id)]
    if not as_json:
        _print(key)
        for event in history:
            what = ", ".join(f"{name}={value}" for name, value in event.items() if name not in ("at", "action", "sha256"))
            click.echo(f"  {event['at']}  {event['action']}  {what}")
    return _shown(key) | {"history": history}


@verb(keys, "change")
@click.argument("reference", metavar="KEY|NAME")
@_bounds
def keys_change(store: Store, as_json: bool, reference: str, **bounds: Any) -> Any:
    """Other grants or limits for a key; what is not given stays."""
    from forge_ray.serve import keys as api_keys
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        key = api_keys.change(index, reference, **_given(**bounds))
    if not as_json:
        _print(key)
    return _shown(key)


@verb(keys, "rotate")
@click.argument("reference", metavar="KEY|NAME")
@click.option("--grace", default="0s", show_default=True, help="How long the old secret stays valid, e.g. 24h.")
def keys_rotate(store: Store, as_json: bool, reference: str, grace: str) -> Any:
    """A new secret for a key whose grants and limits stay."""
    from forge_ray.serve import keys as api_keys
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        key, text = api_keys.rotate(index, reference, api_keys.duration(grace))
    return _with_secret(key, text, as_json)


@verb(keys, "revoke")
@click.argument("reference", metavar="KEY|NAME")
@click.option("--reason", default="", help="Kept with the event.")
def keys_revoke(store: Store, as_json: bool, reference: str, reason: str) -> Any:
    """End a key, for ever; endpoints refuse it within seconds."""
    from forge_ray.serve import keys as api_keys
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        key = api_keys.revoke(index, reference, reason)
    if not as_json:
        _print(key)
    return _shown(key)


@verb(top, "usage")
@click.option("--by", type=click.Choice(["key", "model", "version", "day"]), default="key", show_default=True)
@click.option("--since", default="", metavar="YYYY-MM-DD", help="From this day (UTC) on; default: all.")
def usage(store: Store, as_json: bool, by: Literal["key", "model", "version", "day"], since: str) -> Any:
    """Requests and tokens that the endpoints answered, by who asked, for what, of which version, or when."""
    from forge_ray.cli.show import print_table
    from forge_ray.serve import keys as api_keys
    from forge_ray.serve.ledger import usage as sums
    from forge_ray.store.catalog import Catalog

    rows = sums(store, by, since)
    if by == "key":
        with Catalog(store) as index:
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


def _given(expires: str | None, **bounds: Any) -> dict[str, Any]:
    """The options that were given, as fields of a key."""
    from forge_ray.serve.keys import moment

    fields = {name: value for name, value in bounds.items() if value not in (None, ())}
    return fields | ({} if expires is None else {"expires_at": moment(expires)})


def _shown(key: ApiKey) -> dict[str, Any]:
    return key.model_dump(mode="json") | {"state": _state(key)}


def _with_secret(key: ApiKey, text: str, as_json: bool) -> dict[str, Any]:
    if not as_json:
        _print(key)
        click.echo("keep it now, it is not shown again:", err=True)
        click.echo(text)
    return _shown(key) | {"secret": text}


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
            click.echo(f"{name + ':':9} {value}", err=True)
