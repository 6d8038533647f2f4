"""`forge catalog …`: the identity of a store, what this machine holds of it, and its upgrade."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb

if TYPE_CHECKING:
    from forge_ray.store.files import Store


@click.group(cls=Verbs)
def catalog() -> None:
    """Show, trust and upgrade the catalogue of a store."""


@verb(catalog, "show", "forge catalog show")
def catalog_show(store: Store, as_json: bool) -> Any:
    """Show the id of the store and the head of its audit log.

    And the head that this machine last saw, and lines without effect."""
    from forge_ray.store import pins
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as facts:
        standing = facts.standing
        result = {
            "store": store.place,
            "id": standing.authority.genesis,
            "head": standing.reader.head,
            "head_on_this_machine": pins.head_of(store),
            "without_effect": standing.all_ignored(),
            "needs_upgrade": standing.needs_upgrade,
        }
    if not as_json:
        echo(f"id: {result['id'] or 'none: the store has no signers'}")
        echo(f"head: {result['head'] or 'none: nothing was written yet'}")
        for line, reason in standing.all_ignored().items():
            echo(f"line {line} has no effect: {reason}")
        if standing.needs_upgrade:
            echo("an owner has to run `forge catalog upgrade`")
    return result


@verb(catalog, "trust", "forge catalog trust --id 78e2d712")
@click.option("--id", "genesis", required=True, help="Id of the store, as an owner gave it to you; '' for one without.")
def catalog_trust(store: Store, as_json: bool, genesis: str) -> Any:
    """Take a store that was replaced or put back as it is now.

    Until then, commands on this machine refuse it. Compare the id with an owner first."""
    from forge_ray.errors import PolicyError
    from forge_ray.store import pins
    from forge_ray.store.standing import Standing

    standing = Standing(store)
    standing.refresh()
    if standing.authority.genesis != genesis:
        raise PolicyError(
            f"{store.place} has the id {standing.authority.genesis or 'none'}, not {genesis or 'none'}",
            hint="it is not the store that the owner means: do not use it",
        )
    pins.forget(store)
    pins.check(standing)
    pins.note(standing)
    if not as_json:
        echo(f"{store.place}: taken as it is, at {standing.reader.head or 'no line'}")
    return {"store": store.place, "id": genesis, "head": standing.reader.head}


@verb(catalog, "upgrade", "forge catalog upgrade --yes")
@click.option("--yes", is_flag=True, help="Sign the list; without it, the list is only shown.")
@click.option("--without", type=int, multiple=True, metavar="LINE", help="Leave this line out of the list. Repeatable.")
@click.option("--why", default="", help="Reason, kept in the audit log.")
def catalog_upgrade(store: Store, as_json: bool, yes: bool, without: tuple[int, ...], why: str) -> Any:
    """Sign what earlier versions accepted and this one would not.

    For stores whose signers are from an earlier version; done once, by an owner."""
    from dataclasses import asdict

    from forge_ray.cli.show import print_table
    from forge_ray.governance import upgrade
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as facts:
        is_needed = facts.standing.needs_upgrade
        listed = upgrade.plan(facts)
        if not as_json and listed:
            rows = [(str(one.line or ""), one.what, one.subject, one.by, one.reason) for one in listed]
            print_table("To be signed", ("line", "what", "of", "by", "without your signature"), rows)
        event = upgrade.apply(facts, listed, without, why) if yes and is_needed else None
    if not as_json:
        state = "signed" if event else "not needed" if not is_needed else "nothing was signed; --yes signs the list"
        echo(f"{len(listed)} events and envelopes: {state}")
    return {"needed": is_needed, "signed": event is not None, "listed": [asdict(one) for one in listed]}
