"""What validations of a run found, which was best, and when to stop.

    runs/<id>/validations/00000120.json    one per step: its loss, or why there is none; or only that a task was asked for it

Written by the loop, or by a task beside it (`train.validation.background`); everything that follows from validations is read
from here, so an attempt that is killed and started again decides the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from forge_ray.config.train import EarlyStopping
from forge_ray.errors import NotFound
from forge_ray.records import canonical_json
from forge_ray.store import paths
from forge_ray.store.files import MANIFEST, Store
from forge_ray.train.context import Context, agree
from forge_ray.train.job import TrainJob

LOOK_EVERY_S = 2.0  # how often the first rank looks for what tasks found


@dataclass(frozen=True)
class Result:
    """`loss` is None until there is one; `left_out` tells a timeline that was given up from the one that holds."""

    step: int
    left_out: str = ""
    loss: float | None = None
    problem: str = ""
    seconds: float = 0.0
    background: bool = False

    @property
    def is_pending(self) -> bool:
        return self.loss is None and not self.problem


def write(store: Store, run: str, result: Result) -> None:
    value = asdict(result)
    if result.loss is not None and not math.isfinite(result.loss):
        value["loss"] = str(result.loss)  # there is no JSON for it
    store.write(_path(run, result.step), canonical_json(value))


def read(store: Store, run: str) -> list[Result]:
    """In the order of their steps."""
    results = []
    for path in store.list(paths.run(run, "validations")):
        with suppress(NotFound):  # an attempt that begins forgets what it will do again
            results.append(_parse(store.read_json(path)))
    return results


def _parse(value: dict[str, Any]) -> Result:
    return Result(**value | {"loss": None if value["loss"] is None else float(value["loss"])})


def _path(run: str, step: int) -> str:
    return paths.validation(run, step)


def best(results: Iterable[Result]) -> Result | None:
    """The lowest finite loss, the earliest of equal ones."""
    finite = [result for result in results if result.loss is not None and math.isfinite(result.loss)]
    return min(finite, key=lambda result: (result.loss, result.step), default=None)


def protected(store: Store, run: str, keep_best: bool) -> set[int]:
    """Steps whose checkpoints must stay: those that a task is to read, and the best."""
    results = read(store, run)
    steps = {result.step for result in results if result.is_pending}
    top = best(results) if keep_best else None
    return steps | ({top.step} if top else set())


def best_step(store: Store, run: str) -> int | None:
    """The step of the best validation whose checkpoint is there and is the one that was validated."""
    kept = []
    for result in read(store, run):
        path = paths.checkpoint(run, result.step, MANIFEST)
        if store.exists(path) and store.read_json(path)["position"].get("left_out", "") == result.left_out:
            kept.append(result)
    top = best(kept)
    return top.step if top else None


def why_stop(results: Iterable[Result], rule: EarlyStopping | None) -> str:
    """In words why a run should end, "" where it should go on. `results` in the order of their steps."""
    lowest, where, since = math.inf, 0, 0
    for result in results if rule else ():
        if result.loss is None:
            continue
        if result.loss < lowest - rule.min_delta:  # type: ignore[union-attr]
            lowest, where, since = result.loss, result.step, 0
        else:
            since += 1
        if rule and since >= rule.patience:
            return (
                f"the validation loss is {result.loss:.4g} at step {result.step} and has not fallen by more than"
                f" {rule.min_delta:g} below {lowest:.4g} of step {where} in {since} validations"
            )
    return ""


def open_validations(
    job: TrainJob, context: Context, first_step: int, total_steps: int, left_out: Callable[[int], str]
) -> Validations:
    """Collective. Results behind this attempt's first step, and those that a task of an attempt before was asked for, are
    removed: the first are validated again, nobody answers the second."""
    why = ""
    if context.is_first:
        for result in read(job.store, job.run):
            if result.step > first_step or result.is_pending:
                job.store.delete(_path(job.run, result.step))
        why = why_stop(read(job.store, job.run), job.config.validation.early_stopping)
    return Validations(job, context, first_step, total_steps, left_out, agree(why, context))


class Validations:
    """One attempt's view of them, made by `open_validations`: which are due, and whether the run should end. `step` counts
    from 1; `why` is the reason to end it that is on record already."""

    def __init__(
        self,
        job: TrainJob,
        context: Context,
        first_step: int,
        total_steps: int,
        left_out: Callable[[int], str],
        why: str = "",
    ) -> None:
        self.job, self.context, self.left_out = job, context, left_out
        self.settings, self.last_step = job.config.validation, total_steps
        self.in_background = self.settings.background and context.under_ray
        self.why = why
        if why:
            self.last_step = first_step  # it was to end here, and was killed before it had
        self._looked = time.monotonic()

    def _why(self) -> str:
        return why_stop(read(self.job.store, self.job.run), self.settings.early_stopping)

    def due(self, step: int) -> bool:
        every = self.settings.every_steps
        return bool(self.settings.max_rows) and (step == self.last_step or (every > 0 and step % every == 0))

    def add(self, step: int, loss: float) -> None:
        """Collective: put what the loop found on record, and see whether the run should end at this step."""
        if self.context.is_first:
            write(self.job.store, self.job.run, Result(step, self.left_out(step), loss))
        if self.settings.early_stopping:
            self.stop()

    def ask(self, step: int) -> bool:
        """Collective: whether a task is to validate the checkpoint of `step`. Only one is asked for at a time, for what it
        reads must stay on disk; but the last step always is."""
        if not self.in_background or not self.due(step):
            return False
        return bool(agree(self._ask(step) if self.context.is_first else False, self.context))

    def _ask(self, step: int) -> bool:
        results = read(self.job.store, self.job.run)
        is_busy = any(result.is_pending for result in results) and step != self.last_step
        if is_busy or any(result.step == step for result in results):
            return False
        write(self.job.store, self.job.run, Result(step, self.left_out(step), background=True))
        return True

    def wants_stop(self) -> bool:
        """On the first rank, now and then: whether what the tasks found so far ends the run. The others say False."""
        if not (self.in_background and self.settings.early_stopping and self.context.is_first):
            return False
        if time.monotonic() - self._looked < LOOK_EVERY_S:
            return False
        self._looked = time.monotonic()
        return bool(self._why())

    def stop(self) -> None:
        """Collective: `why` from what is on record now, the same on all ranks."""
        self.why = agree(self._why() if self.context.is_first else "", self.context)
