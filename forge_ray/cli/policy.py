"""`forge policy show|set`: what a store demands."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import ConfigError

if TYPE_CHECKING:
    from forge_ray.store.files import Store

WHY = click.option("--why", default="", help="Reason, kept in the audit log.")


@click.group(cls=Verbs)
def policy() -> None:
    """Show or change which roles and signatures are required."""


@verb(policy, "show", "forge policy show")
def policy_show(store: Store, as_json: bool) -> Any:
    """Show what the policy requires, and what each role may write."""
    from forge_ray.store.authority import MAY
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        settings = index.authority().policy.model_dump(mode="json")
    if not as_json:
        for name, value in settings.items():
            text = ", ".join(value) if isinstance(value, list | tuple) else str(value).lower()
            echo(f"{name}: {text or 'none'}")
        echo("with roles: true,")
        for what, roles in MAY.items():
            echo(f"  {what:20} {', '.join(roles)}")
    return settings | {"may": {what: list(roles) for what, roles in MAY.items()}}


@verb(policy, "set", "forge policy set --signatures --protect '*@prod'")
@click.option("--roles/--no-roles", default=None, help="Require a signer with a permitted role for every change.")
@click.option("--signatures/--no-signatures", default=None, help="Promote and deploy only signed versions.")
@click.option(
    "--protect",
    multiple=True,
    metavar="ALIAS",
    help="Require two releasers to move this alias; patterns: '*@prod'. Repeatable.",
)
@click.option("--protect-none", is_flag=True, help="Protect no alias.")
@click.option(
    "--independent-validation/--no-independent-validation",
    default=None,
    help="Require approval by a validator who did not train the version, for protected aliases.",
)
@click.option(
    "--no-export/--allow-export", default=None, help="Let no weights of a model version leave the store by a command."
)
@click.option(
    "--endpoint",
    "endpoints",
    multiple=True,
    metavar="URL",
    help="Let `forge eval --endpoint` send held-out rows to this host, e.g. https://api.vendor.example. Repeatable.",
)
@click.option("--no-endpoints", is_flag=True, help="Send rows to no host.")
@click.option(
    "--refuse-licence",
    "licences",
    multiple=True,
    metavar="LICENCE",
    help="Let no run learn from a teacher with this licence (train.method.teacher), e.g. CC-BY-NC-4.0. Repeatable.",
)
@click.option("--refuse-no-licence", is_flag=True, help="Let runs learn from teachers with any licence.")
@WHY
def policy_set(
    store: Store,
    as_json: bool,
    roles: bool | None,
    signatures: bool | None,
    protect: tuple[str, ...],
    protect_none: bool,
    independent_validation: bool | None,
    no_export: bool | None,
    endpoints: tuple[str, ...],
    no_endpoints: bool,
    licences: tuple[str, ...],
    refuse_no_licence: bool,
    why: str,
) -> Any:
    """Change the policy; requires an owner's signature.

    Options that are left out stay unchanged."""
    from forge_ray.governance.signers import set_policy
    from forge_ray.store.catalog import Catalog

    if protect and protect_none:
        raise ConfigError("--protect and --protect-none contradict each other", hint="give one of them")
    if endpoints and no_endpoints:
        raise ConfigError("--endpoint and --no-endpoints contradict each other", hint="give one of them")
    if licences and refuse_no_licence:
        raise ConfigError("--refuse-licence and --refuse-no-licence contradict each other", hint="give one of them")
    options: dict[str, Any] = {
        "roles": roles,
        "signatures": signatures,
        "independent_validation": independent_validation,
        "no_export": no_export,
    }
    if protect or protect_none:
        options["protected"] = list(protect)
    if endpoints or no_endpoints:
        options["endpoints"] = list(endpoints)
    if licences or refuse_no_licence:
        options["refused_licences"] = list(licences)
    changes = {name: value for name, value in options.items() if value is not None}
    if not changes:
        raise ConfigError("no policy setting to change", hint="--roles, --signatures, --protect ALIAS, …")
    with Catalog.open(store) as index:
        settings = set_policy(index, changes, why).model_dump(mode="json")
    if not as_json:
        echo(", ".join(f"{name}={value}" for name, value in settings.items()))
    return settings
