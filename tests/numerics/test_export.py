"""What a run hands on: plain Hugging Face or PEFT safetensors that others load and that compute the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Jobs, Run, exported, largest_difference
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from forge_ray.models.import_model import refuse_unsafe
from forge_ray.store.files import MANIFEST, verify_files
from forge_ray.train.job import TrainJob

pytestmark = pytest.mark.numerics
LORA = {"r": 4, "alpha": 32}
# large, so that the adapter is far from its start at zero; a gradient that is nothing but rounding must not make a step
OPTIMIZER = {"lr": 1e-2, "eps": 1e-3}


def export_of(job: TrainJob) -> Path:
    return job.store.local(f"runs/{job.run}/export")


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.tensor([[10, 11, 12, 13, 40, 42, 44]])).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def test_adapter_and_merged_exports_agree(jobs: Jobs, run: Run) -> None:
    adapter = jobs("export-adapter", zero_stage=2, adapter=LORA, optimizer=OPTIMIZER, max_steps=2)
    merged = jobs("export-merged", zero_stage=3, adapter=LORA, optimizer=OPTIMIZER, max_steps=2, export="merged")
    run(adapter, merged)
    base = adapter.store.local(f"models/{adapter.base.id}")

    files = {path.name for path in export_of(adapter).iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", MANIFEST}
    settings = json.loads((export_of(adapter) / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == adapter.base.id
    assert settings["inference_mode"] is True
    assert (settings["r"], settings["lora_alpha"]) == (4, 32)

    before = logits(load(base))
    with_adapter = logits(PeftModel.from_pretrained(load(base), str(export_of(adapter))))
    assert float((with_adapter - before).abs().max()) > 0.1  # it learnt something
    torch.testing.assert_close(logits(load(export_of(merged))), with_adapter, rtol=1e-5, atol=2e-5)
    refuse_unsafe(export_of(merged))


def test_full_export_is_a_plain_transformers_model(jobs: Jobs, run: Run, tmp_path: Path) -> None:
    """It loads, computes what was trained, is as large as the base, and passes the import rules; tied weights or not."""
    version = tied_version(jobs, tmp_path)
    untied = [jobs(f"export-{stage}", zero_stage=stage, optimizer=OPTIMIZER, max_steps=2) for stage in (0, 3)]
    tied = [jobs.on_base(jobs(f"tied-{stage}", zero_stage=stage, optimizer=OPTIMIZER), version) for stage in (0, 2, 3)]
    alone = jobs.on_base(jobs("tied-torch", engine="torch", zero_stage=0, optimizer=OPTIMIZER), version)
    run(*untied, *tied, ranks=2)
    run(alone)
    for job in (*untied, *tied, alone):
        check_full_export(job, is_tied=job.base == version)
    for job in tied:  # a shared matrix gets both of its gradients, partitioned or not
        assert largest_difference(exported(job), exported(alone)) < 1e-5


def check_full_export(job: TrainJob, is_tied: bool) -> None:
    folder, base = export_of(job), job.store.local(f"models/{job.base.id}")
    refuse_unsafe(folder)
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]
    verify_files(folder, job.store.files(f"runs/{job.run}/export"))
    before, after = load(base), load(folder)
    assert [n for n, _ in before.named_parameters()] == [n for n, _ in after.named_parameters()]
    assert (after.get_output_embeddings().weight is after.get_input_embeddings().weight) == is_tied
    assert float((logits(after) - logits(before)).abs().max()) > 0.1
    sizes = [(path / "model.safetensors").stat().st_size for path in (base, folder)]
    assert abs(sizes[0] - sizes[1]) < 4096
    one, other = (AutoTokenizer.from_pretrained(path, local_files_only=True) for path in (base, folder))
    text = "How do I reset my password?"
    assert one(text)["input_ids"] == other(text)["input_ids"]
    assert one.chat_template == other.chat_template


def tied_version(jobs: Jobs, tmp_path: Path) -> Any:
    """The tiny model with one matrix for input and output embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from forge_ray.models.import_model import import_model
    from forge_ray.store.catalog import Catalog

    with Catalog.open(jobs.store) as catalog:
        base = jobs.store.local(f"models/{catalog.model('tiny').id}")
        settings = LlamaConfig.from_pretrained(base)
        settings.tie_word_embeddings = True
        torch.manual_seed(1)
        folder = tmp_path / "tied-llama"
        LlamaForCausalLM(settings).save_pretrained(folder)
        AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(folder)
        return import_model(catalog, folder, "tied-llama", licence="apache-2.0")
