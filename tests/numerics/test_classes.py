"""A head over labels: its loss, what it exports, and the guarantees of the loop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import SEQUENCE_LENGTH, Jobs, Run, export_digest, exported, first_steps, largest_difference, losses, written
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from forge_ray.config.base import parse
from forge_ray.config.classify import Classify, Target
from forge_ray.data.build.pack import Document, pack
from forge_ray.data.dataset.labels import values_of
from forge_ray.data.dataset.version import LABELLED
from forge_ray.errors import ConfigError, DataError
from forge_ray.models.architecture import open_model
from forge_ray.models.class_head import targets_of
from forge_ray.records import DatasetManifest, ModelVersion, files_digest
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.train.job import TrainJob
from forge_ray.train.labels import report_labels
from forge_ray.train.methods.classes import label_weights, loss, num_labelled
from forge_ray.train.start import Start, refuse_other_adapter
from forge_ray.train.weights import export_checkpoint

pytestmark = pytest.mark.numerics
TORCH: dict[str, Any] = {"engine": "torch", "zero_stage": 0, "optimizer": {"lr": 1e-3, "eps": 1e-6}}
ZERO: dict[str, Any] = {"engine": "deepspeed", "optimizer": {"lr": 1e-3, "eps": 1e-6}}
LORA: dict[str, Any] = {"adapter": {"r": 4, "alpha": 8, "target_modules": "all-linear"}}
STRIDES = ("one", "two", "three")
ONE: dict[str, Any] = {"kind": "classify", "targets": [{"labels": STRIDES}]}
SEVERAL: dict[str, Any] = {
    "kind": "classify",
    "label_smoothing": 0.1,
    "class_weights": "balanced",
    "targets": [
        {"name": "stride", "labels": STRIDES},
        {"name": "has", "labels": ["ten", "fifty", "ninety"], "loss": "multi", "weight": 0.5},
    ],
}


def counting(seed: int, count: int) -> tuple[list[Document], list[int], list[str]]:
    """Documents that count up, the stride of each, and which of three numbers it holds."""
    random, documents, strides, numbers = Random(seed), [], [], []
    for number in range(count):
        length, start, stride = random.randint(4, 20), random.randint(0, 149), random.randint(1, 3)
        ids = [10 + (start + stride * place) % 150 for place in range(length)]
        documents.append(Document(f"rec_{seed}_{number}", ids, [0] * (length - 1) + [1]))
        strides.append(stride)
        held = [name for name, value in (("ten", 10), ("fifty", 50), ("ninety", 90)) if value in ids]
        numbers.append(", ".join(held) or "none")
    return documents, strides, numbers


def labelled_by(store: Store, name: str, shift: int = 0, row_length: int = SEQUENCE_LENGTH) -> DatasetManifest:
    """Every seventh document has one target alone; with `shift` the strides are those of other documents."""
    packed, texts = {}, {}
    for split, (seed, count) in {"train": (5, 60), "validation": (6, 12)}.items():
        documents, strides, numbers = counting(seed, count)
        for place, document in enumerate(documents):
            stride = STRIDES[strides[(place + shift) % count] - 1]
            both = f'{{"stride": "{stride}", "has": "{numbers[place]}"}}'
            texts[document.record] = stride if name.startswith("one") or place % 7 == 0 else both
        packed[split] = pack(documents, row_length, 0)
    return written(store, name, packed, {"chat": 72}, (LABELLED.field("labels"), texts), row_length)


@pytest.fixture(scope="session")
def labelled(store: Store) -> dict[str, DatasetManifest]:
    return {name: labelled_by(store, name) for name in ("one", "several")} | {
        "shifted": labelled_by(store, "one-shifted", 1)
    }


def job_of(jobs: Jobs, dataset: DatasetManifest, run: str, method: dict[str, Any] = ONE, **settings: Any) -> TrainJob:
    return jobs.on(jobs(run, **{**TORCH, **settings}, method=method), dataset)


# ---------------------------------------------------------------- the loss


def test_loss_and_gradient_are_those_of_torch_for_each_target() -> None:
    """Two documents in one row, the second with a label of one target alone; and a row without a document."""
    config = parse(Classify, SEVERAL | {"class_weights": {"stride/one": 3.0, "has/ten": 2.0}})
    weights = label_weights(SimpleNamespace(), config)  # type: ignore[arg-type]
    texts = ['{"stride": "one", "has": "ten, ninety"}', "three"]
    labels = torch.full((2, 2, 6), -1, dtype=torch.int8)
    labels[0] = torch.tensor([values_of(config.targets, text).tolist() for text in texts])
    batch = {
        "input_ids": torch.ones(2, 6, dtype=torch.int64),
        "position_ids": torch.tensor([[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]),
        "segment_ids": torch.tensor([[1, 1, 2, 2, 2, 0], [0] * 6]),
        "loss_mask": torch.tensor([[0, 1, 0, 0, 1, 0], [0] * 6]),
        "labels": labels,
    }
    logits = torch.randn(12, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def forward(**inputs: Any) -> Any:
        return SimpleNamespace(logits=logits[None, inputs["logits_to_keep"]])

    first, second = logits[1], logits[4]
    expected = 3.0 * F.cross_entropy(first[:3], torch.tensor(0), label_smoothing=0.1)
    expected = expected + F.cross_entropy(second[:3], torch.tensor(2), label_smoothing=0.1)
    truth = torch.tensor([1.0, 0.0, 1.0]) * 0.9 + 0.05
    expected = expected + 0.5 * F.binary_cross_entropy_with_logits(first[3:], truth, pos_weight=torch.tensor([2.0, 1, 1]))
    sums = loss(config, weights, forward, batch)
    assert float(sums.loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    assert int(num_labelled(batch)) == 2
    (ours,), (theirs,) = torch.autograd.grad(sums.loss, logits, retain_graph=True), torch.autograd.grad(expected, logits)
    assert torch.allclose(ours, theirs, atol=1e-6)
    blank = {name: value[1:] for name, value in batch.items()}
    assert float(loss(config, weights, forward, blank).loss.detach()) == 0.0
    assert int(num_labelled(blank)) == 0


def test_balanced_weights_follow_the_training_rows(jobs: Jobs, labelled: dict[str, DatasetManifest]) -> None:
    job = job_of(jobs, labelled["several"], "balanced", SEVERAL)
    config = job.config.method
    assert isinstance(config, Classify)
    _, strides, numbers = counting(5, 60)
    single = [60 / (3 * strides.count(stride)) for stride in (1, 2, 3)]
    held = [numbers[place].split(", ") for place in range(60) if place % 7]
    multi = [
        (len(held) - held_by) / held_by
        for held_by in (sum(name in one for one in held) for name in ("ten", "fifty", "ninety"))
    ]
    assert label_weights(job, config).tolist() == pytest.approx([*single, *multi])


# ---------------------------------------------------------------- the guarantees of the loop


@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
def test_workers_and_passes_change_nothing(
    jobs: Jobs, labelled: dict[str, DatasetManifest], run: Run, settings: dict[str, Any]
) -> None:
    kind = "lora" if settings else "full"
    looking = settings | {"validation": {"every_steps": 2, "max_rows": 3}}
    one = job_of(jobs, labelled["several"], f"classes-one-{kind}", SEVERAL, **looking)
    three = job_of(jobs, labelled["several"], f"classes-three-{kind}", SEVERAL, **looking, micro_batch_size=3)
    two = job_of(jobs, labelled["several"], f"classes-two-{kind}", SEVERAL, **looking)
    run(one, three)
    run(two, ranks=2)
    for other in (three, two):
        for name in ("loss", "accuracy", "validation_loss", "validation_accuracy"):
            assert losses(other, name) == pytest.approx(losses(one, name), rel=1e-4, abs=1e-5), (other.run, name)
        assert largest_difference(exported(other), exported(one)) < 1e-5
    assert len(set(losses(one))) == 4


@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
def test_zero_stages_agree(jobs: Jobs, labelled: dict[str, DatasetManifest], run: Run, settings: dict[str, Any]) -> None:
    kind = "lora" if settings else "full"
    stages = {
        stage: job_of(jobs, labelled["one"], f"classes-zero-{stage}-{kind}", **settings | ZERO, zero_stage=stage)
        for stage in (0, 2, 3)
    }
    for job in stages.values():
        run(job, ranks=2)
    for stage in (2, 3):
        assert losses(stages[stage]) == pytest.approx(losses(stages[0]), rel=1e-4)
        assert largest_difference(exported(stages[stage]), exported(stages[0])) < 1e-4


@pytest.mark.parametrize("settings", [{}, LORA], ids=["full", "lora"])
def test_killed_and_resumed_equals_uninterrupted(
    jobs: Jobs, labelled: dict[str, DatasetManifest], run: Run, settings: dict[str, Any]
) -> None:
    kind = "lora" if settings else "full"
    saving = settings | {"checkpoint": {"every_steps": 2}, "max_steps": 5}
    whole = job_of(jobs, labelled["one"], f"classes-whole-{kind}", **saving)
    killed = job_of(jobs, labelled["one"], f"classes-killed-{kind}", **saving)
    run(whole, ranks=2)
    run(killed, ranks=2, kill_at=4, expect=23)
    run(killed, ranks=2)
    assert first_steps(killed) == [0, 2]
    assert export_digest(killed) == export_digest(whole)


def test_packing_changes_no_logits(jobs: Jobs, labelled: dict[str, DatasetManifest], run: Run) -> None:
    """All documents in one step: rows of several documents, and rows of one, give the same gradient."""
    alone = labelled_by(jobs.store, "one-alone", row_length=20)
    steps = {"max_steps": 1, "max_grad_norm": 0.0, "optimizer": {"lr": 1e-3, "eps": 1e-2}}
    packed = job_of(jobs, labelled["one"], "classes-packed", **steps, global_batch=labelled["one"].splits["train"].num_rows)
    single = job_of(jobs, alone, "classes-single", **steps, global_batch=alone.splits["train"].num_rows)
    assert alone.splits["train"].num_rows > labelled["one"].splits["train"].num_rows
    run(packed, single)
    assert losses(single) == pytest.approx(losses(packed), rel=1e-5)
    assert largest_difference(exported(single), exported(packed)) < 1e-5


def test_labels_decide_what_is_learned(jobs: Jobs, labelled: dict[str, DatasetManifest], run: Run) -> None:
    """The same texts with the labels of others: another model. With its own labels it learns them."""
    learning = {"max_steps": 60, "optimizer": {"lr": 3e-3}, "global_batch": 8}
    right = job_of(jobs, labelled["one"], "classes-right", **learning)
    shifted = job_of(jobs, labelled["shifted"], "classes-shifted", **learning)
    run(right, shifted)
    assert losses(right, "accuracy")[-1] > 0.9
    assert losses(shifted)[0] != losses(right)[0]
    assert export_digest(shifted) != export_digest(right)


# ---------------------------------------------------------------- the export


def logits_of(model: Any, documents: list[Document]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([document.ids])).logits for document in documents])


@pytest.mark.parametrize("kind", ["full", "adapter", "merged"])
def test_export_is_the_trained_model(jobs: Jobs, labelled: dict[str, DatasetManifest], run: Run, kind: str) -> None:
    """transformers' own class, one text a row and several padded ones, gives the loss that the run measured last."""
    settings: dict[str, Any] = {} if kind == "full" else LORA | {"export": kind}
    job = job_of(jobs, labelled["one"], f"classes-export-{kind}", **settings, validation={"max_rows": 64})
    run(job)
    folder = job.store.local(f"runs/{job.run}/export")
    assert targets_of(folder)[0].labels == STRIDES
    base = job.store.local(f"models/{job.base.id}")
    if kind == "adapter":
        plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        model: Any = PeftModel.from_pretrained(plain, str(folder))
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert model.config.id2label == dict(enumerate(STRIDES))
        assert model.config.problem_type == "single_label_classification"
    documents, strides, _ = counting(6, 12)
    logits = logits_of(model.eval(), documents)
    measured = float(F.cross_entropy(logits, torch.tensor(strides) - 1))
    assert measured == pytest.approx(losses(job, "validation_loss")[-1], rel=1e-5)
    if kind != "adapter":
        longest = max(len(document.ids) for document in documents)
        pad = model.config.pad_token_id
        padded = torch.tensor([[*one.ids, *[pad] * (longest - len(one.ids))] for one in documents])
        with torch.no_grad():
            together = model(input_ids=padded, attention_mask=(padded != pad).long()).logits
        assert torch.allclose(together, logits, atol=1e-5)


