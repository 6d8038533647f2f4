"""Does the same training give the same bits, and what do deterministic kernels cost?

    python benchmarks/determinism.py                                          tiny, on the CPU
    python benchmarks/determinism.py --shape llama-3.2-1b --device cuda --precision bf16 --sequence-length 4096 \\
        --document-length 1024 --micro-batch-size 2

What it does not know goes to `train_step.py`. Each way is a process that trains `--repeat` times from the same start: `free`
is what `forge train` does, which sets nothing; `deterministic` is torch's own switch, with its warnings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from reports import last_object

WAYS: dict[str, list[str]] = {"free": [], "deterministic": ["--deterministic"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=2)
    options, others = parser.parse_known_args()
    report: dict[str, Any] = {}
    for way, flags in WAYS.items():
        command = [sys.executable, str(Path(__file__).with_name("train_step.py")), "--repeat", str(options.repeat)]
        done = subprocess.run([*command, *others, *flags], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{way}: train_step.py ended with {done.returncode}")
        run = last_object(done.stdout)
        report[way] = {
            "shape": run["shape"],
            "method": run["method"],
            "bits_equal": len(set(run["weights_sha256"])) == 1,
            "tokens_per_s": run["tokens_per_s"],
            "last_loss": run["losses"][-1],
            "weights_sha256": run["weights_sha256"],
            "notes": run["notes"],
        }
    report["deterministic_over_free"] = report["deterministic"]["tokens_per_s"] / report["free"]["tokens_per_s"]
    print(json.dumps(report, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
