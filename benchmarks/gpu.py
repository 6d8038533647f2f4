"""Every figure of one GPU with one command: training, memory against `forge plan`, determinism, generation the GPU's tests.

    python benchmarks/gpu.py --minutes 9 --out FILE         on a machine with a GPU, torch, transformers and peft
    python benchmarks/gpu.py --device cpu --tiny            every part at toy size, which shows that the script works

No network, no data, no weights. The parts run in order of worth, each in a process of its own, with the time that is left
as its limit. Each result is a line of FILE as soon as it is there, so what is cut off keeps the rest: `ok` with its report,
`failed` with the end of what it printed, `skipped` with the reason, such as a package that is not installed. A table ends
it.

Peers: the rates that NVIDIA publishes for NeMo Automodel on one H100 (LoRA, bf16, full rows of 4,096 tokens, micro-batch 2)
are set against the same workload here, the part `peer's rows`; the others train chats of 1,024 tokens, half of each.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports import last_object

ROOT = Path(__file__).parents[1]
# tokens/s of NVIDIA NeMo Automodel on one H100: docs.nvidia.com/nemo/automodel/performance/performance-summary
PEER = {"llama-3.1-8b": 12473, "qwen2.5-7b": 14110}
GOAL, WITHIN = 1.15, 0.15  # of the peer's rate; of the measured memory
LEAST_S = 5  # a part that has less is not started
RESULT = re.compile(r"^(\S+::\S.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b", re.MULTILINE)
SUMMARY = re.compile(r"^(FAILED|ERROR) (\S+)(?: - (.*))?$", re.MULTILINE)


@dataclass(frozen=True)
class Part:
    """`script` is a file of this folder, or a module of Python's; `needs` are packages without which it is skipped."""

    name: str
    script: str
    flags: tuple[str, ...]
    needs: tuple[str, ...] = ("torch", "transformers", "peft", "pydantic")


def steps(*flags: str) -> tuple[str, ...]:
    return ("--precision", "bf16", "--sequence-length", "4096", "--micro-batch-size", "2", "--steps", "5", *flags)


def all_parts() -> Iterator[Part]:
    full = ("--document-length", "4096", "--trained-share", "1")
    chats = ("--document-length", "1024")
    lora = ("--lora", "16")
    parts = {}
    for shape in PEER:
        parts[shape] = [
            Part(f"{shape} lora peer's rows", "train_step.py", steps("--shape", shape, *lora, *full, "--compile")),
            Part(f"{shape} lora chats compiled", "train_step.py", steps("--shape", shape, *lora, *chats, "--compile")),
            Part(f"{shape} lora chats", "train_step.py", steps("--shape", shape, *lora, *chats)),
            Part(
                f"{shape} lora chats trl",
                "train_step.py",
                steps("--shape", shape, *lora, *chats, "--method", "trl"),
                ("torch", "transformers", "peft", "pydantic", "trl", "datasets"),
            ),
        ]
    yield from (part for several in zip(*parts.values(), strict=True) for part in several)
    small = ("--shape", "llama-3.2-1b", *chats)
    yield Part("llama-3.2-1b full chats compiled", "train_step.py", steps(*small, "--compile"))
    quantised = steps("--shape", "llama-3.1-8b", *lora, *chats, "--quantize", "nf4")
    needs = ("torch", "transformers", "peft", "pydantic", "bitsandbytes")
    yield Part("llama-3.1-8b qlora nf4 chats", "train_step.py", quantised, needs)
    mixture = ("--shape", "mistral-small-4", "--layers", "fit", *lora, "--experts", "--activation-checkpointing")
    yield Part("mistral-small-4 lora on experts", "train_step.py", steps(*mixture, *chats, "--steps", "4"))
    yield Part("determinism", "determinism.py", steps(*small, "--steps", "4"))
    generation = ("--shape", "llama-3.1-8b", "--precision", "bf16")
    yield Part("generation transformers", "decode.py", generation)
    yield Part("generation vllm", "decode.py", (*generation, "--engine", "vllm"), ("torch", "transformers", "vllm"))
    yield Part("tests of the GPU", "pytest", ("tests/gpu",), ("pytest", "torch", "transformers"))


