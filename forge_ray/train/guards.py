"""The guards of a training loop: what is not finite, what spikes, what fails, what is slow.

Each decision is taken from numbers that all ranks share, so they take it together; each is an incident of the run.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from forge_ray.config.guards import Spike
from forge_ray.data.dataset.order import Order
from forge_ray.data.dataset.stream import Rows
from forge_ray.errors import TrainingError, first_line
from forge_ray.train import attempts, incidents
from forge_ray.train.context import Context, agree, gather
from forge_ray.train.job import TrainJob

PROBE_EVERY = 50  # steps between two looks at how fast the workers are
PROBE_SIZE = 384  # of the square matrices that are multiplied for it


class RollBack(Exception):
    """Raised on every rank at once: what an incident says is to be left out, from the checkpoint before."""


@dataclass(frozen=True)
class History:
    """What is on record of a run when an attempt begins."""

    recorded: list[incidents.Incident]
    num_starts: int


def open_guards(job: TrainJob, rows: Rows, order: Order, total_steps: int, context: Context) -> AttemptGuards:
    """Collective. A row that earned it is put aside first, which is an incident of its own."""
    history = None
    if context.is_first:
        history = History(_with_quarantines(job, rows), len(attempts.read(job.store, job.run)))
    return AttemptGuards(job, rows, order, total_steps, context, agree(history, context))


class AttemptGuards:
    """One attempt's guards, made by `open_guards`. `step` counts from 1; `num_starts` is the number of attempts before."""

    def __init__(
        self, job: TrainJob, rows: Rows, order: Order, total_steps: int, context: Context, history: History
    ) -> None:
        self.job, self.rows, self.order, self.context, self.total_steps = job, rows, order, context, total_steps
        self.left_out, self.num_starts = incidents.left_out(history.recorded), history.num_starts
        self.losses: deque[float] = deque(maxlen=job.config.guards.spike.window if job.config.guards.spike else 1)
        self.rising: list[int] = []
        self.slow_before: set[int] = set()
        self.in_a_row, self.last_skipped = 0, 0
        self.num_left_out = sum(step <= total_steps for step in self.left_out.steps)
        self._check_share(f"{len(self.left_out.rows)} rows were put aside", len(self.left_out.rows), rows.num_rows)

    def _check_share(self, what: str, number: int, of: int) -> None:
        if number > max(3, self.job.config.guards.max_skipped * of):
            raise TrainingError(
                f"{what}, of {of}: more than train.guards.max_skipped={self.job.config.guards.max_skipped}",
                hint="this is not about single rows: look at the data, the learning rate, or the code",
            )

    def remember(self, losses: list[float]) -> None:
        """The losses before this attempt's first step: a resumed run judges as one that was not interrupted."""
        self.losses.extend(agree(losses, self.context))

    def record(self, kind: str, step: int, **facts: Any) -> None:
        """Collective; rank 0 writes."""
        if self.context.is_first:
            incidents.write(self.job.store, self.job.run, kind, step, **facts)
        dist.barrier()

    # ------------------------------------------------ not finite

    def skipped(self, step: int, loss: float, again: float) -> None:
        """A step was computed twice without a finite result and changed nothing."""
        self.num_left_out += 1
        self.in_a_row = self.in_a_row + 1 if self.last_skipped == step - 1 else 1
        self.last_skipped = step
        numbers = self.order.rows_of(step - 1, range(self.order.global_batch))
        records = self.rows.records(numbers) if self.context.is_first else []
        facts = {"rows": numbers, "records": records, "loss": str(loss), "same_again": str(loss) == str(again)}
        self.record("not_finite", step, **facts)
        if self.in_a_row >= 3 or step == self.total_steps:
            which = f"{self.in_a_row} steps in a row had" if self.in_a_row > 1 else f"the last step ({step}) had"
            raise TrainingError(
                f"{which} no finite result, the last with loss={loss}: it is the weights, not the rows",
                hint=f"lower train.optimizer.lr={self.job.config.optimizer.lr}, or lengthen train.schedule.warmup_ratio",
            )
        self._check_share(f"{self.num_left_out} steps had no finite result", self.num_left_out, self.total_steps)

    # ------------------------------------------------ spikes

    def watch(self, step: int, loss: float) -> None:
        """Raises `RollBack` when the loss rose and stayed."""
        spike = self.job.config.guards.spike
        if spike is None:
            return
        if self._rises(spike, loss):
            self.rising.append(step)
        else:
            self.losses.extend([loss])
            self.rising = []
        if len(self.rising) == spike.patience:
            mean = statistics.fmean(self.losses)
            self._check_share(
                f"{self.num_left_out} steps were left out", self.num_left_out + spike.patience, self.total_steps
            )
            self.record("spike", self.rising[0], last_step=step, loss=loss, mean_before=mean)
            raise RollBack(f"the loss rose from {mean:.3f} to {loss:.3f} at step {self.rising[0]}")

    def _rises(self, spike: Spike, loss: float) -> bool:
        if len(self.losses) < spike.window:
            return False
        mean = statistics.fmean(self.losses)
        return loss > mean + max(spike.rise, spike.sigma * statistics.pstdev(self.losses, mean))

    # ------------------------------------------------ failures

    @contextmanager
    def blaming(self, step: int, rows: list[int]) -> Iterator[None]:
        """Whatever fails inside is put on record with the rows that were being worked on."""
        try:
            yield
        except (TrainingError, RollBack):
            raise
        except Exception as error:
            if _is_of_the_group(error):
                raise
            reason = first_line(error)[:300]
            facts = {"rank": self.context.rank, "rows": rows, "records": self.rows.records(rows)}
            facts["error"] = f"{type(error).__name__}: {reason}"
            facts["start"] = self.num_starts + 1  # workers that share their rows fail together, and that is once
            incidents.write(self.job.store, self.job.run, "failure", step, **facts)
            raise

    # ------------------------------------------------ slow workers

    def look_for_slow(self, step: int) -> None:
        """Collective, every `PROBE_EVERY` steps: a fixed piece of work, compared between the ranks. A step's own time tells
        nothing: in a group all are as slow as the slowest."""
        if step % PROBE_EVERY or self.context.world_size == 1:
            return
        probes = gather((probe(self.context.device), platform.node()), self.context)
        seconds = [taken for taken, _ in probes]
        slow = slow_ranks(seconds, self.job.config.guards.slow_rank)
        for rank in sorted(slow & self.slow_before):  # twice in a row
            times = round(seconds[rank] / statistics.median_low(seconds), 1)
            self.record("slow_rank", step, rank=rank, node=probes[rank][1], times_the_median=times)
        self.slow_before = slow


def _is_of_the_group(error: Exception) -> bool:
    """Whether another rank is the cause: a lost peer says nothing about the rows of this one."""
    lost = ("gloo", "NCCL", "Connection", "Broken pipe", "process group")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in lost)


def slow_ranks(seconds: list[float], factor: float) -> set[int]:
    """Ranks that took more than `factor` times the median of all (the lower one of two)."""
    median = statistics.median_low(seconds)
    return {rank for rank, taken in enumerate(seconds) if taken > factor * median}


def probe(device: torch.device) -> float:
    """Seconds for a few products of the same matrices, the best of five: how fast this device is now."""
    matrix = torch.ones(PROBE_SIZE, PROBE_SIZE, device=device)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(4):
            product = matrix @ matrix
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - began)
    return best


def _with_quarantines(job: TrainJob, rows: Rows) -> list[incidents.Incident]:
    """All incidents; a row that earned it is put aside now, before the attempt begins."""
    recorded = incidents.read(job.store, job.run)
    for failure in incidents.to_quarantine(recorded):
        facts = {"rows": failure["rows"], "records": rows.records(failure["rows"]), "error": failure["error"]}
        recorded.append(incidents.write(job.store, job.run, "quarantine", failure["step"], **facts))
    return recorded
