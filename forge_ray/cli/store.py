"""`forge store …`: what uses the disk space of a store, and the removal of what is not needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import ConfigError

if TYPE_CHECKING:
    from forge_ray.governance.space.decide import ItemDecision, Retention
    from forge_ray.store.files import Store

ROLES = ("last", "best")


@click.group(cls=Verbs)
def store() -> None:
    """Show and free the disk space of a store."""


def policy_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that adds the options of a policy."""
    for option in (
        click.option(
            "--base-models",
            is_flag=True,
            help="Also remove imported models that nothing uses; the store cannot rebuild them.",
        ),
        click.option("--caches", is_flag=True, help="Also remove intermediate files, which are computed again when needed."),
        click.option(
            "--unreleased-days",
            type=click.FloatRange(min=0),
            default=30.0,
            show_default=True,
            help="Keep unreleased datasets, weights and evaluations for this number of days after their last change.",
        ),
        click.option(
            "--checkpoints",
            default="last,best",
            show_default=True,
            help="Checkpoints to keep of a run that has ended: last, best, both with a comma, or none.",
        ),
    ):
        function = option(function)
    return function


def _policy(checkpoints: str, unreleased_days: float, caches: bool, base_models: bool) -> Retention:
    from forge_ray.governance.space.decide import Retention

    roles = {role.strip() for role in checkpoints.split(",")} - {""}
    if roles - {*ROLES, "none"} or not roles or ("none" in roles and len(roles) > 1):
        raise ConfigError(f"--checkpoints {checkpoints!r} is not one of last, best, none", hint="--checkpoints last,best")
    kept = frozenset(role for role in ("last", "best") if role in roles)
    return Retention(kept, unreleased_days, caches, base_models)


@verb(store, "du", "forge store du")
@policy_options
def store_du(store: Store, as_json: bool, checkpoints: str, unreleased_days: float, caches: bool, base_models: bool) -> Any:
    """Show what uses disk space, what keeps it, and what could go.

    Largest first. A file with several names (hard links) is counted once."""
    from forge_ray.cli.show import size
    from forge_ray.governance.space.prune import examine
    from forge_ray.store.catalog import Catalog

    with Catalog.read_only(store) as catalog:
        space = examine(catalog, _policy(checkpoints, unreleased_days, caches, base_models))
    decisions = sorted(space.decisions, key=lambda decision: (-decision.item.size, decision.item.name))
    if not as_json:
        for decision in decisions:
            _print(decision, "could go: " if decision.removes else "")
        echo(f"{size(space.survey.size)} in all; `forge store prune` would free {size(space.freed)}")
    return {"bytes": space.survey.size, "could_free": space.freed, "items": [_to_json(one) for one in decisions]}


@verb(store, "prune", "forge store prune --unreleased-days 60 --apply")
@policy_options
@click.option("--apply", "applies", is_flag=True, help="Remove; without it, only show what would be removed.")
def store_prune(
    store: Store,
    as_json: bool,
    checkpoints: str,
    unreleased_days: float,
    caches: bool,
    base_models: bool,
    applies: bool,
) -> Any:
    """Remove what nothing needs: old unreleased work, half-built folders.

    Kept whatever the options say: what an alias or a deployment serves, what a process uses, a released version and all that
    its reproduction, trace and erasure need. Records and the audit log stay, with an event for each removal."""
    from forge_ray.cli.show import size
    from forge_ray.governance.space import prune as pruning
    from forge_ray.progress import stage
    from forge_ray.store.catalog import Catalog

    policy = _policy(checkpoints, unreleased_days, caches, base_models)
    if applies:
        with Catalog.open(store) as catalog, stage("prune") as it:
            pruned = pruning.prune(catalog, policy, lambda done, total: it.update(done, total, "removed"))
            it.done(f"{len(pruned.removed)} removed, {size(pruned.freed)} freed")
        removals, freed, left = list(pruned.removed), pruned.freed, pruned.left
    else:
        with Catalog.read_only(store) as catalog:
            space = pruning.examine(catalog, policy)
        removals, freed, left = space.removals, space.freed, {}
    if not as_json:
        for one in removals:
            _print(one, "removed: " if applies else "would be removed: ")
        for name, reasons in left.items():
            echo(f"kept: {name}: {'; '.join(reasons)}")
        hint = "" if applies or not removals else "; --apply removes it"
        echo(f"{size(freed)} {'freed' if applies else 'would be freed'}{hint}")
    return {"applied": applies, "freed": freed, "removed": [_to_json(one) for one in removals], "left": left}


def _print(decision: ItemDecision, verdict: str) -> None:
    """One item in two lines: its size, kind and name; why it stays or goes."""
    from forge_ray.cli.show import size

    more = len(decision.why) - 2
    why = "; ".join(decision.why[:2]) + (f"; and {more} more reason{'s' if more > 1 else ''}" if more > 0 else "")
    echo(f"{size(decision.item.size):>10}  {decision.item.kind:<12}  {decision.item.name}")
    echo(f"{'':26}{verdict}{why}")


def _to_json(decision: ItemDecision) -> dict[str, Any]:
    item = decision.item
    return {
        "name": item.name,
        "kind": item.kind,
        "bytes": item.size,
        "idle_days": round(item.idle_days, 2),
        "could_go": decision.removes,
        "why": list(decision.why),
        "paths": list(item.paths),
    }
