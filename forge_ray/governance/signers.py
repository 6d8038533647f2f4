"""Signers, policy, approvals: the events behind `forge signers`, `forge policy`, `forge approve`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from pathlib import Path
from typing import Any

from forge_ray.config.base import parse
from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.records import Event, FileEntry
from forge_ray.store import exports, paths, signing
from forge_ray.store.authority import ROLES, Policy, Signer
from forge_ray.store.catalog import Catalog
from forge_ray.store.exact import copy_file
from forge_ray.store.governing import limits_of, refolded
from forge_ray.store.home import expanded
from forge_ray.store.out_of_use import refuse_withdrawn
from forge_ray.store.protection import DECIDERS, Action
from forge_ray.store.signatures import add_signature, record_path, roles_for


def create(
    catalog: Catalog, name: str, roles: tuple[str, ...], folder: Path, algorithm: signing.Algorithm, person: str = ""
) -> Signer:
    """Create a key pair in `folder` (NAME.key readable by its owner only, NAME.pub) and register it as a signer. The first
    signer must be an owner and signs its own registration. `person`: who holds the key, where they hold others too."""
    _check(catalog, name, roles)
    is_first = not catalog.authority().signers
    if not is_first:
        catalog.check_may("signer events")  # before a key is written that could not be registered
    elif "owner" not in roles:
        raise PolicyError("the first signer must be an owner, who can add the others", hint="--role owner")
    key = signing.generate(algorithm)
    folder.mkdir(parents=True, exist_ok=True)
    signing.write_private(folder / f"{name}.key", key, os.environ.get(signing.PASSPHRASE, ""))
    (folder / f"{name}.pub").write_text(public := signing.public_pem(key.public_key()))
    with signing.acting(key) if is_first else contextlib.nullcontext():
        return add(catalog, name, roles, public, person)


def add(catalog: Catalog, name: str, roles: tuple[str, ...], public_pem: str, person: str = "") -> Signer:
    """Register a public key as a signer with these roles; done by an owner, or by the first signer for itself."""
    _check(catalog, name, roles)
    identifier = signing.key_id(signing.load_public(public_pem))
    if identifier in catalog.authority().signers:
        raise ConfigError(f"{identifier} is already a signer", hint="`forge signers change` changes its roles")
    if not catalog.authority().signers:
        key = signing.private_key()
        if "owner" not in roles or key is None or signing.key_id(key.public_key()) != identifier:
            raise PolicyError(
                "the first signer must be an owner, and must sign its own registration",
                hint="`forge signers create NAME --role owner …` creates the key and signs",
            )
    more = {"person": person} if person and person != name else {}
    _append(catalog, identifier, "added", name=name, roles=list(roles), public_key=public_pem, **more)
    return find(catalog, identifier)


def change(catalog: Catalog, reference: str, roles: tuple[str, ...]) -> Signer:
    signer = find(catalog, reference)
    _check_roles(roles)
    _keep_an_owner(catalog, signer, roles)
    _append(catalog, signer.id, "changed", roles=list(roles))
    return find(catalog, signer.id)


def end(catalog: Catalog, reference: str, compromised: bool, why: str, since: int | None = None) -> Signer:
    """Retire a signer, or revoke a compromised key. What it signed so far stays valid, and nothing that it brings later;
    with `since`, nothing that it signed behind that line of the audit log."""
    signer = find(catalog, reference)
    _keep_an_owner(catalog, signer, ())
    own = signing.private_key()
    acting = signing.key_id(own.public_key()) if own else ""
    is_signer = acting in catalog.authority().signers
    if since is not None and is_signer and not _would_remain(catalog, acting, signer.id, since):
        raise ConfigError(
            f"--since {since} would void what made {catalog.authority().name_of(acting)} a signer, who revokes here",
            hint="give a later line (`forge audit log`), or let an owner whom that key did not add revoke it",
        )
    more = {} if since is None else {"since": since}
    _append(catalog, signer.id, "revoked" if compromised else "retired", why=why, **more)
    return find(catalog, signer.id)


def _would_remain(catalog: Catalog, acting: str, revoked: str, since: int) -> bool:
    """Whether `acting` would still be a signer if everything behind line `since` by the key `revoked` were void."""
    history, _ = refolded(catalog.standing.governing, limits_of(catalog.authority()) | {revoked: since})
    signer = history[-1][1].signers.get(acting)
    return signer is not None and signer.is_active


def find(catalog: Catalog, reference: str) -> Signer:
    """The signer with this key id or name. Raises `NotFound`."""
    signers = catalog.authority().signers.values()
    for signer in signers:
        if reference in (signer.id, signer.name):
            return signer
    names = ", ".join(signer.name for signer in signers) or "none yet"
    raise NotFound(f"no signer {reference!r} in {catalog.store.place}", hint=f"signers: {names}")


def set_policy(catalog: Catalog, changes: dict[str, Any], why: str) -> Policy:
    """Change the given settings of the policy; requires an owner's signature."""
    authority = catalog.authority()
    if not authority.signers:
        raise PolicyError("a policy needs an owner", hint="`forge signers create NAME --role owner` first")
    if licences := changes.get("refused_licences"):
        changes = changes | {"refused_licences": list(dict.fromkeys(map(str.strip, licences)))}
        if "" in changes["refused_licences"]:
            raise ConfigError(
                "a refused licence is empty, which would refuse nothing",
                hint="a model imported without one has the licence `unknown`: --refuse-licence unknown",
            )
    policy = parse(Policy, authority.policy.model_dump(mode="json") | changes)
    if policy.protected and len(authority.active("releaser")) < 2:
        raise PolicyError(
            "policy.protected needs two releasers, or protected aliases could never be moved",
            hint="`forge signers create NAME --role releaser`",
        )
    if policy.signatures and not authority.policy.signatures:
        _refuse_to_strand(catalog)
    settings = policy.model_dump(mode="json")
    for later in (
        "no_export",
        "endpoints",
        "refused_licences",
    ):  # releases that do not know a setting pass over a policy that has it
        if not settings[later]:
            del settings[later]
    catalog.append(Event(kind="policy", subject="policy", data=settings | ({"why": why} if why else {})))
    return catalog.authority().policy


