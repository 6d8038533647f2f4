"""Removal of what a policy lets go: one item after the other, each with an event in the audit log.

A folder is moved out of sight in one step, what holds it is looked at once more, the event is written, and then its bytes
are deleted. A process that is killed in between leaves a folder that no reader looks at, which the next removal deletes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from forge_ray.errors import PolicyError
from forge_ray.governance.space.decide import ItemDecision, Retention, StoredItem, decide
from forge_ray.governance.space.holds import Held, holds, unfinished_erasures
from forge_ray.governance.space.survey import Survey, survey
from forge_ray.store.catalog import Catalog
from forge_ray.store.removed import delete_aside, put_back, removal, set_aside
from forge_ray.store.uses import opened

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Space:
    """What lies in a store and what a policy does with it. `freed`: bytes that the removals free."""

    survey: Survey
    decisions: tuple[ItemDecision, ...]
    freed: int

    @property
    def removals(self) -> list[ItemDecision]:
        return [decision for decision in self.decisions if decision.removes]


@dataclass(frozen=True)
class Pruned:
    """What was removed, and what came into use before its turn (name → why)."""

    removed: tuple[ItemDecision, ...]
    freed: int
    left: dict[str, list[str]]


def examine(catalog: Catalog, policy: Retention) -> Space:
    """The items of the store and the decision about each. Removes nothing."""
    whole = survey(catalog)
    decisions = decide(whole.items, holds(catalog, whole.items, opened(catalog.store)), policy)
    removals = [path for decision in decisions if decision.removes for path in decision.item.paths]
    return Space(whole, tuple(decisions), whole.freed(removals))


def prune(catalog: Catalog, policy: Retention, progress: Progress = lambda done, total: None) -> Pruned:
    """Remove what the policy lets go. Raises `PolicyError` where the signer may not, or an erasure is not finished."""
    catalog.check_may("removal events")
    if erasures := unfinished_erasures(catalog):
        raise PolicyError(
            f"{erasures[0]} is not finished: it has to find the files that a removal would take away",
            hint="give the same `forge erase … --apply` again, then remove",
        )
    space = examine(catalog, policy)
    left: Held = {}
    removed: list[ItemDecision] = []
    items = {item.name: item for item in space.survey.items}
    for number, decision in enumerate(space.removals):
        name = decision.item.name
        try:
            stays = _remove(catalog, decision, lambda: _current(catalog, items, policy, left))
        except OSError as error:
            stays = [f"could not be removed: {error.strerror or error}"]
        if stays:
            left[name] = stays
        else:
            del items[name]
            removed.append(decision)
        progress(number + 1, len(space.removals))
    freed = space.survey.freed(path for decision in removed for path in decision.item.paths)
    return Pruned(tuple(removed), freed, left)


def _current(catalog: Catalog, items: dict[str, StoredItem], policy: Retention, left: Held) -> Held:
    """Why items stay, decided again with what holds them now. What could not be removed stays too, with what it needs."""
    decisions = decide(list(items.values()), holds(catalog, items.values(), opened(catalog.store)) | left, policy)
    return {decision.item.name: list(decision.why) for decision in decisions if not decision.removes}


def _remove(catalog: Catalog, decision: ItemDecision, current: Callable[[], Held]) -> list[str]:
    """Remove one item; or return why it stays after all. Whatever ends this before its event is written, each path of the
    item is put back."""
    store, item = catalog.store, decision.item
    if reasons := current().get(item.name):
        return reasons
    moved = []
    with contextlib.ExitStack() as undo:
        for path in item.paths:
            with contextlib.suppress(FileNotFoundError):  # another process removes too
                if store.exists(path):
                    moved.append(set_aside(store, path))
                    undo.callback(put_back, store, moved[-1])
        if not moved:
            return ["another process removed it"]
        if reasons := current().get(item.name):
            return reasons
        catalog.append(removal(item.paths, item.size, decision.why[0]))
        undo.pop_all()
    for aside in moved:
        delete_aside(store, aside)
    return []
