"""What the runs that used a record led to: versions, aliases, deployments, reports."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from forge_ray.config.release import AliasRoute
from forge_ray.evaluate.items import splits_of
from forge_ray.governance.uses import Run, Use, finished, unfinished
from forge_ray.records import Deployment, EvalReport, ModelVersion, RunRecord
from forge_ray.store import paths
from forge_ray.store.aliases import route_of
from forge_ray.store.catalog import Catalog
from forge_ray.store.disclosures import SentRows, sent
from forge_ray.store.endpoint_state import RUNNING, state_of, was_silent
from forge_ray.store.exports import ExportedCopy, exported
from forge_ray.store.files import Store


@dataclass(frozen=True)
class ReachedRun:
    """A run that a record reached. `how`: `trained` on it, `chosen` (a validation with it selected the checkpoint or the
    end), `base` (it started from a version that was reached), or `frozen` (its loss read numbers of such a version: a
    teacher, or a reference)."""

    run: str
    name: str
    state: str
    how: str


@dataclass(frozen=True)
class ReachedVersion:
    version: str
    name: str
    status: str
    run: str
    how: str
    archived: bool


@dataclass(frozen=True)
class ReachedAlias:
    """An alias that routed to a version from `since` to `until` ("" if it still does)."""

    alias: str
    version: str
    since: str
    until: str


@dataclass(frozen=True)
class ReachedDeployment:
    """`seen`: when the endpoint was last seen, in words; "" without a lease."""

    deployment: str
    name: str
    state: str
    live: bool
    versions: tuple[str, ...]
    seen: str = ""


@dataclass(frozen=True)
class ReachedReport:
    """An evaluation with the record among its examples, or (`how` is `labels`) among the answers that form its label set.
    `subject`: a version, a run, or a checkpoint of a run as `run_…@step`."""

    report: str
    subject: str
    dataset: str
    how: str


@dataclass(frozen=True)
class Reached:
    runs: tuple[ReachedRun, ...]
    versions: tuple[ReachedVersion, ...]
    aliases: tuple[ReachedAlias, ...]
    deployments: tuple[ReachedDeployment, ...]
    evals: tuple[ReachedReport, ...]
    exported: tuple[ExportedCopy, ...] = ()
    sent: tuple[SentRows, ...] = ()


@dataclass(frozen=True)
class Affected:
    """Ids of everything that the records reached. `runs` and `versions` have weights that depend on the records;
    `validated` are runs that only measured a validation loss on one."""

    datasets: tuple[str, ...]
    runs: tuple[str, ...]
    versions: tuple[str, ...]
    aliases: tuple[str, ...]
    deployments: tuple[str, ...]
    evals: tuple[str, ...]
    validated: tuple[str, ...]


@dataclass(frozen=True)
class StoreUses:
    """The runs and versions of a store, read once."""

    catalog: Catalog
    runs: dict[str, Run]
    versions: tuple[ModelVersion, ...]

    @classmethod
    def of(cls, catalog: Catalog) -> StoreUses:
        versions = tuple(catalog.all(ModelVersion))
        runs = {record.id: finished(catalog.store, record) for record in catalog.all(RunRecord)}
        candidates = [version for version in versions if version.run and version.run not in runs]
        for run in dict.fromkeys([*catalog.subjects("run"), *(version.run for version in candidates)]):
            if run not in runs:
                runs[run] = unfinished(catalog, run, [version for version in candidates if version.run == run])
        return cls(catalog, runs, versions)

    def runs_on(self, dataset: str) -> list[Run]:
        """Runs on a dataset version, including runs whose dataset is unknown."""
        return [run for run in self.runs.values() if run.dataset in (dataset, "")]

    def reached(self, uses: Sequence[Use], splits: Sequence[tuple[str, str, str]]) -> Reached:
        """What `uses` led to. `splits` are the (record, dataset, split) of every traced record."""
        runs: dict[str, str] = {}
        for use in uses:
            if use.how == "trained":
                if use.steps or not use.exact:
                    runs[use.run] = "trained"
            elif use.decided:
                runs.setdefault(use.run, "chosen")
        versions = self._versions(runs, uses)
        ids, archived = set(versions), self.catalog.archived()
        aliases = tuple(self.aliases(ids))
        return Reached(
            tuple(ReachedRun(run, self.runs[run].name, self.runs[run].state, how) for run, how in sorted(runs.items())),
            tuple(
                ReachedVersion(v.id, v.name, v.status, v.run, versions[v.id], v.id in archived)
                for v in self.versions
                if v.id in versions
            ),
            aliases,
            tuple(self.deployments(ids, aliases)),
            tuple(self._reports(splits)),
            exported(self.catalog, ids),
            sent(self.catalog, {(dataset, split) for _, dataset, split in splits}),
        )

    def _versions(self, runs: dict[str, str], uses: Sequence[Use]) -> dict[str, str]:
        """Version → how it was reached, for versions whose weights depend on the uses; adds the runs that start from one
        to `runs`."""
        reached: dict[str, str] = {}
        trainings: dict[str, list[Use]] = {}
        for use in uses:
            if use.how == "trained":
                trainings.setdefault(use.run, []).append(use)
        direct = dict.fromkeys(trainings, "trained") | runs
        grown = True
        while grown:
            grown = False
            for run in self.runs.values():
                if run.run not in runs and (hit := [version for version in run.starts_from if version in reached]):
                    runs[run.run], grown = "frozen" if hit == [run.frozen_model] else "base", True
            for version in self.versions:
                how = runs.get(version.run, "") if runs.get(version.run) in ("base", "frozen") else ""
                how = how or ("base" if version.base_model in reached else "")
                if version.run in direct and self._took_part(version, direct[version.run], trainings.get(version.run, ())):
                    how = direct[version.run]
                if how and version.id not in reached:
                    reached[version.id], grown = how, True
        return reached

    def _took_part(self, version: ModelVersion, how: str, trainings: Sequence[Use]) -> bool:
        """Whether the records were used by the step whose weights the version has. A candidate's checkpoint may include
        steps that an incident later removed from the run."""
        run = self.runs[version.run]
        last = version.step or run.export_step
        if how == "chosen" or not last or any(not use.exact for use in trainings):
            return True
        later = [
            step
            for use in trainings
            for step, at in use.left_out
            if version.status == "candidate" and at > version.created_at
        ]
        return any(step <= last for step in (*later, *(step for use in trainings for step in use.steps)))

    def aliases(self, versions: set[str]) -> Iterator[ReachedAlias]:
        """Every time in which an alias routed to one of the versions."""
        for alias in self.catalog.subjects("alias"):
            moves = self.catalog.events("alias", alias)
            for move, after in zip(moves, [*(later.at for later in moves[1:]), ""], strict=True):
                for version in sorted(_named(route_of(move)) & versions):
                    yield ReachedAlias(alias, version, move.at, after)

    def deployments(self, versions: set[str], aliases: Sequence[ReachedAlias]) -> Iterator[ReachedDeployment]:
        """The deployments that served one of the versions, by its id or as `aliases` moved."""
        bases = {version.id: version.base_model or version.id for version in self.versions}
        last_of_name: dict[str, str] = {}
        deployments = self.catalog.all(Deployment)
        states = {one.id: self.catalog.events("deployment", one.id) for one in deployments}
        ups = sorted((e.at, e.subject) for events in states.values() for e in events if e.data["state"] == "running")
        names = {one.id: one.name for one in deployments}
        for _, identifier in ups:
            last_of_name[names[identifier]] = identifier
        for one in deployments:
            started = {one.model_version, *one.models.values()}
            served = started & versions
            end = ""
            last = states[one.id][-1] if states[one.id] else None
            if last and last.data["state"] != RUNNING and not was_silent(last):  # nobody saw the end of a silent one
                end = last.at
            asked = {one.model, *one.models, *one.config.get("models", ())}
            own = {bases.get(version, version) for version in started}
            for move in aliases:  # a running deployment follows the moves of its aliases
                if (not end or move.since < end) and (not move.until or move.until > one.created_at):
                    follows = one.config.get("published", True) and bases.get(move.version) in own
                    if move.alias in asked or follows:
                        served.add(move.version)
            if served:
                now = state_of(self.catalog, one.id)
                live = now.state == RUNNING and last_of_name.get(one.name, one.id) == one.id
                yield ReachedDeployment(one.id, one.name, now.state or "unknown", live, tuple(sorted(served)), now.seen)

    def _reports(self, splits: Sequence[tuple[str, str, str]]) -> Iterator[ReachedReport]:
        for report in self.catalog.all(EvalReport):
            hits = [(record, (dataset, split)) for record, dataset, split in splits if (dataset, split) in splits_of(report)]
            labels = report.config.get("labels") == "from_data" and any(
                (dataset, split) == (report.dataset, "train") for _, dataset, split in splits
            )
            if hits and _has_item(self.catalog.store, report, {record for record, _ in hits}):
                dataset, split = hits[0][1]
                yield ReachedReport(report.id, report.evaluated, dataset, split)
            elif labels:
                yield ReachedReport(report.id, report.evaluated, report.dataset, "labels")


def _named(route: AliasRoute | None) -> set[str]:
    """Every version that a route names."""
    if route is None:
        return set()
    ruled = {name for rule in route.rules for name in (rule.to, rule.classifier)}
    return {*route.versions, *route.shadow, *ruled} - {"", "base"}


def _has_item(store: Store, report: EvalReport, records: set[str]) -> bool:
    """Whether one of the records was among the examples; assumed where the list of examples is missing."""
    path = paths.items(report.id)
    if not store.exists(path):
        return True
    return any(json.loads(line).get("record") in records for line in store.read(path).splitlines() if line.strip())
