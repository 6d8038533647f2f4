"""Who may do what: signers, roles, policy. All of it follows from signed events; nothing here reads the store.

The first signer vouches for itself and is the owner; from then on signers and policy change by an owner's signature alone:
events without one are as if they had not been written. Refusals are for people who come through these commands; against
somebody who writes into the store's files it is the signatures that hold, which `forge verify` and the endpoints check.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Literal, get_args

from pydantic import Field

from forge_ray.config.base import Config
from forge_ray.errors import PolicyError
from forge_ray.records import Event, Frozen
from forge_ray.store import signing
from forge_ray.store.aliases import gives_up_canaries, route_of

Role = Literal["owner", "data_steward", "trainer", "validator", "releaser", "auditor"]
ROLES: tuple[str, ...] = get_args(Role)

# what is written → the roles that may. `models` of the last two kinds are told apart by their status.
MAY: dict[str, tuple[Role, ...]] = {
    "datasets": ("data_steward",),
    "imported models": ("data_steward", "trainer"),
    "runs": ("trainer",),
    "evals": ("trainer", "validator"),
    "models": ("trainer", "validator"),
    "erasures": ("data_steward",),
    "deployments": ("releaser",),
    "run events": ("trainer",),
    "alias events": ("releaser",),
    "deployment events": ("releaser",),
    "model events": ("releaser", "data_steward"),
    "erasure events": ("data_steward",),
    "key events": ("releaser", "owner"),
    "approval events": ("data_steward", "validator", "releaser"),
    "reproduction events": ("trainer", "validator", "auditor"),
    "signer events": ("owner",),
    "policy events": ("owner",),
}


class Signer(Frozen):
    """Somebody, or a service, whose signature counts."""

    id: str
    name: str
    roles: tuple[Role, ...]
    public_key: str = Field(description="PEM")
    added_at: str = ""
    retired_at: str = Field("", description="what it signed before counts, what it signs later does not")
    revoked_at: str = Field("", description="nothing that it signed counts: the key is in wrong hands")


class Policy(Config):
    """What an organisation demands. The default demands nothing: one person on a laptop needs no keys."""

    roles: bool = Field(False, description="every change needs the signature of a signer whose role may make it")
    signatures: bool = Field(False, description="only versions whose record and reports are signed are promoted or deployed")
    protected: tuple[str, ...] = Field((), description="aliases, or patterns of them, that two releasers move together")
    independent_validation: bool = Field(
        False, description="a protected alias takes a version only if a validator approved it who did not train it"
    )


class Authority(Frozen):
    signers: dict[str, Signer] = {}
    policy: Policy = Policy()

    @property
    def keys(self) -> dict[str, signing.PublicKey]:
        """key id → public key, of everyone who was not revoked."""
        return {s.id: signing.load_public(s.public_key) for s in self.signers.values() if not s.revoked_at}

    def active(self, *roles: str) -> list[Signer]:
        """Signers who may act now, in one of these roles (or in any)."""
        now = [signer for signer in self.signers.values() if not (signer.revoked_at or signer.retired_at)]
        return [signer for signer in now if not roles or set(signer.roles) & set(roles)]

    def name_of(self, key: str) -> str:
        return self.signers[key].name if key in self.signers else key or "nobody"

    def is_valid(self, event: Event, *roles: str) -> bool:
        """Whether a signer who could act when it was written, in one of these roles, signed the event."""
        signer = self.signers.get(event.key)
        if signer is None or signer.revoked_at or (roles and not set(signer.roles) & set(roles)):
            return False
        if signer.retired_at and event.at >= signer.retired_at:
            return False
        return _is_signed(event, signer.public_key)


def _is_signed(event: Event, public_key: str) -> bool:
    try:
        signature = base64.b64decode(event.signature, validate=True)
    except ValueError:
        return False
    return bool(signature) and signing.is_signed(event.to_sign(), signature, signing.load_public(public_key))


def folded(events: Iterable[Event]) -> Authority:
    """What the `signer` and `policy` events say, in the order of their time; those that no owner signed are passed over."""
    authority = Authority()
    for event in sorted(events, key=lambda event: (event.at, event.id)):
        if event.kind == "signer":
            authority = _with_signer(authority, event)
        elif event.kind == "policy" and authority.is_valid(event, "owner"):
            authority = authority.model_copy(update={"policy": _policy_of(event)})
    return authority


def _policy_of(event: Event) -> Policy:
    return Policy.model_validate({name: value for name, value in event.data.items() if name != "why"})


def _with_signer(before: Authority, event: Event) -> Authority:
    data = event.data
    is_first = not before.signers and data["action"] == "added" and event.key == event.subject and "owner" in data["roles"]
    if is_first:
        if not _is_signed(event, data["public_key"]) or signing.key_id(signing.load_public(data["public_key"])) != event.key:
            return before
    elif not before.is_valid(event, "owner"):
        return before
    match data["action"]:
        case "added":
            if signing.key_id(signing.load_public(data["public_key"])) != event.subject:
                return before
            signer = Signer(
                id=event.subject,
                name=data["name"],
                roles=data["roles"],
                public_key=data["public_key"],
                added_at=event.at,
            )
        case "changed":
            signer = before.signers[event.subject].model_copy(update={"roles": tuple(data["roles"])})
        case "retired":
            signer = before.signers[event.subject].model_copy(update={"retired_at": event.at})
        case _:
            signer = before.signers[event.subject].model_copy(update={"revoked_at": event.at})
    return before.model_copy(update={"signers": before.signers | {event.subject: signer}})


def check_may(authority: Authority, key: str, *actions: str) -> None:
    """Raise `PolicyError` where the policy wants roles and the signer `key` may not write all of `actions` (of `MAY`)."""
    if not authority.signers:  # the first signer is being added
        return
    ruled = [what for what in actions if authority.policy.roles or what in ("signer events", "policy events")]
    able = [{signer.id for signer in authority.active(*MAY[what])} for what in ruled]
    refused: dict[tuple[str, ...], list[str]] = {}
    for what, who in zip(ruled, able, strict=True):
        if key not in who:
            refused.setdefault(MAY[what], []).append(what)
    if not refused:
        return
    could = ", ".join(s.name for s in authority.active() if all(s.id in who for who in able)) or "nobody yet"
    if not key:
        actor = f"{signing.SIGNER} names no key"
    elif key in authority.signers:
        actor = f"{authority.name_of(key)} is {', '.join(authority.signers[key].roles)}"
        actor += " and retired" if authority.signers[key].retired_at else ""
    else:
        actor = f"{key} is no signer"
    rules = "; ".join(f"{', '.join(whats)} are written by {' or '.join(roles)}" for roles, whats in refused.items())
    raise PolicyError(f"policy.roles: {rules}; {actor}", hint=f"who could: {could} (`forge signers list`)")


def accepted_moves(authority: Authority, events: Iterable[Event]) -> list[Event]:
    """Of the alias events of a store, in the order of their time, those that may be followed: under `policy.signatures` the
    ones that a releaser signed, and an endpoint's own, without a key, that give up a canary."""
    if not authority.policy.signatures:
        return list(events)
    accepted: dict[str, list[Event]] = {}
    for event in events:
        before = accepted.setdefault(event.subject, [])
        if authority.is_valid(event, "releaser") or (
            not event.key and before and gives_up_canaries(route_of(before[-1]), route_of(event))
        ):
            before.append(event)
    return sorted((event for moves in accepted.values() for event in moves), key=lambda event: (event.at, event.id))
