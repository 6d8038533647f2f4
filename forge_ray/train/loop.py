"""The life of a training run on one worker: open, steps, close. What is trained, and how, is the method's (`method.py`).

torch alone, on a laptop:   train.engine=torch train.zero_stage=0 train.scaling.num_workers=0
a cluster:                  train.engine=deepspeed train.zero_stage=3 train.scaling.num_workers=8
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forge_ray.data.dataset.order import Order, order_of
from forge_ray.data.dataset.stream import Feed, Rows, local_batches, ray_batches
from forge_ray.machine import environment
from forge_ray.store import paths
from forge_ray.store.scratch import scratch_folder
from forge_ray.train import attempts, checkpoint, follow, launch, metrics, speed, watchdog
from forge_ray.train.context import Context, agree, gather, join
from forge_ray.train.engine import TorchEngine, TrainEngine
from forge_ray.train.fingerprint import fingerprint
from forge_ray.train.finish import export, export_kind, finish
from forge_ray.train.guards import RollBack, open_guards
from forge_ray.train.job import TrainJob
from forge_ray.train.method import Expect, ReadRows
from forge_ray.train.methods import method_of
from forge_ray.train.model import load_for_training, refuse_without_compiler
from forge_ray.train.moe import Balance
from forge_ray.train.saving import Saved, Saver
from forge_ray.train.schedule import learning_rate, num_steps
from forge_ray.train.sequence_parallel import Slices
from forge_ray.train.step import Steps, StepSums
from forge_ray.train.validating import validate
from forge_ray.train.validation import Validations, open_validations
from forge_ray.train.zero import ZeroEngine

PREEMPTION_EVERY_S = 5.0  # how often Ray is asked whether a node is to be taken away; it looks as often itself
logger = logging.getLogger("forge_ray")


def train_loop(values: dict[str, Any]) -> None:
    """One worker's whole life. `values` is `TrainJob.to_json()`."""
    job = TrainJob.from_json(values)
    scaling = job.config.scaling
    context = join(bool(scaling.gpus_per_worker), int(scaling.cpus_per_worker), job.under_ray, job.config.sequence_parallel)
    dog = watchdog.Watchdog(job.config.guards, job.store.uri, job.run, context.rank) if job.under_ray else None
    expect: Expect = dog.expect if dog else lambda phase, step: None
    try:
        while True:
            try:
                attempt = _open(job, context, expect)
                attempt.close(*attempt.train())
                return
            except RollBack as why:
                logger.warning("%s: back to the checkpoint before", why)
    finally:
        if dog:
            dog.close()


