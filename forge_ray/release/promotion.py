"""Which versions may answer clients, and what an alias stands for: promote, set a route, archive.

Each change is one event of the catalogue; endpoints read the events and follow. The rules of protected aliases are here too.
"""

from __future__ import annotations

import re

from forge_ray.config.classify import class_names
from forge_ray.config.release import ALIAS, AliasRoute
from forge_ray.errors import ConfigError, NotFound, PolicyError
from forge_ray.models.class_head import is_classifier, refuse_reward_model, targets_in
from forge_ray.records import Event, ModelVersion
from forge_ray.store import paths, signatures, signing
from forge_ray.store.aliases import alias_event
from forge_ray.store.authority import Authority
from forge_ray.store.catalog import Catalog
from forge_ray.store.out_of_use import refuse_archived, refuse_withdrawn
from forge_ray.store.protection import Action, Shortfall
from forge_ray.store.removed import require
from forge_ray.store.standing import BACK_IN, NEXT, TAKEN_OUT


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
    refuse_archived(catalog, version.id)
    judged = version
    while judged.status == "imported" and judged.base_model:  # some layers of another version, or with new tokens
        judged = catalog.get_as(ModelVersion, judged.base_model)
    _refuse_unjudged(judged, f"{version.id} was made of {judged.id}: " if judged is not version else "")
    require_signed(catalog, version)
    require(catalog, paths.model(version.id))
    return version


def _refuse_unjudged(version: ModelVersion, of: str) -> None:
    if version.status == "rejected":
        raise PolicyError(
            f"{of}{version.id} was rejected: {'; '.join(version.reasons)}",
            hint="train a better one, or change the gate in the run file and release again",
        )
    if version.status == "candidate":
        raise PolicyError(
            f"{of}{version.id} is a candidate: step {version.step} of {version.run}, which no gate has judged",
            hint="deploy it by its id, or let the run end and `forge release` it",
        )
    if version.status == "merged":
        raise PolicyError(
            f"{of}{version.id} is {version.source}, which no gate has judged",
            hint=f"point the alias at {version.base_model}, or at a version that was trained on {version.id}",
        )


def require_signed(catalog: Catalog, version: ModelVersion) -> None:
    """Raise `PolicyError` where the policy wants signatures and the version, or a report it was judged by, has none."""
    authority = catalog.authority()
    if authority.policy.signatures:
        for record in (version, *(catalog.get(report) for report in version.evals)):
            signatures.require_signed(catalog.standing, record)


def refuse_name(catalog: Catalog, alias: str) -> None:
    """Raise `ConfigError` for a name that no alias can have."""
    if catalog.has(alias) or alias == "base":
        raise ConfigError(f"alias {alias!r} is the id of a record, or `base`, which rules use", hint="choose a name")
    if not re.fullmatch(ALIAS, alias):
        raise ConfigError(f"{alias!r} is not a valid alias, which matches {ALIAS}", hint="for example support@prod")


def resolved_route(catalog: Catalog, alias: str, route: AliasRoute) -> AliasRoute:
    """`route` with every reference as the id of a version that may answer. Shadows may be candidates, for nobody sees
    their answers."""
    refuse_name(catalog, alias)
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
    resolved = route.model_copy(update={"versions": versions, "rules": rules, "shadow": shadow})
    refuse_mixture(catalog, alias, resolved)
    refuse_unknown_label(catalog, resolved)
    return resolved


def refuse_mixture(catalog: Catalog, alias: str, route: AliasRoute) -> None:
    """Raise `ConfigError` where some versions of a route are classifiers and others generate text: no request can be put to
    both."""
    names = [*route.versions, *route.shadow, *(rule.to for rule in route.rules if rule.to != "base")]
    kinds = {name: is_classifier(catalog.model(name)) for name in names}
    if kinds[route.stable] and (route.fallback == "base" or any(rule.to == "base" for rule in route.rules)):
        raise ConfigError(
            f"{alias!r} stands for the classifier {route.stable}, and names `base`, which generates text",
            hint="remove the fallback and the rules to `base`",
        )
    if other := next((name for name, kind in kinds.items() if kind != kinds[route.stable]), None):
        one, two = ("is a classifier", "generates text") if kinds[route.stable] else ("generates text", "is a classifier")
        raise ConfigError(
            f"{alias!r} cannot stand for both: {route.stable} {one}, and {other} {two}", hint="give each an alias of its own"
        )