def _refuse_to_strand(catalog: Catalog) -> None:
    """Raise `PolicyError` if the last move of an alias was not signed by a releaser: the policy would vouch for it."""
    standing = catalog.standing
    now = catalog.routes()
    if unsigned := sorted(name for name in now if not standing.is_signed(standing.placed("alias", name)[-1], "releaser")):
        raise PolicyError(
            f"policy.signatures: no releaser signed the current route of {', '.join(unsigned)}",
            hint=f"a releaser first: forge alias set {unsigned[0]} --to {now[unsigned[0]].stable}, or forge alias archive"
            f" {unsigned[0]}",
        )


def approve(catalog: Catalog, reference: str, alias: str, refuse: bool, why: str, action: Action = "use") -> Event:
    """Sign an approval or a refusal of a version or dataset; with `alias`, of one move of that alias, or of archiving or
    restoring what it stands for. It names the full digest of the record."""
    key = signing.private_key()
    if key is None:
        raise PolicyError("an approval needs a key to sign it", hint=f"set {signing.SIGNER} to your private key")
    aliases = catalog.aliases()
    record = catalog.get(aliases.get(reference, reference))
    authority = catalog.authority()
    identifier = signing.key_id(key.public_key())
    if identifier not in {signer.id for signer in authority.active(*DECIDERS)}:
        raise PolicyError(
            f"{authority.name_of(identifier)} is not a data steward, validator or releaser",
            hint=f"who could: {', '.join(s.name for s in authority.active('validator', 'releaser')) or 'nobody yet'}",
        )
    line = catalog.standing.line_of(record_path(record))
    data = {"decision": "refuse" if refuse else "approve", "alias": alias, "why": why, "digest": line.sha256 if line else ""}
    if action != "use":
        data["action"] = action
    return catalog.append(Event(kind="approval", subject=record.id, data=data))


