"""Train one elastic run on two nodes of which one comes and goes, and compare it with a run on a steady number of workers.

    python tests/e2e/elastic_matrix.py        prints what happened; exit code 1 if rows or losses differ

Workers go 2 → 1 (the second node is killed) → 2 (a node joins) → 1 (that node is drained, as a scheduler announces that it
takes it away: a checkpoint is written before it goes). The nodes are Ray nodes on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kill_matrix import FORGE, ROOT, RUN, forge, last_step

PATIENCE_S = 240.0
STEPS = 160
SETTINGS = {
    "train.max_steps": STEPS,
    "train.epochs": 1000,
    "train.global_batch": 32,
    "train.optimizer.lr": "1e-3",
    "train.checkpoint.every_steps": 5,
    "train.guards.first_step_s": 90,
}
ELASTIC = "train.scaling={num_workers: {min: 1, max: 2, resize_every_s: 5}, cpus_per_worker: 2}"
STEADY = "train.scaling={num_workers: 2, cpus_per_worker: 1}"
TOLERANCE = 1e-4  # of a step's loss: sums are taken in another order


def wait_until(what: str, holds: Callable[[], bool], log: Path) -> None:
    print(f"waiting: {what}", file=sys.stderr, flush=True)
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            raise SystemExit(f"{what}: not within {PATIENCE_S:.0f} s; log:\n{log.read_text()[-6000:]}")
        time.sleep(0.1)


def starts(run: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(run.glob("attempts/*.json"))]


def losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines}


def matrix(scratch: Path, options: list[str]) -> dict[str, Any]:
    from conftest import make_tiny_model
    from ray.cluster_utils import Cluster

    from forge_ray.models.import_model import import_model
    from forge_ray.release import promotion
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    os.environ |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    steady, elastic, log = scratch / "steady", scratch / "elastic", scratch / "driver.log"
    with Catalog.open(Store(str(steady))) as catalog:
        base = import_model(catalog, make_tiny_model(scratch / "tiny-llama"), "tiny-llama", licence="apache-2.0")
        promotion.promote(catalog, base.id, "tiny")
    common = [part for name, value in SETTINGS.items() for part in ("--set", f"{name}={value}")]
    common += [part for option in options for part in ("--set", option)]
    forge("data", "prepare", RUN, *common, store=steady)
    shutil.copytree(steady, elastic)
    record = forge("train", RUN, *common, "--set", STEADY, store=steady)
    run = elastic / "runs" / record["id"]

    began = time.monotonic()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})  # a worker, and a task that reads
    second = cluster.add_node(num_cpus=2)
    command = [*FORGE, "train", RUN, *common, "--set", ELASTIC, "--store", str(elastic)]
    with log.open("ab") as stream:
        driver = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=stream, env=os.environ | {"RAY_ADDRESS": cluster.address}
        )
    try:
        wait_until("two workers", lambda: last_step(run) >= 8, log)
        cluster.remove_node(second, allow_graceful=False)
        wait_until("one worker", lambda: len(starts(run)) == 2 and last_step(run) > starts(run)[1]["first_step"] + 5, log)
        second = cluster.add_node(num_cpus=2)
        wait_until("two again", lambda: len(starts(run)) == 3 and last_step(run) > starts(run)[2]["first_step"] + 5, log)
        drain = [
            "drain-node",
            "--address",
            cluster.address,
            "--node-id",
            second.node_id,
            "--deadline-remaining-seconds",
            "30",
        ]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "taken away"]
        subprocess.run([str(Path(sys.executable).with_name("ray")), *drain, *reason], check=True, capture_output=True)
        wait_until("a checkpoint before", lambda: any("preemption" in p.read_text() for p in run.glob("incidents/*")), log)
        cluster.remove_node(second, allow_graceful=False)
        wait_until("the end", lambda: driver.poll() is not None, log)
    finally:
        driver.kill()
        cluster.shutdown()
    if driver.returncode:
        raise SystemExit(f"the driver ended with {driver.returncode}:\n{log.read_text()[-6000:]}")
    audit = forge("audit", "data", record["id"], store=elastic)
    one, other = losses(steady / "runs" / record["id"]), losses(run)
    incidents = [json.loads(path.read_text()) for path in sorted(run.glob("incidents/*.json"))]
    warned = next(incident["step"] for incident in incidents if incident["kind"] == "preemption")
    return {
        "run": record["id"],
        "workers": [(start["world_size"], start["first_step"]) for start in starts(run)],
        "incidents": [f"{incident['kind']} at step {incident['step']}" for incident in incidents],
        "same_order": audit["order_digest"] == record["order_digest"] == audit["recomputed_digest"],
        "goes_on_from_the_warning": starts(run)[-1]["first_step"] >= warned,
        "largest_difference_of_a_loss": max(abs(one[step] - other[step]) for step in one),
        "last_losses": (one[STEPS], other[STEPS]),
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", dest="options", action="append", default=[], help="e.g. train.zero_stage=3")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fe-", ignore_cleanup_errors=True) as scratch:
        report = matrix(Path(scratch), options.options)
    print(json.dumps(report) if options.json else "\n".join(f"{name}: {value}" for name, value in report.items()))
    good = report["same_order"] and report["goes_on_from_the_warning"]
    sys.exit(0 if good and report["largest_difference_of_a_loss"] < TOLERANCE else 1)


if __name__ == "__main__":
    main()
