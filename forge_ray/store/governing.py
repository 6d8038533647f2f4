"""How signers and policy change: which `signer`, `policy` and `upgrade` events have an effect, and which (pure)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pydantic import ValidationError

from forge_ray.errors import ForgeError
from forge_ray.records import Event
from forge_ray.store import signing
from forge_ray.store.authority import Authority, Policy, Signer
from forge_ray.store.placed import Placed

GOVERNING = ("signer", "policy", "upgrade")  # kinds of events that only an owner's signature gives an effect


def governed(before: Authority, placed: Placed) -> Authority | None:
    """Signers and policy behind a `signer`, `policy` or `upgrade` event; None where it has no effect: not signed, with its
    line, by an owner who could, or of a content that is none."""
    event, line = placed.event, placed.source
    try:
        if line is None or line.key != event.key:
            return None
        if before.genesis:
            owner = before.signers.get(event.key)
            if owner is None or not owner.could_sign(line.number) or "owner" not in owner.roles:
                return None
            public_key = signing.load_public(owner.public_key)
        else:
            if event.kind != "signer" or event.data["action"] != "added" or "owner" not in event.data["roles"]:
                return None
            public_key = signing.load_public(event.data["public_key"])
            if not signing.key_id(public_key) == event.key == event.subject:
                return None
        if not line.is_signed(public_key):
            return None
        match event.kind:
            case "signer":
                return with_signer(before, placed)
            case "policy":
                settings = {name: value for name, value in event.data.items() if name != "why"}
                return before.model_copy(update={"policy": Policy.model_validate(settings)})
            case _:
                digests = event.data["events"]
                return before if isinstance(digests, list) and all(isinstance(one, str) for one in digests) else None
    except (ForgeError, ValidationError, LookupError, TypeError, ValueError, AttributeError):
        return None


def with_signer(before: Authority, placed: Placed) -> Authority | None:
    """The authority after a `signer` event that counts; None where it changes nothing."""
    event, data, line = placed.event, placed.event.data, placed.line
    current = before.signers.get(event.subject)
    match data["action"]:
        case "added":
            if current is not None or signing.key_id(signing.load_public(data["public_key"])) != event.subject:
                return None
            signer = Signer(
                id=event.subject,
                name=data["name"],
                person=data.get("person") or data["name"],
                roles=data["roles"],
                public_key=data["public_key"],
                added_at=event.at,
                added_line=line,
            )
        case "changed" if current and current.is_active:
            signer = Signer.model_validate(current.model_dump() | {"roles": data["roles"]})
        case "retired" if current and current.is_active:
            signer = current.model_copy(update={"retired_at": event.at, "valid_to": line})
        case "revoked" if current:
            valid_to = min(int(data.get("since", line)), line, line if current.valid_to is None else current.valid_to)
            signer = current.model_copy(update={"revoked_at": event.at, "valid_to": valid_to})
        case _:
            return None
    genesis = before.genesis or (placed.source.sha256 if placed.source else "")
    return before.model_copy(update={"genesis": genesis, "signers": before.signers | {event.subject: signer}})


def reaches_back(event: Event, line: int) -> bool:
    """Whether a `signer` event that counts changes what holds in front of it."""
    return event.kind == "signer" and event.data["action"] == "revoked" and int(event.data.get("since", line)) < line


def limits_of(authority: Authority) -> dict[str, int]:
    """Revoked key → the last line for which its signature counts."""
    return {
        signer.id: signer.valid_to
        for signer in authority.signers.values()
        if signer.revoked_at and signer.valid_to is not None
    }


def refolded(events: Iterable[Placed], limits: Mapping[str, int]) -> tuple[list[tuple[int, Authority]], list[int]]:
    """Signers and policy behind each event (line, authority), without what a key signed behind its limit; and the lines that
    are void. Revocations stay, and so does the first owner."""
    authority, void = Authority(), []
    history = [(0, authority)]
    for placed in events:
        is_void = bool(authority.genesis) and placed.line > limits.get(placed.event.key, placed.line)
        if placed.event.kind == "signer" and placed.event.data["action"] == "revoked":
            after = with_signer(authority, placed) if placed.event.subject in authority.signers else None
        else:
            after = None if is_void else governed(authority, placed)
        if after is None:
            void.append(placed.line)
        else:
            authority = after
            history.append((placed.line, after))
    return history, void