def refuse_unknown_label(catalog: Catalog, route: AliasRoute) -> None:
    """Raise `ConfigError` where a rule asks for a label that its classifier never gives; a reward model gives none."""
    for rule in route.rules:
        if not rule.classifier or not is_classifier(catalog.model(rule.classifier)):
            continue
        refuse_reward_model(catalog.store, catalog.model(rule.classifier))
        names = class_names(targets_in(catalog.store, catalog.model(rule.classifier)))
        if rule.label not in names:
            raise ConfigError(
                f"a rule asks for the label {rule.label!r}, which the classifier {rule.classifier} does not have",
                hint=f"one of {', '.join(names)}",
            )


def set_route(catalog: Catalog, alias: str, route: AliasRoute | None, why: str = "") -> None:
    """Let `alias` stand for `route` from now on; None archives it."""
    now = catalog.routes().get(alias)
    if route is None and now is None:
        raise NotFound(f"no alias {alias!r} in {catalog.store.place}", hint="`forge alias list`")
    new = route and resolved_route(catalog, alias, route)
    _check_people(catalog, alias, now, new)
    catalog.append(alias_event(alias, new, why))


def archive(catalog: Catalog, reference: str, restore: bool = False) -> ModelVersion:
    """Take a version out of use (or back): whoever asks for it by name is answered 410, or by the alias's fallback."""
    version = catalog.model(reference)
    if restore:
        refuse_withdrawn(catalog, version.id)
    if (version.id in catalog.archived()) == restore:
        state = BACK_IN if restore else TAKEN_OUT
        missing = catalog.standing.shortfalls_of_state(version.id, state, _key(), NEXT)
        for alias, shortfall in missing:
            raise refusal(catalog.authority(), alias, shortfall, "restore" if restore else "archive")
        catalog.append(Event(kind="model", subject=version.id, data={"state": state}))
    return version


def _key() -> str:
    key = signing.private_key()
    return signing.key_id(key.public_key()) if key else ""


def _check_people(catalog: Catalog, alias: str, now: AliasRoute | None, new: AliasRoute | None) -> None:
    """Raise `PolicyError` where the policy wants more people for a move of `alias` than have signed for it."""
    standing = catalog.standing
    since = max((placed.line for placed in standing.placed("alias", alias)), default=0)
    for shortfall in standing.shortfalls(alias, now, new, _key(), since, NEXT):
        raise refusal(catalog.authority(), alias, shortfall, "use" if new else "archive")


def refusal(authority: Authority, alias: str, shortfall: Shortfall, action: Action) -> PolicyError:
    """The error for what is missing: which rule, who has signed, who could."""
    version, people = shortfall.version, shortfall.people
    option = "" if action == "use" else f" --{action}"
    if shortfall.rule == "refused":
        return PolicyError(
            f"{', '.join(people)} refused {version}: a no counts until whoever gave it approves",
            hint=f"`forge approve {version} --alias {alias}{option}` by {' and '.join(people)}, or another version",
        )
    if shortfall.rule == "protected":
        others = [s.name for s in authority.active("releaser") if authority.person_of(s.id) not in people]
        verb = "moved" if action == "use" else f"{action}d"
        return PolicyError(
            f"policy.protected: {alias!r} is {verb} by two releasers together; for {version} there is"
            f" {', '.join(people) or 'nobody'}",
            hint=f"`forge approve {version} --alias {alias}{option}` by"
            f" {' or '.join(others) or 'another releaser, yet to add'}",
        )
    could = [s.name for s in authority.active("validator") if authority.person_of(s.id) not in people]
    return PolicyError(
        f"policy.independent_validation: no validator who did not train {version} has approved it"
        + ("" if people else "; if it was trained, its run must be signed, which shows who did"),
        hint=f"`forge approve {version}` by {' or '.join(could) or 'a validator, who is yet to be added'}",
    )