def test_several_targets_stand_side_by_side(jobs: Jobs, labelled: dict[str, DatasetManifest], run: Run) -> None:
    job = job_of(jobs, labelled["several"], "classes-targets", SEVERAL)
    run(job)
    folder = job.store.local(f"runs/{job.run}/export")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert list(model.config.id2label.values())[2:4] == ["stride/three", "has/ten"]
    assert [target.loss for target in targets_of(folder)] == ["single", "multi"]


def test_classifier_is_not_opened_as_a_language_model(
    jobs: Jobs, labelled: dict[str, DatasetManifest], run: Run, tmp_path: Path
) -> None:
    job = job_of(jobs, labelled["one"], "classes-refused", max_steps=1)
    run(job)
    with pytest.raises(ConfigError, match=r"is a classifier \(label: one, two, three\)"):
        open_model(job.store.local(f"runs/{job.run}/export"), torch.float32)


# ---------------------------------------------------------------- before a run


def test_label_in_no_target_is_refused_in_the_worker_too(jobs: Jobs, labelled: dict[str, DatasetManifest], run: Run) -> None:
    fewer = {"kind": "classify", "targets": [{"labels": STRIDES[:2]}]}
    run(job_of(jobs, labelled["one"], "classes-fewer", fewer), expect=1, says="'three' is not a label of target label")