def _open(job: TrainJob, context: Context, expect: Expect) -> TrainingAttempt:
    """Model, engine and state as the newest good checkpoint holds them; collective."""
    config, store = job.config, job.store
    refuse_without_compiler(config)  # the driver has looked at its own machine alone
    folder = store.local(paths.run(job.run)) if store.is_local else scratch_folder("run")
    folder.mkdir(parents=True, exist_ok=True)
    expect("start", 0)

    rows = Rows.of(store, job.dataset, "train")
    order = order_of(job.dataset, "train", config.seed, config.global_batch)
    planned_steps = num_steps(config, rows.num_rows)
    guards = open_guards(job, rows, order, planned_steps, context)

    base = store.fetch_dir(paths.model(job.base.id), files=job.base.files, verify=not store.is_local)
    method = method_of(job)
    if context.is_first:
        store.delete(paths.run(job.run, follow.PROGRESS))  # of a pass that was killed
    if method.prepare:
        method.prepare(context, expect)
    initial = store.fetch_dir(paths.model(job.initial.id), files=job.initial.files) if job.initial else None
    model = load_for_training(base, config, job.precision, context.device, context.world_size, method.head, initial)
    slices = Slices(model, rows.sequence_length, context, method.columns)
    balance = Balance(model, config.router_aux_loss) if config.router_aux_loss else None
    zero = config.engine == "deepspeed"
    engine: TrainEngine = ZeroEngine(model, config, job.precision) if zero else TorchEngine(model, config)
    if method.begin:
        method.begin(engine, context, expect)
    flops = speed.flops(base, config, job.dataset) if context.is_first else None
    peak = speed.peak_flops(context.device, job.precision) if flops else 0.0

    checkpoint.seed_all(config.seed, context.rank)
    restored = checkpoint.restore(engine, store, checkpoint.expected(job), context, guards.left_out.digest)
    first_step, chain = (restored.step, restored.order_digest) if restored else (0, "")
    environments = gather(environment.keep(store) if context.local_rank == 0 else "", context)  # once a machine
    number = attempts.start(store, job.run, context.world_size, first_step, environments) if context.is_first else 0
    number = agree(number, context)
    if context.is_first:
        checkpoint.sweep(store, job.run)
    keep, in_background = config.checkpoint.keep, config.checkpoint.asynchronous
    saver = Saver(engine, store, context, keep, in_background, config.keeps_best, job.origins)
    validations = open_validations(job, context, first_step, planned_steps, guards.left_out.digest)
    if restored and validations.ask(first_step):
        launch.report({"step": first_step}, job, paths.checkpoint(job.run, first_step), validate=True)
    before = metrics.read(folder / metrics.METRICS) if context.is_first else []
    watched = method.watched
    guards.remember([line[watched] for line in before if watched in line and line["step"] <= first_step])

    steps = Steps(method, engine, rows, slices, balance, guards, context, job.micro_batch_size)
    meter = speed.Meter(flops, peak, context.world_size, first_step)
    return TrainingAttempt(
        number, job, context, folder, base, order, steps, saver, validations, meter, first_step, chain, planned_steps, expect
    )


