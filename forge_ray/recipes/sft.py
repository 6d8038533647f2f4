"""Supervised fine-tuning; on plain text the same loop is continued pre-training (level 4).

torch alone, on a laptop:   train.engine=torch train.zero_stage=0 train.scaling.num_workers=0
a cluster:                  train.engine=deepspeed train.zero_stage=3 train.scaling.num_workers=8
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from forge_ray.data.order import Order
from forge_ray.data.stream import Arrays, Feed, Rows, local_batches, ray_batches
from forge_ray.errors import TrainingError
from forge_ray.records import canonical_json
from forge_ray.train import attempts, checkpoint, launch, metrics
from forge_ray.train.audit import fingerprint
from forge_ray.train.context import Context, agree, join, sum_over_ranks
from forge_ray.train.engine import TorchEngine, TrainEngine
from forge_ray.train.job import TrainJob, identity_digest
from forge_ray.train.loss import kept_positions, token_cross_entropy
from forge_ray.train.model import export_adapter, export_full, load_for_training, merge_adapter
from forge_ray.train.schedule import learning_rate, num_steps
from forge_ray.train.zero import ZeroEngine

RESULT = "result.json"
logger = logging.getLogger("forge_ray")


def train_loop(values: dict[str, Any]) -> None:
    """One worker's whole life. `values` is `TrainJob.to_json()`."""
    # 1. config and context
    job = TrainJob.from_json(values)
    config, store = job.config, job.store
    context = join(bool(config.scaling.gpus_per_worker), int(config.scaling.cpus_per_worker), job.under_ray)
    folder = store.local(f"runs/{job.run}") if store.is_local else Path(tempfile.mkdtemp(prefix="forge-run-"))
    folder.mkdir(parents=True, exist_ok=True)

    # 2. the order of samples
    rows = Rows.of(store, job.dataset, "train")
    order = Order(job.dataset.id, config.seed, rows.num_rows, rows.block_rows, config.global_batch)
    lanes = order.lanes(context.rank, context.world_size)
    total_steps = num_steps(config, rows.num_rows)

    # 3. model
    base = store.fetch_dir(f"models/{job.base.id}", verify=not store.is_local)
    model = load_for_training(base, config, job.precision, context.device, context.world_size)

    # 4. engine
    zero = config.engine == "deepspeed"
    engine: TrainEngine = ZeroEngine(model, config, job.precision) if zero else TorchEngine(model, config)

    # 5. restore
    checkpoint.seed_all(config.seed, context.rank)
    found = checkpoint.restore(engine, store, _position(job, context, 0, "", 0), context)
    first_step, chain = (found.step, found.order_digest) if found else (0, "")
    attempt = agree(attempts.start(store, job.run, context.world_size, first_step) if context.is_first else 0, context)
    if context.is_first:
        checkpoint.sweep(store, job.run)

    # 6. steps
    feed = Feed(rows, order, lanes, first_step, total_steps - first_step)
    batches = ray_batches(feed) if context.under_ray and feed.num_steps else local_batches(feed)
    clock, began = metrics.StepClock(), time.perf_counter()
    for step in range(first_step, total_steps):
        step_began = time.perf_counter()
        with clock.measure("wait"):
            batch = _tensors(next(batches), context)
        chain = order.link(chain, step)
        with clock.measure("compute"):
            trained = int(batch["loss_mask"].sum())
            used = int((batch["segment_ids"] > 0).sum())
            num_trained, num_tokens, rows_sum = sum_over_ranks([trained, used, fingerprint(batch["input_ids"])], context)
            loss_sum = 0.0
            splits = {name: value.split(config.micro_batch_size) for name, value in batch.items()}
            num_micro = len(lanes) // config.micro_batch_size
            for micro in range(num_micro):
                loss = _loss({name: parts[micro] for name, parts in splits.items()}, engine)[0]
                engine.backward(loss / max(num_trained, 1.0), is_last=micro == num_micro - 1)
                loss_sum += float(loss.detach())
            lr = learning_rate(step, total_steps, config.optimizer.lr, config.schedule)
            grad_norm = engine.step(lr)
        (loss_sum,) = sum_over_ranks([loss_sum], context)
        done = step + 1
        line: dict[str, Any] = {
            "step": done,
            "of": total_steps,
            "loss": loss_sum / max(num_trained, 1.0),
            "lr": lr,
            "grad_norm": grad_norm,
        }
        if not (line["loss"] < float("inf") and grad_norm < float("inf")):
            raise TrainingError(
                f"step {done}: loss={line['loss']}, grad_norm={grad_norm} is not finite",
                hint=f"lower train.optimizer.lr={config.optimizer.lr}; the last checkpoint is from before this step",
            )
        if _due(done, config.validation.every_steps, total_steps) and config.validation.max_rows:
            with clock.measure("validate"):
                line |= _validate(job, engine, context)
        line |= {"tokens": int(num_tokens), "trained_tokens": int(num_trained), "rows_sum": int(rows_sum)}
        line |= _timing(line, clock, step_began)
        line["eta_s"] = (time.perf_counter() - began) / (done - first_step) * (total_steps - done)
        if context.is_first and store.is_local:
            attempts.check_newest(store, job.run, attempt)
        if context.is_first:  # before the checkpoint, from which a resumed run would not take this step again
            metrics.append(folder, line)
        if _due(done, config.checkpoint.every_steps, total_steps):
            with clock.measure("checkpoint"):
                position = _position(job, context, done, chain, attempt)
                saved = checkpoint.save(engine, store, position, context, config.checkpoint.keep)
                if saved.path:
                    launch.report({"step": done, "loss": line["loss"]}, job, saved.path)
                else:
                    line["checkpoint_problem"] = saved.problem
                    logger.warning("step %d has no checkpoint: %s", done, saved.problem)
            if context.is_first:  # once more, with the time that it took: a reader keeps the last
                metrics.append(folder, line | _timing(line, clock, step_began))

    # 7. export
    weights = engine.weights(trained_only=config.adapter is not None)
    if context.is_first:
        _finish(job, folder, order, total_steps, chain, _export(job, model, weights, base))


