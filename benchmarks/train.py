"""A training step: us and TRL's SFTTrainer, side by side and in turn, on the same rows, model, dtype, optimizer and threads.

    pip install -e '.[bench]'
    python benchmarks/train.py                       SmolLM2-135M-Instruct and a 10 M model, LoRA r=16, CPU
    python benchmarks/train.py --models 10m --rounds 1 --steps 4
    python benchmarks/train.py --first-step          what passes between `forge train` and its first step
    python benchmarks/train.py --two                 two runs at once on this machine, against one alone
    python benchmarks/train.py --checkpoints         what checkpoints cost: all weights of SmolLM2, one every 4 steps

Every line is a process of its own; a round runs each once, in turn, and the table shows medians over the rounds.

    trl             one conversation per row, padded to the longest of its batch, batches of like length (its fastest here)
    trl packed      the packed rows of our dataset, four of 512 tokens a step, in our order, `padding_free`
    forge           the recipe, one process, engine torch: the same packed rows in the same order
    forge zero 2    the recipe on DeepSpeed

Tokens are those of documents, padding not counted. The floor is the large products alone: FLOPs of a LoRA step (4 per weight
that multiplies every token, 4 per weight of the output projection and trained token) at the rate of this machine's
matrix product, measured in the same run. Losses are compared between `forge` and `trl packed`, step by step, from the same
adapter weights; in bf16, TRL keeps the adapter in fp32 and multiplies in bf16 (autocast), we keep an fp32 master copy.
Overhead is the share of a step that is neither forward nor backward nor the optimizer.
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from forge_ray.machine.hardware import resolve_precision
from forge_ray.machine.offline import THREADS

ROOT = Path(__file__).parents[1]
METHODS = ("trl", "trl packed", "forge", "forge zero 2")
LENGTH, ROWS, SKIPPED = 512, 4, 2  # of a packed row; rows a step; steps before the clock counts
LR = 2e-4
PRECISION = resolve_precision("auto", False)  # of all lines: bf16 where this CPU has its arithmetic, else fp32
DTYPE = {"bf16": "bfloat16", "fp32": "float32"}[PRECISION]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="10m,smollm2")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help=f"per process, the first {SKIPPED} not counted")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--first-step", action="store_true")
    parser.add_argument("--two", action="store_true")
    parser.add_argument("--checkpoints", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def settings(folder: str, steps: int, threads: int, **train: Any) -> Any:
    """The run file of every method."""
    from forge_ray.config.base import parse
    from forge_ray.config.run import RunConfig

    common = {
        "epochs": 100,
        "max_steps": steps,
        "global_batch": ROWS,
        "micro_batch_size": ROWS,
        "optimizer": {"lr": LR, "betas": [0.9, 0.999]},
        "schedule": {"name": "constant", "warmup_ratio": 0},
        "adapter": {"r": 16, "alpha": 32},
        "precision": PRECISION,
        "validation": {"max_rows": 0},
        "scaling": {"num_workers": 0, "cpus_per_worker": threads},
    }
    data = {"sources": [{"path": str(ROOT / "jobs/data/debian_sections.jsonl")}], "sequence_length": LENGTH, "block_rows": 8}
    values = {"name": "bench", "base_model": "bench", "data": data, "train": common | train, "release": {"alias": "bench"}}
    return parse(RunConfig, values | {"name": Path(folder).name})


def prepare(model: str, folder: str) -> None:
    """The store: the model, the packed dataset."""
    from forge_ray import pipeline
    from forge_ray.models.import_model import import_model
    from forge_ray.models.quickstart_base import base_model_file
    from forge_ray.release import promotion
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    store = Store(folder)
    with Catalog.open(store) as catalog:
        source: Path = base_model_file()
        version = import_model(catalog, source, "smollm2", "Apache-2.0")
        if model == "10m":
            version = import_model(catalog, small(store.fetch_dir(f"models/{version.id}"), Path(folder) / "10m"), "10m")
        promotion.promote(catalog, version.id, "bench")
    pipeline.prepare(settings(folder, 1, 1), store)


def small(smollm2: Path, folder: Path) -> Path:
    """10 M random weights behind SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2, local_files_only=True).save_pretrained(folder)
    return folder


def job_of(folder: str, steps: int, threads: int, run: str, **train: Any) -> Any:
    from forge_ray.records import DatasetManifest
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store
    from forge_ray.train.job import TrainJob

    store = Store(folder)
    with Catalog.open(store) as catalog:
        dataset, base = catalog.all(DatasetManifest)[0], catalog.model("bench")
    config = settings(folder, steps, threads, **train).train
    return TrainJob(run, run, config, store, dataset, base, PRECISION, under_ray=False)


