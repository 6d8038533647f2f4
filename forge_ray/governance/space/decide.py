"""What stays in a store and what can be removed: a pure function of the items and the policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Literal

Kind = Literal[
    "dataset",
    "base model",
    "version",
    "export",
    "checkpoint",
    "evaluation",
    "run",
    "images",
    "answers",
    "reproduction",
    "cache",
    "half-built",
    "facts",
    "other",
]
Role = Literal["last", "best"]


@dataclass(frozen=True)
class StoredItem:
    """A part of a store that stays or goes as a whole.

    `paths`: its folders and files, the first of which is its name. `size`: bytes; a file with several names (hard links)
    counts for the first item that has it. `idle_days`: days since anything in it changed. `needs`: names of items that have
    to stay as long as this one. `is_released`: of a released version or its run; of images, shown by a dataset.
    `is_finished`, `roles`: of a checkpoint, whether its run has ended, and whether it is the last or the best one; of kept
    answers, whether their last day is over."""

    paths: tuple[str, ...]
    kind: Kind
    size: int
    idle_days: float = 0.0
    needs: tuple[str, ...] = ()
    is_released: bool = False
    is_finished: bool = False
    roles: frozenset[Role] = frozenset()

    @property
    def name(self) -> str:
        return self.paths[0]


@dataclass(frozen=True)
class Retention:
    """What `forge store prune` removes. The defaults are those of its options."""

    checkpoints: frozenset[Role] = frozenset({"last", "best"})  # that stay of a run that has ended
    unreleased_days: float = 30.0
    caches: bool = False
    base_models: bool = False


@dataclass(frozen=True)
class ItemDecision:
    """Whether an item is removed, and why, or what keeps it."""

    item: StoredItem
    removes: bool
    why: tuple[str, ...]


def decide(items: Sequence[StoredItem], held: Mapping[str, Sequence[str]], policy: Retention) -> list[ItemDecision]:
    """The decision about each item. `held`: name → why it stays whatever the policy says. Nothing is removed that an item
    which stays needs. Removals are ordered: each comes behind every removal of an item that needs it."""
    by_name = {item.name: item for item in items}
    kept: dict[str, list[str]] = {}
    for item in items:
        removes, why = judged(item, policy)
        if reasons := held.get(item.name):
            kept[item.name] = list(reasons)
        elif not removes:
            kept[item.name] = [why]
    waiting = list(kept)
    while waiting:
        name = waiting.pop()
        for need in by_name[name].needs:
            if need not in by_name:
                continue
            if need not in kept:
                waiting.append(need)
            kept.setdefault(need, []).append(f"needed by {name}")
    removals = [item for item in items if item.name not in kept]
    stay = [ItemDecision(item, False, tuple(dict.fromkeys(kept[item.name]))) for item in items if item.name in kept]
    return [*stay, *(ItemDecision(item, True, (judged(item, policy)[1],)) for item in _ordered(removals))]


def _ordered(items: Iterable[StoredItem]) -> list[StoredItem]:
    by_name = {item.name: item for item in items}
    sorter: TopologicalSorter[str] = TopologicalSorter(dict.fromkeys(by_name, ()))
    for item in by_name.values():
        for need in item.needs:
            if need in by_name:
                sorter.add(need, item.name)
    return [by_name[name] for name in sorter.static_order()]


def judged(item: StoredItem, policy: Retention) -> tuple[bool, str]:
    """Whether the policy lets an item go that nothing else keeps, and the reason either way."""
    is_old = item.idle_days >= policy.unreleased_days
    age = f"unchanged for {item.idle_days:.0f} days" if is_old else f"changed within {policy.unreleased_days:g} days"
    match item.kind:
        case "half-built":
            return True, "half-built, and its process has ended"
        case "checkpoint":
            if item.is_finished and item.roles.isdisjoint(policy.checkpoints):
                return True, "a checkpoint of a run that has ended, and not one that --checkpoints keeps"
            if item.is_released:
                return False, f"{' and '.join(sorted(item.roles))} checkpoint of a released run"
            return is_old, f"unreleased, {age}" if is_old else age
        case "version" | "export" | "evaluation" | "dataset":
            return (False, "released") if item.is_released else (is_old, f"unreleased, {age}" if is_old else age)
        case "reproduction":
            return is_old, age
        case "base model":
            return (is_old, age) if policy.base_models else (False, "imported; --base-models removes unused ones")
        case "cache":
            return (True, "computed again when needed") if policy.caches else (False, "--caches removes it")
        case "answers":
            day = item.name.rpartition("/")[2]
            return item.is_finished, f"prompts and answers, kept until {day}"
        case "images":
            return (False, "shown by a dataset") if item.is_released else (True, "shown by no dataset")
    return False, "kept always"