def test_labels_are_reported_and_those_without_a_row_refused(
    jobs: Jobs, labelled: dict[str, DatasetManifest], capsys: pytest.CaptureFixture[str]
) -> None:
    part = SEVERAL | {"targets": SEVERAL["targets"][:1]}
    job = job_of(jobs, labelled["several"], "classes-reported", part)
    report_labels(job.store, job.config, job.dataset)
    printed = capsys.readouterr().err
    _, strides, _ = counting(5, 60)
    assert f"one {strides.count(1)}" in printed
    assert "51 rows have a label of has, which no target reads" in printed
    both = job_of(jobs, labelled["several"], "classes-both", SEVERAL)
    report_labels(both.store, both.config, both.dataset)
    assert "9 rows have no label of has, which is not trained on them" in capsys.readouterr().err
    more = {"kind": "classify", "targets": [{"labels": [*STRIDES, "four"]}]}
    job = job_of(jobs, labelled["one"], "classes-more", more)
    with pytest.raises(DataError, match="has the label 'four'"):
        report_labels(job.store, job.config, job.dataset)


# ---------------------------------------------------------------- from a checkpoint, and trained on


def test_the_best_checkpoint_is_exported_with_its_head(jobs: Jobs, labelled: dict[str, DatasetManifest], run: Run) -> None:
    """Without the workers that wrote it, the last checkpoint comes to what the end of the run exported."""
    settings = {"checkpoint": {"every_steps": 2}, "max_steps": 4}
    job = job_of(jobs, labelled["one"], "classes-checkpoint", **LORA, **settings)
    run(job)
    assert export_checkpoint(job.to_json(), 4, "runs/classes-checkpoint/again") == "adapter"
    (path,) = job.store.local("runs/classes-checkpoint/again").glob("*.safetensors")
    again = {name: weight.float() for name, weight in load_file(path).items()}
    assert largest_difference(again, exported(job)) == 0
    assert targets_of(path.parent)[0].labels == STRIDES