def forge(method: str, folder: str, steps: int, threads: int) -> dict[str, Any]:
    import torch

    from forge_ray.train import loop, metrics
    from forge_ray.train.engine import TorchEngine
    from forge_ray.train.methods import sft
    from forge_ray.train.zero import ZeroEngine

    engine = {"engine": "deepspeed", "zero_stage": 2} if "zero" in method else {"engine": "torch", "zero_stage": 0}
    job = job_of(folder, steps, threads, f"run-{os.getpid()}", **engine)
    spent = {"forward": 0.0, "backward": 0.0, "step": 0.0}
    count = {"steps": 0}

    def timed(name: str, function: Any) -> Any:
        def call(*values: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*values, **named)
            finally:
                count["steps"] += name == "step"
                if count["steps"] >= SKIPPED + (name == "step"):
                    spent[name] += time.perf_counter() - began

        return call

    kind = ZeroEngine if "zero" in method else TorchEngine
    sft.loss = timed("forward", sft.loss)
    kind.backward, kind.step = timed("backward", kind.backward), timed("step", kind.step)  # type: ignore[method-assign]
    loop.train_loop(job.to_json())
    assert torch.get_num_threads() == threads
    lines = metrics.read(job.store.local(f"runs/{job.run}") / metrics.METRICS)
    counted = lines[SKIPPED:]
    seconds = sum(line["seconds"] - line.get("checkpoint_s", 0.0) for line in counted)
    return {
        "tokens_per_s": sum(line["tokens"] for line in counted) / seconds,
        "losses": [line["loss"] for line in lines],
        "trained_share": sum(line["trained_tokens"] for line in counted) / sum(line["tokens"] for line in counted),
        "overhead": 1 - sum(spent.values()) / seconds,
        "split": {name: value / len(counted) for name, value in spent.items()},
    }


def trl(method: str, folder: str, steps: int, threads: int) -> dict[str, Any]:
    import torch
    import transformers
    from datasets import Dataset
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from trl import SFTConfig, SFTTrainer

    from forge_ray.data.dataset.order import order_of
    from forge_ray.data.dataset.stream import Rows
    from forge_ray.train.adapter import with_adapter

    torch.set_num_threads(threads)
    packed = "packed" in method
    job = job_of(folder, steps, threads, "unused", engine="torch", zero_stage=0)
    rows = Rows.of(job.store, job.dataset, "train")
    order = order_of(job.dataset, "train", job.config.seed, ROWS)
    taken = rows.take([order.row(index) for index in range(steps * ROWS)])
    examples: list[dict[str, Any]] = []
    for ids, mask, segments in zip(
        *(taken[name].tolist() for name in ("input_ids", "loss_mask", "segment_ids")), strict=True
    ):
        sizes = [segments.count(number) for number in range(1, max(segments) + 1)]
        labels = [token if trained else -100 for token, trained in zip(ids, mask, strict=True)]
        ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        whole = {"input_ids": ids[: ends[-1]], "labels": labels[: ends[-1]], "seq_lengths": sizes}
        parts = [{"input_ids": ids[e - s : e], "labels": labels[e - s : e]} for s, e in zip(sizes, ends, strict=True)]
        examples += [whole] if packed else parts
    per_step = ROWS if packed else max(1, len(examples) // steps)

    model = transformers.AutoModelForCausalLM.from_pretrained(
        job.store.fetch_dir(f"models/{job.base.id}"),
        dtype=getattr(torch, DTYPE),
        attn_implementation="sdpa",
        local_files_only=True,
    )
    torch.manual_seed(job.config.seed)
    model = with_adapter(model, job.config.adapter)
    start = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()  # as TRL does where it makes the adapter itself
    set_peft_model_state_dict(model, start)

    moments: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            moments.append(time.perf_counter())

    args = SFTConfig(
        output_dir=str(Path(folder) / f"trl-{os.getpid()}"),
        per_device_train_batch_size=per_step,
        max_steps=steps,
        learning_rate=LR,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="sequential" if packed else "group_by_length",
        gradient_checkpointing=False,
        padding_free=packed,
        max_length=None if packed else LENGTH,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=PRECISION == "bf16",
        disable_tqdm=True,
        dataloader_num_workers=0,
        remove_unused_columns=False,
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        job.store.fetch_dir(f"models/{job.base.id}"), local_files_only=True
    )
    trainer = SFTTrainer(
        model, args=args, train_dataset=Dataset.from_list(examples), processing_class=tokenizer, callbacks=[Clock()]
    )
    num_tokens: list[int] = []
    collate = trainer.data_collator

    def collated(batch: list[dict[str, Any]]) -> Any:
        num_tokens.append(sum(len(example["input_ids"]) for example in batch))
        return collate(batch)

    trainer.data_collator = collated
    trainer.train()
    seconds = moments[-1] - moments[SKIPPED - 1]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"tokens_per_s": sum(num_tokens[SKIPPED:steps]) / seconds, "losses": losses}


