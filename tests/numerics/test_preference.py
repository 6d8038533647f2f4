"""Training on judged answers: each loss, its reference, and the guarantees of the loop."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from conftest import Jobs, Run, export_digest, exported, first_steps, largest_difference, losses
from torch import Tensor

from forge_ray.config.base import parse
from forge_ray.config.method import OF_ANSWERS, OF_PAIRS, Preference
from forge_ray.config.train import TrainConfig
from forge_ray.data.dataset.stream import Rows
from forge_ray.errors import ConfigError, DataError, TrainingError
from forge_ray.records import DatasetManifest
from forge_ray.store import paths
from forge_ray.store.files import Store
from forge_ray.train import attention
from forge_ray.train.follow import PROGRESS
from forge_ray.train.job import TrainJob
from forge_ray.train.loss import segment_sums, token_logps
from forge_ray.train.measure import PIECE_ROWS, document_logps
from forge_ray.train.method import STEP_MEAN
from forge_ray.train.methods.preference import judged_loss, num_documents, num_pairs, pair_loss, preference, read_grades
from forge_ray.train.mismatched import moved_answers
from forge_ray.train.model import load_for_training
from forge_ray.train.preflight import refuse_without_rows
from forge_ray.train.reference import Reference, read_document_logps
from forge_ray.train.reference_files import parquet, pieces
from forge_ray.train.shared_prompt import shared_prompts
from forge_ray.train.step import averages

pytestmark = pytest.mark.numerics
TORCH: dict[str, Any] = {"engine": "torch", "zero_stage": 0, "optimizer": {"lr": 1e-3, "eps": 1e-6}}
LORA: dict[str, Any] = {"adapter": {"r": 4, "alpha": 8, "target_modules": "all-linear"}}
VOCABULARY = 20
SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.3, "label_smoothing": 0.1, "sft_weight": 0.2},
    "robust": {"beta": 0.3, "label_smoothing": 0.2},
    "ipo": {"beta": 0.5},
    "hinge": {"beta": 0.7},
    "offset": {"beta": 0.3, "offset_weight": 0.5},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "orpo": {"beta": 0.2},
    "kto": {"beta": 0.3, "good_weight": 3.0, "bad_weight": 0.1},
    "apo_zero": {"beta": 0.3, "good_weight": 1.5, "bad_weight": 0.5},
}
REFERENCE_POINT = 1.7  # z0 of the comparison with the papers


def of_kind(kind: str) -> Preference:
    return parse(Preference, {"kind": kind, **SETTINGS[kind]})


def two_pairs() -> tuple[dict[str, Tensor], Tensor]:
    """One row of two pairs and padding, and the logits of its tokens."""
    lengths = [5, 4, 6, 7]
    segments = torch.cat([torch.full((size,), place + 1) for place, size in enumerate(lengths)] + [torch.zeros(2)]).long()
    mask = torch.cat([torch.tensor([0, 0] + [1] * (size - 2)) for size in lengths] + [torch.zeros(2)]).long()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (24,), generator=generator)
    batch = {
        "input_ids": ids[None],
        "segment_ids": segments[None],
        "loss_mask": mask[None],
        "position_ids": torch.cat([torch.arange(size) for size in [*lengths, 2]])[None],
        "reference_logps": torch.tensor([[-9.0, -7.5, -12.0, -14.0]]),
        "grades": torch.tensor([[2.0, 2.0, 5.0, 5.0]]),
    }
    return batch, torch.randn(24, VOCABULARY, generator=generator, requires_grad=True)


def expected(kind: str, logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """The mean of the loss as the peers' trainers write it, one document after the other."""
    settings, sums, lengths = SETTINGS[kind], [], []
    logps = logits.log_softmax(-1)
    for segment in range(1, 5):
        places = [
            place
            for place in range(1, 24)
            if batch["segment_ids"][0, place] == segment and batch["loss_mask"][0, place] == 1
        ]
        sums.append(sum(logps[place - 1, batch["input_ids"][0, place]] for place in places))
        lengths.append(len(places))
    total, beta, smoothing = torch.zeros(()), settings["beta"], settings.get("label_smoothing", 0.0)
    for first in (0, 2):
        chosen, rejected = sums[first], sums[first + 1]
        r_chosen = chosen - batch["reference_logps"][0, first]
        r_rejected = rejected - batch["reference_logps"][0, first + 1]
        delta = r_chosen - r_rejected
        if kind == "dpo":
            loss = -F.logsigmoid(beta * delta) * (1 - smoothing) - F.logsigmoid(-beta * delta) * smoothing
            loss = loss - 0.2 * chosen / lengths[first]
        elif kind == "robust":
            clean, flipped = -(1 - smoothing) * F.logsigmoid(beta * delta), -smoothing * F.logsigmoid(-beta * delta)
            loss = (clean - flipped) / (1 - 2 * smoothing)
        elif kind == "ipo":
            loss = (r_chosen / lengths[first] - r_rejected / lengths[first + 1] - 1 / (2 * beta)) ** 2
        elif kind == "hinge":
            loss = torch.relu(1 - beta * delta)
        elif kind == "offset":
            loss = -F.logsigmoid(beta * delta - 0.5 * math.log(batch["grades"][0, first]))
        elif kind == "simpo":
            loss = -F.logsigmoid(beta * (chosen / lengths[first] - rejected / lengths[first + 1] - 0.5 / beta))
        elif kind == "orpo":
            p, q = (chosen / lengths[first]).exp(), (rejected / lengths[first + 1]).exp()
            loss = -chosen / lengths[first] - beta * F.logsigmoid(torch.log(p / (1 - p)) - torch.log(q / (1 - q)))
        else:
            z0 = REFERENCE_POINT if kind == "kto" else 0.0
            good, bad = torch.sigmoid(beta * (r_chosen - z0)), torch.sigmoid(beta * (r_rejected - z0))
            loss = settings["good_weight"] * (1 - good) + settings["bad_weight"] * bad
        total = total + loss
    return total / (4 if kind in OF_ANSWERS else 2)