def test_adapter_is_trained_on_with_its_head(jobs: Jobs, labelled: dict[str, DatasetManifest], run: Run) -> None:
    """A learning rate that moves nothing leaves it as it was; targets in another order are refused."""
    first = job_of(jobs, labelled["one"], "classes-first", **LORA)
    run(first)
    store = first.store
    with Catalog.open(store) as catalog:
        folder = "models/.classes-first"
        with store.staged_dir(folder) as target:
            for path in store.local("runs/classes-first/export").iterdir():
                (target / path.name).write_bytes(path.read_bytes())
        files = store.files(folder)
        kept = {"files": files, "files_digest": files_digest(files), "base_model": first.base.id, "licence": "mit"}
        version = catalog.put(ModelVersion(name="strides", status="accepted", weights="adapter", **kept).sealed())
        store.move_dir(folder, f"models/{version.id}")
    still = {"init_from": "continue", "optimizer": {"lr": 1e-30}, "max_steps": 1}
    on = replace(job_of(jobs, labelled["one"], "classes-on", **LORA, **still), initial=version)
    run(on)
    assert largest_difference(exported(on), exported(first)) == 0
    with Catalog.open(store) as catalog:
        turned = Target(labels=STRIDES[::-1])
        with pytest.raises(ConfigError, match=r"has a head over the labels \['one', 'two', 'three'\]"):
            refuse_other_adapter(catalog, Start(first.base, version), on.config.adapter, (turned,))
        refuse_other_adapter(catalog, Start(first.base, version), on.config.adapter, on.config.targets)
