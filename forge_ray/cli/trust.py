"""`forge signers|policy|approve|sign|verify`, `forge audit log|verify`: who may, who did, does it hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from forge_ray.cli.audit import audit
from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import ConfigError, PolicyError

if TYPE_CHECKING:
    from forge_ray.store.authority import Signer
    from forge_ray.store.files import Store

ROLE = click.option("--role", "roles", multiple=True, help="owner, data_steward, trainer, validator, releaser, auditor.")
WHY = click.option("--why", default="", help="Kept in the audit log.")


@click.group()
def top() -> None:
    """Verbs of `forge` itself."""


@click.group(cls=Verbs)
def signers() -> None:
    """Whose signature counts, and for what: create, add, list, change, retire, revoke."""


@click.group(cls=Verbs)
def policy() -> None:
    """What this store demands: show, set."""


@verb(signers, "create")
@click.argument("name")
@ROLE
@click.option("--out", default=".", show_default=True, help="Folder for NAME.key (0600) and NAME.pub.")
@click.option(
    "--algorithm",
    type=click.Choice(["ed25519", "p256"]),
    default="ed25519",
    show_default=True,
    help="p256: OpenSSF's model_signing can verify what it signs.",
)
def signers_create(
    store: Store, as_json: bool, name: str, roles: tuple[str, ...], out: str, algorithm: Literal["ed25519", "p256"]
) -> Any:
    """A new key pair, and the signer that it makes. The first is the owner. FORGE_SIGNER_PASSPHRASE encrypts the key."""
    from pathlib import Path

    from forge_ray.governance.signers import create
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        signer = create(index, name, roles, Path(out).expanduser(), algorithm)
    if not as_json:
        click.echo(f"{signer.id}  {signer.name}: {', '.join(signer.roles)}")
        click.echo(f"export FORGE_SIGNER={Path(out).expanduser().absolute() / (name + '.key')}", err=True)
    return _shown(signer)


@verb(signers, "add")
@click.argument("name")
@click.option("--public", "path", required=True, metavar="FILE.pub", help="The public key, PEM.")
@ROLE
def signers_add(store: Store, as_json: bool, name: str, path: str, roles: tuple[str, ...]) -> Any:
    """Let somebody's public key count; their private one stays with them."""
    from pathlib import Path

    from forge_ray.errors import NotFound
    from forge_ray.governance.signers import add
    from forge_ray.store.catalog import Catalog

    if not Path(path).is_file():
        raise NotFound(f"--public {path!r} is no file", hint="the public half, NAME.pub")
    with Catalog(store) as index:
        signer = add(index, name, roles, Path(path).read_text())
    if not as_json:
        click.echo(f"{signer.id}  {signer.name}: {', '.join(signer.roles)}")
    return _shown(signer)


@verb(signers, "list")
def signers_list(store: Store, as_json: bool) -> Any:
    """Every signer, those that are retired or revoked too."""
    from forge_ray.cli.show import print_table
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        found = list(index.authority().signers.values())
    if not as_json:
        rows = [(signer.id, signer.name, ", ".join(signer.roles), _state(signer), signer.added_at[:19]) for signer in found]
        print_table("Signers", ("key", "name", "roles", "state", "since (UTC)"), rows)
    return [_shown(signer) for signer in found]


@verb(signers, "change")
@click.argument("reference", metavar="KEY|NAME")
@ROLE
def signers_change(store: Store, as_json: bool, reference: str, roles: tuple[str, ...]) -> Any:
    """Other roles for a signer: those given, and no others."""
    from forge_ray.governance.signers import change
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        signer = change(index, reference, roles)
    if not as_json:
        click.echo(f"{signer.id}  {signer.name}: {', '.join(signer.roles)}")
    return _shown(signer)


@verb(signers, "retire")
@click.argument("reference", metavar="KEY|NAME")
@WHY
def signers_retire(store: Store, as_json: bool, reference: str, why: str) -> Any:
    """Somebody leaves: what they signed stays valid, nothing new is."""
    return _ended(store, as_json, reference, why, compromised=False)


@verb(signers, "revoke")
@click.argument("reference", metavar="KEY|NAME")
@WHY
def signers_revoke(store: Store, as_json: bool, reference: str, why: str) -> Any:
    """A key is in wrong hands: nothing that it ever signed counts from now on."""
    return _ended(store, as_json, reference, why, compromised=True)


