"""Supervised fine-tuning; on plain text the same loop is continued pre-training.

torch alone, on a laptop:   train.engine=torch train.zero_stage=0 train.scaling.num_workers=0
a cluster:                  train.engine=deepspeed train.zero_stage=3 train.scaling.num_workers=8
"""

from __future__ import annotations

import logging
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from forge_ray.data.dataset.order import order_of
from forge_ray.data.dataset.stream import Arrays, Feed, Rows, local_batches, ray_batches
from forge_ray.errors import TrainingError
from forge_ray.machine import environment
from forge_ray.store import paths
from forge_ray.train import attempts, checkpoint, launch, metrics, speed, watchdog
from forge_ray.train.audit import fingerprint
from forge_ray.train.context import Context, agree, gather, join, sum_over_ranks
from forge_ray.train.engine import TorchEngine, TrainEngine
from forge_ray.train.finish import export, export_kind, finish
from forge_ray.train.guards import AttemptGuards, RollBack
from forge_ray.train.job import TrainJob
from forge_ray.train.loss import packed_loss
from forge_ray.train.model import load_for_training, refuse_without_compiler
from forge_ray.train.moe import Balance
from forge_ray.train.saving import Saved, Saver
from forge_ray.train.schedule import learning_rate, num_steps
from forge_ray.train.sequence_parallel import Slices
from forge_ray.train.validation import Result, Validations
from forge_ray.train.validation import write as write_validation
from forge_ray.train.weights import load, verified
from forge_ray.train.zero import ZeroEngine

PREEMPTION_EVERY_S = 5.0  # how often Ray is asked whether a node is to be taken away; it looks as often itself
logger = logging.getLogger("forge_ray")


def train_loop(values: dict[str, Any]) -> None:
    """One worker's whole life. `values` is `TrainJob.to_json()`."""
    job = TrainJob.from_json(values)
    scaling = job.config.scaling
    context = join(bool(scaling.gpus_per_worker), int(scaling.cpus_per_worker), job.under_ray, job.config.sequence_parallel)
    dog = watchdog.Watchdog(job.config.guards, job.store.uri, job.run, context.rank) if job.under_ray else None
    try:
        while True:
            try:
                return _attempt(job, context, dog)
            except RollBack as why:
                logger.warning("%s: back to the checkpoint before", why)
    finally:
        if dog:
            dog.close()


