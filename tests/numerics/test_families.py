"""Every family of models trains, keeps packed documents apart, and exports what computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Jobs, Run, losses
from families import FAMILIES, version
from peft import PeftModel
from test_loss import batch_of, loss_of, some_documents

from forge_ray.inference.load import load_model
from forge_ray.models.architecture import open_model, outside_text
from forge_ray.train.job import TrainJob
from forge_ray.train.model import merge_adapter

pytestmark = pytest.mark.numerics
TORCH = {"engine": "torch", "zero_stage": 0, "optimizer": {"lr": 1e-2}, "max_steps": 2, "global_batch": 2}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MOE = [family for family in FAMILIES if family.startswith(("mixtral", "qwen3-moe", "mistral4"))]
IDS = torch.tensor([[10, 11, 12, 13, 40, 42, 44]])


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(IDS, use_cache=False).logits


def export_of(job: TrainJob) -> Path:
    return job.store.local(f"runs/{job.run}/export")


def load(folder: Path) -> Any:
    return open_model(folder, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_and_exports(family: str, jobs: Jobs, run: Run, tmp_path: Path) -> None:
    base = version(family, jobs, tmp_path / family)

    def job(name: str, **settings: Any) -> TrainJob:
        return jobs.on_base(jobs(f"{family}-{name}", **TORCH | settings), base)

    lora = {"r": 4, "alpha": 32} | ({"target_parameters": EXPERTS} if family in MOE else {})
    adapters = [job("lora", adapter=lora)]
    if method := {"llama": "rslora", "mistral4": "dora"}.get(family):
        adapters.append(job(method, adapter={"r": 4, "alpha": 32, "method": method}))
    full = job("full")
    run(*adapters, full)
    before = load(folder := jobs.store.local(f"models/{base.id}"))
    untrained = logits(before)

    _check_isolation(before)
    for one in adapters:
        with_adapter = logits(PeftModel.from_pretrained(load(folder), str(export_of(one))))
        assert float((with_adapter - untrained).abs().max()) > 0.05  # it learnt something
        near = {"rtol": 1e-4, "atol": 1e-5 * float(with_adapter.abs().max())}
        merge_adapter(folder, export_of(one), tmp_path / one.run)
        torch.testing.assert_close(logits(load(tmp_path / one.run)), with_adapter, **near)
        served = load_model(folder, export_of(one), torch.float32, torch.device("cpu"))
        torch.testing.assert_close(logits(served), with_adapter, **near)
    assert losses(full)[0] == pytest.approx(losses(adapters[0])[0], rel=1e-5)  # an adapter starts at nothing
    after = load(export_of(full))
    assert type(after) is type(before)
    assert float((logits(after) - untrained).abs().max()) > 0.05
    kept = outside_text(before)
    for (name, one), (_, same) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        if kept and name.startswith(kept):  # what sees is as it was
            assert torch.equal(one, same), name
    assert sum(not torch.equal(one, same) for one, same in zip(before.parameters(), after.parameters(), strict=True)) > 5


def _check_isolation(model: Any) -> None:
    """The loss and gradients of a packed row are those of its documents alone."""
    chosen = some_documents()
    batch = batch_of(chosen, sum(len(document.ids) for document in chosen) + 5)
    packed = loss_of(model.train(), batch)[0]
    alone = [loss_of(model, batch_of([document], len(document.ids)))[0] for document in chosen]
    assert float(packed.detach()) == pytest.approx(sum(float(loss.detach()) for loss in alone), rel=1e-5)
    leaks = loss_of(model, batch, position_ids=None)[0]
    assert abs(float(leaks.detach()) - float(packed.detach())) > 1e-3 * float(packed.detach())