def _ended(store: Store, as_json: bool, reference: str, why: str, compromised: bool) -> Any:
    from forge_ray.governance.signers import end
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        signer = end(index, reference, compromised, why)
    if not as_json:
        click.echo(f"{signer.id}  {signer.name}: {_state(signer)}")
    return _shown(signer)


@verb(policy, "show")
def policy_show(store: Store, as_json: bool) -> Any:
    """What is demanded now, and what each role may write."""
    from forge_ray.store.authority import MAY
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        found = index.authority().policy.model_dump(mode="json")
    if not as_json:
        for name, value in found.items():
            shown = ", ".join(value) if isinstance(value, list | tuple) else str(value).lower()
            click.echo(f"{name}: {shown or 'none'}")
        click.echo("with roles: true,")
        for what, roles in MAY.items():
            click.echo(f"  {what:20} {', '.join(roles)}")
    return found | {"may": {what: list(roles) for what, roles in MAY.items()}}


@verb(policy, "set")
@click.option("--roles/--no-roles", default=None, help="Every change needs a signer whose role may make it.")
@click.option("--signatures/--no-signatures", default=None, help="Only signed versions are promoted or deployed.")
@click.option("--protect", multiple=True, metavar="ALIAS", help="Two releasers move it together; patterns: '*@prod'.")
@click.option("--protect-none", is_flag=True, help="No alias is protected.")
@click.option(
    "--independent-validation/--no-independent-validation",
    default=None,
    help="A protected alias takes only what a validator approved who did not train it.",
)
@WHY
def policy_set(
    store: Store,
    as_json: bool,
    roles: bool | None,
    signatures: bool | None,
    protect: tuple[str, ...],
    protect_none: bool,
    independent_validation: bool | None,
    why: str,
) -> Any:
    """Change what is given; an owner's signature is needed."""
    from forge_ray.governance.signers import set_policy
    from forge_ray.store.catalog import Catalog

    if protect and protect_none:
        raise ConfigError("--protect and --protect-none say the opposite", hint="give one of them")
    given: dict[str, Any] = {"roles": roles, "signatures": signatures, "independent_validation": independent_validation}
    if protect or protect_none:
        given["protected"] = list(protect)
    changes = {name: value for name, value in given.items() if value is not None}
    if not changes:
        raise ConfigError("nothing of the policy is to be changed", hint="--roles, --signatures, --protect ALIAS, …")
    with Catalog(store) as index:
        found = set_policy(index, changes, why).model_dump(mode="json")
    if not as_json:
        click.echo(", ".join(f"{name}={value}" for name, value in found.items()))
    return found


@verb(top, "approve")
@click.argument("reference", metavar="VERSION|DATASET")
@click.option("--alias", default="", help="Only for this alias: counts as one of the two releasers.")
@click.option("--refuse", is_flag=True, help="Say no instead.")
@WHY
def approve(store: Store, as_json: bool, reference: str, alias: str, refuse: bool, why: str) -> Any:
    """A signed yes to a version: a validator's, or a releaser's to one move."""
    from forge_ray.governance import signers as people
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        event = people.approve(index, reference, alias, refuse, why)
        name = index.authority().name_of(event.key)
    if not as_json:
        click.echo(f"{event.subject}: {event.data['decision']} by {name}" + (f" for {alias}" if alias else ""))
    return {"subject": event.subject, "by": name, **event.data}


@verb(top, "sign")
@click.argument("reference", metavar="ID|ALIAS")
@click.option("--openssf", is_flag=True, help="Write the files and a model.sig to --out, for model_signing and others.")
@click.option("--out", default="", metavar="DIR", help="With --openssf: where to.")
def sign(store: Store, as_json: bool, reference: str, openssf: bool, out: str) -> Any:
    """Put your signature beside a record that somebody else wrote; its files are checked first."""
    from forge_ray.governance import signers as people
    from forge_ray.store.catalog import Catalog

    if openssf != bool(out):
        raise ConfigError("--openssf and --out DIR go together", hint="forge sign mv_… --openssf --out signed/")
    with Catalog(store) as index:
        path = people.export_signed(index, reference, out) if openssf else people.sign(index, reference)
    if not as_json:
        click.echo(path)
    return {"path": path}


