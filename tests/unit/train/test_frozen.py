"""A teacher, or another reference: which models can be one, and what follows for the run's id, licence and settings."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from fabricated import dataset, record_of, run, train_config

from forge_ray.cli.audit import _reference_difference
from forge_ray.config.base import parse
from forge_ray.config.train import TrainConfig
from forge_ray.errors import ConfigError, ForgeError, NotFound, PolicyError
from forge_ray.records import Event, ModelVersion, files_digest
from forge_ray.release import promotion
from forge_ray.store import paths
from forge_ray.store.authority import Policy
from forge_ray.store.catalog import Catalog
from forge_ray.train.frozen import FrozenModel, frozen_of, joined_licence
from forge_ray.train.job import identity, job_of, origins, run_id
from forge_ray.train.methods import reference_of

pytestmark = pytest.mark.unit


def version(
    catalog: Catalog, name: str, tokenizer: str = "one", vocabulary: int = 400, kept: bool = True, **more: Any
) -> ModelVersion:
    """A version whose files say what a teacher is judged by."""
    texts = {
        "config.json": json.dumps({"vocab_size": vocabulary}),
        "tokenizer.json": tokenizer,
        "model.safetensors": name,
        **more.pop("texts", {}),
    }
    with catalog.store.staged_dir(f"models/{name}") as folder:
        for path, text in texts.items():
            (folder / path).write_text(text)
    files = catalog.store.files(f"models/{name}")
    values = {"name": name, "status": "imported", "weights": "full", "licence": "apache-2.0"} | more
    put = catalog.put(ModelVersion(**values, files=files, files_digest=files_digest(files)).sealed())
    if kept:
        catalog.store.copy_dir(f"models/{name}", paths.model(put.id))
    return put


def distil(teacher: str, **more: Any) -> TrainConfig:
    return parse(TrainConfig, {"method": {"kind": "distil", "teacher": teacher, **more}})


def refused(catalog: Catalog, train: TrainConfig, base: ModelVersion) -> ForgeError:
    with pytest.raises(ForgeError) as caught:
        frozen_of(catalog, train, base)
    assert caught.value.hint
    return caught.value


def test_teacher_is_a_version_an_adapter_or_an_alias(catalog: Catalog) -> None:
    base, teacher = version(catalog, "base"), version(catalog, "teacher", vocabulary=408)
    adapter = version(catalog, "adapter", tokenizer="none", weights="adapter", status="accepted", base_model=teacher.id)
    promotion.promote(catalog, teacher.id, "big")
    assert frozen_of(catalog, distil(teacher.id), base) == frozen_of(catalog, distil("big"), base) == FrozenModel(teacher)
    asked = frozen_of(catalog, distil(adapter.id), base)
    assert asked == FrozenModel(adapter, teacher)
    assert FrozenModel.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    assert frozen_of(catalog, distil(base.id), base) == FrozenModel(base)  # its own base is fine
    assert frozen_of(catalog, TrainConfig(), base) is None
    pairs = parse(TrainConfig, {"method": {"kind": "dpo", "reference": "big"}})
    assert frozen_of(catalog, pairs, base) == FrozenModel(teacher)
    assert frozen_of(catalog, parse(TrainConfig, {"method": {"kind": "dpo"}}), base) is None


def test_what_cannot_be_a_teacher_is_refused_by_name(catalog: Catalog) -> None:
    base, teacher = version(catalog, "base"), version(catalog, "teacher")
    error = refused(catalog, distil("nobody"), base)
    assert isinstance(error, NotFound)
    other = version(catalog, "other", tokenizer="two")
    error = refused(catalog, distil(other.id), base)
    assert isinstance(error, ConfigError)
    assert f"{other.id} (other) has another tokenizer than {base.id} (base)" in error.message
    assert "answers as rows with train.method=sft" in error.hint
    pairs = parse(TrainConfig, {"method": {"kind": "ipo", "reference": other.id}})
    assert "train.method.reference=" in refused(catalog, pairs, base).message
    head = json.dumps({"format": 1, "targets": [{"name": "t", "labels": ["a", "b"], "loss": "single"}]})
    classifier = version(catalog, "classifier", texts={"classes.json": head})
    assert "is a classifier: it has no distribution" in refused(catalog, distil(classifier.id), base).message
    small = version(catalog, "small", vocabulary=300)
    assert frozen_of(catalog, distil(small.id, k=300), base)
    assert "k=301 exceeds the vocabulary of 300 tokens" in refused(catalog, distil(small.id, k=301), base).message
    without = version(catalog, "without", kept=False)
    error = refused(catalog, distil(without.id), base)
    assert isinstance(error, NotFound)
    assert f"the files of {without.id}" in error.message
    promotion.archive(catalog, teacher.id)
    assert "is archived" in refused(catalog, distil(teacher.id), base).message
    assert frozen_of(catalog, distil(teacher.id), base, "archived") == FrozenModel(teacher)
    catalog.append(Event(kind="model", subject=teacher.id, data={"state": "withdrawn", "erasure": "er_1"}))
    error = refused(catalog, distil(teacher.id), base)
    assert isinstance(error, PolicyError)
    assert f"{teacher.id} learned from rows that er_1 erased" in error.message
    assert frozen_of(catalog, distil(teacher.id), base, "any") == FrozenModel(teacher)  # of a run that has ended


def test_adapter_on_what_was_withdrawn_is_refused(catalog: Catalog) -> None:
    base, teacher = version(catalog, "base"), version(catalog, "teacher")
    adapter = version(catalog, "adapter", weights="adapter", status="accepted", base_model=teacher.id)
    catalog.append(Event(kind="model", subject=teacher.id, data={"state": "withdrawn", "erasure": "er_1"}))
    assert teacher.id in refused(catalog, distil(adapter.id), base).message


def test_policy_refuses_licences_of_teachers(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    base, teacher = version(catalog, "base"), version(catalog, "teacher", licence="Apache-2.0 AND (CC-BY-NC-4.0)")
    authority = catalog.authority().model_copy(update={"policy": Policy(refused_licences=("cc-by-nc-4.0",))})
    monkeypatch.setattr(Catalog, "authority", lambda self: authority)
    error = refused(catalog, distil(teacher.id), base)
    assert isinstance(error, PolicyError)
    assert f"names {teacher.id} (teacher), whose licence is CC-BY-NC-4.0" in error.message
    assert frozen_of(catalog, distil(base.id), base)
    pairs = parse(TrainConfig, {"method": {"kind": "dpo", "reference": teacher.id}})
    assert frozen_of(catalog, pairs, base)  # it is about teachers


def test_licence_of_a_distillate_is_both() -> None:
    def of(licence: str) -> ModelVersion:
        return ModelVersion(name="t", status="imported", weights="full", files=(), files_digest="", licence=licence).sealed()

    assert joined_licence("apache-2.0", None) == "apache-2.0"
    assert joined_licence("apache-2.0", of("apache-2.0")) == "apache-2.0"
    assert joined_licence("apache-2.0", of("llama3.3")) == "apache-2.0 AND llama3.3"
    assert joined_licence("MIT OR Apache-2.0", of("CC-BY-4.0")) == "(MIT OR Apache-2.0) AND CC-BY-4.0"
    assert joined_licence("apache-2.0 AND mit", of("mit")) == "apache-2.0 AND mit"
    assert joined_licence("mit or gpl-2.0-or-later", of("cc0-1.0")) == "(mit or gpl-2.0-or-later) AND cc0-1.0"
    assert joined_licence("gpl-2.0-or-later", of("cc0-1.0")) == "gpl-2.0-or-later AND cc0-1.0"


def test_run_is_named_by_the_digests_of_its_teacher(catalog: Catalog) -> None:
    base, teacher, other = (version(catalog, name) for name in ("base", "teacher", "other"))
    adapter = version(catalog, "adapter", weights="adapter", status="accepted", base_model=teacher.id)

    def of(train: TrainConfig, frozen: FrozenModel | None) -> dict[str, Any]:
        return identity(train, "fp32", "ds_1", base, None, frozen)

    assert of(distil("alias"), FrozenModel(teacher)) == of(distil(teacher.id), FrozenModel(teacher))
    asked = [FrozenModel(teacher), FrozenModel(other), FrozenModel(adapter, teacher), FrozenModel(adapter, other)]
    assert len({json.dumps(of(distil("alias"), one)) for one in asked}) == 4
    method = of(distil("alias"), FrozenModel(teacher))["config"]["method"]
    assert method == {"kind": "distil", "k": 64, "temperature": 1.0, "hard_weight": 0.5}
    plain, named = (parse(TrainConfig, {"method": {"kind": "dpo", **more}}) for more in ({}, {"reference": "alias"}))
    assert "reference" not in plain.model_dump()["method"]
    assert of(plain, None) != of(named, FrozenModel(teacher))
    assert "reference" not in of(named, FrozenModel(teacher))["config"]["method"]
    assert origins(base, None, FrozenModel(adapter, teacher)) == (base.id, adapter.id, teacher.id)
    assert origins(base, None, FrozenModel(base)) == (base.id,)


def test_kto_with_an_estimated_reference_point_is_another_run() -> None:
    """Runs of `kto` from before it was estimated had 0: what they trained is `apo_zero`, and is not taken for this."""
    kto, apo_zero, dpo = (
        parse(TrainConfig, {"method": {"kind": kind}}).identity()["method"] for kind in ("kto", "apo_zero", "dpo")
    )
    assert kto["reference_point"]
    assert apo_zero == {"kind": "apo_zero", "beta": 0.1, "good_weight": 1.0, "bad_weight": 1.0}
    assert dpo == {"kind": "dpo", "beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0}


@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ({"kind": "distil"}, "required and missing"),
        ({"kind": "distil", "teacher": ""}, "at least 1 character"),
        ({"kind": "distil", "teacher": "t", "k": 0}, "greater than or equal to 1"),
        ({"kind": "distil", "teacher": "t", "hard_weight": 1}, "less than 1"),
        ({"kind": "distil", "teacher": "t", "temperature": 0}, r"greater than or equal to 0\.1"),
        ({"kind": "orpo", "reference": "t"}, "has no effect with kind=orpo"),
        ({"kind": "simpo", "reference": "t"}, "has no effect with kind=simpo"),
    ],
)
def test_settings_that_cannot_be(method: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        parse(TrainConfig, {"method": method})


def test_audit_says_why_numbers_of_a_reference_are_not_compared(catalog: Catalog) -> None:
    """Of runs of earlier releases, and where an erasure or a removal took them: the audit of the rows goes through."""
    base = version(catalog, "base")
    data = dataset(catalog, [record_of(1)])
    settings = train_config(method={"kind": "dpo"})
    name = run_id(parse(TrainConfig, settings), "fp32", data, base)
    run(catalog, name.removeprefix("run_"), data.id, base.id, method="dpo", train=settings, base_digest=base.files_digest)
    why = _reference_difference(catalog.store, name, settings["method"])
    assert re.match(rf"not compared: references/{data.id}/\w+ is not kept", str(why))
    older = run(catalog, "older", data.id, base.id, method="kto", train=train_config(method={"kind": "kto"}))
    why = _reference_difference(catalog.store, older.id, {"kind": "kto"})
    assert "not computed again: run_older was trained with settings that mean something else" in str(why)
    assert _reference_difference(catalog.store, name, "sft") is None
    job = job_of(catalog, name)
    reference = reference_of(job)
    assert reference
    with catalog.store.staged_dir(reference.folder) as folder:
        (folder / "made_by.json").write_text("{}")
    catalog.store.delete_dir(paths.model(base.id))
    why = _reference_difference(catalog.store, name, settings["method"])
    assert "its base model is gone" in str(why)


@pytest.mark.parametrize("method", [{"kind": "distil", "teacher": "t", "k": 4}, {"kind": "dpo", "reference": "t"}])
def test_audit_says_that_a_teacher_is_gone(catalog: Catalog, method: dict[str, Any]) -> None:
    base, teacher, data = version(catalog, "base"), version(catalog, "teacher"), dataset(catalog, [record_of(1)])
    settings, frozen = train_config(method=method), FrozenModel(teacher)
    name = run_id(parse(TrainConfig, settings), "fp32", data, base, None, frozen)
    named = {"method": method["kind"], "frozen_model": teacher.id, "frozen_digest": teacher.files_digest}
    run(catalog, name[4:], data.id, base.id, train=settings, base_digest=base.files_digest, **named)
    reference = reference_of(job_of(catalog, name))
    assert reference
    with catalog.store.staged_dir(reference.folder) as folder:
        (folder / "made_by.json").write_text("{}")
    catalog.store.delete_dir(paths.model(teacher.id))
    why = _reference_difference(catalog.store, name, settings["method"])
    assert re.match(rf"not computed again.*{teacher.id}", str(why)), why
