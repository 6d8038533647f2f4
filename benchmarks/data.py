"""From rows to packed tokens, and from packed tokens to a worker: us and a peer, side by side in one run, on the same rows.

    pip install -e '.[bench]'
    python benchmarks/data.py                                   three shapes of rows, some 6 M tokens each
    python benchmarks/data.py --tokens 50e6 --shapes short      the size from which start-up no longer counts
    python benchmarks/data.py --scale 1e6,4e6,16e6              how cost and memory grow with the input
    python benchmarks/data.py --workers 1,2,4                   how cost falls with CPUs

Every line is a process of its own that starts from the same JSONL files and ends with packed rows on disk:

    tokenizer   the bare tokenizer on the rendered texts, all cores, ids thrown away
    fastokens   the same by the encoder that makes the ids of a build where it is proven equal: the floor of the work
    trl         TRL's SFTTrainer path (`_prepare_dataset`, num_proc=2, packing bfd), messages: no loss mask
    trl masked  the same on prompt and completion, with the completion mask: what we do, too
    forge       index, validate, hash, template, mask, prove, pack and publish a dataset version

Seconds do not hold imports, the start of Ray, and the proof of the encoder, which is made once for a tokenizer; they are
printed beside them. Memory is the peak of the process and all its
children (proportional share of common pages, without the page cache), of Ray's own daemons for us too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WORDS_OF = {"short": (20, 1), "long": (60, 8), "text": (900, 0)}  # words per turn, turns
SEQUENCE_LENGTH = 2048
WATCH_S = 2.0  # reading the memory of a dozen processes twice a second took a fifth of a core from what was measured


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=6e6, help="about so many tokens per shape")
    parser.add_argument("--shapes", default="short,long,text")
    parser.add_argument("--methods", default="tokenizer,fastokens,trl,trl masked,forge")
    parser.add_argument("--scale", default="", help="sizes in tokens for the growth table, instead of --tokens")
    parser.add_argument("--workers", default="", help="numbers of CPUs given to Ray, for the scaling table")
    parser.add_argument("--stream", action="store_true", help="also the stream into training")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=2, metavar=("METHOD", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help=argparse.SUPPRESS)
    return parser.parse_args()


def texts() -> list[list[str]]:
    """Words of the shipped rows: English package descriptions."""
    lines = (ROOT / "jobs/data/debian_sections.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"][-2]["content"].split() for line in lines]


def rows(shape: str, tokens: float) -> Iterator[dict[str, Any]]:
    """Seeded rows of log-normal length, until about `tokens` tokens were written."""
    chosen, source, size, written = random.Random(0), texts(), WORDS_OF[shape], 0.0
    number = 0

    def passage() -> str:
        num_words = max(3, int(chosen.lognormvariate(0, 0.6) * size[0]))
        words: list[str] = []
        while len(words) < num_words:
            words += chosen.choice(source)
        return " ".join(words[:num_words])

    while written < tokens:
        number += 1
        if not size[1]:
            value: dict[str, Any] = {"text": f"{number} {passage()}"}
            count = len(value["text"])
        else:
            turns = []
            for turn in range(size[1]):
                turns += [
                    {"role": "user", "content": f"{number}.{turn} {passage()}"},
                    {"role": "assistant", "content": passage()},
                ]
            value, count = {"messages": turns}, sum(len(turn["content"]) + 24 for turn in turns)
        written += count / 4.2
        yield value


def write_inputs(folder: Path, shape: str, tokens: float) -> int:
    """Eight JSONL files; returns their size in bytes."""
    files = [(folder / f"{number}.jsonl").open("w", encoding="utf-8") for number in range(8)]
    for number, value in enumerate(rows(shape, tokens)):
        files[number % 8].write(json.dumps(value) + "\n")
    for file in files:
        file.close()
    return sum(file.stat().st_size for file in folder.glob("*.jsonl"))


def base_folder(scratch: Path) -> Path:
    """A store that holds the quick start's base model; imported once."""
    store = Path(os.environ.get("FORGE_STORE", ROOT / ".forge"))
    if list(store.glob("models/*/tokenizer.json")):
        return store
    from forge_ray.models.import_model import import_model
    from forge_ray.models.quickstart_base import base_model_file
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    with Catalog.open(Store(str(scratch / "store"))) as catalog:
        import_model(catalog, base_model_file(), "smollm2-135m-instruct", licence="apache-2.0")
    return scratch / "store"