@verb(top, "verify")
@click.argument("what", metavar="ID|ALIAS|PATH")
@click.option("--key", "keys", multiple=True, metavar="FILE.pub", help="Trust these keys, not the store's signers.")
def verify(store: Store, as_json: bool, what: str, keys: tuple[str, ...]) -> Any:
    """Digests and signatures of a record and all behind it; or of a folder with model.sig, or an envelope, offline."""
    from pathlib import Path

    from forge_ray.cli.show import print_table
    from forge_ray.governance import verify as verifying
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.resolve import resolve

    trusted = verifying.trusted_keys(keys)
    if Path(what).exists():
        found = verifying.verify_path(Path(what), trusted)
        if not as_json:
            click.echo(f"{what}: {found['what']} holds")
        return found
    with Catalog(store) as index:
        authority = verifying.trusting(index.authority(), trusted)
        checked = verifying.verify_record(index, resolve(index, what), authority)
    if not as_json:
        rows = [(one.id, one.what, ", ".join(one.signed_by) or "-", one.problem or "ok") for one in checked]
        print_table("Verified", ("record", "what", "signed by", ""), rows)
    if wrong := [one for one in checked if one.problem]:
        raise PolicyError(
            f"{wrong[0].id}: {wrong[0].problem} ({len(wrong)} of {len(checked)})", hint="do not deploy what does not verify"
        )
    return [vars(one) for one in checked]


@verb(audit, "log")
@click.option("--subject", default="", help="Only of this id, alias or key.")
@click.option("--action", default="", help="Only these, e.g. alias.set or alias.")
@click.option("--last", default=0, help="So many lines of the end; 0: all.")
def audit_show(store: Store, as_json: bool, subject: str, action: str, last: int) -> Any:
    """Every change of the store: who, when, what, why."""
    from forge_ray.cli.show import print_table
    from forge_ray.store import audit_log
    from forge_ray.store.catalog import Catalog

    found = [
        {name: value for name, value in line.items() if name not in ("body", "sig")}
        for line in audit_log.read(store)
        if (not subject or line["subject"] == subject) and (not action or line["action"].startswith(action))
    ][-last:]
    if not as_json:
        with Catalog(store) as index:
            authority = index.authority()
        rows = [
            (
                str(line["n"]),
                line["at"][:19],
                authority.name_of(line["key"]) if line["key"] else f"({line['who']})",
                line["action"],
                line["subject"],
                line["why"],
            )
            for line in found
        ]
        print_table("Audit log", ("line", "at (UTC)", "who (unsigned)", "what", "of", "why"), rows)
    return found


@verb(audit, "verify")
@click.option("--head", default="", metavar="N:HASH", help="A head that you wrote down: the log must still go through it.")
@click.option("--every-signature", is_flag=True, help="Check each line's, not the last one's alone.")
def audit_verify(store: Store, as_json: bool, head: str, every_signature: bool) -> Any:
    """Was a line of the log, or a record or event, changed, added, moved or taken away? Exit 3 if so."""
    from forge_ray.governance.verify import verify_log
    from forge_ray.store.catalog import Catalog

    with Catalog(store) as index:
        found = verify_log(index, every_signature, head)
    if not as_json:
        click.echo(f"{found.num_lines} lines, {found.num_signed} signed, {found.num_files} files; head {found.head}")
        for problem in found.problems[:20]:
            click.echo(f"  {problem}")
        if not found.problems:
            click.echo("nothing was changed" + ("" if found.num_signed else "; no line is signed: the chain alone says so"))
    if found.problems:
        raise PolicyError(
            f"the audit log does not hold: {found.problems[0]} ({len(found.problems)} problems)",
            hint="compare the store with a backup; `forge audit log` shows who wrote last",
        )
    return vars(found)


TRUST: tuple[click.Command, ...] = (signers, policy, *top.commands.values())


def _state(signer: Signer) -> str:
    return "revoked" if signer.revoked_at else "retired" if signer.retired_at else "active"


def _shown(signer: Signer) -> dict[str, Any]:
    return signer.model_dump(mode="json") | {"state": _state(signer)}
