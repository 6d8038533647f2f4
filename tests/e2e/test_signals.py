"""Ctrl-C and SIGTERM end a command within ten seconds at every stage, with one line and what to do next."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from forge_ray.store.files import Store

pytestmark = [pytest.mark.e2e, pytest.mark.large]

WAIT_S = 400  # until a stage has begun
END_S = 10.0
GONE_S = 20.0  # until nothing of Ray is left
ENGINE = {"precision": "fp32", "page_size": 16, "num_blocks": 64, "max_batch_tokens": 128}
ENDLESS = {"epochs": 500, "global_batch": 4, "micro_batch_size": 1, "precision": "fp32"}


@dataclass(frozen=True)
class Running:
    """A command that runs: its log, its store, and the folder by which the processes of its Ray are recognised."""

    process: subprocess.Popen[str]
    log: Path
    store: Path
    tmp: str

    def has(self, pattern: str) -> bool:
        return any(path.stat().st_size for path in self.store.glob(pattern))

    def ray_processes(self) -> list[str]:
        """Titles of the processes of its Ray."""
        titles = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RAY_TMPDIR") == self.tmp and process.pid != self.process.pid:
                    titles.append(" ".join(process.cmdline())[:60] or process.name())
            except psutil.Error:
                continue
        return titles

    def works(self, name: str) -> bool:
        return any(title.startswith("ray::") and name in title for title in self.ray_processes())


STAGES: dict[str, tuple[tuple[str, ...], Callable[[Running], bool]]] = {
    "start": (("run", "RUN"), lambda running: True),
    "import": (("models", "import", "LARGE", "--alias", "large"), lambda running: running.has("models/.*importing*/*")),
    "prepare": (("data", "prepare", "RUN"), lambda running: running.has("work/data/*")),
    "train": (("train", "RUN"), lambda running: running.has("runs/*/attempts/*") and running.works("RayTrainWorker")),
    "train without Ray": (
        ("train", "RUN", "--set", "train.scaling.num_workers=0"),
        lambda running: running.has("runs/*/metrics.jsonl"),
    ),
    "evaluate": (
        ("eval", "--model", "tiny", "--data", "ROWS", "--set", f"eval.engine={json.dumps(ENGINE)}"),
        lambda running: running.works("evaluate"),
    ),
    "deploy": (("serve", "tiny"), lambda running: running.works("ServeReplica")),
    "serve": (("serve", "tiny"), lambda running: "until Ctrl-C" in running.log.read_text()),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A run file that does not end by itself, many rows, and a model whose import takes a while."""
    folder = tmp_path_factory.mktemp("signals")
    rows = folder / "rows.jsonl"
    with rows.open("w") as stream:
        for number in range(4000):
            messages = [
                {"role": "user", "content": f"How much is {number} and {number + 1}?"},
                {"role": "assistant", "content": f"It is {2 * number + 1}."},
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")
    run: dict[str, Any] = {
        "name": "endless",
        "base_model": "tiny",
        "data": {"sources": [{"path": str(rows)}], "sequence_length": 128},
        "train": {**ENDLESS, "scaling": {"num_workers": 2, "cpus_per_worker": 1}},
        "release": {"alias": "endless"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return {"RUN": str(folder / "run.yaml"), "ROWS": str(rows), "LARGE": str(large_model(folder / "large"))}


def large_model(folder: Path) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=4,
        num_attention_heads=16,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("stage", STAGES)
def test_a_signal_ends_every_stage(
    stage: str, number: signal.Signals, inputs: dict[str, str], store: Store, tmp_path: Path
) -> None:
    words, has_begun = STAGES[stage]
    shutil.copytree(store.uri, tmp_path / "store")
    tmp, log = tempfile.mkdtemp(prefix="fr-", dir="/tmp"), tmp_path / "log"  # short: Ray's socket paths have a limit
    command = [sys.executable, "-m", "forge_ray", *(inputs.get(word, word) for word in words)]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [*command, "--store", str(tmp_path / "store")],
            stdout=stream,
            stderr=stream,
            env=os.environ | {"RAY_TMPDIR": tmp},
            start_new_session=True,
            text=True,
        )
    running = Running(process, log, tmp_path / "store", tmp)
    try:
        began = time.monotonic()
        while not has_begun(running):
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < began + WAIT_S, log.read_text()[-3000:]
            time.sleep(0.1)
        time.sleep(1.0)
        before = len(log.read_text())
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        sent = time.monotonic()
        code = process.wait(60)
        seconds = time.monotonic() - sent
        text = log.read_text()[before:]
        while (left := running.ray_processes()) and time.monotonic() < sent + GONE_S:
            time.sleep(0.2)
        gone_s = time.monotonic() - sent
        print(f"\n{stage:18} {number.name:8} exit {code} in {seconds:.1f} s; Ray ended in {gone_s:.1f} s, left: {left}")
        print("    " + "\n    ".join(text.splitlines()[-6:]))
        assert "Traceback" not in text
        if stage == "serve":
            assert code == 0
            assert "error: " not in text
        else:
            assert code == 128 + number
            assert [number.name in line for line in text.splitlines() if line.startswith("error: ")] == [True]
            assert len([line for line in text.splitlines() if line.startswith("hint: ")]) == 1
        assert seconds < END_S
        assert not left
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        shutil.rmtree(tmp, ignore_errors=True)
