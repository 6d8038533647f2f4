"""Train one run while its processes are killed, and compare it with a run that was left alone.

    python tests/e2e/kill_matrix.py --kills 20 --seed 0        prints a table; exit code 1 if weights or rows differ

The plan is seeded: which process, at which step, how long after it. Victims are the driver, a rank, a rank inside a save,
Ray Train's controller, and the raylet (the whole node); `stop` stops a rank (SIGSTOP) instead of killing it. The driver is
started again when it ends with the run unfinished.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
FORGE = [sys.executable, "-m", "forge_ray.cli"]
RUN = "tests/e2e/run.yaml"
VICTIMS = {
    "rank": "ray::RayTrainWorker",
    "save": "ray::RayTrainWorker",
    "stop": "ray::RayTrainWorker",
    "controller": "ray::TrainController",
    "raylet": "/raylet/raylet",
}
KINDS = ("rank", "driver", "save", "controller", "raylet", "stop")
PATIENCE_S = 180.0


@dataclass(frozen=True)
class Kill:
    kind: str
    step: int
    delay_s: float


@dataclass(frozen=True)
class Outcome:
    """What became of one planned kill: `pid` 0 when there was nobody to kill before the run was over."""

    kind: str
    at_step: int
    pid: int
    driver_exit: int | None


def plan(kills: int, kinds_of: list[str], steps: int, seed: int) -> list[Kill]:
    chosen = random.Random(seed)
    kinds = [kinds_of[number % len(kinds_of)] for number in range(kills)]
    chosen.shuffle(kinds)
    places = sorted(chosen.randrange(0, steps - 1) for _ in kinds)
    return [Kill(kind, place, chosen.uniform(0, 0.4)) for kind, place in zip(kinds, places, strict=True)]


def settings(steps: int, options: list[str]) -> list[str]:
    values = [
        f"train.max_steps={steps}",
        "train.epochs=1000",
        "train.checkpoint.every_steps=2",
        "train.scaling.max_failures=50",
        "train.guards.first_step_s=60",
    ]
    return [part for value in [*values, *options] for part in ("--set", value)]


def forge(*words: str, store: Path) -> dict[str, Any]:
    done = subprocess.run(
        [*FORGE, *words, "--store", str(store), "--json"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"forge {' '.join(words)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    report: dict[str, Any] = json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
    return report


def descendants(root: int) -> dict[int, str]:
    """Process id → command line of everything that `root` started."""
    parents, commands = {}, {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (OSError, IndexError):
                continue
    family, new = {}, [root]
    while new:
        new = [pid for pid, parent in parents.items() if parent in new]
        family |= {pid: commands.get(pid, "") for pid in new}
    return family


def last_step(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    try:
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except ValueError:
        return 0


def saving(run: Path) -> bool:
    return any(run.glob("checkpoints/.tmp-*"))


class Driver:
    """`forge train`, started again as often as it must be."""

    def __init__(self, command: list[str], log: Path) -> None:
        self.command, self.log, self.starts = command, log, 0
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command, cwd=ROOT, stdout=log, stderr=log)

    def revive(self, finished: Path) -> None:
        if self.process.poll() is not None and not finished.exists():
            self.process = self.start()


def strike(driver: Driver, kill: Kill, run: Path) -> Outcome:
    """Wait for the moment, send SIGKILL, and see the driver through to a state from which it goes on."""
    finished, deadline = run / "result.json", time.monotonic() + PATIENCE_S
    victims: list[int] = []
    while not victims and not finished.exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"no {kill.kind} to kill at step {kill.step}; log:\n{driver.log.read_text()[-4000:]}")
        driver.revive(finished)
        if last_step(run) >= kill.step and (kill.kind != "save" or saving(run)):
            if kill.kind != "save":
                time.sleep(kill.delay_s)
            if kill.kind == "driver":
                victims = [driver.process.pid] if driver.process.poll() is None else []
            else:
                family = descendants(driver.process.pid)
                victims = sorted(pid for pid, command in family.items() if VICTIMS[kill.kind] in command)
        time.sleep(0.005)
    if not victims:
        return Outcome(kill.kind, last_step(run), 0, None)
    victim, step = victims[-1], last_step(run)
    try:
        os.kill(victim, signal.SIGSTOP if kill.kind == "stop" else signal.SIGKILL)
    except ProcessLookupError:
        return Outcome(kill.kind, step, 0, None)
    while kill.kind == "stop" and Path(f"/proc/{victim}").exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"a stopped rank is still there; log:\n{driver.log.read_text()[-4000:]}")
        time.sleep(0.05)
    if kill.kind in ("driver", "raylet"):
        try:
            driver.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise SystemExit(
                f"the driver hangs after its {kill.kind} was killed; log:\n{driver.log.read_text()[-4000:]}"
            ) from None
    return Outcome(kill.kind, step, victim, driver.process.poll())


def export_digest(run: Path) -> str:
    hasher = hashlib.sha256()
    for path in sorted((run / "export").rglob("*")):
        if path.is_file():
            hasher.update(path.name.encode() + path.read_bytes())
    return hasher.hexdigest()


def matrix(scratch: Path, kills: list[Kill], steps: int, options: list[str]) -> dict[str, Any]:
    from conftest import make_tiny_model

    from forge_ray.models.import_model import import_model
    from forge_ray.release import promotion
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

    os.environ |= {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    whole, broken = scratch / "whole", scratch / "broken"
    with Catalog.open(Store(str(whole))) as catalog:
        base = import_model(catalog, make_tiny_model(scratch / "tiny-llama"), "tiny-llama", licence="apache-2.0")
        promotion.promote(catalog, base.id, "tiny")
    forge("data", "prepare", RUN, *settings(steps, options), store=whole)
    shutil.copytree(whole, broken)
    record = forge("train", RUN, *settings(steps, options), store=whole)
    run = broken / "runs" / record["id"]

    began = time.monotonic()
    command = [*FORGE, "train", RUN, *settings(steps, options), "--store", str(broken)]
    driver = Driver(command, scratch / "driver.log")
    outcomes = [strike(driver, kill, run) for kill in kills]
    deadline = time.monotonic() + PATIENCE_S
    while driver.process.poll() is None or not (run / "result.json").exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"the run does not end; log:\n{driver.log.read_text()[-4000:]}")
        driver.revive(run / "result.json")
        time.sleep(0.05)
    forge("train", RUN, *settings(steps, options), store=broken)  # writes the record, should the last kill have prevented it
    audit = forge("audit", "data", record["id"], store=broken)
    attempts = json.loads((run / "result.json").read_text())["attempts"]
    return {
        "run": record["id"],
        "kills": [asdict(outcome) for outcome in outcomes],
        "starts_of_driver": driver.starts,
        "starts_of_workers": [attempt["first_step"] for attempt in attempts],
        "incidents": [item["kind"] for item in json.loads((run / "result.json").read_text())["incidents"]],
        "same_weights": export_digest(run) == export_digest(whole / "runs" / record["id"]),
        "same_order": audit["order_digest"] == record["order_digest"] == audit["recomputed_digest"],
        "steps_compared": audit["steps_compared"],
        "times_used": audit["times_used"],
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kinds", default=",".join(KINDS), help="victims, in turn")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--set", dest="options", action="append", default=[], help="e.g. train.zero_stage=3")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fk-", ignore_cleanup_errors=True) as scratch:
        kills = plan(options.kills, options.kinds.split(","), options.steps, options.seed)
        report = matrix(Path(scratch), kills, options.steps, options.options)
    if options.json:
        print(json.dumps(report))
    else:
        for number, kill in enumerate(report["kills"], 1):
            end = "the driver went on" if kill["driver_exit"] is None else f"the driver ended with {kill['driver_exit']}"
            note = f"pid {kill['pid']}, {end}" if kill["pid"] else "nobody left to kill: the run was over"
            print(f"{number:>3}  {kill['kind']:<11} at step {kill['at_step']:>3}  {note}")
        print(f"{report['starts_of_driver']} starts of the driver, workers began at steps {report['starts_of_workers']}")
        print(f"incidents: {', '.join(report['incidents']) or 'none'}")
        print(f"{report['steps_compared']} steps compared with the dataset, rows by times used: {report['times_used']}")
        print(f"weights equal: {report['same_weights']}, order equal: {report['same_order']}, {report['seconds']} s")
    sys.exit(0 if report["same_weights"] and report["same_order"] else 1)


if __name__ == "__main__":
    main()