def _attempt(job: TrainJob, context: Context, dog: watchdog.Watchdog | None) -> None:
    # 1. config
    config, store = job.config, job.store
    refuse_without_compiler(config)  # the driver has looked at its own machine alone
    folder = store.local(paths.run(job.run)) if store.is_local else Path(tempfile.mkdtemp(prefix="forge-run-"))
    folder.mkdir(parents=True, exist_ok=True)
    expect = dog.expect if dog else lambda phase, step: None
    expect("start", 0)

    # 2. the order of samples
    rows = Rows.of(store, job.dataset, "train")
    order = order_of(job.dataset, "train", config.seed, config.global_batch)
    lanes = order.lanes(context.data_rank, context.data_size)
    total_steps = num_steps(config, rows.num_rows)
    guards = AttemptGuards(job, rows, order, total_steps, context)

    # 3. model
    base = store.fetch_dir(paths.model(job.base.id), verify=not store.is_local)
    model = load_for_training(base, config, job.precision, context.device, context.world_size)
    slices = Slices(model, rows.sequence_length, context)
    balance = Balance(model, config.router_aux_loss) if config.router_aux_loss else None

    # 4. engine
    zero = config.engine == "deepspeed"
    engine: TrainEngine = ZeroEngine(model, config, job.precision) if zero else TorchEngine(model, config)

    flops = speed.flops(base, config, job.dataset) if context.is_first else None
    peak = speed.peak_flops(context.device, job.precision) if flops else 0.0

    # 5. restore
    checkpoint.seed_all(config.seed, context.rank)
    start = _position(job, context, 0, "", 0, guards)
    found = checkpoint.restore(engine, store, start, context, guards.left_out.digest)
    first_step, chain = (found.step, found.order_digest) if found else (0, "")
    environments = gather(environment.keep(store) if context.local_rank == 0 else "", context)  # once a machine
    number = attempts.start(store, job.run, context.world_size, first_step, environments) if context.is_first else 0
    attempt = agree(number, context)
    if context.is_first:
        checkpoint.sweep(store, job.run)
    keep_best = config.validation.keep_best or config.export_step == "best"
    saver = Saver(engine, store, context, config.checkpoint.keep, config.checkpoint.asynchronous, keep_best)
    validations = Validations(job, context, first_step, total_steps, guards.left_out.digest)
    planned_steps, total_steps = total_steps, validations.last_step
    if found and validations.ask(first_step):
        launch.report({"step": first_step}, job, paths.checkpoint(job.run, first_step), validate=True)
    before = metrics.read(folder / metrics.METRICS) if context.is_first else []
    guards.remember([line["loss"] for line in before if "loss" in line and line["step"] <= first_step])

    def saved(result: Saved | None, line: dict[str, Any]) -> None:
        if result and result.path:
            launch.report({"step": result.step}, job, result.path, validations.ask(result.step))
        elif result:
            line["checkpoint_problem"] = result.problem
            guards.record("no_checkpoint", result.step, problem=result.problem)
            logger.warning("step %d has no checkpoint: %s", result.step, result.problem)

    # 6. steps
    feed = Feed(rows, order, lanes, first_step, total_steps - first_step)
    batches = ray_batches(feed) if context.under_ray and feed.num_steps else local_batches(feed)
    clock, began, looked = metrics.StepClock(), time.perf_counter(), time.monotonic()
    for step in range(first_step, total_steps):
        done, step_began, preempted = step + 1, time.perf_counter(), False
        expect("step", done)
        with clock.measure("wait"):
            batch = _tensors(next(batches), context)
        chain = order.link(chain, step)
        with clock.measure("compute"):
            numbers = order.rows_of(step, lanes)
            counts = [fingerprint(batch["input_ids"]), float(time.monotonic() - looked > PREEMPTION_EVERY_S)]
            counts.append(float(validations.wants_stop()))
            memory = [speed.peak_bytes(context.device) * (rank == context.rank) for rank in range(context.world_size)]
            _blank(batch, [lane for lane, row in enumerate(numbers) if guards.left_out.rows.get(row, done + 1) <= done])
            trained, used = int(batch["loss_mask"].sum()), int((batch["segment_ids"] > 0).sum())
            num_trained, num_tokens, rows_sum, look, stop, *more = sum_over_ranks(
                [trained, used, *counts, *memory, *saver.flags], context
            )
            num_trained, num_tokens, rows_sum = (total / context.share for total in (num_trained, num_tokens, rows_sum))
            memory, flags = more[: context.world_size], more[context.world_size :]
            lr = learning_rate(step, planned_steps, config.optimizer.lr, config.schedule)
            line: dict[str, Any] = {"step": done, "of": total_steps, "lr": lr, "peak_bytes": [int(size) for size in memory]}
            if done in guards.left_out.steps:
                line["left_out"] = "spike"
            else:
                scale = max(num_trained, 1.0)
                passes = Passes(engine, batch, numbers, done, scale, guards, config.micro_batch_size, slices, balance)
                line |= _update(passes, lr, guards, context)
        if "loss" in line:
            guards.watch(done, line["loss"])
        if look:
            looked, preempted = time.monotonic(), launch.is_preempted(job)
        if stop:
            validations.stop()
        if validations.due(done) and not validations.in_background:
            expect("validate", done)
            with clock.measure("validate"):
                line |= _validate(job, engine, context, slices)
            if "validation_loss" in line:
                validations.add(done, line["validation_loss"])
        if validations.why and done < total_steps:
            total_steps = validations.last_step = done
        line |= {"tokens": int(num_tokens), "trained_tokens": int(num_trained), "rows_sum": int(rows_sum)}
        line |= _timing(line, clock, step_began)
        if flops and peak:
            line["mfu"] = flops.of(num_tokens, num_trained) / line["seconds"] / peak / context.world_size
        line["eta_s"] = (time.perf_counter() - began) / (done - first_step) * (total_steps - done)
        guards.look_for_slow(done)
        if context.is_first and store.is_local:
            attempts.check_newest(store, job.run, attempt)
        if context.is_first:  # before the checkpoint, from which a resumed run would not take this step again
            metrics.append(folder, line)
        due = _due(done, config.checkpoint.every_steps, total_steps) or preempted
        with clock.measure("checkpoint"):
            saved(saver.advance(flags), line)
            if due:
                expect("checkpoint", done)
                saved(saver.finish(), line)
                saved(saver.begin(_position(job, context, done, chain, attempt, guards)), line)
            if preempted or done == total_steps:
                saved(saver.finish(), line)
        if preempted:
            guards.record("preemption", done)
        if context.is_first and (due or "checkpoint_problem" in line):  # once more, with its time: a reader keeps the last
            metrics.append(folder, line | _timing(line, clock, step_began))
        if done == total_steps:
            break

    # 7. export
    expect("export", total_steps)
    is_early = total_steps < planned_steps
    stopped = {"step": total_steps, "of": planned_steps, "why": validations.why} if is_early else None
    if config.export_step == "best":  # of a checkpoint, once every validation is there: `pipeline.train`
        kind = export_kind(config)
    else:
        weights = engine.weights(trained_only=config.adapter is not None)
        kind = export(job, model, weights, base) if context.is_first else ""
    if context.is_first:
        finish(job, folder, order, total_steps, chain, kind, stopped)


