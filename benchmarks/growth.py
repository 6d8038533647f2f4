"""How cost grows with work: rows of a build, versions of a store, lines of its log, adapters of an endpoint, length of rows.

    python benchmarks/growth.py --most 10000                 about five minutes on two cores
    python benchmarks/growth.py --axes versions,events --most 100000 --out growth.png --json

Each point is a process of its own on a store made for it: processor seconds without imports, which other work on the machine
hardly changes, and peak memory; of a build, which many processes share, seconds of the clock and the memory of all of them.
A line of the table is one cost: its exponent is the slope of log cost over log size, over all points (`fit`) and between the
last two (`end`), where start-up no longer counts: 1 is linear. `--most` bounds every axis, and a minute is enough for 1000.
The stores are written as the catalogue writes them, line by line, without its syncs.

rows        a build of short texts: `data.py`'s, from JSONL to a published version
versions    model versions with a run and an alias each, a hundredth as many datasets: `forge models list`, `forge trace` of
            a record that every dataset holds, and an endpoint's start: log, facts, table
events      lines of alias moves: an endpoint's start, one further line, and `forge audit verify`
adapters    LoRA versions of a tiny model with an alias each, on one endpoint in this process: the table, the loading of all
            (verified, each asked for a token), the choice of one, and a batch of 16 different ones
length      `forge plan` of Llama-3.1-8B with LoRA, by tokens of a row; its memory is the estimate
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIZES = {
    "rows": (10**4, 10**5, 10**6, 10**7),
    "versions": (10, 100, 1000, 10**4),
    "events": (10**3, 10**4, 10**5, 10**6),
    "adapters": (1, 10, 100, 1000),
    "length": (512, 2048, 8192, 32768, 131072),
}
TARGET = 7  # the record that is traced
DRAWS = 2000  # choices that are timed together


def timed(call: Callable[[], object]) -> float:
    """Processor seconds of all threads of this process."""
    started = time.process_time()
    call()
    return time.process_time() - started


def fill(store: Any, contents: list[tuple[str, bytes, str, str]]) -> None:
    """(path, content, action, subject) of each file, with its line behind the last one, as `audit_log.publish` has it."""
    from forge_ray.store import audit_log, log_reader

    before = (audit_log.lines(store) or [b""])[-1]
    path = Path(store.path(log_reader.LOG))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        for name, content, action, subject in contents:
            before = audit_log._line(before, name, content, action, subject, "")
            log.write(before + b"\n")
            file = Path(store.path(name))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    store.write(log_reader.HEAD, before)


def of_record(record: Any) -> tuple[str, bytes, str, str]:
    from forge_ray.records import canonical_json
    from forge_ray.store.signatures import record_path

    return record_path(record), canonical_json(record.model_dump(mode="json")), f"{record.kind}.put", record.id


def of_move(alias: str, version: str) -> tuple[str, bytes, str, str]:
    from forge_ray.records import Event
    from forge_ray.store.catalog import event_path

    event = Event(kind="alias", subject=alias, data={"model_version": version})
    return event_path(event), event.stored(), "alias.set", alias


def version_of(name: str, run: str, base: str, files: tuple[Any, ...] = ()) -> Any:
    from forge_ray.records import FileEntry, ModelVersion, files_digest

    files = files or (FileEntry(path="model.safetensors", size=1, sha256=name),)
    return ModelVersion(
        name=name,
        status="accepted" if run else "imported",
        weights="adapter" if base else "full",
        files=files,
        files_digest=files_digest(files),
        base_model=base,
        run=run,
        licence="apache-2.0",
    ).sealed()


def versions(count: int, folder: Path) -> dict[str, float]:
    sys.path.append(str(ROOT / "tests"))
    import fabricated

    from forge_ray.cli.show import models
    from forge_ray.config.release import DeployConfig
    from forge_ray.governance.trace import of_record as asked
    from forge_ray.governance.trace import trace
    from forge_ray.serve.coordinator import read_table
    from forge_ray.serve.watcher import StoreWatcher
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    store = Store(str(folder / "store"))
    records = [fabricated.record_of(number) for number in range(20)]
    with Catalog.open(store) as catalog:
        base = fabricated.version(catalog, "base")
        datasets = [
            fabricated.dataset(catalog, records, name=f"rows {number}", data={"sequence_length": 16 + number})
            for number in range(max(1, count // 100))
        ]
        example = fabricated.run(catalog, "example", datasets[0].id, base.id, num_steps=20)  # every row at least once
    contents = []
    for number in range(count):
        run = example.model_copy(update={"id": f"run_{number:08d}", "dataset": datasets[number % len(datasets)].id})
        version = version_of(f"v{number}", run.id, base.id)
        contents += [of_record(run), of_record(version), of_move(f"alias-{number}", version.id)]
    fill(store, contents)

    def listed() -> None:
        with Catalog.read_only(store) as catalog:
            if len(models(catalog)) != count + 1:
                raise SystemExit("a version is missing")

    def traced() -> None:
        with Catalog.read_only(store) as catalog:
            answer = trace(catalog, [asked(records[TARGET].id)])
            if len(answer.affected.versions) != count:
                raise SystemExit(f"the record reached {len(answer.affected.versions)} of {count} versions")

    def started() -> None:
        watcher = StoreWatcher(store)
        watcher.refresh()
        table = read_table(DeployConfig(name="one", models=("alias-0",)), watcher, {})
        if len(table.routes) != count or not table.id:
            raise SystemExit("an alias is missing")

    return {"models list": timed(listed), "trace": timed(traced), "endpoint's start": timed(started)}


def events(count: int, folder: Path) -> dict[str, float]:
    from forge_ray.governance.verify import verify_log
    from forge_ray.serve.watcher import StoreWatcher
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    store = Store(str(folder / "store"))
    with Catalog.open(store):
        pass
    fill(store, [of_move(f"team-{number % 50}", f"mv_{number:016x}") for number in range(count)])
    watcher = StoreWatcher(store)

    def started() -> None:
        watcher.refresh()
        if len(watcher.routes()) != min(50, count):
            raise SystemExit("an alias is missing")

    def verified() -> None:
        if problems := verify_log(store, False).problems:
            raise SystemExit(f"the log does not verify: {problems[:3]}")

    seconds = {"endpoint's start": timed(started)}
    fill_one = of_move("team-0", "mv_new")
    seconds["audit verify"] = timed(verified)
    fill(store, [fill_one])
    return seconds | {"one line more": timed(started)}


def adapters(count: int, folder: Path) -> dict[str, float]:
    import asyncio
    import hashlib

    sys.path.append(str(ROOT / "tests"))
    import torch
    from conftest import make_tiny_model
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from forge_ray.config.release import DeployConfig
    from forge_ray.inference.engine import GenerationRequest
    from forge_ray.models.import_model import import_model
    from forge_ray.records import FileEntry, canonical_json
    from forge_ray.serve.context import Caller
    from forge_ray.serve.coordinator import read_table
    from forge_ray.serve.directory import ReplicaDirectory
    from forge_ray.serve.engines import EnginePool
    from forge_ray.serve.routing import RoutingInputs
    from forge_ray.serve.watcher import StoreWatcher
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import MANIFEST, Store

    torch.set_num_threads(1)
    store = Store(str(folder / "store"))
    with Catalog.open(store) as catalog:
        base = import_model(catalog, make_tiny_model(folder / "tiny"), "tiny", "Apache-2.0")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "tiny")
    get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).save_pretrained(str(folder / "adapter"))
    weights = load_file(folder / "adapter/adapter_model.safetensors")
    settings = (folder / "adapter/adapter_config.json").read_bytes()
    contents, names = [], []
    for number in range(count):
        draft = folder / "draft.safetensors"
        save_file(weights, draft, {"format": "pt", "number": str(number)})
        files = {"adapter_config.json": settings, "adapter_model.safetensors": draft.read_bytes()}
        entries = tuple(
            FileEntry(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()
        )
        version = version_of(f"v{number}", "", base.id, entries)
        for name, data in files.items():
            store.write(f"models/{version.id}/{name}", data)
        store.write(f"models/{version.id}/{MANIFEST}", canonical_json({"files": [one.model_dump() for one in entries]}))
        names.append(f"alias-{number}")
        contents += [of_record(version), of_move(names[-1], version.id)]
    fill(store, contents)
    config = DeployConfig.model_validate({"name": "one", "models": ["alias-0"], "engine": {"max_adapters": count}})
    watcher = StoreWatcher(store)
    watcher.refresh()
    tables: list[Any] = []

    def read() -> None:
        tables.append(read_table(config, watcher, {}))
        assert tables[0].id

    seconds = {"table": timed(read)}
    pool = EnginePool(config, store)
    directory = ReplicaDirectory(pool)
    try:
        seconds["loading of all"] = timed(lambda: directory.prepare(tables[0]))
        if broken := directory.prepare(tables[0]):
            raise SystemExit(f"not loaded: {broken}")
        directory.go_live(tables[0].id)
        inputs, nobody = RoutingInputs({}, "", (1, 2, 3)), Caller("", None)

        async def choose() -> None:
            for number in range(DRAWS):
                await directory.choose(names[number * 7919 % count], nobody, inputs)

        seconds["one choice"] = timed(lambda: asyncio.run(choose())) / DRAWS
        loaded = [directory.stable(names[number * 7919 % count], nobody) for number in range(16)]
        requests = [GenerationRequest((5, 6, 7), 16, adapter=one.adapter) for one in loaded]
        loaded[0].generator.generate(requests)
        seconds["16 requests of 16 tokens"] = timed(lambda: loaded[0].generator.generate(requests))
    finally:
        pool.close()
    return seconds


def length(count: int, folder: Path) -> dict[str, float]:
    from random_models import configuration, plan_model

    from forge_ray.config.base import parse
    from forge_ray.config.train import TrainConfig
    from forge_ray.train.plan import plan
    from forge_ray.train.stated import Stated

    model = plan_model(configuration("llama-3.1-8b"))
    config = parse(TrainConfig, {"adapter": {"r": 16}, "scaling": {"gpus_per_worker": 1}, "activation_checkpointing": True})
    estimates: list[Any] = []
    seconds = timed(lambda: estimates.append(plan(model, config, "bf16", Stated.of(10**6, count), 8)))
    return {"plan": seconds, "memory of a worker, GB": estimates[0].worker_bytes / 1e9}


def rows(count: int, folder: Path) -> dict[str, float]:
    """`data.py`'s build; its `peak_mb` counts. The tokenizer is the tests', of 400 tokens, so that no model is converted."""
    sys.path.append(str(ROOT / "tests"))
    import data
    from conftest import make_tiny_model

    from forge_ray.models.import_model import import_model
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    base = folder / "base"
    with Catalog.open(Store(str(base))) as catalog:
        import_model(catalog, make_tiny_model(folder / "tiny"), "tiny", "Apache-2.0")
    words = data.texts()
    source = folder / "source"
    source.mkdir()
    with (source / "0.jsonl").open("w", encoding="utf-8") as file:
        for number in range(count):
            some = words[number % len(words)]
            file.write(json.dumps({"text": f"{number} {' '.join(some[number % 5 : number % 5 + 12])}"}) + "\n")
    result = data.run("forge", source, base, os.cpu_count() or 1)
    return {"build": result["seconds"], "peak_mb": result["peak_mb"]}


AXES: dict[str, Callable[[int, Path], dict[str, float]]] = {
    "rows": rows,
    "versions": versions,
    "events": events,
    "adapters": adapters,
    "length": length,
}


def point(axis: str, size: int) -> dict[str, float]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory(prefix="bench-growth-", ignore_cleanup_errors=True) as folder:
        environment |= {"XDG_STATE_HOME": folder}  # what a machine keeps of the stores that it has seen
        command = [sys.executable, __file__, "--run", axis, str(size), folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        raise SystemExit(f"{axis} {size}: ended with {done.returncode}:\n{done.stderr[-2000:]}")
    costs: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return costs


def exponent(sizes: list[int], costs: list[float]) -> float | None:
    """The slope of log cost over log size by least squares; None of one point."""
    import numpy as np

    if len(sizes) < 2:
        return None
    return float(np.polyfit(np.log(sizes), np.log([max(cost, 1e-9) for cost in costs]), 1)[0])


def table(axis: str, points: dict[int, dict[str, float]]) -> list[dict[str, Any]]:
    sizes = list(points)
    lines = []
    for cost in points[sizes[0]]:
        values = [points[size][cost] for size in sizes]
        fits = exponent(sizes, values), exponent(sizes[-2:], values[-2:])
        lines.append({"axis": axis, "cost": cost, "sizes": sizes, "values": values, "fit": fits[0], "end": fits[1]})
    return lines


def show(lines: list[dict[str, Any]]) -> None:
    for axis in dict.fromkeys(line["axis"] for line in lines):
        own = [line for line in lines if line["axis"] == axis]
        print(f"\n| {axis} | {' | '.join(f'{size:,}' for size in own[0]['sizes'])} | fit | end |")
        print("| --- |" + " ---: |" * (len(own[0]["sizes"]) + 2))
        for line in own:
            values = [written(value) for value in line["values"]]
            slopes = ["" if slope is None else f"{slope:.2f}" for slope in (line["fit"], line["end"])]
            print(f"| {line['cost']} | {' | '.join([*values, *slopes])} |")


def written(value: float) -> str:
    """Three digits that count."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(max(value, 1e-9))))}f}"