def _own_roles(catalog: Catalog, key: signing.PrivateKey) -> tuple[str, ...]:
    signer = catalog.authority().signers.get(signing.key_id(key.public_key()))
    return signer.roles if signer and signer.is_active else ()


def _name(catalog: Catalog, key: signing.PrivateKey) -> str:
    return catalog.authority().name_of(signing.key_id(key.public_key()))


def sign(catalog: Catalog, reference: str) -> str:
    """Sign a record that someone else wrote, after verifying its files; returns the path of the signature."""
    from forge_ray.governance.verify import check_files

    key = signing.private_key()
    if key is None:
        raise PolicyError("there is no key to sign with", hint=f"set {signing.SIGNER} to your private key")
    record = catalog.get(catalog.aliases().get(reference, reference))
    check_files(catalog.store, record)
    roles = set(roles_for(record))
    if catalog.authority().signers and not roles & set(_own_roles(catalog, key)):
        raise PolicyError(
            f"a signature on {record.id} counts from {' or '.join(sorted(roles))}; {_name(catalog, key)} is none of them",
            hint=f"who could: {', '.join(s.name for s in catalog.authority().active(*roles)) or 'nobody yet'}",
        )
    path = add_signature(catalog.store, record, catalog.store.read(record_path(record)), key)
    catalog.sync()
    return path


def export_signed(catalog: Catalog, reference: str, out: str) -> str:
    """Export the files of a model version to a new folder, with a `model.sig` that OpenSSF's model-signing verifies."""
    from forge_ray.governance.verify import check_files

    key = signing.private_key()
    if key is None:
        raise PolicyError("there is no key to sign with", hint=f"set {signing.SIGNER} to your private key")
    version = catalog.model(reference)
    refuse_withdrawn(catalog, version.id)
    exports.refuse_export(catalog, version)
    check_files(catalog.store, version)
    folder, target = catalog.store.fetch_dir(paths.model(version.id), verify=False), expanded(out)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{out} is not empty", hint="give another --out")
    files = tuple(entry for entry in version.files if entry.path != signing.BUNDLE_FILE)  # a new one takes its place
    bundle = signing.model_bundle(version.id, files, key)
    signature = FileEntry(path=signing.BUNDLE_FILE, size=len(bundle), sha256=hashlib.sha256(bundle).hexdigest())
    exports.record_export(catalog, version, "openssf", "", str(target.absolute()), (*files, signature))
    target.mkdir(parents=True, exist_ok=True)
    for entry in files:
        copy_file(folder, entry.path, target)
    (target / signature.path).write_bytes(bundle)
    return str(target)


def _append(catalog: Catalog, key: str, action: str, **data: Any) -> None:
    before = catalog.authority()
    catalog.append(Event(kind="signer", subject=key, data={"action": action, **data}))
    if catalog.authority() == before:
        raise PolicyError(
            "this was not signed by an owner, so it has no effect", hint=f"set {signing.SIGNER} to an owner's key"
        )


def _check(catalog: Catalog, name: str, roles: tuple[str, ...]) -> None:
    _check_roles(roles)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}", name):
        raise ConfigError(f"name {name!r}: up to 64 letters, digits and . _ @ -", hint="for example alice")
    if any(signer.name == name for signer in catalog.authority().active()):
        raise ConfigError(
            f"there is already a signer named {name!r}", hint="choose another name, or retire that signer first"
        )


def _check_roles(roles: tuple[str, ...]) -> None:
    if unknown := [role for role in roles if role not in ROLES] or ([] if roles else ["none"]):
        raise ConfigError(f"role {unknown[0]!r} is not one of {', '.join(ROLES)}", hint="--role trainer --role validator")


def _keep_an_owner(catalog: Catalog, signer: Signer, roles: tuple[str, ...]) -> None:
    owners = catalog.authority().active("owner")
    if "owner" not in roles and [owner.id for owner in owners] == [signer.id]:
        raise PolicyError(
            f"{signer.name} is the only owner: without an owner, signers and policy could never be changed again",
            hint="`forge signers create NAME --role owner` first",
        )