@pytest.mark.parametrize("kind", sorted(SETTINGS))
def test_each_loss_and_its_gradient_are_those_of_the_papers(kind: str) -> None:
    batch, logits = two_pairs()
    if kind in OF_ANSWERS:
        batch["grades"] = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
        batch[STEP_MEAN] = torch.tensor(REFERENCE_POINT)
    right = expected(kind, logits, batch)
    (gradient,) = torch.autograd.grad(right, logits)
    other = logits.detach().clone().requires_grad_()

    def forward(**inputs: Any) -> Any:
        return SimpleNamespace(logits=other[None, inputs["logits_to_keep"]].clone())

    loss = judged_loss if kind in OF_ANSWERS else pair_loss
    sums, units = loss(of_kind(kind), forward, batch), (num_documents if kind in OF_ANSWERS else num_pairs)(batch)
    value = sums.loss / units
    value.backward()
    assert float(value.detach()) == pytest.approx(float(right.detach()), rel=1e-5)
    assert other.grad is not None
    assert torch.allclose(other.grad, gradient, atol=1e-6)
    assert int(units) == (4 if kind in OF_ANSWERS else 2)


def job_of(jobs: Jobs, judged: dict[str, DatasetManifest], run: str, kind: str, **settings: Any) -> TrainJob:
    method = {"kind": kind, **SETTINGS[kind]}
    return jobs.on(jobs(run, **(TORCH | settings), method=method), judged[of_kind(kind).rows])