def main() -> None:
    options = arguments()
    if options.run:
        print(json.dumps(METHODS[options.run[0]](Path(options.run[1]), options.cpus)))
        return
    scratch = Path(tempfile.mkdtemp(prefix="forge-bench-"))
    try:
        results = measure(options, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if options.json:
        print(json.dumps({"machine": machine(), "results": results}))


def measure(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    store = base_folder(scratch)
    sizes = [float(size) for size in options.scale.split(",") if size] or [options.tokens]
    workers = [int(count) for count in options.workers.split(",") if count] or [options.cpus]
    print(machine(), file=sys.stderr)
    measurements = []
    for shape in options.shapes.split(","):
        for size in sizes:
            folder = scratch / f"{shape}-{size:g}"
            folder.mkdir()
            num_bytes = write_inputs(folder, shape, size)
            batch = []
            for method in options.methods.split(","):
                if method == "trl masked" and shape == "text":
                    continue  # a text has no prompt: the same as `trl`
                for cpus in workers if method == "forge" else workers[:1]:
                    result = run(method, folder, store, cpus)
                    batch.append({"shape": shape, "input_mb": num_bytes / 1e6, "method": method, "cpus": cpus} | result)
            measurements += batch
            print_table(batch)
            shutil.rmtree(folder)
    if options.stream:
        folder = scratch / "stream"
        folder.mkdir()
        write_inputs(folder, "text", options.tokens)
        measurements.append({"method": "stream"} | run("stream", folder, store, options.cpus))
        print_stream(measurements[-1])
    return measurements


def run(method: str, folder: Path, store: Path, cpus: int) -> dict[str, Any]:
    """One method in a process of its own; its result and the peak memory of its process tree."""
    command = [sys.executable, __file__, "--run", method, str(folder), "--cpus", str(cpus)]
    environment = {**os.environ, "FORGE_STORE": str(store), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    output = folder / f"{method.replace(' ', '-')}-{cpus}.out"
    with output.open("w") as stdout, (folder / "err").open("w+") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, cwd=folder)
        peak, over = [0], threading.Event()
        watcher = threading.Thread(target=watch, args=(process.pid, peak, over))
        watcher.start()
        process.wait()
        over.set()
        watcher.join()
        if process.returncode:
            stderr.seek(0)
            raise SystemExit(f"{method} failed:\n{stderr.read()[-3000:]}")
    return {**json.loads(output.read_text().splitlines()[-1]), "peak_mb": peak[0] / 1e6}


def watch(pid: int, peak: list[int], over: threading.Event) -> None:
    import psutil

    while not over.wait(WATCH_S):
        total = 0
        try:
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            try:
                total += process.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        peak[0] = max(peak[0], total)


def model_folder() -> Path:
    return next(Path(os.environ["FORGE_STORE"]).glob("models/*/tokenizer.json")).parent


def tokenizer_only(folder: Path, cpus: int) -> dict[str, Any]:
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["RAYON_NUM_THREADS"] = str(cpus)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)

    def count(texts: list[str]) -> int:
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return sum(len(encoding) for encoding in encodings)

    return encoded_only(tokenizer, count, folder)


def fast_only(folder: Path, cpus: int) -> dict[str, Any]:
    os.environ["FASTOKENS_BPE_THREADS"] = str(cpus)
    from fastokens import Tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
    fast = Tokenizer.from_json_str(tokenizer.backend_tokenizer.to_str())
    return encoded_only(tokenizer, lambda texts: len(fast.encode_batch_flat(texts)[0]) // 4, folder)


def encoded_only(tokenizer: Any, count: Callable[[list[str]], int], folder: Path) -> dict[str, Any]:
    """`count` tokens of the rendered texts, a thousand at a time."""
    rendered = [
        value.get("text") or tokenizer.apply_chat_template(value["messages"], tokenize=False) for value in read(folder)
    ]
    started = time.perf_counter()
    tokens = sum(count(rendered[start : start + 1000]) for start in range(0, len(rendered), 1000))
    return {"tokens": tokens, "rows": len(rendered), "seconds": time.perf_counter() - started, "start_s": 0.0, "fill": 1.0}


def read(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield json.loads(line)


def trl_messages(folder: Path, cpus: int) -> dict[str, Any]:
    return trl(folder, cpus, masked=False)


def trl_masked(folder: Path, cpus: int) -> dict[str, Any]:
    return trl(folder, cpus, masked=True)


def trl(folder: Path, cpus: int, masked: bool) -> dict[str, Any]:
    """TRL's own preparation: the method of its trainer, called without a model."""
    from types import SimpleNamespace

    import datasets
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(model_folder(), local_files_only=True)
    if masked:
        lines = [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.open(encoding="utf-8")]
        if "messages" in lines[0]:
            (folder / "trl").mkdir()
            with (folder / "trl/rows.jsonl").open("w") as out:
                for line in lines:
                    pair = {"prompt": line["messages"][:-1], "completion": line["messages"][-1:]}
                    out.write(json.dumps(pair) + "\n")
        del lines
    files = sorted(map(str, (folder / "trl").glob("*.jsonl"))) or sorted(map(str, folder.glob("*.jsonl")))
    config = SFTConfig(
        output_dir=str(folder / "out"),
        max_length=SEQUENCE_LENGTH,
        packing=True,
        packing_strategy="bfd",
        dataset_num_proc=cpus,
        use_cpu=True,
        bf16=False,
    )
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=None, completion_only_loss=masked, _is_vision_dataset=False, padding_free=True
    )
    started = time.perf_counter()
    loaded = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(folder / "cache"))
    packed = SFTTrainer._prepare_dataset(trainer, loaded, tokenizer, config, True, None, "train")
    seconds = time.perf_counter() - started
    tokens = sum(len(chunk) for batch in packed.iter(1000) for chunk in batch["input_ids"])
    shutil.rmtree(folder / "trl", ignore_errors=True)
    fill = tokens / (len(packed) * SEQUENCE_LENGTH)
    return {"tokens": tokens, "rows": len(loaded), "seconds": seconds, "start_s": 0.0, "fill": fill}


def forge(folder: Path, cpus: int) -> dict[str, Any]:
    from forge_ray.data.build.build import build, index_sources

    config, catalog, base, start_s, store = prepared(folder, cpus)
    started = time.perf_counter()
    manifest = build("bench", config, base, store, index_sources(config))
    seconds = time.perf_counter() - started
    stats = manifest.splits["train"]
    fill = stats.num_tokens / (stats.num_rows * SEQUENCE_LENGTH)
    catalog.close()
    return {"tokens": stats.num_tokens, "rows": stats.num_records, "seconds": seconds, "start_s": start_s, "fill": fill}


def prepared(folder: Path, cpus: int) -> Any:
    import ray

    from forge_ray.config.data import DataConfig
    from forge_ray.data.dataset.encoders import key_of, prove_tokenizer
    from forge_ray.machine.offline import set_offline_switches
    from forge_ray.records import ModelVersion
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    set_offline_switches()
    origin, store = Store(os.environ["FORGE_STORE"]), Store(str(folder / f"store-{cpus}"))
    with Catalog.open(origin) as catalog:
        base = next(v for v in catalog.all(ModelVersion) if v.id == model_folder().name)
    (folder / f"store-{cpus}/models").mkdir(parents=True)
    (folder / f"store-{cpus}/models/{base.id}").symlink_to(model_folder())
    config = DataConfig.model_validate(
        {
            "sources": [{"path": f"{folder}/*.jsonl"}],
            "sequence_length": SEQUENCE_LENGTH,
            "splits": {"validation": 0, "test": 0},
            "overlong": "truncate",
        }
    )
    begun = time.perf_counter()
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    ray.get(ray.remote(prove_tokenizer).remote(store, base.id, key_of(base)))
    return config, Catalog.open(store), base, time.perf_counter() - begun, store


def stream(folder: Path, cpus: int) -> dict[str, Any]:
    """Tokens per second that one worker is given, in micro-batches of 4 rows, and how long it waits for the first."""
    from forge_ray.data.build.build import build, index_sources
    from forge_ray.data.dataset.order import order_of
    from forge_ray.data.dataset.stream import Feed, Rows, local_batches, ray_batches

    config, catalog, base, _, store = prepared(folder, cpus)
    manifest = build("bench", config, base, store, index_sources(config))
    catalog.close()
    rows = Rows.of(store, manifest, "train")
    order = order_of(manifest, "train", 0, 4)
    feed = Feed(rows, order, order.lanes(0, 1), 0, max(1, 2 * rows.num_rows // 4))
    measurements: dict[str, Any] = {}
    for name, reader in (("thread", local_batches), ("ray", ray_batches)):
        started = time.perf_counter()
        first, tokens = 0.0, 0
        for batch in reader(feed):
            first = first or time.perf_counter() - started
            tokens += batch["input_ids"].size
        seconds = time.perf_counter() - started
        measurements[name] = {"tokens_per_s": tokens / (seconds - first), "first_batch_s": first, "tokens": tokens}
        measurements[name]["wait"] = wait_share(reader(feed), steps=min(24, feed.num_steps - 1))
    return measurements


def wait_share(batches: Iterator[dict[str, Any]], steps: int) -> float:
    """The share of the time of `steps` training steps that a model of 1.05 M parameters waits for its rows; the first batch,
    which is told apart, left out."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1536,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).bfloat16()
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e6
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    next(batches)
    waited, began = 0.0, time.perf_counter()
    for _ in range(steps):
        asked = time.perf_counter()
        rows = next(batches)
        waited += time.perf_counter() - asked
        ids, position_ids = torch.from_numpy(rows["input_ids"]) % 1536, torch.from_numpy(rows["position_ids"])
        loss = model(input_ids=ids, position_ids=position_ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return waited / (time.perf_counter() - began)


METHODS = {
    "tokenizer": tokenizer_only,
    "fastokens": fast_only,
    "trl": trl_messages,
    "trl masked": trl_masked,
    "forge": forge,
    "stream": stream,
}


def machine() -> str:
    from forge_ray.machine.environment import versions

    installed = versions()
    names = ("ray", "transformers", "pyarrow")
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, " + ", ".join(
        f"{n} {installed.get(n, '?')}" for n in names
    )


def print_table(batch: list[dict[str, Any]]) -> None:
    speed = {item["method"]: item["tokens"] / item["seconds"] for item in batch}
    header = "shape   input MB  method      CPUs      rows      tokens  seconds  +start  tokens/s"
    print(f"\n{header}   ÷ trl  ÷ tokenizer  ÷ fastokens   fill  peak MB", file=sys.stderr)
    for item in batch:
        rate = item["tokens"] / item["seconds"]
        ratios = [f"{rate / speed[name]:.2f}" if name in speed else "" for name in ("trl", "tokenizer", "fastokens")]
        print(
            f"{item['shape']:<7} {item['input_mb']:>8.0f}  {item['method']:<10} {item['cpus']:>5} {item['rows']:>9,}"
            f" {item['tokens']:>11,} {item['seconds']:>8.1f} {item['start_s']:>7.1f} {rate:>9,.0f} {ratios[0]:>7}"
            f" {ratios[1]:>12} {ratios[2]:>12} {item['fill']:>6.1%} {item['peak_mb']:>8,.0f}",
            file=sys.stderr,
        )


def print_stream(item: dict[str, Any]) -> None:
    for name in ("thread", "ray"):
        values = item[name]
        print(
            f"stream through {name}: {values['tokens_per_s']:,.0f} tokens/s to one worker, first batch after"
            f" {values['first_batch_s']:.2f} s ({values['tokens']:,} tokens); a model of 1.05 M parameters waits"
            f" {values['wait']:.2%} of its time",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
