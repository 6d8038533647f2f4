"""`forge signers|approve|sign|verify`, `forge audit log|verify`: signatures, roles and the audit log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import click

from forge_ray.cli.audit import audit
from forge_ray.cli.policy import WHY
from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import ConfigError, PolicyError
from forge_ray.store.home import expanded

if TYPE_CHECKING:
    from forge_ray.store.authority import Signer
    from forge_ray.store.files import Store

ROLE = click.option(
    "--role", "roles", multiple=True, help="Role: owner, data_steward, trainer, validator, releaser or auditor. Repeatable."
)
PERSON = click.option("--person", default="", help="Who holds the key, where they hold another one too. Default: NAME.")


@click.group()
def top() -> None:
    """Top-level verbs; `forge` registers them."""


@click.group(cls=Verbs)
def signers() -> None:
    """Manage the keys whose signatures count, and their roles."""


@verb(signers, "create", "forge signers create olga --role owner --out ~/keys")
@click.argument("name")
@ROLE
@PERSON
@click.option("--out", default=".", show_default=True, help="Folder for NAME.key (0600) and NAME.pub.")
@click.option(
    "--algorithm",
    type=click.Choice(["ed25519", "p256"]),
    default="ed25519",
    show_default=True,
    help="Algorithm of the key; only p256 signatures can be verified by OpenSSF's model_signing.",
)
def signers_create(
    store: Store,
    as_json: bool,
    name: str,
    roles: tuple[str, ...],
    person: str,
    out: str,
    algorithm: Literal["ed25519", "p256"],
) -> Any:
    """Create a key pair and register it as a signer.

    The first signer is the owner. FORGE_SIGNER_PASSPHRASE encrypts the private key."""

    from forge_ray.governance.signers import create
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        signer = create(index, name, roles, expanded(out), algorithm, person)
    if not as_json:
        echo(f"{signer.id}  {signer.name}: {', '.join(signer.roles)}")
        echo(f"export FORGE_SIGNER={expanded(out).absolute() / (name + '.key')}", err=True)
    return _with_state(signer)


@verb(signers, "add", "forge signers add rolf --public rolf.pub --role releaser")
@click.argument("name")
@click.option("--public", "path", required=True, metavar="FILE.pub", help="Public key, PEM.")
@ROLE
@PERSON
def signers_add(store: Store, as_json: bool, name: str, path: str, roles: tuple[str, ...], person: str) -> Any:
    """Register someone's public key as a signer.

    The private key stays with its owner."""
    from pathlib import Path

    from forge_ray.errors import NotFound
    from forge_ray.governance.signers import add
    from forge_ray.store.catalog import Catalog

    if not Path(path).is_file():
        raise NotFound(f"--public {path!r} is not a file", hint="give the public key, NAME.pub")
    with Catalog.open(store) as index:
        signer = add(index, name, roles, Path(path).read_text(), person)
    if not as_json:
        echo(f"{signer.id}  {signer.name}: {', '.join(signer.roles)}")
    return _with_state(signer)


@verb(signers, "list", "forge signers list")
def signers_list(store: Store, as_json: bool) -> Any:
    """List every signer, including retired and revoked ones."""
    from forge_ray.cli.show import print_table
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as index:
        listed = list(index.authority().signers.values())
    if not as_json:
        rows = [(signer.id, signer.name, ", ".join(signer.roles), _state(signer), signer.added_at[:19]) for signer in listed]
        print_table("Signers", ("key", "name", "roles", "state", "since (UTC)"), rows)
    return [_with_state(signer) for signer in listed]


@verb(signers, "change", "forge signers change rolf --role releaser --role validator")
@click.argument("reference", metavar="KEY|NAME")
@ROLE
def signers_change(store: Store, as_json: bool, reference: str, roles: tuple[str, ...]) -> Any:
    """Replace the roles of a signer.

    The signer has exactly the roles named with --role from then on."""
    from forge_ray.governance.signers import change
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        signer = change(index, reference, roles)
    if not as_json:
        echo(f"{signer.id}  {signer.name}: {', '.join(signer.roles)}")
    return _with_state(signer)


@verb(signers, "retire", "forge signers retire rolf --why 'left the team'")
@click.argument("reference", metavar="KEY|NAME")
@WHY
def signers_retire(store: Store, as_json: bool, reference: str, why: str) -> Any:
    """Retire a signer; existing signatures stay valid.

    New signatures by this signer are rejected."""
    return _ended(store, as_json, reference, why, compromised=False)


@verb(signers, "revoke", "forge signers revoke rolf --why 'laptop stolen'")
@click.argument("reference", metavar="KEY|NAME")
@click.option(
    "--since",
    type=int,
    metavar="LINE",
    help="Last line of the audit log for which its signature counts; 0: none. Default: all.",
)
@WHY
def signers_revoke(store: Store, as_json: bool, reference: str, since: int | None, why: str) -> Any:
    """Revoke a compromised key: nothing that it signs from now on counts.

    With --since, neither does what it signed after that line of the audit log; aliases fall back to what they were."""
    return _ended(store, as_json, reference, why, compromised=True, since=since)


def _ended(store: Store, as_json: bool, reference: str, why: str, compromised: bool, since: int | None = None) -> Any:
    from forge_ray.governance.signers import end
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        signer = end(index, reference, compromised, why, since)
    if not as_json:
        echo(f"{signer.id}  {signer.name}: {_state(signer)}")
    return _with_state(signer)


@verb(top, "approve", "forge approve mv_0123456789abcdef --alias support@prod")
@click.argument("reference", metavar="VERSION|DATASET")
@click.option("--alias", default="", help="Approve one move of this alias, as one of the two releasers.")
@click.option("--archive", "action", flag_value="archive", help="Approve that the alias, or the version, is archived.")
@click.option("--restore", "action", flag_value="restore", help="Approve that the version is taken back into use.")
@click.option("--refuse", is_flag=True, help="Refuse instead of approving; nobody moves it until you approve.")
@WHY
def approve(
    store: Store,
    as_json: bool,
    reference: str,
    alias: str,
    action: Literal["archive", "restore"] | None,
    refuse: bool,
    why: str,
) -> Any:
    """Sign an approval of a version, a dataset or an alias move.

    A validator approves a version; with --alias, a releaser approves one move of that alias."""
    from forge_ray.governance import signers as people
    from forge_ray.store.catalog import Catalog

    with Catalog.open(store) as index:
        event = people.approve(index, reference, alias, refuse, why, action or "use")
        name = index.authority().name_of(event.key)
    if not as_json:
        echo(f"{event.subject}: {event.data['decision']} by {name}" + (f" for {alias}" if alias else ""))
    return {"subject": event.subject, "by": name, **event.data}


@verb(top, "sign", "forge sign mv_0123456789abcdef")
@click.argument("reference", metavar="ID|ALIAS")
@click.option(
    "--openssf", is_flag=True, help="Export the files and a model.sig to --out, to verify with OpenSSF's model_signing."
)
@click.option("--out", default="", metavar="DIR", help="Folder for the export of --openssf.")
def sign(store: Store, as_json: bool, reference: str, openssf: bool, out: str) -> Any:
    """Add your signature to a record that someone else wrote.

    The files of the record are verified first."""
    from forge_ray.governance import signers as people
    from forge_ray.store.catalog import Catalog

    if openssf != bool(out):
        raise ConfigError("--openssf and --out DIR go together", hint="forge sign mv_… --openssf --out signed/")
    with Catalog.open(store) as index:
        path = people.export_signed(index, reference, out) if openssf else people.sign(index, reference)
    if not as_json:
        echo(path)
    return {"path": path}


@verb(top, "verify", "forge verify support@prod")
@click.argument("what", metavar="ID|ALIAS|PATH")
@click.option(
    "--key", "keys", multiple=True, metavar="FILE.pub", help="Trust this key instead of the store's signers. Repeatable."
)
def verify(store: Store, as_json: bool, what: str, keys: tuple[str, ...]) -> Any:
    """Verify digests and signatures of a record and its inputs.

    A PATH to a folder with model.sig, or to an envelope, is verified offline."""
    from pathlib import Path

    from forge_ray.cli.show import print_table
    from forge_ray.governance import verify as verifying
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.resolve import resolve

    trusted = verifying.trusted_keys(keys)
    if Path(what).exists():
        result = verifying.verify_path(Path(what), trusted)
        if not as_json:
            echo(f"{what}: {result['what']} holds")
        return result
    with Catalog.read_only(store) as index:
        checked = verifying.verify_record(index, resolve(index, what), trusted)
        checked = verifying.requiring(checked, trusted)
    if not as_json:
        rows = [(one.id, one.what, ", ".join(one.signed_by) or "-", one.problem or "ok") for one in checked]
        print_table("Verified", ("record", "what", "signed by", ""), rows)
    if wrong := [one for one in checked if one.problem]:
        raise PolicyError(
            f"{wrong[0].id}: {wrong[0].problem} ({len(wrong)} of {len(checked)})", hint="do not deploy what does not verify"
        )
    return [vars(one) for one in checked]


@verb(audit, "log", "forge audit log --subject support@prod --last 20")
@click.option("--subject", default="", help="Show only lines about this id, alias or key.")
@click.option("--action", default="", help="Show only actions that begin with this, e.g. alias.set or alias.")
@click.option("--last", default=0, help="Show only the last N lines; 0: all.")
def audit_show(store: Store, as_json: bool, subject: str, action: str, last: int) -> Any:
    """Show every change of the store: who, when, what and why."""
    from forge_ray.cli.show import print_table
    from forge_ray.store import audit_log
    from forge_ray.store.catalog import Catalog

    lines = [
        {name: value for name, value in line.items() if name not in ("body", "sig")}
        for line in audit_log.read(store)
        if (not subject or line["subject"] == subject) and (not action or line["action"].startswith(action))
    ][-last:]
    if not as_json:
        with Catalog.read_only(store) as index:
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
            for line in lines
        ]
        print_table("Audit log", ("line", "at (UTC)", "who (unsigned)", "what", "of", "why"), rows)
    return lines


@verb(audit, "verify", "forge audit verify --every-signature")
@click.option("--head", default="", metavar="N:HASH", help="Head noted earlier, which the log must still contain.")
@click.option("--every-signature", is_flag=True, help="Check the signature of every line, not only of the last.")
def audit_verify(store: Store, as_json: bool, head: str, every_signature: bool) -> Any:
    """Verify the audit log and everything it covers.

    Exit code 3 if a line, record or event was changed, added, moved or removed."""
    from forge_ray.governance.verify import verify_log

    report = verify_log(store, every_signature, head)
    if not as_json:
        echo(f"{report.num_lines} lines, {report.num_signed} signed, {report.num_files} files; head {report.head}")
        for line in (*report.problems[:20], *report.ignored[:20]):
            echo(f"  {line}")
        if not report.problems:
            echo(
                "nothing was changed"
                + ("" if report.num_signed else "; no line is signed, so this rests on the hash chain alone")
            )
    if report.problems:
        raise PolicyError(
            f"the audit log does not hold: {report.problems[0]} ({len(report.problems)} problems)",
            hint="compare the store with a backup; `forge audit log` shows who wrote last",
        )
    return vars(report)


TRUST: tuple[click.Command, ...] = (signers, *top.commands.values())


def _state(signer: Signer) -> str:
    return "revoked" if signer.revoked_at else "retired" if signer.retired_at else "active"


def _with_state(signer: Signer) -> dict[str, Any]:
    return signer.model_dump(mode="json") | {"state": _state(signer)}
