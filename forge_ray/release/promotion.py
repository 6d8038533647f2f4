"""Which versions may answer clients, and what an alias stands for: promote, set a route, archive.

Each change is one event of the catalogue; endpoints read the events and follow. The rules of protected aliases are here too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from forge_ray.config.release import ALIAS, AliasRoute
from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.records import Event, ModelVersion
from forge_ray.store import signatures, signing
from forge_ray.store.aliases import alias_event
from forge_ray.store.authority import Authority, Policy
from forge_ray.store.catalog import Catalog


def promote(catalog: Catalog, reference: str, alias: str) -> ModelVersion:
    """Point `alias` at a version; a rejected one is refused. Its rules, shadows and fallback stay, canaries end.
    Pointing again at the same one writes nothing."""
    version, now = releasable(catalog, reference), catalog.routes().get(alias)
    route = (now or AliasRoute(versions={version.id: 1})).model_copy(update={"versions": {version.id: 1.0}})
    if now != route:
        set_route(catalog, alias, route)
    return version


def releasable(catalog: Catalog, reference: str) -> ModelVersion:
    """A version that clients may be answered by; `PolicyError` for one rejected, never judged, or archived."""
    version = catalog.model(reference)
    refuse_withdrawn(catalog, version.id)
    if version.id in catalog.archived():
        raise PolicyError(f"{version.id} is archived", hint=f"`forge models restore {version.id}` first")
    if version.status == "rejected":
        raise PolicyError(
            f"{version.id} was rejected: {'; '.join(version.reasons)}",
            hint="train a better one, or change the gate in the run file and release again",
        )
    if version.status == "candidate":
        raise PolicyError(
            f"{version.id} is a candidate: step {version.step} of {version.run}, which no gate has judged",
            hint="deploy it by its id, or let the run end and `forge release` it",
        )
    require_signed(catalog, version)
    return version


def refuse_withdrawn(catalog: Catalog, version: str) -> None:
    """Raise `PolicyError` for a version that learned from erased rows."""
    if erasure := catalog.withdrawn().get(version):
        raise PolicyError(
            f"{version} learned from rows that {erasure} erased",
            hint=f"`forge lineage {erasure}` and erasures/{erasure}/certificate.json name what replaces it",
        )


def require_signed(catalog: Catalog, version: ModelVersion) -> None:
    """Raise `PolicyError` where the policy wants signatures and the version, or a report it was judged by, has none."""
    authority = catalog.authority()
    if authority.policy.signatures:
        for record in (version, *(catalog.get(report) for report in version.evals)):
            signatures.require_signed(catalog.store, authority, record)


def resolved_route(catalog: Catalog, alias: str, route: AliasRoute) -> AliasRoute:
    """`route` with every reference as the id of a version that may answer. Shadows may be candidates, for nobody sees
    their answers."""
    if catalog.has(alias) or alias == "base":
        raise ConfigError(f"alias {alias!r} is the id of a record, or `base`, which rules use", hint="choose a name")
    if not re.fullmatch(ALIAS, alias):
        raise ConfigError(f"{alias!r} is no name for an alias: want {ALIAS}", hint="for example support@prod")
    rules = tuple(
        rule.model_copy(
            update={
                "to": rule.to if rule.to == "base" else releasable(catalog, rule.to).id,
                "classifier": rule.classifier and releasable(catalog, rule.classifier).id,
            }
        )
        for rule in route.rules
    )
    versions = {releasable(catalog, reference).id: weight for reference, weight in route.versions.items()}
    shadow = tuple(catalog.model(reference).id for reference in route.shadow)
    return route.model_copy(update={"versions": versions, "rules": rules, "shadow": shadow})


def set_route(catalog: Catalog, alias: str, route: AliasRoute | None, why: str = "") -> None:
    """Let `alias` stand for `route` from now on; None archives it."""
    now = catalog.routes().get(alias)
    if route is None and now is None:
        raise NotFound(f"no alias {alias!r} in {catalog.store.place}", hint="`forge alias list`")
    new = route and resolved_route(catalog, alias, route)
    if new:
        current = set(now.versions) if now else set()
        for version in [one for one in new.versions if one not in current or one != new.stable]:
            _check_promotion(catalog, alias, version)
    catalog.append(alias_event(alias, new, why))


def archive(catalog: Catalog, reference: str, restore: bool = False) -> ModelVersion:
    """Take a version out of use (or back): whoever asks for it by name is answered 410, or by the alias's fallback."""
    version = catalog.model(reference)
    if restore:
        refuse_withdrawn(catalog, version.id)
    if (version.id in catalog.archived()) == restore:
        catalog.append(Event(kind="model", subject=version.id, data={"state": "active" if restore else "archived"}))
    return version


def _check_promotion(catalog: Catalog, alias: str, version: str) -> None:
    key = signing.private_key()
    run = catalog.get_as(ModelVersion, version).run
    check_promotion(
        catalog.authority(),
        alias,
        version,
        signing.key_id(key.public_key()) if key else "",
        catalog.events("approval", version),
        signatures.signers_of(catalog.store, run) if run else (),
    )


def is_protected(policy: Policy, alias: str) -> bool:
    return any(fnmatchcase(alias, pattern) for pattern in policy.protected)


def check_promotion(
    authority: Authority, alias: str, version: str, key: str, approvals: Iterable[Event], trained_by: Iterable[str]
) -> None:
    """The rules of a protected alias, for a version that comes new to it. `approvals` are events of the version;
    `trained_by` the keys that signed its run."""
    if not is_protected(authority.policy, alias):
        return
    approved = [event for event in approvals if event.data["decision"] == "approve" and event.data["alias"] in ("", alias)]
    releasers = {event.key for event in approved if event.data["alias"] == alias and authority.is_valid(event, "releaser")}
    releasers |= {signer.id for signer in authority.active("releaser") if signer.id == key}
    if len(releasers) < 2:
        others = [signer.name for signer in authority.active("releaser") if signer.id not in releasers]
        have = ", ".join(sorted(authority.name_of(one) for one in releasers)) or "nobody"
        raise PolicyError(
            f"policy.protected: {alias!r} is moved by two releasers together; for {version} there is {have}",
            hint=f"`forge approve {version} --alias {alias}` by {' or '.join(others) or 'another releaser, yet to add'}",
        )
    if authority.policy.independent_validation:
        trainers = set(trained_by)
        validated = [event for event in approved if event.key not in trainers and authority.is_valid(event, "validator")]
        if not validated:
            could = [signer.name for signer in authority.active("validator") if signer.id not in trainers]
            raise PolicyError(
                f"policy.independent_validation: no validator who did not train {version} has approved it",
                hint=f"`forge approve {version}` by {' or '.join(could) or 'a validator, who is yet to be added'}",
            )