def _position(job: TrainJob, context: Context, step: int, chain: str, attempt: int) -> checkpoint.Position:
    return checkpoint.Position(
        step=step,
        samples_seen=step * job.config.global_batch,
        order_digest=chain,
        attempt=attempt,
        run=job.run,
        config_digest=identity_digest(job),
        dataset=job.dataset.id,
        base_digest=job.base.files_digest,
        engine=job.config.engine,
        zero_stage=job.config.zero_stage,
        world_size=context.world_size,
    )


def _loss(batch: dict[str, torch.Tensor], engine: TrainEngine) -> tuple[torch.Tensor, torch.Tensor]:
    """Position ids without an attention mask: that, and no cache, is what isolates the packed documents."""
    kept = kept_positions(batch["loss_mask"])
    output = engine.forward(
        input_ids=batch["input_ids"], position_ids=batch["position_ids"], logits_to_keep=kept, use_cache=False
    )
    return token_cross_entropy(output.logits, batch["input_ids"], batch["loss_mask"], kept)


def _timing(line: dict[str, Any], clock: metrics.StepClock, step_began: float) -> dict[str, float]:
    seconds = time.perf_counter() - step_began
    rates = {f"{name}_per_s": line[name] / seconds for name in ("tokens", "trained_tokens")}
    return {"seconds": seconds, **{f"{part}_s": spent for part, spent in clock.take().items()}, **rates}


def _due(done: int, every: int, total: int) -> bool:
    return done == total or (every > 0 and done % every == 0)


@torch.no_grad()
def _validate(job: TrainJob, engine: TrainEngine, context: Context) -> dict[str, float]:
    """Loss per trained token on the same validation rows each time; every rank does the same number of passes.

    A shuffled sample, not the first rows: packing puts the longest documents first, and they are not like the others.
    """
    rows = Rows.of(job.store, job.dataset, "validation")
    count = min(rows.num_rows, job.config.validation.max_rows)
    if not count:
        return {}
    order = Order(job.dataset.id, 0, rows.num_rows, rows.block_rows, global_batch=1)
    sample = [order.row(index) for index in range(count)]
    engine.model.eval()
    total, tokens = 0.0, 0.0
    size = job.config.micro_batch_size
    for start in range(0, count, size * context.world_size):
        mine = sample[start + context.rank * size : start + (context.rank + 1) * size]
        loss, number = _loss(_tensors(rows.batch(mine or sample[:1]), context), engine)
        if mine:
            total, tokens = total + float(loss), tokens + float(number)
    engine.model.train()
    total, tokens = sum_over_ranks([total, tokens], context)
    return {"validation_loss": total / max(tokens, 1.0)}


def _tensors(batch: Arrays, context: Context) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array).to(context.device) for name, array in batch.items()}


def _export(job: TrainJob, model: Any, weights: dict[str, torch.Tensor], base: Path) -> str:
    """Plain Hugging Face or PEFT safetensors under `runs/<id>/export`; returns which of the two."""
    with job.store.staged_dir(f"runs/{job.run}/export") as target:
        if job.config.adapter is None:
            export_full(base, weights, target)
            return "full"
        if job.config.export == "adapter":
            export_adapter(model, weights, job.base.id, target)
            return "adapter"
        with tempfile.TemporaryDirectory(prefix="forge-adapter-") as adapter:
            export_adapter(model, weights, job.base.id, Path(adapter))
            merge_adapter(base, Path(adapter), target)
        return "full"


def _finish(job: TrainJob, folder: Path, order: Order, total_steps: int, chain: str, export_kind: str) -> None:
    """The facts of the finished run, for its record; the last thing written."""
    lines = metrics.read(folder / metrics.METRICS)
    metrics.plot(lines, folder / metrics.CURVE, f"{job.name} · {job.run}")
    compute = sum(line["compute_s"] for line in lines)
    summary = {
        "loss": lines[-1]["loss"],
        "seconds": sum(line["seconds"] for line in lines),
        "wait_s": sum(line["wait_s"] for line in lines),
        "compute_s": compute,
        "checkpoint_s": sum(line.get("checkpoint_s", 0.0) for line in lines),
        "tokens": sum(line["tokens"] for line in lines),
        "trained_tokens": sum(line["trained_tokens"] for line in lines),
        "tokens_per_s": sum(line["tokens"] for line in lines) / max(compute, 1e-9),
    }
    if "validation_loss" in lines[-1]:
        summary["validation_loss"] = lines[-1]["validation_loss"]
    result = {
        "num_steps": total_steps,
        "samples_seen": total_steps * order.global_batch,
        "order_digest": chain,
        "attempts": attempts.read(job.store, job.run),
        "metrics": summary,
        "export_kind": export_kind,
    }
    job.store.write(f"runs/{job.run}/{RESULT}", canonical_json(result))
    if not job.store.is_local:
        for name in (metrics.METRICS, metrics.CURVE):
            job.store.write(f"runs/{job.run}/{name}", (folder / name).read_bytes())
        shutil.rmtree(folder, ignore_errors=True)