@dataclass(frozen=True)
class Passes:
    """Forward and backward over a rank's rows of one step; as many passes on every rank, for they are collective."""

    engine: TrainEngine
    batch: dict[str, torch.Tensor]
    rows: list[int]
    step: int
    num_trained: float
    guards: AttemptGuards
    micro_batch_size: int
    slices: Slices
    balance: Balance | None = None

    def run(self) -> float:
        """Adds to the gradients; returns this rank's sum of losses, without what balances a router."""
        size = 1 if self.step in self.guards.left_out.careful else self.micro_batch_size
        most = -(-self.guards.order.global_batch // self.guards.context.data_size)
        num_micro = -(-most // size)
        loss_sum = 0.0
        for micro in range(num_micro):
            mine = slice(micro * size, (micro + 1) * size)
            part = {name: value[mine] for name, value in self.batch.items()}
            with self.guards.blaming(self.step, self.rows[mine]):
                if not len(part["input_ids"]):  # the lanes did not divide evenly: a pass that adds nothing
                    part = {name: value[:1].clone() for name, value in self.batch.items()}
                    _blank(part, [0])
                loss, number = _loss(self.slices.cut(part), self.engine)
                extra = self.balance.loss(part["segment_ids"] > 0, number) if self.balance else 0.0
                self.engine.backward((loss + extra) / self.num_trained, is_last=micro == num_micro - 1)
                loss_sum += float(loss.detach())
        return loss_sum


def _update(passes: Passes, lr: float, guards: AttemptGuards, context: Context) -> dict[str, Any]:
    """One optimizer step. Without a finite result nothing changes; it is computed once more, from the same random state."""
    tried: list[float] = []
    random_state = checkpoint.rng_state()
    for _ in range(2):
        if tried:
            checkpoint.set_rng_state(random_state)
        mine, balance = [passes.run()], passes.balance
        loss_sum, *more = sum_over_ranks([*mine, balance.take()] if balance else mine, context)
        loss, grad_norm = loss_sum / passes.num_trained, passes.engine.step(lr)
        if loss - loss == 0 and grad_norm < float("inf"):
            if tried:
                guards.record("recovered", passes.step, first=str(tried[0]))
            found = {"loss": loss, "grad_norm": grad_norm}
            return found | {"router_balance": more[0] / passes.num_trained} if more else found
        if grad_norm < float("inf"):
            raise TrainingError(
                f"step {passes.step}: loss={loss} with finite gradients (norm {grad_norm}): the weights cannot be trusted",
                hint="this is a fault of the loss; the last checkpoint is from before this step",
            )
        tried.append(loss)
    guards.skipped(passes.step, *tried)
    return {"left_out": "not finite"}


def _blank(batch: dict[str, torch.Tensor], lanes: list[int]) -> None:
    """Rows without a document: nothing in them is trained, nor seen."""
    for lane in lanes:
        for name, value in batch.items():
            value[lane] = torch.arange(value.shape[1], device=value.device) if name == "position_ids" else 0


def _position(
    job: TrainJob, context: Context, step: int, chain: str, attempt: int, guards: AttemptGuards
) -> checkpoint.Position:
    return replace(
        checkpoint.expected(job),
        left_out=guards.left_out.digest(step),
        step=step,
        samples_seen=step * job.config.global_batch,
        order_digest=chain,
        attempt=attempt,
        world_size=context.world_size,
    )


def _loss(batch: dict[str, torch.Tensor], engine: TrainEngine | Forward) -> tuple[torch.Tensor, torch.Tensor]:
    return packed_loss(engine.forward, batch)


def _timing(line: dict[str, Any], clock: metrics.StepClock, step_began: float) -> dict[str, float]:
    seconds = time.perf_counter() - step_began
    rates = {f"{name}_per_s": line[name] / seconds for name in ("tokens", "trained_tokens")}
    return {"seconds": seconds, **{f"{part}_s": spent for part, spent in clock.take().items()}, **rates}


def _due(done: int, every: int, total: int) -> bool:
    return done == total or (every > 0 and done % every == 0)


@torch.no_grad()
def _validate(
    job: TrainJob, engine: TrainEngine | Forward, context: Context, slices: Slices | None = None
) -> dict[str, float]:
    """Loss per trained token on the same validation rows each time; every rank does the same number of passes.

    A shuffled sample, not the first rows: packing puts the longest documents first, and they are not like the others.
    """
    rows = Rows.of(job.store, job.dataset, "validation")
    count = min(rows.num_rows, job.config.validation.max_rows)
    if not count:
        return {}
    order = order_of(job.dataset, "validation", 0, global_batch=1)
    sample = [order.row(index) for index in range(count)]
    engine.model.eval()
    total, tokens = 0.0, 0.0
    size = job.config.micro_batch_size
    for start in range(0, count, size * context.data_size):
        mine = sample[start + context.data_rank * size : start + (context.data_rank + 1) * size]
        given = _tensors(rows.batch(mine or sample[:1]), context)
        loss, number = _loss(slices.cut(given) if slices else given, engine)
        if mine:
            total, tokens = total + float(loss), tokens + float(number)
    engine.model.train()
    total, tokens = sum_over_ranks([total, tokens], context)
    return {"validation_loss": total / max(tokens, 1.0)}


@dataclass(frozen=True)
class Forward:
    """What `_validate` needs of an engine, over a plain model."""

    model: Any

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def validate_checkpoint(values: dict[str, Any], step: int) -> None:
    """The same loss as `_validate`, from a checkpoint, in a process that belongs to no group; written into the store."""
    job, began = TrainJob.from_json(values), time.perf_counter()
    context = join(bool(job.config.validation.gpus), int(job.config.validation.cpus), under_ray=False)
    position, _ = verified(job, step)
    found = _validate(job, Forward(load(job, step, context.device)), context)
    result = Result(step, position.left_out, found["validation_loss"], "", time.perf_counter() - began, background=True)
    write_validation(job.store, job.run, result)


def _tensors(batch: Arrays, context: Context) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).to(context.device) for name, array in batch.items()}