@pytest.mark.parametrize("kind", ["dpo", "offset", "orpo", "kto", "apo_zero"])
def test_neither_passes_nor_workers_nor_zero_change_what_is_trained(
    jobs: Jobs, judged: dict[str, DatasetManifest], run: Run, kind: str
) -> None:
    looking: dict[str, Any] = {"validation": {"every_steps": 2, "max_rows": 3}, "max_steps": 4}
    one = job_of(jobs, judged, f"{kind}-one", kind, **looking)
    three = job_of(jobs, judged, f"{kind}-three", kind, **looking, micro_batch_size=3)
    two = job_of(jobs, judged, f"{kind}-two", kind, **looking)
    zero = job_of(jobs, judged, f"{kind}-zero", kind, **looking, engine="deepspeed", zero_stage=3)
    run(one, three)
    run(two, zero, ranks=2)
    for other in (three, two, zero):
        for name in ("loss", "validation_loss", "verdict_accuracy" if kind in OF_ANSWERS else "pair_accuracy"):
            assert losses(other, name) == pytest.approx(losses(one, name), rel=1e-4, abs=1e-5), (other.run, name)
        assert largest_difference(exported(other), exported(one)) < 2e-5
    if kind == "kto":
        for name in ("reference_point", "validation_reference_point"):
            assert losses(zero, name) == pytest.approx(losses(one, name), rel=1e-4, abs=1e-4)
            assert max(losses(one, name)) > 0
    if kind not in OF_ANSWERS:  # whose verdicts follow no rule here
        assert losses(one, "validation_loss")[1] < losses(one, "validation_loss")[0]


