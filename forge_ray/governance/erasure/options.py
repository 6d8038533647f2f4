"""How an erasure is carried out, and what it has done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from forge_ray.governance.erasure.plan import ErasurePlan

Facts = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """How an erasure is carried out.

    `deployments`: `retire` removes affected versions from every alias at once; `mark` lets them serve until a replacement is
    released. `retrain`: repeat all affected runs, only those that an alias routes to, or none. `remove_adapters`: delete an
    adapter whose base is not affected instead of training it again. `keep_weights`: keep the weights of affected versions,
    blocked from use. `wait_s`: how long trainings and endpoints have to end or let go. `stopped`: deployments that no longer
    run, by the word of the person who erases."""

    deployments: Literal["retire", "mark"] = "retire"
    retrain: Literal["all", "used", "none"] = "all"
    remove_adapters: bool = False
    keep_weights: bool = False
    wait_s: float = 120.0
    stopped: tuple[str, ...] = ()


@dataclass
class Done:
    """What the rounds of an erasure have done: their plans, and what the certificate says of each stage."""

    plans: list[ErasurePlan] = field(default_factory=list)
    datasets: dict[str, str] = field(default_factory=dict)  # old → new, "" where no row is left
    runs: list[Facts] = field(default_factory=list)
    replaced: dict[str, str] = field(default_factory=dict)  # version → the one that replaces it
    routes: dict[str, Facts] = field(default_factory=dict)  # alias → its route before
    aliases: dict[str, list[str]] = field(default_factory=dict)
    waiting: dict[str, str] = field(default_factory=dict)
    purged: list[Facts] = field(default_factory=list)

    @property
    def versions(self) -> set[str]:
        return {version.id for plan in self.plans for version in plan.versions}

    @property
    def weights_left(self) -> list[str]:
        return sorted({version for purged in self.purged for version in purged["weights_left"]})
