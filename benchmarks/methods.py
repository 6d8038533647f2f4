"""Training methods beside SFT, side by side and in turn: DPO's step against TRL's DPOTrainer, the pass that computes its
reference against a bare forward pass of transformers, and distillation's step against SFT's, on the same tokens.

    pip install -e '.[bench]'
    python benchmarks/methods.py                     SmolLM2-135M-Instruct, LoRA r=16, bf16 where the CPU has it, 2 cores
    python benchmarks/methods.py --rounds 1 --steps 4

Every line is a process of its own; a round runs each once, in turn, and the table shows medians over the rounds.

    dpo             the recipe, one process, engine torch: four packed rows of 512 tokens a step, the reference kept before
    dpo trl         DPOTrainer with `precompute_ref_log_probs`, as many pairs a step in batches of like length: its fastest
                    here (`padding_free` is switched off in TRL 1.16, with a warning)
    reference       the pass over the dataset that the recipe does once, its files written and published
    forward         the same documents through AutoModelForCausalLM without a gradient, 16 of like length at a time
    distil          the recipe on conversations, four packed rows a step, 64 tokens of a teacher, whom the pass asked before
    sft             the same rows without a teacher

Tokens are those of documents, padding not counted: of a pair those of both answers, each with its prompt. The clock starts
after the first steps, so that the reference is in neither rate of the training step; peak memory is the process's own, the
computation of the reference included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LENGTH, ROWS, SKIPPED = 512, 4, 2  # of a packed row; rows a step; steps before the clock counts
BATCH = 16  # documents of a bare forward pass
LR, BETA = 2e-4, 0.1
PEERS = {"dpo": "dpo trl", "reference": "forward", "distil": "sft"}
METHOD: dict[str, Any] = {"sft": "sft", "distil": {"kind": "distil", "teacher": "bench", "k": 64}}  # of others: DPO


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(name for pair in PEERS.items() for name in pair))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help=f"per process, the first {SKIPPED} not counted")
    parser.add_argument("--pairs", type=int, default=240, help="rows of the dataset")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def settings(folder: str, options: argparse.Namespace, method: str = "dpo") -> Any:
    """The run file of a method: pairs, or for `sft` and `distil` as many conversations."""
    from forge_ray.config.base import parse
    from forge_ray.config.run import RunConfig

    train = {
        "method": METHOD.get(method, {"kind": "dpo", "beta": BETA}),
        "epochs": 100,
        "max_steps": options.steps,
        "global_batch": ROWS,
        "micro_batch_size": ROWS,
        "optimizer": {"lr": LR, "betas": [0.9, 0.999]},
        "schedule": {"name": "constant", "warmup_ratio": 0},
        "adapter": {"r": 16, "alpha": 32},
        "validation": {"max_rows": 0},
        "engine": "torch",
        "zero_stage": 0,
        "scaling": {"num_workers": 0, "cpus_per_worker": options.threads},
    }
    splits = {"validation": 0.0, "test": 0.0}
    rows = "chats.jsonl" if method in METHOD else "pairs.jsonl"
    data = {"sources": [{"path": str(Path(folder) / rows)}], "sequence_length": LENGTH, "splits": splits}
    return parse(
        RunConfig,
        {
            "name": rows.removesuffix(".jsonl"),
            "base_model": "bench",
            "data": data,
            "train": train,
            "release": {"alias": "bench"},
        },
    )


def prepare(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """The store: the model, the packed pairs and conversations."""
    from forge_ray import pipeline
    from forge_ray.models.import_model import import_model
    from forge_ray.models.quickstart_base import base_model_file
    from forge_ray.release import promotion
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    pairs = subprocess.run(
        [sys.executable, str(ROOT / "jobs/data/make_debian_pairs.py")], capture_output=True, text=True, check=True
    )
    (Path(folder) / "pairs.jsonl").write_text("".join(pairs.stdout.splitlines(keepends=True)[: options.pairs]))
    chats = (ROOT / "jobs/data/debian_sections.jsonl").read_text().splitlines(keepends=True)
    (Path(folder) / "chats.jsonl").write_text("".join(chats[: 2 * options.pairs]))
    store = Store(folder)
    with Catalog.open(store) as catalog:
        version = import_model(catalog, base_model_file(), "smollm2", "Apache-2.0")
        promotion.promote(catalog, version.id, "bench")
    pipeline.prepare(settings(folder, options, "sft"), store)
    manifest = pipeline.prepare(settings(folder, options), store)
    return {"rows": manifest.splits["train"].num_rows, "tokens": manifest.splits["train"].num_tokens}


def job_of(folder: str, options: argparse.Namespace, method: str = "dpo") -> Any:
    from forge_ray.machine.hardware import resolve_precision
    from forge_ray.records import DatasetManifest
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store
    from forge_ray.train.job import TrainJob
    from forge_ray.train.start import start_of

    config = settings(folder, options, method)
    store, run = Store(folder), f"run-{os.getpid()}"
    with Catalog.open(store) as catalog:
        dataset = next(one for one in catalog.all(DatasetManifest) if one.name == config.name)
        begun = start_of(catalog, catalog.model("bench"), config.train)
    precision = resolve_precision("auto", False)
    return TrainJob(run, run, config.train, store, dataset, begun.base, precision, under_ray=False, frozen=begun.frozen)


def documents(job: Any) -> list[list[tuple[list[int], list[int]]]]:
    """Per packed row in our order of the training, (ids, loss mask) of each document."""
    from forge_ray.data.dataset.order import order_of
    from forge_ray.data.dataset.stream import Rows

    rows = Rows.of(job.store, job.dataset, "train")
    order = order_of(job.dataset, "train", job.config.seed, ROWS)
    arrays = rows.take([order.row(index) for index in range(max(job.config.max_steps * ROWS, rows.num_rows))])
    columns = (arrays[name].tolist() for name in ("input_ids", "loss_mask", "segment_ids"))
    split = []
    for ids, mask, segments in zip(*columns, strict=True):
        ends = [len(segments) - segments[::-1].index(number) for number in range(1, max(segments) + 1)]
        split.append([(ids[a:b], mask[a:b]) for a, b in zip([0, *ends], ends, strict=False)])
    return split


def recipe(method: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    from forge_ray.train import loop, metrics

    job = job_of(folder, options, method)
    loop.train_loop(job.to_json())
    lines = metrics.read(job.store.local(f"runs/{job.run}") / metrics.METRICS)
    counted = lines[SKIPPED:]
    seconds = sum(line["seconds"] - line.get("checkpoint_s", 0.0) for line in counted)
    return {"tokens_per_s": sum(line["tokens"] for line in counted) / seconds, "losses": [line["loss"] for line in lines]}


def dpo_trl(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    job = job_of(folder, options)
    rows = documents(job)[: options.steps * ROWS]
    pairs = [
        {
            "prompt_ids": [token for token, trained in zip(*chosen, strict=True) if not trained],
            "chosen_ids": [token for token, trained in zip(*chosen, strict=True) if trained],
            "rejected_ids": [token for token, trained in zip(*rejected, strict=True) if trained],
        }
        for row in rows
        for chosen, rejected in zip(row[0::2], row[1::2], strict=True)
    ]
    per_step = len(pairs) // options.steps
    pairs.sort(key=lambda pair: len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])))
    pairs = pairs[: per_step * options.steps]
    batches = [pairs[start : start + per_step] for start in range(0, len(pairs), per_step)]
    batches = batches[len(batches) // 2 :] + batches[: len(batches) // 2]  # the clock sees short and long ones

    class OfIds(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    moments: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

    is_bf16, place = job.precision == "bf16", job.store.fetch_dir(f"models/{job.base.id}")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        place, dtype=torch.bfloat16 if is_bf16 else torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    args = DPOConfig(
        output_dir=str(Path(folder) / f"trl-{os.getpid()}"),
        per_device_train_batch_size=per_step,
        max_steps=options.steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=BETA,
        train_sampling_strategy="sequential",
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        max_length=None,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=is_bf16,
        disable_tqdm=True,
    )
    trainer = OfIds(
        model,
        args=args,
        train_dataset=Dataset.from_list([pair for batch in batches for pair in batch]),
        processing_class=transformers.AutoTokenizer.from_pretrained(place, local_files_only=True),
        peft_config=LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"),
        callbacks=[Clock()],
    )
    trainer.train()
    sizes = [
        sum(2 * len(pair["prompt_ids"]) + len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in batch)
        for batch in batches
    ]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"tokens_per_s": sum(sizes[SKIPPED:]) / (moments[-1] - moments[SKIPPED - 1]), "losses": losses}


def reference(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    from forge_ray.train.context import join
    from forge_ray.train.engine import TorchEngine
    from forge_ray.train.measure import document_logps
    from forge_ray.train.model import load_for_training
    from forge_ray.train.reference import Reference

    job = job_of(folder, options)
    context = join(False, options.threads, under_ray=False)
    base = job.store.fetch_dir(f"models/{job.base.id}")
    engine = TorchEngine(load_for_training(base, job.config, job.precision, context.device, 1), job.config)
    one = Reference(job, document_logps(in_pairs=True))
    job.store.delete_dir(one.folder)
    began = time.perf_counter()
    one.begin(engine, context, lambda *_: None)
    return {"tokens_per_s": job.dataset.splits["train"].num_tokens / (time.perf_counter() - began)}


def forward(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch
    import transformers

    job = job_of(folder, options)
    rows = documents(job)[: job.dataset.splits["train"].num_rows]
    ids = sorted((ids for row in rows for ids, _ in row), key=len)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job.store.fetch_dir(f"models/{job.base.id}"),
        dtype=torch.bfloat16 if job.precision == "bf16" else torch.float32,
        attn_implementation="sdpa",
        local_files_only=True,
    ).eval()
    began = time.perf_counter()
    with torch.inference_mode():
        for start in range(0, len(ids), BATCH):
            part = ids[start : start + BATCH]
            width = len(part[-1])
            inputs = torch.tensor([one + [0] * (width - len(one)) for one in part])
            mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in part])
            model(input_ids=inputs, attention_mask=mask, use_cache=False)
    return {"tokens_per_s": sum(map(len, ids)) / (time.perf_counter() - began)}


METHODS: dict[str, Callable[[str, argparse.Namespace], dict[str, Any]]] = {
    "prepare": prepare,
    "dpo": partial(recipe, "dpo"),
    "distil": partial(recipe, "distil"),
    "sft": partial(recipe, "sft"),
    "dpo trl": dpo_trl,
    "reference": reference,
    "forward": forward,
}


def run(method: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", method, folder, "--pairs", str(options.pairs)]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{method} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    measurement: dict[str, Any] = json.loads(
        next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    )
    return measurement


def measure(options: argparse.Namespace) -> dict[str, Any]:
    methods = options.methods.split(",")
    with tempfile.TemporaryDirectory(prefix="bench-methods-", ignore_cleanup_errors=True) as folder:
        dataset = run("prepare", folder, options)
        rounds: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for number in range(options.rounds):
            for method in methods:
                rounds[method].append(run(method, folder, options))
                speed = f"{rounds[method][-1]['tokens_per_s']:.0f} tokens/s, load {os.getloadavg()[0]:.1f}"
                print(f"  round {number + 1}, {method}: {speed}", file=sys.stderr, flush=True)
    report: dict[str, Any] = {"dataset": dataset, "load": os.getloadavg()[0], "methods": {}}
    for method, measurements in rounds.items():
        rates = sorted(one["tokens_per_s"] for one in measurements)
        peak = max(one["peak_gb"] for one in measurements)
        report["methods"][method] = {
            **measurements[0],
            "tokens_per_s": statistics.median(rates),
            "range": [rates[0], rates[-1]],
            "peak_gb": peak,
        }
    for method, peer in PEERS.items():
        if {method, peer} <= rounds.keys():
            pairs = zip(rounds[method], rounds[peer], strict=True)
            ratios = [one["tokens_per_s"] / other["tokens_per_s"] for one, other in pairs]
            report["methods"][method]["of_peer"] = statistics.median(ratios)
    return report


def show(report: dict[str, Any]) -> None:
    print(f"{report['dataset']['rows']} packed rows of {report['dataset']['tokens']:,} tokens; load {report['load']:.1f}")
    print("  method         tokens/s  range            of peer  peak GB  losses")
    for method, one in report["methods"].items():
        spread = f"{one['range'][0]:,.0f} - {one['range'][1]:,.0f}"
        ratio = f"{one['of_peer']:.2f}" if "of_peer" in one else ""
        losses = f"{one['losses'][0]:.3f} → {one['losses'][-1]:.3f}" if "losses" in one else ""
        print(f"  {method:<14}{one['tokens_per_s']:>9,.0f}  {spread:<15}{ratio:>9}{one['peak_gb']:>9.2f}  {losses}")


def main() -> None:
    options = arguments()
    if not options.run:
        report = measure(options)
        print(json.dumps(report)) if options.json else show(report)
        return
    os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    method, folder = options.run
    if method != "prepare":
        import torch

        torch.set_num_threads(options.threads)
    measurement = METHODS[method](folder, options)
    measurement["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps(measurement), flush=True)


if __name__ == "__main__":
    main()
