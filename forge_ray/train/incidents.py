"""What went wrong in a run and what was done: `runs/<id>/incidents/000001.json`, never rewritten (no torch).

They are also the memory of the guards: which steps and rows a later attempt leaves out follows from them alone, so an
attempt that is killed and started again decides the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from forge_ray.records import canonical_json, digest, utc_now
from forge_ray.store import paths
from forge_ray.store.files import Store

Incident = dict[str, Any]  # number, at, kind, step, and what belongs to the kind

# kind → what happened, for people
KINDS = {
    "recovered": "a step without a finite result was computed again and was finite: suspect the hardware of that node",
    "not_finite": "a step gave no finite result twice; its rows were left out",
    "spike": "the loss rose and stayed; the run went back and left these steps out",
    "failure": "a worker failed in a step",
    "quarantine": "a row failed twice in the same way; it is left out from that step on",
    "hang": "a worker made no progress; stacks were saved and the group was started again",
    "slow_rank": "a worker is slower than the others",
    "no_checkpoint": "a checkpoint could not be written",
    "preemption": "a node is to be taken away; a checkpoint was written before",
    "restart": "the workers were started again",
    "validation": "a checkpoint could not be validated; training went on",
}


REPEATED = {"failure", "hang", "restart"}  # each time counts; of the others a step that is done again makes no second one


def write(store: Store, run: str, kind: str, step: int, **facts: Any) -> Incident:
    """Put an incident on record."""
    assert kind in KINDS, kind
    recorded = read(store, run)
    for old in recorded if kind not in REPEATED else ():
        if (old["kind"], old["step"]) == (kind, step) and all(old.get(name) == value for name, value in facts.items()):
            return old
    number = max((old["number"] for old in recorded), default=0)
    while True:
        number += 1
        value: Incident = {"number": number, "at": utc_now(), "kind": kind, "step": step} | facts
        if store.create(paths.incident(run, number), canonical_json(value)):
            return value


def read(store: Store, run: str) -> list[Incident]:
    """In the order of their numbers."""
    return [store.read_json(path) for path in store.list(paths.run(run, "incidents"))]


@dataclass(frozen=True)
class LeftOut:
    """What the incidents so far say about the steps to come. Steps count from 1."""

    steps: frozenset[int]  # of spikes
    rows: dict[int, int]  # row → the step from which it is left out
    careful: frozenset[int]  # steps in which a worker failed before: taken row by row, so that the row is known

    def digest(self, step: int) -> str:
        """Of what was left out up to `step`; "" where that is nothing."""
        steps = sorted(number for number in self.steps if number <= step)
        rows = sorted((row, since) for row, since in self.rows.items() if since <= step)
        return digest([steps, rows]) if steps or rows else ""


def left_out(recorded: Iterable[Incident]) -> LeftOut:
    steps: set[int] = set()
    rows: dict[int, int] = {}
    careful: set[int] = set()
    for incident in recorded:
        if incident["kind"] == "spike":
            steps |= set(range(incident["step"], incident["last_step"] + 1))
        elif incident["kind"] == "quarantine":
            rows |= dict.fromkeys(incident["rows"], incident["step"])
        elif incident["kind"] == "failure" and incident.get("rows"):
            careful.add(incident["step"])
    return LeftOut(frozenset(steps), rows, frozenset(careful))


def to_quarantine(recorded: Iterable[Incident]) -> list[Incident]:
    """Failures whose one row is to be left out: the same step, the same error in two starts, and the row known alone."""
    recorded = list(recorded)
    done = {(incident["step"], tuple(incident["rows"])) for incident in recorded if incident["kind"] == "quarantine"}
    failures = [incident for incident in recorded if incident["kind"] == "failure" and incident.get("rows")]
    chosen = []
    for number, failure in enumerate(failures):
        before = [old for old in failures[:number] if (old["step"], old["error"]) == (failure["step"], failure["error"])]
        before = [old for old in before if "start" not in failure or old.get("start") != failure["start"]]
        alone = len(failure["rows"]) == 1 and any(set(failure["rows"]) <= set(old["rows"]) for old in before)
        if alone and (failure["step"], tuple(failure["rows"])) not in done:
            chosen.append(failure)
    return chosen
