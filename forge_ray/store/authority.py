"""Who may do what: signers, roles, policy, as they stand at a place of the log (`standing.py` folds it; nothing here reads).

Refusals are for people who come through the commands; against somebody who writes into the store's files it is the
signatures that hold, which commands and endpoints check by the same functions. The argument is in docs/design/authority.md.
"""

from __future__ import annotations

from typing import Literal, get_args
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from forge_ray.config.base import Config, SettingError
from forge_ray.config.origins import origin_of
from forge_ray.errors import PolicyError
from forge_ray.records import Frozen
from forge_ray.store import signing

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
    "export events": ("releaser",),
    "disclosure events": ("trainer", "validator"),
    "removal events": ("owner", "data_steward", "trainer"),
    "signer events": ("owner",),
    "policy events": ("owner",),
    "upgrade events": ("owner",),
}
# what endpoints follow: under `policy.roles` and under `policy.signatures` these count with a signature of such a role alone
FOLLOWED = ("alias events", "model events", "key events", "approval events")


class Signer(Frozen):
    """Somebody, or a service, whose signature counts: from the line that added it to the one that ended it."""

    id: str
    name: str
    person: str = Field("", description="who holds the key; two keys of one person are one of the two that must agree")
    roles: tuple[Role, ...]
    public_key: str = Field(description="PEM")
    added_at: str = ""
    retired_at: str = Field("", description="what it signed before counts, what it signs later does not")
    revoked_at: str = Field(
        "", description="the key is in wrong hands: what it signed behind line `valid_to` does not count"
    )
    added_line: int = Field(0, description="the line of the log that added it")
    valid_to: int | None = Field(None, description="the last line that its signature counts for; None while it is active")

    @property
    def is_active(self) -> bool:
        return self.valid_to is None

    def could_sign(self, line: int) -> bool:
        """Whether its signature counts at this line of the log."""
        return self.added_line <= line and (self.valid_to is None or line <= self.valid_to)


class Policy(Config):
    """What an organisation demands. The default demands nothing: one person on a laptop needs no keys."""

    roles: bool = Field(False, description="every change needs the signature of a signer whose role may make it")
    signatures: bool = Field(False, description="only versions whose record and reports are signed are promoted or deployed")
    protected: tuple[str, ...] = Field((), description="aliases, or patterns of them, that two releasers move together")
    independent_validation: bool = Field(
        False, description="a protected alias takes a version only if a validator approved it who did not train it"
    )
    no_export: bool = Field(False, description="the weights of model versions do not leave the store by a command")
    endpoints: tuple[str, ...] = Field((), description="hosts of other systems that held-out rows may be sent to")
    refused_licences: tuple[str, ...] = Field((), description="licences of models that no run learns from as its teacher")

    @field_validator("endpoints")
    @classmethod
    def _are_origins(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        for url in urls:
            if urlsplit(url).path not in ("", "/"):
                raise SettingError(f"{url!r} has a path: a host is allowed as a whole", f"use {origin_of(url)}")
        return tuple(dict.fromkeys(map(origin_of, urls)))


class Authority(Frozen):
    """Signers and policy behind some line of the log. `genesis`: sha256 of the event that named the first owner."""

    genesis: str = ""
    signers: dict[str, Signer] = {}
    policy: Policy = Policy()

    @property
    def keys(self) -> dict[str, signing.PublicKey]:
        """key id → public key, of everyone who was not revoked."""
        return {s.id: signing.load_public(s.public_key) for s in self.signers.values() if not s.revoked_at}

    def active(self, *roles: str) -> list[Signer]:
        """Signers who may act now, in one of these roles (or in any)."""
        now = [signer for signer in self.signers.values() if signer.is_active]
        return [signer for signer in now if not roles or set(signer.roles) & set(roles)]

    def name_of(self, key: str) -> str:
        return self.signers[key].name if key in self.signers else key or "nobody"

    def person_of(self, key: str) -> str:
        return (self.signers[key].person or self.signers[key].name) if key in self.signers else key

    def rules(self, action: str) -> bool:
        """Whether what is written counts with the signature of a role of `MAY[action]` alone."""
        if action in ("signer events", "policy events", "upgrade events"):
            return True
        return self.policy.roles or (self.policy.signatures and action in FOLLOWED)


def check_may(authority: Authority, key: str, *actions: str) -> None:
    """Raise `PolicyError` where the policy wants roles and the signer `key` may not write all of `actions` (of `MAY`)."""
    if not authority.signers:  # the first signer is being added
        return
    ruled = [what for what in actions if authority.rules(what)]
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
        actor += "" if authority.signers[key].is_active else " and no longer active"
    else:
        actor = f"{key} is no signer"
    rules = "; ".join(f"{', '.join(whats)} are written by {' or '.join(roles)}" for roles, whats in refused.items())
    rule = "policy.roles" if authority.policy.roles else "policy.signatures" if authority.policy.signatures else "signers"
    raise PolicyError(f"{rule}: {rules}; {actor}", hint=f"who could: {could} (`forge signers list`)")
