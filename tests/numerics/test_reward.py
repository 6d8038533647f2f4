"""A reward model: its loss on pairs, what it exports, and the guarantees of the loop."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Jobs, Run, export_digest, exported, first_steps, largest_difference, losses, pairs
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from forge_ray.config.classify import REWARD
from forge_ray.errors import TrainingError
from forge_ray.models.class_head import targets_of
from forge_ray.records import DatasetManifest
from forge_ray.train.job import TrainJob
from forge_ray.train.methods.preference import num_pairs
from forge_ray.train.methods.reward import last_tokens, loss
from forge_ray.train.preflight import refuse_without_rows

pytestmark = pytest.mark.numerics
TORCH: dict[str, Any] = {"engine": "torch", "zero_stage": 0, "optimizer": {"lr": 1e-3, "eps": 1e-6}}
ZERO: dict[str, Any] = {"engine": "deepspeed", "zero_stage": 3, "optimizer": {"lr": 1e-3, "eps": 1e-6}}
LORA: dict[str, Any] = {"adapter": {"r": 4, "alpha": 8, "target_modules": "all-linear"}}
KIND = {"kind": "reward"}
PAD = 7


def job_of(jobs: Jobs, judged: dict[str, DatasetManifest], run: str, **settings: Any) -> TrainJob:
    return jobs.on(jobs(run, **{**TORCH, **settings}, method=KIND), judged["preference"])


def test_loss_and_gradient_are_those_of_bradley_and_terry() -> None:
    """Two rows, of one and of two pairs, with padding between; one document ends in the pad token, which is not read."""
    segments = torch.tensor([[1, 1, 2, 2, 2, 0, 0, 0], [1, 1, 2, 3, 3, 3, 4, 4]])
    ids = torch.tensor([[3, 4, 5, 6, PAD, PAD, PAD, PAD], [1, 2, 3, 4, 5, 6, 8, 9]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 1, 2, 0, 1]])
    batch = {"input_ids": ids, "segment_ids": segments, "position_ids": positions, "loss_mask": (segments > 0).long()}
    assert last_tokens(PAD, batch).tolist() == [1, 3, 8 + 1, 8 + 2, 8 + 5, 8 + 7]
    rewards = torch.randn(16, 1, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def forward(**inputs: Any) -> Any:
        return SimpleNamespace(logits=rewards[None, inputs["logits_to_keep"]])

    sums = loss(PAD, forward, batch)
    of = rewards[:, 0]
    gaps = torch.stack([of[1] - of[3], of[9] - of[10], of[13] - of[15]])
    expected = -F.logsigmoid(gaps).sum()
    assert float(sums.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert sums.fetch()[1] == {
        "pair_accuracy": float((gaps > 0).sum()),
        "reward_margin": pytest.approx(float(gaps.detach().sum()), rel=1e-5),
    }
    assert int(num_pairs(batch)) == 3
    (ours,), (theirs,) = torch.autograd.grad(sums.loss, rewards, retain_graph=True), torch.autograd.grad(expected, rewards)
    assert torch.allclose(ours, theirs, atol=1e-7)
    blank = {name: torch.zeros_like(value[1:]) for name, value in batch.items()}
    nothing = loss(PAD, forward, blank)
    assert nothing.fetch() == (0.0, {"pair_accuracy": 0.0, "reward_margin": 0.0})
    assert int(num_pairs(blank)) == 0


@pytest.mark.parametrize("settings", [pytest.param({}, id="full"), pytest.param(LORA, id="lora", marks=pytest.mark.large)])
def test_workers_passes_and_zero_change_nothing(
    jobs: Jobs, judged: dict[str, DatasetManifest], run: Run, settings: dict[str, Any]
) -> None:
    kind, looking = "lora" if settings else "full", settings | {"validation": {"every_steps": 2, "max_rows": 3}}
    one = job_of(jobs, judged, f"reward-one-{kind}", **looking)
    three = job_of(jobs, judged, f"reward-three-{kind}", **looking, micro_batch_size=3)
    two = job_of(jobs, judged, f"reward-two-{kind}", **looking)
    sharded = job_of(jobs, judged, f"reward-zero-{kind}", **looking | ZERO)
    run(one, three)
    run(two, ranks=2)
    run(sharded, ranks=2)
    for other in (three, two, sharded):
        for name in ("loss", "pair_accuracy", "reward_margin", "validation_loss", "validation_pair_accuracy"):
            assert losses(other, name) == pytest.approx(losses(one, name), rel=1e-3, abs=1e-4), (other.run, name)
        assert largest_difference(exported(other), exported(one)) < 1e-4
    assert len(set(losses(one))) == 4


def test_killed_and_resumed_equals_uninterrupted(jobs: Jobs, judged: dict[str, DatasetManifest], run: Run) -> None:
    saving = {"checkpoint": {"every_steps": 2}, "max_steps": 5}
    whole, killed = (job_of(jobs, judged, f"reward-{name}", **saving) for name in ("whole", "killed"))
    run(whole, ranks=2)
    run(killed, ranks=2, kill_at=4, expect=23)
    run(killed, ranks=2)
    assert first_steps(killed) == [0, 2]
    assert export_digest(killed) == export_digest(whole)


@pytest.mark.parametrize("kind", ["full", pytest.param("adapter", marks=pytest.mark.large), "merged"])
def test_export_gives_the_rewards_that_the_run_measured(
    jobs: Jobs, judged: dict[str, DatasetManifest], run: Run, kind: str
) -> None:
    """By transformers' own class, one conversation a pass: the validation loss of the run, and the preference learned."""
    settings: dict[str, Any] = {} if kind == "full" else LORA | {"export": kind}
    learning = {"max_steps": 30, "optimizer": {"lr": 3e-3}, "validation": {"max_rows": 64}}
    job = job_of(jobs, judged, f"reward-export-{kind}", **settings | learning)
    run(job)
    folder = job.store.local(f"runs/{job.run}/export")
    assert targets_of(folder) == (REWARD,)
    if kind == "adapter":
        plain = AutoModelForSequenceClassification.from_pretrained(job.store.local(f"models/{job.base.id}"), num_labels=1)
        model: Any = PeftModel.from_pretrained(plain, str(folder))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert (model.config.num_labels, model.config.id2label) == (1, {0: "reward"})
    model.eval()
    with torch.no_grad():
        rewards = torch.stack([model(input_ids=torch.tensor([one.ids])).logits[0, 0] for one in pairs(1, 8)])
    gaps = rewards[0::2] - rewards[1::2]
    assert float(-F.logsigmoid(gaps).mean()) == pytest.approx(losses(job, "validation_loss")[-1], rel=1e-4)
    assert float((gaps > 0).float().mean()) == pytest.approx(losses(job, "validation_pair_accuracy")[-1])
    assert losses(job)[-1] < losses(job)[0]


def test_rows_that_are_no_pairs_are_refused(jobs: Jobs, judged: dict[str, DatasetManifest]) -> None:
    job = jobs.on(jobs("reward-refused", **TORCH, method=KIND), judged["feedback"])
    with pytest.raises(TrainingError, match=r"train\.method=reward takes preference records"):
        refuse_without_rows(job.config, job.store, job.dataset)