def draw(lines: list[dict[str, Any]], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = list(dict.fromkeys(line["axis"] for line in lines))
    figure, panels = pyplot.subplots(1, len(axes), figsize=(4.2 * len(axes), 4), squeeze=False, layout="constrained")
    for axis, panel in zip(axes, panels[0], strict=True):
        for line in (line for line in lines if line["axis"] == axis and line["cost"] != "peak_mb"):
            slope = "" if line["end"] is None else f" (~n^{line['end']:.1f})"
            panel.loglog(line["sizes"], line["values"], marker="o", label=line["cost"] + slope)
        panel.set_title(axis)
        panel.set_xlabel(axis)
        panel.set_ylabel("GB, seconds" if axis == "length" else "seconds")
        panel.grid(True, which="major", alpha=0.3)
        panel.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", default=",".join(AXES))
    parser.add_argument("--most", type=int, default=10**6, help="the largest size of any axis")
    parser.add_argument("--out", default="", metavar="FILE.png", help="a picture, both scales logarithmic")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--run", nargs=3, metavar=("AXIS", "SIZE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        costs = AXES[options.run[0]](int(options.run[1]), Path(options.run[2]))
        costs.setdefault("peak_mb", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        print(json.dumps(costs), flush=True)
        return
    if unknown := set(options.axes.split(",")) - AXES.keys():
        parser.error(f"--axes {', '.join(sorted(unknown))}: the axes are {', '.join(AXES)}")
    lines = []
    for axis in options.axes.split(","):
        points = {}
        for size in (size for size in SIZES[axis] if size <= options.most):
            points[size] = point(axis, size)
            print(f"{axis} {size:,}: {points[size]}", file=sys.stderr, flush=True)
        lines += table(axis, points) if points else []
    if options.out:
        draw(lines, options.out)
    print(json.dumps(lines)) if options.json else show(lines)


if __name__ == "__main__":
    main()