TINY: dict[str, Callable[[str], str]] = {
    "--shape": lambda shape: "tiny-mixture" if shape == "mistral-small-4" else "tiny",
    "--sequence-length": lambda _: "64",
    "--document-length": lambda length: str(int(length) // 64),
    "--layers": lambda _: "2",
    "--steps": lambda _: "2",
}
TINY_OF = {  # what each script takes besides
    "train_step.py": ("--steps", "2", "--warmup", "1", "--num-micro-batches", "2"),
    "determinism.py": ("--steps", "2", "--warmup", "1", "--num-micro-batches", "2"),
    "decode.py": ("--prompt", "16", "--new-tokens", "4", "--rounds", "1"),
}


def tiny(part: Part) -> Part:
    """The same part with toy values; compilation takes a minute of a CPU and is left out."""
    values = list(part.flags)
    for at, flag in enumerate(values[:-1]):
        if flag in TINY:
            values[at + 1] = TINY[flag](values[at + 1])
    values = [flag for flag in values if flag != "--compile"]
    return Part(part.name, part.script, (*values, *TINY_OF.get(part.script, ())), part.needs)


def chosen(options: argparse.Namespace) -> list[Part]:
    """In order; at toy size what has become the same as an earlier part is left out."""
    parts = [part for part in all_parts() if any(one in part.name for one in options.parts.split(","))]
    if not options.tiny:
        return parts
    distinct = {(part.script, part.flags): part for part in reversed([tiny(part) for part in parts])}
    return [part for part in (tiny(part) for part in parts) if distinct[part.script, part.flags] == part]


def is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def command_of(part: Part, device: str) -> list[str]:
    if part.script == "pytest":
        return [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations=0", *part.flags]
    return [sys.executable, str(ROOT / "benchmarks" / part.script), "--device", device, *part.flags]


def run(part: Part, device: str, limit: float) -> dict[str, Any]:
    """What the part came to, in at most `limit` seconds."""
    missing = [package for package in part.needs if not is_there(package)]
    if missing:
        return {"part": part.name, "status": "skipped", "reason": f"not installed: {', '.join(missing)}"}
    if limit < LEAST_S:
        return {"part": part.name, "status": "skipped", "reason": "no time was left"}
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    begun = time.monotonic()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command_of(part, device), cwd=ROOT, env=environment, stdout=out, stderr=log, start_new_session=True
        )
        late = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            end(process)
        printed, logged = read(out), read(log)
    result: dict[str, Any] = {"part": part.name, "status": "ok", "seconds": round(time.monotonic() - begun, 1)}
    result["command"] = " ".join(["python", *command_of(part, device)[1:]]).replace(f"{ROOT}/", "")
    problem = f"cut off after {limit:.0f} s" if late else ""
    try:
        result["report"] = tests_of(printed) if part.script == "pytest" else last_object(printed)
    except ValueError:
        problem = problem or f"ended with {process.returncode} and printed no report"
    if process.returncode and not problem:
        problem = f"ended with {process.returncode}"
    if problem:
        tail = [line for line in (logged.strip() or printed.strip()).splitlines() if line.strip()][-12:]
        result |= {"status": "failed", "reason": problem, "log": tail}
    return result


def end(process: subprocess.Popen[bytes]) -> None:
    """The part and whatever it started: they share a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read(file: Any) -> str:
    file.seek(0)
    return str(file.read())


def tests_of(printed: str) -> dict[str, Any]:
    """Counts by outcome, and the tests that failed with the reason, of pytest's `-v`; also of a run that was cut off."""
    outcomes = {name: outcome.lower() for name, outcome in RESULT.findall(printed)}
    reasons = {name: (outcome.lower(), reason) for outcome, name, reason in SUMMARY.findall(printed)}
    for name, (outcome, _) in reasons.items():  # a file that cannot be imported has a line there alone
        outcomes.setdefault(name, outcome)
    if not outcomes:
        raise ValueError("pytest ran no test")
    bad = {name: reasons.get(name, ("", ""))[1] for name, outcome in outcomes.items() if outcome in ("failed", "error")}
    return {"counts": dict(Counter(outcomes.values())), "not_passed": bad}


def machine(device: str) -> dict[str, Any]:
    """What the figures are of; asked in a process of its own, since this one imports nothing of theirs."""
    code = (
        "import json, os, platform, sys, torch\n"
        "on = sys.argv[1] == 'cuda'\n"
        "print(json.dumps({'device': torch.cuda.get_device_name() if on else 'CPU',"
        " 'gpu_gib': torch.cuda.mem_get_info()[1] / 2**30 if on else None, 'torch': torch.__version__,"
        " 'cuda': torch.version.cuda, 'cpus': os.cpu_count(), 'python': platform.python_version()}))"
    )
    done = subprocess.run([sys.executable, "-c", code, device], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: torch sees no {device} here:\n{done.stderr.strip()[-800:]}")
    return last_object(done.stdout)


def summary(result: dict[str, Any]) -> str:
    """One line of the table."""
    report = result.get("report", {})
    if result["status"] != "ok" and "counts" not in report:
        return f"{result['status']}: {result['reason']}"
    if "counts" in report:
        counts = ", ".join(f"{number} {outcome}" for outcome, number in report["counts"].items())
        return "; ".join([counts, *report["not_passed"]])
    if "requests" in report:
        rates = []
        for count, one in report["requests"].items():
            share = f", {one['share_of_bandwidth']:.0%} of the bandwidth" if one["share_of_bandwidth"] else ""
            decode = f"{one['decode_tokens_per_s']:,.0f}" if one["decode_tokens_per_s"] else "?"
            rates.append(f"{count}: {one['prefill_tokens_per_s']:,.0f} / {decode} tokens/s{share}")
        return "prefill / decode at " + "; ".join(rates)
    if "free" in report:
        ways = [f"{way}: bits {'equal' if report[way]['bits_equal'] else 'DIFFER'}" for way in ("free", "deterministic")]
        return "; ".join([*ways, f"deterministic / free {report['deterministic_over_free']:.2f}"])
    texts = [f"{report['tokens_per_s']:,.0f} tokens/s"]
    if report["mfu"]:
        texts.append(f"MFU {report['mfu']:.1%}")
    texts.append(f"peak {report['peak_memory_gib']:.1f} GiB")
    if "memory" in report and not report["shape"].startswith("tiny"):
        ratio = report["memory"]["ratio"]
        verdict = "within" if abs(ratio - 1) <= WITHIN else "NOT within"
        texts.append(f"predicted {report['memory']['predicted_gib']:.1f}, {ratio:.2f}, {verdict} {WITHIN:.0%}")
    if "of_peer" in result:
        texts.append(f"{result['of_peer']:.2f} of Automodel's on an H100 (goal {GOAL})")
    if "of_trl" in result:
        texts.append(f"{result['of_trl']:.2f} of TRL's")
    return ", ".join(texts)


def compared(result: dict[str, Any], results: list[dict[str, Any]], is_tiny: bool) -> dict[str, Any]:
    """With the ratio to a peer's figure, published or of an earlier part."""
    if result["status"] != "ok" or is_tiny:
        return result
    shape, _, rows = result["part"].partition(" ")
    if rows == "lora peer's rows":
        return result | {"of_peer": result["report"]["tokens_per_s"] / PEER[shape]}
    if rows == "lora chats trl":
        ours = next((one for one in results if one["part"] == f"{shape} lora chats" and one["status"] == "ok"), None)
        if ours:
            return result | {"of_trl": ours["report"]["tokens_per_s"] / result["report"]["tokens_per_s"]}
    return result


def append(path: str, line: dict[str, Any]) -> None:
    """On disk when this returns."""
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together")
    parser.add_argument("--out", default="", help="JSON lines, a result a line; what is there is replaced")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="every part at toy size")
    parser.add_argument("--parts", default="", help="only those whose name holds one of these, separated by commas")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON object in place of the table")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        parser.error("true shapes take hours on a CPU; add --tiny")
    until = time.monotonic() + 60 * options.minutes
    parts = chosen(options)
    if not parts:
        parser.error(f"--parts {options.parts} names none of: {'; '.join(part.name for part in all_parts())}")
    host = machine(options.device)
    if options.out:
        Path(options.out).unlink(missing_ok=True)
    append(options.out, {"machine": host, "tiny": options.tiny})
    results: list[dict[str, Any]] = []
    for part in parts:
        result = compared(run(part, options.device, until - time.monotonic()), results, options.tiny)
        results.append(result)
        append(options.out, result)
        print(f"{part.name}: {summary(result)}", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps({"machine": host, "tiny": options.tiny, "results": results}, ensure_ascii=False))
        return
    print(f"{host['device']}, torch {host['torch']}, CUDA {host['cuda']}")
    print("toy size: it shows that the parts run, and nothing else\n" if options.tiny else "")
    print("| part | s | figures |\n| --- | ---: | --- |")
    for result in results:
        print(f"| {result['part']} | {result.get('seconds', '')} | {summary(result)} |")


if __name__ == "__main__":
    main()