@dataclass(frozen=True)
class TrainingAttempt:
    """One start of the workers, from the checkpoint that was restored. Steps count from 1, `first_step` are done already."""

    number: int
    job: TrainJob
    context: Context
    folder: Path  # of the run, on this machine
    base: Path
    order: Order
    steps: Steps
    saver: Saver
    validations: Validations
    meter: speed.Meter
    first_step: int
    chain: str  # over the rows used before
    planned_steps: int
    expect: Expect

    def train(self) -> tuple[int, str]:
        """All steps; returns how many the run has, and the chain over their rows. Raises `RollBack` on all ranks at once."""
        job, context, steps, saver, meter = self.job, self.context, self.steps, self.saver, self.meter
        config, guards, validations, expect = job.config, steps.guards, self.validations, self.expect
        lanes = self.order.lanes(context.data_rank, context.data_size)
        total_steps, chain, looked = validations.last_step, self.chain, time.monotonic()
        feed = Feed(steps.rows, self.order, lanes, self.first_step, total_steps - self.first_step)
        batches = ray_batches(feed) if context.under_ray and feed.num_steps else local_batches(feed)
        for done in range(self.first_step + 1, total_steps + 1):
            meter.begin()
            expect("step", done)
            with meter.measure("wait"):
                arrays = next(batches)
            with meter.measure("compute"):
                rows_sum = fingerprint(arrays["input_ids"])
                rows = steps.rows_of(ReadRows(done, self.order.rows_of(done - 1, lanes), arrays))
                sums = StepSums(
                    weight=float(steps.method.weight(rows.batch)),
                    trained_tokens=float(rows.batch["loss_mask"].sum()),
                    tokens=float((rows.batch["segment_ids"] > 0).sum()),
                    rows_sum=rows_sum,
                    preemption_checks=float(time.monotonic() - looked > PREEMPTION_EVERY_S),
                    stops=float(validations.wants_stop()),
                    written=saver.written,
                    published=saver.published,
                    num_rows=(len(rows.numbers),),
                    peak_bytes=(speed.peak_bytes(context.device),),
                ).over_ranks(context)
                chain = self.order.link(chain, done - 1, rows.digest)
                lr = learning_rate(done - 1, self.planned_steps, config.optimizer.lr, config.schedule)
                line: dict[str, Any] = {"step": done, "of": total_steps, "lr": lr}
                line["peak_bytes"] = [int(size) for size in sums.peak_bytes]
                line |= {"left_out": "spike"} if done in guards.left_out.steps else steps.update(rows, sums, lr)
            if steps.method.watched in line:
                guards.watch(done, line[steps.method.watched])
            is_preempted = False
            if sums.preemption_checks:
                looked, is_preempted = time.monotonic(), launch.is_preempted(job)
                if context.is_first:
                    job.check_may_publish(self.number)
            if sums.stops:
                validations.stop()
            if validations.due(done) and not validations.in_background:
                expect("validate", done)
                with meter.measure("validate"):
                    line |= validate(job, steps.method, steps.engine, context, steps.slices)
                if "validation_loss" in line:
                    validations.add(done, line["validation_loss"])
            if validations.why and done < total_steps:
                total_steps = validations.last_step = done
            line |= {"tokens": int(sums.tokens), "trained_tokens": int(sums.trained_tokens), "rows_sum": int(sums.rows_sum)}
            line |= {"derived": rows.digest} if rows.digest else {}
            line |= meter.line(done, total_steps, sums.tokens, sums.trained_tokens)
            guards.look_for_slow(done)
            self._keep(line)  # before the checkpoint, from which a resumed run would not take this step again
            is_due = is_preempted or _due(done, config.checkpoint.every_steps, total_steps)
            with meter.measure("checkpoint"):
                self._report(saver.advance(sums.written, sums.published), line)
                if is_due:
                    expect("checkpoint", done)
                    self._report(saver.finish(), line)
                    self._report(saver.begin(self._position(done, chain)), line)
                if is_preempted or done == total_steps:
                    self._report(saver.finish(), line)
            if is_preempted:
                guards.record("preemption", done)
            if is_due or "checkpoint_problem" in line:  # once more, with its time: a reader keeps the last
                self._keep(line | meter.times(sums.tokens, sums.trained_tokens))
            if done == total_steps:
                break
        return total_steps, chain

    def close(self, num_steps: int, chain: str) -> None:
        """The servable export, and the facts for the run's record."""
        job, steps = self.job, self.steps
        self.expect("export", num_steps)
        stopped = None
        if num_steps < self.planned_steps:
            stopped = {"step": num_steps, "of": self.planned_steps, "why": self.validations.why}
        if job.config.export_step == "best":  # of a checkpoint, once every validation is there: `pipeline.train`
            kind = export_kind(job.config)
        else:
            weights = steps.engine.weights(trained_only=job.config.adapter is not None)
            model = steps.engine.model
            kind = export(job, model, weights, self.base, steps.method.head) if self.context.is_first else ""
        if self.context.is_first:
            finish(job, self.folder, self.order, num_steps, chain, kind, stopped)

    def _keep(self, line: dict[str, Any]) -> None:
        if not self.context.is_first:
            return
        if self.job.store.is_local:
            self.job.check_may_publish(self.number)
        metrics.append(self.folder, line)

    def _report(self, saved: Saved | None, line: dict[str, Any]) -> None:
        """Collective: a published checkpoint is reported to Ray, one that could not be written is an incident."""
        if saved and saved.path:
            launch.report({"step": saved.step}, self.job, saved.path, self.validations.ask(saved.step))
        elif saved:
            line["checkpoint_problem"] = saved.problem
            self.steps.guards.record("no_checkpoint", saved.step, problem=saved.problem)
            logger.warning("step %d has no checkpoint: %s", saved.step, saved.problem)

    def _position(self, step: int, chain: str) -> checkpoint.Position:
        return replace(
            checkpoint.expected(self.job),
            left_out=self.steps.guards.left_out.digest(step),
            step=step,
            samples_seen=step * self.job.config.global_batch,
            order_digest=chain,
            attempt=self.number,
            world_size=self.context.world_size,
        )


def _due(done: int, every: int, total: int) -> bool:
    return done == total or (every > 0 and done % every == 0)