def matrix_rate(threads: int) -> float:
    """FLOP/s of products of the model's own sizes."""
    import torch

    torch.set_num_threads(threads)
    left, right = (torch.randn(*shape).to(getattr(torch, DTYPE)) for shape in ((ROWS * LENGTH, 576), (576, 1536)))
    best = float("inf")
    for _ in range(30):
        began = time.perf_counter()
        for _ in range(5):
            left @ right
        best = min(best, (time.perf_counter() - began) / 5)
    return 2 * left.shape[0] * left.shape[1] * right.shape[1] / best


def floor(folder: str, trained_share: float, rate: float) -> float:
    """Tokens per second of the arithmetic alone."""
    from forge_ray.train.plan import Model
    from forge_ray.train.speed import active_weights

    job = job_of(folder, 1, 1, "unused", engine="torch", zero_stage=0)
    model = Model.of(job.store.fetch_dir(f"models/{job.base.id}"))
    blocks = active_weights(model, model.shapes)
    output = int(model.config["vocab_size"]) * int(model.config["hidden_size"])
    return rate / (4 * blocks + 4 * output * trained_share)


def run(method: str, folder: str, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--run", method, folder]
    command += ["--steps", str(options.steps), "--threads", str(options.threads)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
    if "forge" in method:  # as its command line sets them
        environment = THREADS | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{method} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    measurement: dict[str, Any] = json.loads(
        next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{"))
    )
    return measurement


def prepared(model: str, folder: str) -> None:
    """`prepare` in a process of its own."""
    command = [sys.executable, __file__, "--run", f"prepare {model}", folder]
    quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, **quiet)


def measure(model: str, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    methods = options.methods.split(",")
    with tempfile.TemporaryDirectory(prefix=f"bench-{model}-", ignore_cleanup_errors=True) as folder:
        prepared(model, folder)
        rounds: dict[str, list[dict[str, Any]]] = {method: [] for method in methods}
        for _ in range(options.rounds):
            for method in methods:
                rounds[method].append(run(method, folder, options))
                speed = f"{rounds[method][-1]['tokens_per_s']:.0f} tokens/s"
                print(f"  {model}, round {len(rounds[method])}, {method}: {speed}", file=sys.stderr, flush=True)
        share = next((taken[0]["trained_share"] for name, taken in rounds.items() if "forge" in name), 1.0)
        least = floor(folder, share, rate)
    report: dict[str, Any] = {"model": model, "floor_tokens_per_s": least, "methods": {}}
    for method, taken in rounds.items():
        rates = sorted(one["tokens_per_s"] for one in taken)
        median = statistics.median(rates)
        report["methods"][method] = taken[0] | {
            "tokens_per_s": median,
            "range": [rates[0], rates[-1]],
            "of_floor": median / least,
            "peak_gb": max(one["peak_gb"] for one in taken),
        }
        if "overhead" in taken[0]:
            report["methods"][method]["overhead"] = statistics.median(one["overhead"] for one in taken)
    both = report["methods"]
    if {"forge", "trl packed"} <= both.keys():
        pairs = zip(both["forge"]["losses"], both["trl packed"]["losses"], strict=True)
        report["largest_difference_of_a_loss"] = max(abs(one - other) for one, other in pairs)
    return report


def show(report: dict[str, Any]) -> None:
    print(f"{report['model']}: floor {report['floor_tokens_per_s']:,.0f} tokens/s")
    print("  method         tokens/s  range          of floor   / trl / packed overhead  peak GB")
    for method, one in report["methods"].items():
        spread = f"{one['range'][0]:,.0f} - {one['range'][1]:,.0f}"
        ratios = [
            f"{one['tokens_per_s'] / report['methods'][peer]['tokens_per_s']:.2f}" if peer in report["methods"] else ""
            for peer in ("trl", "trl packed")
        ]
        overhead = f"{one['overhead']:.1%}" if "overhead" in one else ""
        print(
            f"  {method:<14}{one['tokens_per_s']:>9,.0f}  {spread:<15}{one['of_floor']:>8.0%}"
            f"{ratios[0]:>8}{ratios[1]:>9}{overhead:>9}{one['peak_gb']:>8.2f}"
        )
    if "largest_difference_of_a_loss" in report:
        losses = report["methods"]["forge"]["losses"]
        print(
            f"  losses {losses[0]:.3f} → {losses[-1]:.3f}, forge and trl packed differ by at most"
            f" {report['largest_difference_of_a_loss']:.4f}"
        )


def first_step(options: argparse.Namespace) -> dict[str, float]:
    """Seconds from the command to each of its marks: one worker under Ray, DeepSpeed, SmolLM2, three steps."""
    with tempfile.TemporaryDirectory(prefix="bench-first-", ignore_cleanup_errors=True) as folder:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        prepared("smollm2", folder)
        scaling = {"num_workers": 1, "cpus_per_worker": options.threads}
        file = Path(folder) / "run.yaml"
        file.write_text(settings(folder, 3, options.threads, zero_stage=2, scaling=scaling).model_dump_json())
        began = time.time()
        train = [sys.executable, "-m", "forge_ray.cli", "train", str(file), "--store", folder]
        subprocess.run(train, check=True, cwd=ROOT, env=environment)
        total = time.time() - began
        (run_folder,) = (Path(folder) / "runs").glob("run_*")
        lines = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]

        def at(pattern: str) -> float:
            return min(path.stat().st_mtime for path in run_folder.glob(pattern)) - began

        ready = at("attempts/*.json")
        return {
            "driver: imports, catalogue, dataset verified, Ray started": at("config-*.json"),
            "worker: Ray Train's group, imports, model, engine": ready,
            "first step done": ready + lines[0]["seconds"],
            "command ended: three steps, checkpoint, export": total,
        }


def two(options: argparse.Namespace) -> dict[str, float]:
    """Tokens per second of one run, and of two at once, together: each with as many threads as the machine has."""
    with tempfile.TemporaryDirectory(prefix="bench-two-", ignore_cleanup_errors=True) as folder:
        prepared("smollm2", folder)
        alone, together = [], []
        for _ in range(options.rounds):
            alone.append(run("forge", folder, options)["tokens_per_s"])
            with ThreadPoolExecutor(2) as pool:
                both = pool.map(lambda _: run("forge", folder, options)["tokens_per_s"], range(2))
                together.append(sum(both))
    one, pair = statistics.median(alone), statistics.median(together)
    return {"one alone, tokens/s": one, "two at once, tokens/s": pair, "two at once / one alone": pair / one}


def saving(method: str, folder: str, threads: int) -> dict[str, float]:
    """A full fine-tune that saves every 4 steps; the last save, which nothing hides, is left out."""
    from forge_ray.train import loop, metrics

    checkpoint = {"every_steps": 4, "asynchronous": method == "saves behind"}
    job = job_of(
        folder, 13, threads, f"run-{os.getpid()}", engine="torch", zero_stage=0, adapter=None, checkpoint=checkpoint
    )
    loop.train_loop(job.to_json())
    lines = metrics.read(job.store.local(f"runs/{job.run}") / metrics.METRICS)[4:12]
    (size,) = {
        sum(path.stat().st_size for path in step_folder.iterdir())
        for step_folder in job.store.local(f"runs/{job.run}/checkpoints").glob("step-*")
    }
    return {
        "share": sum(line.get("checkpoint_s", 0.0) for line in lines) / sum(line["seconds"] for line in lines),
        "stall_s": sum(line.get("checkpoint_s", 0.0) for line in lines) / 2,
        "step_s": statistics.median(line["seconds"] - line.get("checkpoint_s", 0.0) for line in lines),
        "gb": size / 1e9,
    }


def main() -> None:
    options = arguments()
    if options.run:
        os.environ |= {"HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu", "TOKENIZERS_PARALLELISM": "false"}
        method, folder = options.run
        if method.startswith("prepare "):
            prepare(method.removeprefix("prepare "), folder)
            return
        if method.startswith("saves "):
            print(json.dumps(saving(method, folder, options.threads)), flush=True)
            return
        took = (trl if "trl" in method else forge)(method, folder, options.steps, options.threads)
        took["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        print(json.dumps(took), flush=True)
        return
    if options.first_step:
        marks = first_step(options)
        print(json.dumps(marks) if options.json else "\n".join(f"{at:7.1f} s  {what}" for what, at in marks.items()))
        return
    if options.two:
        rates = two(options)
        print(json.dumps(rates) if options.json else "\n".join(f"{rate:7.2f}  {what}" for what, rate in rates.items()))
        return
    if options.checkpoints:
        with tempfile.TemporaryDirectory(prefix="bench-saves-", ignore_cleanup_errors=True) as folder:
            prepared("smollm2", folder)
            measurements = {method: run(method, folder, options) for method in ("saves behind", "saves in place")}
        for method, one in measurements.items():
            print(
                f"{method:<15}{one['share']:>7.1%} of the time, {one['stall_s']:.2f} s for {one['gb']:.2f} GB;"
                f" a step takes {one['step_s']:.1f} s"
            )
        return
    rate = matrix_rate(options.threads)
    if not options.json:
        print(f"{PRECISION} matrix product: {rate / 1e9:.0f} GFLOP/s on {options.threads} threads")
    tables = [measure(model, options, rate) for model in options.models.split(",")]
    if options.json:
        print(json.dumps({"matrix_flop_per_s": rate, "models": tables}))
    else:
        for table in tables:
            show(table)


if __name__ == "__main__":
    main()
