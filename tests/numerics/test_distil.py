"""Distillation: what is kept of the teacher, and the guarantees of the loop with it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import Jobs, Run, export_digest, exported, first_steps, largest_difference, losses
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from forge_ray.config.base import parse
from forge_ray.config.distil import Distil
from forge_ray.config.train import TrainConfig
from forge_ray.data.dataset.stream import Rows
from forge_ray.errors import TrainingError
from forge_ray.models.import_model import import_model
from forge_ray.records import DatasetManifest, ModelVersion, files_digest
from forge_ray.store import paths
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import MANIFEST, Store
from forge_ray.train import attention, reference_files
from forge_ray.train import reference as reference_module
from forge_ray.train.context import join
from forge_ray.train.frozen import FrozenModel
from forge_ray.train.job import TrainJob
from forge_ray.train.measure import document_logps
from forge_ray.train.methods import distil, reference_of
from forge_ray.train.reference import Reference

pytestmark = pytest.mark.numerics
TORCH: dict[str, Any] = {"engine": "torch", "zero_stage": 0, "optimizer": {"lr": 1e-3, "eps": 1e-6}}
DISTIL: dict[str, Any] = {"kind": "distil", "teacher": "teacher", "k": 8, "temperature": 2.0, "hard_weight": 0.25}
PADDING = 8  # rows of the teacher's embedding beyond those of the student's


@pytest.fixture(scope="session")
def teacher(store: Store, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> FrozenModel:
    """A larger model with the same tokenizer, whose vocabulary is padded."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny-teacher"
    student = LlamaConfig.from_pretrained(tiny_model_dir)
    torch.manual_seed(7)
    more = {"hidden_size": 96, "num_hidden_layers": 3, "vocab_size": student.vocab_size + PADDING, "head_dim": 24}
    LlamaForCausalLM(LlamaConfig(**student.to_dict() | more)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(folder)
    with Catalog.open(store) as catalog:
        return FrozenModel(import_model(catalog, folder, "tiny-teacher", licence="mit"))


@pytest.fixture(scope="session")
def adapted(store: Store, teacher: FrozenModel) -> FrozenModel:
    """An adapter version on the teacher, as a run of the store would have made it."""
    torch.manual_seed(8)
    base: Any = LlamaForCausalLM.from_pretrained(store.local(paths.model(teacher.version.id)))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    with store.staged_dir("models/adapted") as folder:
        model.save_pretrained(folder)
    files = store.files("models/adapted")
    values = {"files": files, "files_digest": files_digest(files), "base_model": teacher.version.id}
    version = ModelVersion(name="adapted", status="accepted", weights="adapter", licence="mit", **values).sealed()
    store.copy_dir("models/adapted", paths.model(version.id))
    return FrozenModel(version, teacher.version)


def job_of(jobs: Jobs, frozen: FrozenModel, run: str, **settings: Any) -> TrainJob:
    method = DISTIL | settings.pop("method", {})
    return replace(jobs(run, **(TORCH | settings), method=method), frozen=frozen)


def kept_by(job: TrainJob) -> Reference:
    reference = reference_of(job)
    assert reference
    return reference


def alone(job: TrainJob) -> Reference:
    """What is kept for the job, computed and published in this process."""
    reference = kept_by(job)
    reference.prepare(join(False, 1, False, 1), lambda phase, step: None)
    return reference


def test_neither_passes_nor_workers_nor_zero_change_what_is_trained(jobs: Jobs, teacher: FrozenModel, run: Run) -> None:
    looking: dict[str, Any] = {"validation": {"every_steps": 2, "max_rows": 3}, "max_steps": 4}
    one = job_of(jobs, teacher, "distil-one", **looking)
    passes = job_of(jobs, teacher, "distil-passes", **looking, micro_batch_size=3)
    two = job_of(jobs, teacher, "distil-two", **looking)
    three = job_of(jobs, teacher, "distil-three", **looking)
    sliced = job_of(jobs, teacher, "distil-sliced", **looking, sequence_parallel=2, scaling={"num_workers": 2})
    zero = [
        job_of(jobs, teacher, f"distil-zero-{stage}", **looking, engine="deepspeed", zero_stage=stage) for stage in (0, 2, 3)
    ]
    kept = []
    for group, ranks in (([one, passes], 1), ([sliced, two, *zero], 2), ([three], 3)):
        one.store.delete_dir(paths.reference(one.dataset.id))
        run(*group, ranks=ranks)
        kept.append(one.store.files(kept_by(one).folder))
    assert kept[0] == kept[1] == kept[2]  # each by as many workers: the same bytes
    for other in (passes, two, three, sliced, *zero):
        for name in ("loss", "hard_loss", "teacher_kl", "validation_loss", "validation_teacher_kl"):
            assert losses(other, name) == pytest.approx(losses(one, name), rel=1e-4, abs=1e-5), (other.run, name)
        assert largest_difference(exported(other), exported(one)) < 2e-5, other.run
    assert losses(one, "validation_teacher_kl")[1] < losses(one, "validation_teacher_kl")[0]
    mixed = [
        0.25 * hard + 0.75 * 4 * soft
        for hard, soft in zip(*(losses(one, n) for n in ("hard_loss", "teacher_kl")), strict=True)
    ]
    assert losses(one) == pytest.approx(mixed, rel=1e-5)


def test_killed_and_resumed_equals_uninterrupted(jobs: Jobs, teacher: FrozenModel, run: Run) -> None:
    settings: dict[str, Any] = {"checkpoint": {"every_steps": 2}, "max_steps": 5, "adapter": {"r": 4, "alpha": 8}}
    whole = job_of(jobs, teacher, "distil-whole", **settings)
    killed = job_of(jobs, teacher, "distil-killed", **settings)
    run(whole, ranks=2)
    run(killed, ranks=2, kill_at=4, expect=23)
    run(killed, ranks=2)
    assert first_steps(killed) == [0, 2]
    assert export_digest(killed) == export_digest(whole)


def logps_alone(folder: Path, ids: list[int], num_tokens: int, temperature: float) -> Tensor:
    """Of one document by itself, without this project's attention: log q of the next token at each position."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, :, :num_tokens]
    return (logits / temperature).log_softmax(-1)


def test_numbers_kept_are_those_of_the_documents_alone(jobs: Jobs, teacher: FrozenModel) -> None:
    """Packed equals unpacked; ids of the padding are no tokens, however likely."""
    job = job_of(jobs, teacher, "distil-kept")
    reference, rows = alone(job), Rows.of(job.store, job.dataset, "train")
    folder = job.store.local(paths.model(teacher.version.id))
    num_tokens = LlamaConfig.from_pretrained(folder).vocab_size - PADDING
    ids, logps = (distil.read_column(reference, 8, name, rows, [1, 0]) for name in ("ids", "logps"))
    for lane, number in enumerate((1, 0)):
        row = {name: values[0] for name, values in rows.batch([number]).items()}
        for segment in range(1, row["segment_ids"].max() + 1):
            (places,) = np.nonzero(row["segment_ids"] == segment)
            q = logps_alone(folder, row["input_ids"][places].tolist(), num_tokens, 2.0)
            for offset, place in enumerate(places[:-1]):
                if row["loss_mask"][places[offset + 1]]:
                    values, tokens = q[offset].topk(8)
                    assert ids[lane, place].tolist() == tokens.tolist()
                    assert logps[lane, place] == pytest.approx(values.numpy(), abs=1e-4)
                else:
                    assert not ids[lane, place].any()
    assert ids.max() < num_tokens


def test_teacher_with_an_adapter_is_asked_with_it(jobs: Jobs, teacher: FrozenModel, adapted: FrozenModel) -> None:
    job = job_of(jobs, adapted, "distil-adapted")
    reference, rows = alone(job), Rows.of(job.store, job.dataset, "train")
    plain = alone(job_of(jobs, teacher, "distil-plain")).read(rows, [0])[0]
    with_it = reference.read(rows, [0])[0]
    assert reference.folder != kept_by(job_of(jobs, teacher, "distil-plain")).folder
    assert np.abs(with_it["logps"] - plain["logps"]).max() > 0.1
    assert reference.difference(3) == pytest.approx((0.0, 1.0), abs=1e-4)


def test_own_base_as_teacher_has_nothing_to_teach_at_first(jobs: Jobs, store: Store, run: Run) -> None:
    with Catalog.open(store) as catalog:
        own = FrozenModel(catalog.model("tiny"))
    whole = {"k": 200, "temperature": 1.0, "hard_weight": 0.0}
    job = job_of(jobs, own, "distil-own", max_steps=2, method=whole)
    run(job)
    assert losses(job, "teacher_kl")[0] == pytest.approx(0.0, abs=1e-5)


def test_reference_of_pairs_may_be_another_model(
    jobs: Jobs, judged: dict[str, DatasetManifest], teacher: FrozenModel, run: Run
) -> None:
    """Its log probabilities, not those of the start; any number of workers, and resumed."""
    settings: dict[str, Any] = {"method": {"kind": "dpo", "reference": "teacher"}, "max_steps": 3}
    plain = {"method": {"kind": "dpo"}, "max_steps": 1}
    one, two = (
        replace(jobs.on(jobs(f"other-{name}", **TORCH, **settings), judged["preference"]), frozen=teacher)
        for name in ("one", "two")
    )
    usual = jobs.on(jobs("other-usual", **TORCH, **plain), judged["preference"])
    run(one, usual)
    run(two, ranks=2)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert largest_difference(exported(two), exported(one)) < 2e-5
    assert losses(usual, "reward_margin")[0] == pytest.approx(0.0, abs=1e-4)
    assert abs(losses(one, "reward_margin")[0]) > 0.01


def changed(piece: bytes, by: float) -> bytes:
    """A piece whose log probabilities are lower."""
    table = pq.read_table(io.BytesIO(piece))
    lists = table.column("logps").combine_chunks()
    values = type(lists).from_arrays(lists.offsets, lists.values.to_numpy() - np.float32(by))
    sink = io.BytesIO()
    pq.write_table(table.set_column(table.column_names.index("logps"), "logps", values), sink)
    return sink.getvalue()


def pieces_of(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A pass that was killed before it published: its pieces."""
    with monkeypatch.context() as patch:
        patch.setattr(Reference, "_publish", lambda *_: None)
        reference.prepare(join(False, 1, False, 1), lambda phase, step: None)
    return reference.job.store.list(reference._work)


def test_next_attempt_takes_the_pieces_of_a_killed_pass(
    jobs: Jobs, teacher: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is published holds a piece as it was left, and computes only the piece that is missing."""
    reference = kept_by(job_of(jobs, teacher, "distil-pieces", method={"k": 3}))
    first, second, *_ = left = pieces_of(reference, monkeypatch)
    store, rows = reference.job.store, Rows.of(reference.job.store, reference.job.dataset, "train")
    store.write(first, changed(store.read(first), 1.0))
    expected = pq.read_table(io.BytesIO(store.read(second))).column("logps").to_pylist()
    store.delete(second)
    computed, of_pass = [], Reference._of_pass

    def counted(self: Reference, forward: Any, rows: Rows, number: int, device: Any) -> Any:
        computed.append(number)
        return of_pass(self, forward, rows, number, device)

    monkeypatch.setattr(Reference, "_of_pass", counted)
    alone(reference.job)
    assert len(left) > 2
    assert len(computed) == len(expected)
    kept = [row["logps"].tolist() for row in reference.read(rows, list(range(16)))]
    again = kept_by(job_of(jobs, teacher, "distil-again", method={"k": 3})).difference(rows.num_rows)[0]
    assert again == pytest.approx(1.0, abs=1e-4)  # of the piece that was changed
    assert not store.list(reference._work)
    assert kept


def test_folder_of_a_faster_run_stays(jobs: Jobs, teacher: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published and its pieces removed, while another run put the same pieces together."""
    job = job_of(jobs, teacher, "distil-faster", method={"k": 2})
    reference = kept_by(job)
    pieces_of(reference, monkeypatch)
    store, read = job.store, Store.read

    def overtaken(self: Store, relative: str) -> bytes:
        if relative.startswith(reference._work):
            monkeypatch.setattr(Store, "read", read)
            alone(job_of(jobs, teacher, "distil-faster-2", method={"k": 2}))
            published.append(store.read(f"{reference.folder}/{MANIFEST}"))
        return read(self, relative)

    published: list[bytes] = []
    monkeypatch.setattr(Store, "read", overtaken)
    alone(job)
    assert published == [store.read(f"{reference.folder}/{MANIFEST}")]
    listed = {Path(path).name for path in store.list(paths.reference(job.dataset.id))}
    assert not [name for name in listed if name.startswith(".")]


def test_pass_is_watched_in_phases_of_its_own(jobs: Jobs, teacher: FrozenModel) -> None:
    """A piece is not a step, and neither is putting the pieces together."""
    phases: list[str] = []
    reference = kept_by(job_of(jobs, teacher, "distil-phases", method={"k": 6}))
    reference.prepare(join(False, 1, False, 1), lambda phase, step: phases.append(phase))
    assert phases == [*["reference"] * len(reference_files.pieces(reference.job.dataset)), "publish", "start"]
    phases.clear()
    reference.prepare(join(False, 1, False, 1), lambda phase, step: phases.append(phase))
    assert not phases  # it is there


def test_rank_0_alone_looks_for_pieces(jobs: Jobs, teacher: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = kept_by(job_of(jobs, teacher, "distil-ranks", method={"k": 7}))
    monkeypatch.setattr(reference_module, "agree", lambda value, context: value)
    context, asked = join(False, 1, False, 1), []
    for name in ("exists", "list", "is_published"):
        look = getattr(Store, name)
        monkeypatch.setattr(
            Store, name, lambda *values, look=look, name=name, **more: asked.append(name) or look(*values, **more)
        )
    missing = reference._missing(context)
    assert asked == ["is_published", "exists", "list"]  # one look, however many pieces there are
    assert missing == reference_files.pieces(reference.job.dataset)
    asked.clear()
    reference._missing(replace(context, rank=1))
    assert not asked


def test_published_files_hold_many_pieces(jobs: Jobs, teacher: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_files, "FILE_ROWS", 6)
    monkeypatch.setattr(reference_module, "FILE_ROWS", 6)
    for module in (reference_files, reference_module):
        monkeypatch.setattr(module, "PIECE_ROWS", 4)
    job = job_of(jobs, teacher, "distil-files", method={"k": 5})
    reference, rows = alone(job), Rows.of(job.store, job.dataset, "train")
    files = [Path(path).name for path in job.store.list(reference.folder) if path.endswith(".parquet")]
    assert [name for name in files if name.startswith("train")] == [
        f"train-{first:09d}.parquet" for first in range(0, rows.num_rows, 6)
    ]
    assert reference.difference(rows.num_rows)[0] < 1e-4
    for name in files:
        metadata = pq.ParquetFile(job.store.local(f"{reference.folder}/{name}")).metadata
        assert metadata.num_row_groups == metadata.num_rows  # a row is read alone


def test_altered_ids_are_noticed(jobs: Jobs, teacher: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = alone(job_of(jobs, teacher, "distil-ids", method={"k": 4}))
    read = Reference.read

    def altered(self: Reference, rows: Rows, numbers: list[int]) -> Any:
        return [row | {"ids": np.roll(row["ids"], 2)} for row in read(self, rows, numbers)]

    assert reference.difference(2)[0] < 1e-4
    monkeypatch.setattr(Reference, "read", altered)
    assert reference.difference(2)[0] > 0.1


def test_numbers_that_are_not_finite_end_the_pass(jobs: Jobs, teacher: FrozenModel) -> None:
    job = job_of(jobs, teacher, "distil-finite")
    reference, rows = kept_by(job), Rows.of(job.store, job.dataset, "train")

    def forward(**inputs: Any) -> Any:
        kept = inputs["logits_to_keep"]
        return type("Output", (), {"logits": torch.full((1, len(kept), 400), float("nan"))})

    with pytest.raises(TrainingError, match=f"teacher {teacher.version.id}: row 0 of train has no finite log prob"):
        reference._of_pass(forward, rows, 0, torch.device("cpu"))


def test_key_follows_what_decides_the_numbers(jobs: Jobs, teacher: FrozenModel, adapted: FrozenModel) -> None:
    """Of a base in 4 bits too, where the run's own start is asked; a frozen model is never in 4 bits."""
    keys = [
        kept_by(job_of(jobs, frozen, "distil-key", method=method)).key
        for frozen, method in (
            (teacher, {}),
            (adapted, {}),
            (teacher, {"k": 9}),
            (teacher, {"temperature": 1.0}),
        )
    ]
    assert len(set(keys)) == len(keys)
    assert kept_by(job_of(jobs, teacher, "distil-key", method={"hard_weight": 0.5})).key == keys[0]
    pairs = jobs("key-pairs", **TORCH, method={"kind": "dpo"}, adapter={"r": 4})
    adapter = {"r": 4, "quantize": "nf4"}
    four_bits = replace(pairs, config=parse(TrainConfig, {"adapter": adapter, "scaling": {"gpus_per_worker": 1}}))
    measure = document_logps(in_pairs=True)
    assert Reference(pairs, measure).key != Reference(four_bits, measure).key
    assert Reference(four_bits, measure).is_quantised
    other = [Reference(replace(job, frozen=teacher), measure) for job in (pairs, four_bits)]
    assert other[0].key == other[1].key
    assert not other[1].is_quantised


def test_packed_loss_is_that_of_its_documents_alone(jobs: Jobs, teacher: FrozenModel, tiny_model_dir: Path) -> None:
    job = job_of(jobs, teacher, "distil-packed")
    reference, rows = alone(job), Rows.of(job.store, job.dataset, "train")
    config = parse(Distil, DISTIL)
    model: Any = LlamaForCausalLM.from_pretrained(tiny_model_dir, attn_implementation=attention.register()).train()
    model.config.use_cache = False
    arrays = rows.batch([0]) | {
        f"teacher_{name}": distil.read_column(reference, 8, name, rows, [0]) for name in ("ids", "logps")
    }
    batch = {name: torch.from_numpy(values) for name, values in arrays.items()}
    packed = distil.loss(config, model, batch).loss
    (gradient,) = torch.autograd.grad(packed, model.lm_head.weight)
    total, summed = 0.0, torch.zeros_like(gradient)
    for segment in range(1, int(batch["segment_ids"].max()) + 1):
        places = torch.nonzero(batch["segment_ids"][0] == segment).flatten()
        one = distil.loss(config, model, {name: values[:, places] for name, values in batch.items()}).loss
        total, summed = total + float(one.detach()), summed + torch.autograd.grad(one, model.lm_head.weight)[0]
    assert total == pytest.approx(float(packed.detach()), rel=1e-5)
    assert torch.allclose(summed, gradient, atol=1e-5)