def test_answers_are_moved_to_the_next_prompt_of_their_row() -> None:
    row = {"input_ids": [1, 2, 21, 22, 3, 31, 4, 5, 41, 42, 43, 0], "segment_ids": [1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 3, 0]}
    row["loss_mask"] = [0, 0, 1, 1, 0, 1, 0, 0, 1, 0, 1, 0]
    alone = {"input_ids": [7, 8, 9] + [0] * 9, "segment_ids": [1] * 3 + [0] * 9, "loss_mask": [0, 1, 1] + [0] * 9}
    moved = moved_answers({name: torch.tensor([row[name], alone[name]]) for name in row})
    assert moved["input_ids"].tolist() == [[1, 2, 41, 42, 43, 3, 21, 22, 4, 5, 31, 0], [0] * 12]
    assert moved["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0], [0] * 12]
    assert moved["loss_mask"].tolist() == [[0, 0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 0], [0] * 12]
    assert moved["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 0], list(range(12))]


def test_killed_and_resumed_equals_uninterrupted(jobs: Jobs, judged: dict[str, DatasetManifest], run: Run) -> None:
    settings = LORA | {"checkpoint": {"every_steps": 2}, "max_steps": 5}
    whole = job_of(jobs, judged, "dpo-whole", "dpo", **settings)
    killed = job_of(jobs, judged, "dpo-killed", "dpo", **settings)
    run(whole, ranks=2)
    run(killed, ranks=2, kill_at=4, expect=23)
    run(killed, ranks=2)
    assert first_steps(killed) == [0, 2]
    assert export_digest(killed) == export_digest(whole)


def test_reference_is_the_model_without_its_adapter(jobs: Jobs, judged: dict[str, DatasetManifest], run: Run) -> None:
    job = job_of(jobs, judged, "dpo-reference", "dpo", **LORA, max_steps=3)
    run(job, ranks=2)
    rows = Rows.of(job.store, job.dataset, "train")
    kept = read_document_logps(Reference(job, document_logps(in_pairs=True)), rows, list(range(rows.num_rows)))
    config = job.config.model_copy(update={"adapter": None})
    model: Any = load_for_training(job.store.local(f"models/{job.base.id}"), config, "fp32", torch.device("cpu"), 1).eval()
    for number in range(rows.num_rows):
        batch = {name: torch.from_numpy(value) for name, value in rows.batch([number]).items()}
        with torch.no_grad():
            bounds = attention.bounds(attention.edges(batch["position_ids"][0]))
            inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
            logps = model(**inputs, use_cache=False, **bounds).logits[0].log_softmax(-1)
        for segment in range(int(batch["segment_ids"].max())):
            places = [
                place
                for place in range(1, rows.sequence_length)
                if batch["segment_ids"][0, place] == segment + 1 and batch["loss_mask"][0, place]
            ]
            total = sum(float(logps[place - 1, batch["input_ids"][0, place]]) for place in places)
            assert kept[number, segment] == pytest.approx(total, abs=1e-4)
    assert losses(job, "reward_margin")[0] == pytest.approx(0.0, abs=1e-4)  # before the first update both are the same


def test_dpo_of_an_adapter_is_dpo_with_the_adapter_switched_off_as_reference(
    jobs: Jobs, judged: dict[str, DatasetManifest], run: Run
) -> None:
    job = job_of(jobs, judged, "dpo-switched-off", "dpo", **LORA, max_steps=6)
    run(job)
    base, adapter = job.store.local(f"models/{job.base.id}"), job.store.local(paths.export(job.run))
    model: Any = load_for_training(base, job.config, "fp32", torch.device("cpu"), 1, initial=adapter)
    rows, numbers = Rows.of(job.store, job.dataset, "train"), [0, 1, 2]
    batch = {name: torch.from_numpy(value) for name, value in rows.batch(numbers).items()}
    with torch.no_grad(), model.disable_adapter():
        switched_off, _ = segment_sums(*token_logps(model, batch), batch)
    results = []
    kept = read_document_logps(Reference(job, document_logps(in_pairs=True)), rows, numbers)
    for logps in (torch.from_numpy(kept), switched_off):
        model.zero_grad()
        sums = pair_loss(of_kind("dpo"), model, {**batch, "reference_logps": logps})
        sums.loss.backward()
        assert abs(sums.metrics["reward_margin"]) > 0.1  # the adapter has learned something
        results.append([sums.loss.detach(), *(weight.grad for weight in model.parameters() if weight.grad is not None)])
    assert len(results[0]) > 2
    for kept, computed in zip(*results, strict=True):
        assert torch.allclose(kept, computed, rtol=1e-5, atol=1e-5)


def test_reference_is_computed_once_and_a_killed_pass_continues(
    jobs: Jobs, judged: dict[str, DatasetManifest], run: Run
) -> None:
    """The next attempt takes a piece as it was left: what a run then reads of it is not what it would have computed."""
    first = job_of(jobs, judged, "apo_zero-first", "apo_zero", **LORA, max_steps=1)
    reference = Reference(first, document_logps(in_pairs=True))
    store, rows = first.store, Rows.of(first.store, first.dataset, "train")
    store.delete_dir(reference.folder)
    run(first)
    files = store.files(reference.folder)
    values = reference.read(rows, list(range(PIECE_ROWS)))
    store.delete_dir(reference.folder)
    piece = pieces(first.dataset)[0]
    left = [{"logps": row["logps"] - 1} for row in values]
    store.write(f"{reference._work}/{piece.name}", parquet(left, reference.measure))
    store.write(paths.run("apo_zero-again", PROGRESS), b"{}")  # of that pass
    again = job_of(jobs, judged, "apo_zero-again", "apo_zero", **LORA, max_steps=1)
    run(again)
    assert first_steps(again) == [0]
    assert not store.list(reference._work)
    assert not store.exists(paths.run("apo_zero-again", PROGRESS))
    (path,) = [path for path in store.list(reference.folder) if "/train-" in path]
    kept = pq.read_table(store.local(path)).column("logps").to_pylist()
    for number, row in enumerate(values):
        assert kept[number] == (row["logps"] - 1).tolist()
    assert losses(again, "good_reward") != losses(first, "good_reward")
    store.delete_dir(reference.folder)
    run(job_of(jobs, judged, "apo_zero-third", "apo_zero", **LORA, max_steps=1))
    assert store.files(reference.folder) == files


def test_numbers_of_a_pass_are_fetched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fetch waits for the device: the loss and every metric come in one. What pairs share is found before a pass."""
    batch, logits = two_pairs()
    batch["grades"] = torch.tensor([[1.0, -1.0, 1.0, -1.0]])

    def forward(**inputs: Any) -> Any:
        return SimpleNamespace(logits=logits[None, inputs["logits_to_keep"]].clone())

    fetched: list[str] = []
    shared = shared_prompts(batch)
    monkeypatch.setattr("forge_ray.train.methods.preference.shared_prompts", lambda _: shared)
    for name in ("__float__", "tolist"):
        fetch = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda self, fetch=fetch, name=name: fetched.append(name) or fetch(self))
    for loss, kind in ((pair_loss, "dpo"), (judged_loss, "apo_zero")):
        sums = loss(of_kind(kind), forward, batch)
        assert not fetched
        value, metrics = sums.fetch()
        assert fetched == ["tolist"]
        assert len(metrics) >= 3
        assert math.isfinite(value)
        fetched.clear()


def test_margin_that_is_missing_or_has_no_log_is_refused_with_its_record() -> None:
    class Graded:
        def grades(self, numbers: list[int]) -> list[list[float]]:
            return [[1.0, 1.0, float("nan"), float("nan")]]

        def records(self, numbers: list[int]) -> list[list[str]]:
            return [["rec_a", "rec_a", "rec_b", "rec_b"]]

    rows: Any = Graded()
    with pytest.raises(DataError, match="rec_b has no margin: "):
        read_grades(of_kind("offset"), rows, [0])
    with pytest.raises(DataError, match=r"rec_b has a margin that is not a finite number \(a string\): "):
        read_grades(of_kind("offset"), rows, [0], {"rec_b": "a string"}.__getitem__)
    rows.grades = lambda numbers: [[1.0, 1.0, 1e39, 1e39]]
    with pytest.raises(DataError, match=r"rec_b has a margin beyond fp32 \(3\.4e\+38\): "):
        read_grades(of_kind("offset"), rows, [0])


def test_rows_that_a_method_cannot_train_on_are_refused_before_a_run(
    store: Store, judged: dict[str, DatasetManifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    offset = TrainConfig(method=of_kind("offset"))
    refuse_without_rows(offset, store, judged["preference"])
    with pytest.raises(TrainingError, match=r"holds 48 feedback records; train\.method=offset takes preference records"):
        refuse_without_rows(offset, store, judged["feedback"])
    chats = judged["feedback"].model_copy(update={"kinds": {"chat": 48}})
    with pytest.raises(TrainingError, match="holds 48 chat records") as caught:
        refuse_without_rows(offset, store, chats)
    assert "or leave out train.method" in caught.value.hint
    grades = Rows.grades
    monkeypatch.setattr(Rows, "grades", lambda rows, numbers: [[float("nan") for _ in row] for row in grades(rows, numbers)])
    with pytest.raises(DataError, match=r"has no margin: train\.method\.kind=offset needs one on every pair"):
        refuse_without_rows(offset, store, judged["preference"])
    refuse_without_rows(TrainConfig(method=of_kind("dpo")), store, judged["preference"])


@pytest.mark.parametrize(
    ("verdict", "counts"), [(1.0, "80 training answers judged good and 0"), (-1.0, "0 training answers")]
)
def test_answers_that_are_all_good_or_all_bad_are_refused(
    store: Store, judged: dict[str, DatasetManifest], monkeypatch: pytest.MonkeyPatch, verdict: float, counts: str
) -> None:
    config = TrainConfig(method=of_kind("apo_zero"))
    refuse_without_rows(config, store, judged["feedback"])
    grades = Rows.grades
    monkeypatch.setattr(Rows, "grades", lambda rows, numbers: [[verdict for _ in row] for row in grades(rows, numbers)])
    with pytest.raises(DataError, match=counts) as caught:
        refuse_without_rows(config, store, judged["feedback"])
    assert "add rows with the other label" in caught.value.hint


def test_rewards_are_means_over_the_answers_of_their_verdict() -> None:
    """Of three good answers and a bad one, over a step; a step without a bad one has no mean of them."""
    method, sums = preference(of_kind("apo_zero"), None), {"loss": 2.0, "good_reward": 6.0, "bad_reward": -1.0}
    means = averages({**sums, "good_share": 3.0, "bad_share": 1.0}, 4.0, method)
    assert means == {"loss": 0.5, "good_reward": 2.0, "bad_reward": -1.0, "good_share": 0.75, "bad_share": 0.25}
    assert "bad_reward" not in averages({**sums, "good_share": 3.0, "bad_share": 0.0}, 3.0, method)


@pytest.mark.parametrize("beta", [0, -0.1])
def test_beta_of_zero_is_refused(beta: float) -> None:
    with pytest.raises(ConfigError, match=rf"beta={beta}: input should be greater than 0"):
        parse(Preference, {"kind": "dpo", "beta": beta})


def test_every_kind_has_a_test() -> None:
    assert set(SETTINGS) == {*OF_PAIRS, *OF_ANSWERS}
