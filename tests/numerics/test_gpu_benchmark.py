"""The benchmark of a GPU, on the CPU at toy size: where a GPU is lent for minutes, the script is not what fails."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # behind the others: one of its files is named as a module of Python is
gpu, older_torch, random_models = map(importlib.import_module, ("gpu", "older_torch", "random_models"))

pytestmark = pytest.mark.numerics
ABSENT = ("ray", "deepspeed", "trl", "vllm", "bitsandbytes")


def lines_of(folder: Path, *flags: str, absent: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What the command writes where these packages cannot be imported."""
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({absent}))\n")
    out = folder / "out.jsonl"
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--out", str(out), *flags]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_parts_run_without_what_a_gpu_machine_may_lack_and_name_it(tmp_path: Path) -> None:
    flags = ("--parts", "8b lora chats,nf4,vllm")
    host, *results = lines_of(tmp_path, *flags, absent=ABSENT)
    assert host["machine"]["device"] == "CPU"
    by_part = {result["part"]: result for result in results}
    missing = {name: result["reason"] for name, result in by_part.items() if result["status"] == "skipped"}
    assert missing == {
        "llama-3.1-8b lora chats trl": "not installed: trl",
        "llama-3.1-8b qlora nf4 chats": "not installed: bitsandbytes",
        "generation vllm": "not installed: vllm",
    }
    (ran,) = (result for result in results if result["part"] not in missing)
    assert ran["status"] == "ok", ran
    assert ran["report"]["memory"]["ratio"] > 0
    assert ran["report"]["losses"][1] < ran["report"]["losses"][0]


@pytest.mark.large
def test_every_part_runs(tmp_path: Path) -> None:
    _, *results = lines_of(tmp_path, absent=("bitsandbytes",))
    assert {result["part"]: result for result in results if result["status"] == "failed"} == {}
    reports = {result["part"]: result["report"] for result in results if result["status"] == "ok"}
    assert reports["determinism"]["free"]["bits_equal"]
    assert set(reports["generation transformers"]["requests"]) == {"1", "16", "64"}
    counts = reports["tests of the GPU"]["counts"]
    assert torch.cuda.is_available() or set(counts) == {"skipped"}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import time; print('begun'); time.sleep(60)", "cut off after 1 s"),
        ("print('begun'); raise SystemExit('no memory is left')", "ended with 1 and printed no report"),
    ],
)
def test_part_that_fails_or_is_late_is_recorded(tmp_path: Path, source: str, reason: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu, "LEAST_S", 0)
    (tmp_path / "part.py").write_text(source)
    begun = time.monotonic()
    result = gpu.run(gpu.Part("one", str(tmp_path / "part.py"), (), ()), "cpu", 1)
    assert time.monotonic() - begun < 30
    assert (result["status"], result["reason"]) == ("failed", reason)
    assert result["log"] == ["begun"] if "sleep" in source else ["no memory is left"]
    assert gpu.run(gpu.Part("one", "part.py", (), ()), "cpu", -1)["reason"] == "no time was left"


def test_outcomes_of_pytest_are_read() -> None:
    printed = (
        "gpu/a.py::test_x[1] PASSED [ 50%]\ngpu/a.py::test_y FAILED [100%]\n"
        "FAILED gpu/a.py::test_y - assert 1 == 2\nERROR gpu/b.py - No module named 'ray'\n"
    )
    assert gpu.tests_of(printed) == {
        "counts": {"passed": 1, "failed": 1, "error": 1},
        "not_passed": {"gpu/a.py::test_y": "assert 1 == 2", "gpu/b.py": "No module named 'ray'"},
    }
    with pytest.raises(ValueError, match="no test"):
        gpu.tests_of("no tests ran in 0.01s")


def test_grouped_heads_of_an_older_torch_are_repeated() -> None:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, scale: float) -> torch.Tensor:
        return torch.einsum("nhd,mhd,mhe->nhe", query, key, value) * scale

    query, key, value = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    grouped = older_torch.repeating(attend)(query, key, value, scale=2.0, enable_gqa=True)
    for head in range(4):
        one = (query[:, [head]], key[:, [head // 2]], value[:, [head // 2]])
        torch.testing.assert_close(grouped[:, [head]], attend(*one, scale=2.0))


def test_flops_of_a_true_shape_are_counted_by_hand() -> None:
    counted = random_models.flops(random_models.plan_model(random_models.configuration("llama-3.1-8b")), 1024)
    hidden, wide, layers, keys, vocabulary = 4096, 14336, 32, 1024, 128256
    weights = layers * (hidden * (2 * hidden + 2 * keys) + 3 * hidden * wide)
    assert (counted.layers, counted.output) == (2 * weights, 2 * hidden * vocabulary)
    assert counted.attention == 4 * layers * hidden * 512
    assert counted.step(True, 0.5) == 2 * (counted.layers + counted.output / 2 + counted.attention)


def test_layers_that_fit_are_as_many_as_the_estimate_says() -> None:
    flags = {"shape": "tiny-mixture", "precision": "bf16", "device": "cpu", "lora": 4, "experts": True, "quantize": "none"}
    sizes = {"micro_batch_size": 1, "sequence_length": 64, "trained_share": 0.5, "activation_checkpointing": True}
    options = argparse.Namespace(**flags, **sizes)

    def needs(layers: int) -> int:
        shape = random_models.configuration("tiny-mixture", layers)
        return random_models.predicted(random_models.plan_model(shape), options, 0.5).total

    assert random_models.fitting_layers(options, needs(1)) == 1
    assert random_models.fitting_layers(options, needs(2)) == 2
    with pytest.raises(SystemExit, match="one layer needs"):
        random_models.fitting_layers(options, needs(1) - 1)
