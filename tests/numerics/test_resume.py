"""A run that was killed and started again ends with the very bytes of one that was not."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Jobs, Run, export_digest, exported, first_steps, largest_difference, losses
from worker import KILLED

from forge_ray.errors import PolicyError
from forge_ray.records import canonical_json, digest
from forge_ray.store.files import MANIFEST, hash_dir
from forge_ray.train import checkpoint
from forge_ray.train.job import TrainJob
from forge_ray.train.weights import verified

pytestmark = pytest.mark.numerics
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"engine": "torch", "zero_stage": 0},
    **{f"zero{stage}": {"zero_stage": stage} for stage in (0, 2, 3)},
}
LORA = {"r": 4, "dropout": 0.1}  # dropout: only with the random state of every rank restored do the bytes agree
CADENCE = {"checkpoint": {"every_steps": 2}, "max_steps": 6}
SHORT = {"checkpoint": {"every_steps": 1}, "max_steps": 3}
KINDS = {"torch-lora", "zero0-full", "zero3-full"}
ALL_KINDS = {f"{engine}-{name}" for engine in ENGINES for name in ("full", "lora")}


def folder_of(job: TrainJob, step: int) -> Path:
    return job.store.local(f"runs/{job.run}/checkpoints/step-{step:08d}")


def again(job: TrainJob, run: str) -> TrainJob:
    return replace(job, run=run, name=run)


@pytest.mark.parametrize(
    ("ranks", "kinds", "bf16"),
    [
        pytest.param(2, KINDS, "zero2-lora", id="two ranks"),
        pytest.param(2, ALL_KINDS - KINDS, "", id="two ranks, the others", marks=pytest.mark.large),
        # one rank has nothing to shard; stage 3 stands for the code of stage 2
        pytest.param(
            1, {kind for kind in ALL_KINDS if "zero2" not in kind}, "torch-lora", id="one rank", marks=pytest.mark.large
        ),
    ],
)
def test_resume_is_bit_identical(jobs: Jobs, run: Run, ranks: int, kinds: set[str], bf16: str) -> None:
    """Killed in the third step, resumed from the second: every engine, full and LoRA, and one of them in bf16.

    In the quick suite torch and ZeRO 0, 2 and 3 have one of full and LoRA each, for an engine saves the parameters that it
    trains, whichever they are; ZeRO 1 and 3 have LoRA in test_saving.py, ZeRO 2 has it in fp32 in test_sequence_parallel.py.
    `large` has every pair.
    """

    def whole_of(kind: str, name: str, precision: str = "fp32") -> TrainJob:
        engine, _, method = kind.partition("-")
        options = ENGINES[engine] | {"adapter": LORA if method == "lora" else None}
        return jobs(f"whole-{name}-{ranks}", precision=precision, **options, **SHORT)

    whole = {kind: whole_of(kind, kind) for kind in sorted(kinds)}
    if bf16:
        whole["bf16"] = whole_of(bf16, "bf16", "bf16")
    run(*whole.values(), ranks=ranks)

    broken = {kind: again(job, f"broken-{kind}-{ranks}") for kind, job in whole.items()}
    for job in broken.values():
        run(job, ranks=ranks, kill_at=3, expect=KILLED)
        assert checkpoint.steps(job.store, job.run) == [2, 1]
        assert not job.store.exists(f"runs/{job.run}/export")
    run(*broken.values(), ranks=ranks)
    for kind, job in broken.items():
        assert first_steps(job) == [0, 2], kind
        assert losses(job) == losses(whole[kind]), kind
        assert export_digest(job) == export_digest(whole[kind]), kind


@pytest.fixture(scope="module")
def finished(jobs: Jobs) -> TrainJob:
    """The configuration that the tests below break; its first run is not interrupted."""
    return jobs("finished", zero_stage=2, adapter=LORA, **CADENCE)


def stopped_at_four(job: TrainJob, run: Run, name: str) -> TrainJob:
    """A killed run with checkpoints 2 and 4; made once, copied for each test."""
    source, target = again(job, "stopped"), again(job, name)
    if not job.store.exists("runs/stopped"):
        run(source, kill_at=5, expect=KILLED)
    shutil.copytree(job.store.local("runs/stopped"), job.store.local(f"runs/{name}"))
    for step in (2, 4):  # a checkpoint says whose it is
        path = folder_of(target, step) / MANIFEST
        manifest = json.loads(path.read_bytes())
        del manifest["digest"], manifest["hmac"]
        manifest["position"]["run"] = name
        path.write_bytes(checkpoint.sealed(target.store, manifest))
    return target


def flip_a_byte(folder: Path) -> str:
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return "sha256"


def truncate(folder: Path) -> str:
    path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    return "bytes, its manifest says"


def remove_a_file(folder: Path) -> str:
    (folder / "rng-00000.pt").unlink()
    return "has -1 bytes"


def tear_the_manifest(folder: Path) -> str:
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes()[:100])
    return "is not JSON"


def remove_the_manifest(folder: Path) -> str:
    (folder / MANIFEST).unlink()
    return ""  # without it there is no checkpoint: nothing to say


def test_damaged_checkpoint_is_skipped_and_resume_is_bit_identical(jobs: Jobs, run: Run, finished: TrainJob) -> None:
    run(finished)
    harm = (flip_a_byte, truncate, remove_a_file, tear_the_manifest, remove_the_manifest)
    broken = {way.__name__: stopped_at_four(finished, run, f"bad-{way.__name__}") for way in harm}
    reasons = [way(folder_of(broken[way.__name__], 4)) for way in harm]
    printed = run(*broken.values())
    skipped = [line for line in printed.splitlines() if "is skipped:" in line]
    assert len(skipped) == 4
    for way, reason in zip(harm[:4], reasons, strict=False):
        assert any(f"runs/bad-{way.__name__}/checkpoints/step-00000004 is skipped:" in s and reason in s for s in skipped), (
            way
        )
    for name, job in broken.items():
        assert first_steps(job) == [0, 2], name
        assert export_digest(job) == export_digest(finished), name


class Plant:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.canary, "this was run")


def test_checkpoint_is_verified_before_unpickling(run: Run, finished: TrainJob, tmp_path: Path) -> None:
    job = stopped_at_four(finished, run, "planted")
    canary = tmp_path / "canary"
    planted = pickle.dumps(Plant(canary))
    victims = list(folder_of(job, 4).rglob("*.pt"))
    assert len(victims) >= 3  # weights, optimizer, random state
    for path in victims:
        path.write_bytes(planted)
    run(job, says="step-00000004 is skipped")
    assert first_steps(job) == [0, 2]
    assert not canary.exists()
    pickle.loads(planted)
    assert canary.exists()  # the control: it does what it says


def remade(folder: Path) -> dict[str, Any]:
    """What the manifest of a changed folder would say, without digest and HMAC."""
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_bytes())
    manifest.pop("digest"), manifest.pop("hmac", None)
    return manifest | {"files": [entry.model_dump() for entry in hash_dir(folder)]}


def test_remade_manifest_is_refused_by_name(run: Run, finished: TrainJob, tmp_path: Path) -> None:
    """By whoever holds no key, at resume, export and validation: digests are computed by anybody."""
    stopped = stopped_at_four(finished, run, "forged")
    folder, canary = folder_of(stopped, 4), tmp_path / "canary"
    for path in (folder / "state").glob("*.pt"):
        torch.save(Plant(canary), path)
    for tag, reason in ({}, "is not authenticated"), ({"hmac": "0" * 64}, "was not made with this store's key"):
        value = remade(folder) | tag
        (folder / MANIFEST).write_bytes(canonical_json(value | {"digest": digest(value)}))
        run(stopped, expect=1, says=f"runs/forged/checkpoints/step-00000004 {reason}")
        with pytest.raises(PolicyError, match=reason):
            verified(stopped, 4)
        with pytest.raises(PolicyError, match=reason):
            checkpoint.find(stopped.store, checkpoint.expected(stopped))
    assert not canary.exists()


def test_files_of_an_authentic_checkpoint_are_read_as_data_alone(run: Run, finished: TrainJob, tmp_path: Path) -> None:
    """Whoever holds the key makes the manifest anew: what it lists still runs nothing."""
    job, canary = stopped_at_four(finished, run, "remade"), tmp_path / "canary"
    folder = folder_of(job, 4)
    for path in (folder / "state").glob("*.pt"):
        torch.save(Plant(canary), path)
    (folder / MANIFEST).write_bytes(checkpoint.sealed(job.store, remade(folder)))
    run(job, expect=1, says="is not data alone")
    assert not canary.exists()


def test_checkpoint_with_an_unlisted_file_is_skipped(run: Run, finished: TrainJob) -> None:
    job = stopped_at_four(finished, run, "added")
    folder = folder_of(job, 4)
    listed = {entry["path"] for entry in json.loads((folder / MANIFEST).read_bytes())["files"]}
    assert {entry.path for entry in hash_dir(folder)} == listed  # DeepSpeed's scripts are not written
    (folder / "zero_to_fp32.py").write_text("of a checkpoint of an earlier version")
    extra = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    shutil.copy(folder / "state" / "mp_rank_00_model_states.pt", folder / "state" / extra)
    assert f"{extra} is not listed in its manifest" in run(job)
    assert first_steps(job) == [0, 2]


def test_checkpoint_of_another_run_is_skipped(run: Run, jobs: Jobs, finished: TrainJob) -> None:
    job = stopped_at_four(finished, run, "other-config")
    other = replace(job, config=job.config.model_copy(update={"seed": 7}))
    printed = run(other)
    assert "step-00000004 is skipped: it has config_digest='sha256:" in printed
    assert first_steps(other) == [0, 0]


@pytest.mark.parametrize("engine", ["torch", "zero0"])
def test_zero0_and_torch_resume_at_another_world_size(run: Run, jobs: Jobs, engine: str) -> None:
    """One rank, then two, then one, without dropout: the same batches, so the same weights to 1e-5."""
    whole = jobs(f"one-rank-{engine}", **ENGINES[engine], **SHORT)
    moved = again(whole, f"moved-{engine}")
    run(whole)
    run(moved, kill_at=2, expect=KILLED)
    run(moved, ranks=2, kill_at=3, expect=KILLED)
    run(moved)
    assert first_steps(moved) == [0, 1, 2]
    assert losses(moved) == pytest.approx(losses(whole), rel=2e-6)
    assert largest_difference(exported(moved), exported(whole)) < 1e-5


def test_finished_run_repeats_no_step(run: Run, jobs: Jobs) -> None:
    job = jobs("twice", zero_stage=2, adapter=LORA, max_steps=2)
    run(job)
    before = export_digest(job)
    run(job)
    assert first_steps(job) == [0, 2]
    assert len(losses(job)) == 2
    assert export_digest(job) == before


def test_run_killed_after_its_last_checkpoint_reports_all_metrics(run: Run, jobs: Jobs) -> None:
    job = jobs("last", zero_stage=2, adapter=LORA, max_steps=1, validation={"max_rows": 2})
    run(job, kill_at=1, kill_in="report", expect=KILLED)
    run(job)
    assert first_steps(job) == [0, 1]
    facts = job.store.read_json(f"runs/{job.run}/result.json")["metrics"]
    assert facts["loss"] == losses(job)[0] > 0
    assert facts["validation_loss"] == losses(job, "validation_loss")[0]


def test_only_the_newest_checkpoints_are_kept(run: Run, jobs: Jobs) -> None:
    job = jobs("keeps", zero_stage=2, adapter=LORA, max_steps=4, checkpoint={"every_steps": 1, "keep": 2})
    run(job)
    assert checkpoint.steps(job.store, job.run) == [4, 3]
    left = [path.name for path in job.store.local(f"runs/{job.run}/checkpoints").iterdir()]
    assert sorted(left) == ["step-00000003", "step-00000004"]


def test_lora_checkpoint_contains_no_base_weights(run: Run, jobs: Jobs) -> None:
    """By the names in it and by its numbers, in every engine."""
    runs = [jobs(f"size-{engine}", **options, adapter={"r": 1}, max_steps=1) for engine, options in ENGINES.items()]
    run(*runs, ranks=2)
    for job in runs:
        numbers = 0
        for path in folder_of(job, 1).rglob("*.pt"):
            if path.name.startswith("rng"):
                continue
            state = torch.load(path, map_location="cpu", weights_only=False)  # written a moment ago, by this test
            names = [name for name in _keys(state) if "." in name and "layers" in name]
            assert all("lora_" in name for name in names), (job.run, path.name, names[:3])
            numbers += sum(tensor.numel() for tensor in _tensors(state))
        (adapter,) = job.store.local(f"runs/{job.run}/export").glob("*.safetensors")
        trained, frozen = (sum(_sizes(path)) for path in (adapter, _base(job) / "model.safetensors"))
        assert frozen > 20 * trained
        assert numbers < 6 * trained + 1000, job.run  # weights, master copy, two moments, some of it twice: and no base


def _base(job: TrainJob) -> Path:
    return job.store.local(f"models/{job.base.id}")


def _sizes(path: Path) -> list[int]:
    with path.open("rb") as stream:
        header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
    return [int(torch.Size(entry["shape"]).numel()) for name, entry in header.items() if name != "__metadata__"]


def _keys(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [str(key) for key in value] + [name for item in value.values() for name in _keys(item)]
    return [name for item in value for name in _keys(item)] if isinstance(value, (list, tuple)) else []


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in _tensors(item)]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, (list, tuple)) else []


def test_rng_state_round_trips_through_a_file(tmp_path: Path) -> None:
    import random

    import numpy as np

    checkpoint.seed_all(3, 1)
    random.gauss(0, 1), np.random.normal(), torch.rand(3)
    torch.save(checkpoint.rng_state(), tmp_path / "rng.pt")
    drawn = [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(2).tolist()]
    checkpoint.seed_all(9, 0)
    checkpoint.set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert drawn == [random.gauss(0, 1), random.random(), np.random.normal(), np.random.rand(), torch.rand(2).tolist()]
    assert hash_dir(tmp_path)[0].path == "rng.pt"
