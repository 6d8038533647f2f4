"""A classifier version in a replica: what it loads, what its card says, how it labels prompts for a route."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray")

from classifiers import TOPIC, TOXIC, make_classifier
from serving import make_adapter, register

from forge_ray.config.base import parse
from forge_ray.config.classify import REWARD
from forge_ray.config.release import AliasRoute, DeployConfig
from forge_ray.errors import ConfigError, StoreError
from forge_ray.records import EvalReport, ModelVersion
from forge_ray.release import promotion
from forge_ray.serve import replica as replica_module
from forge_ray.serve.calibration import ClassHead
from forge_ray.serve.canary import AnswerOutcome
from forge_ray.serve.context import Caller, Chosen
from forge_ray.serve.directory import ReplicaDirectory
from forge_ray.serve.engines import EnginePool
from forge_ray.serve.routing import RoutingFacts, RoutingInputs, table_of
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit
ENGINE = {"precision": "fp32", "page_size": 16, "num_blocks": 64, "max_batch_tokens": 64}


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_classifier(tiny_model_dir, tmp_path_factory.mktemp("served") / "model", TOPIC, TOXIC)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def report_of(version: ModelVersion, **more: Any) -> EvalReport:
    values: dict[str, Any] = {
        "subject": version.run,
        "subject_digest": version.files_digest,
        "dataset": "ds_0",
        "split": "test",
        "config": {},
        "num_examples": 9,
        "metrics": {"topic_temperature": 2.0, "toxic_temperature": 0.5, "exact_match": 1.0},
        "per_class": {},
        "items_sha256": "0" * 64,
        "thresholds": {"toxic/threat": 0.25},
        "unreached": {"topic/cards": "precision 0.99: the highest on 9 validation rows is 0.5"},
    }
    return EvalReport(**values | more).sealed()


def released(catalog: Catalog, folder: Path, **more: Any) -> ModelVersion:
    """The folder as a version with a report of its own before one of its base."""
    plain = register(catalog, folder, None, "topics")
    named = plain.model_copy(update={"run": "run_1"})
    reports = [report_of(named), report_of(named, subject="mv_base", subject_digest="sha256:1", thresholds={})]
    for report in reports:
        catalog.put(report)
    version = named.model_copy(update={"evals": tuple(report.id for report in reports), **more}).sealed()
    catalog.store.copy_dir(f"models/{plain.id}", f"models/{version.id}")
    return catalog.put(version)


def directory_of(catalog: Catalog, *names: str, **more: Any) -> ReplicaDirectory:
    config = parse(DeployConfig, {"name": "bot", "models": names, "engine": ENGINE, **more})
    facts = RoutingFacts(catalog.routes(), frozenset(), lambda one: catalog.get_as(ModelVersion, one))
    table = table_of(config, facts, {})
    directory = ReplicaDirectory(EnginePool(config, catalog.store))
    assert directory.prepare(table) == {}
    assert directory.go_live(table.id)
    return directory


def test_temperatures_and_thresholds_are_those_of_the_versions_own_report(store: Store, folder: Path) -> None:
    with Catalog.open(store) as catalog:
        version = released(catalog, folder, flags=("toxic/threat",))
        promotion.promote(catalog, version.id, "topics")
        directory = directory_of(catalog, "topics")
    try:
        head = directory.stable("topics", Caller("r")).head
        assert head is not None
        assert head.temperatures == {"topic": 2.0, "toxic": 0.5}
        assert (head.thresholds, head.flags, head.report) == ({"toxic/threat": 0.25}, ("toxic/threat",), version.evals[0])
        card = next(card for card in directory.cards(Caller("r")) if card["id"] == "topics")
        assert card["capabilities"] == {"completion_chat": False, "classification": True, "moderation": True}
        assert card["classifier"]["report"] == version.evals[0]
        assert card["classifier"]["unreached"].keys() == {"topic/cards"}
        assert [target["labels"] for target in card["classifier"]["targets"]] == [list(TOPIC.labels), list(TOXIC.labels)]
    finally:
        directory.engines.close()


def test_version_without_a_report_is_not_scaled_and_says_so(store: Store, folder: Path) -> None:
    with Catalog.open(store) as catalog:
        version = register(catalog, folder, None, "topics")
        directory = directory_of(catalog, version.id)
    try:
        (card,) = directory.cards(Caller("r"))
        assert (card["classifier"]["temperatures"], card["classifier"]["report"]) == ({}, None)
        assert card["capabilities"]["moderation"] is False
    finally:
        directory.engines.close()


def test_a_changed_report_is_refused(store: Store, folder: Path) -> None:
    with Catalog.open(store) as catalog:
        version = released(catalog, folder)
        path = Path(store.root) / "records" / "evals" / f"{version.evals[0]}.json"
        path = path if path.is_file() else next(Path(store.root).rglob(f"{version.evals[0]}.json"))
        path.write_text(path.read_text().replace('"topic_temperature":2.0', '"topic_temperature":9.0'))
        config = parse(DeployConfig, {"name": "bot", "models": [version.id], "engine": ENGINE})
        table = table_of(config, RoutingFacts({}, frozenset(), lambda one: version), {})
    pool = EnginePool(config, store)
    try:
        with pytest.raises(StoreError, match="was changed"):
            pool.load_version(table.versions[version.id])
    finally:
        pool.close()


def test_adapter_of_a_classifier_has_an_engine_of_its_own_and_its_base_is_not_loaded(
    store: Store, tiny_model_dir: Path, folder: Path, tmp_path: Path
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from forge_ray.models.class_head import write_targets

    torch.manual_seed(1)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=5)
    adapted = get_peft_model(plain, LoraConfig(r=4, task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"]))
    for name, weights in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weights, std=0.3)
    adapted.save_pretrained(tmp_path / "adapter")
    write_targets(tmp_path / "adapter", (TOPIC, TOXIC))
    with Catalog.open(store) as catalog:
        base = register(catalog, tiny_model_dir, None, "tiny", "imported")
        version = register(catalog, tmp_path / "adapter", base, "topics")
        other = register(catalog, make_adapter(tiny_model_dir, tmp_path / "chat", 1), base, "chat")
        promotion.promote(catalog, other.id, "chat")
        directory = directory_of(catalog, version.id)
    try:
        table = directory.current.table
        assert list(table.versions) == [version.id]  # nor are chat models on the same base served because of it
        assert (table.versions[version.id].weights, table.versions[version.id].base) == ("merged", base.id)
        loaded = directory.stable(version.id, Caller("r"))
        engine, _ = loaded.classifier
        ids = tuple(loaded.tokenizer.prompt_ids([{"role": "user", "content": "one two"}]))
        with torch.no_grad():
            expected = adapted.eval()(input_ids=torch.tensor([ids])).logits[0]
        assert engine.submit([ids]).result()[0] == pytest.approx(expected.double().numpy(), abs=1e-4)
        assert directory.engines.versions_in_memory() == [version.id]
    finally:
        directory.engines.close()


def test_classifier_decides_by_its_labels_where_a_route_sends_a_prompt(
    store: Store, tiny_model_dir: Path, folder: Path, tmp_path: Path
) -> None:
    with Catalog.open(store) as catalog:
        base = register(catalog, tiny_model_dir, None, "tiny", "imported")
        one, two = (register(catalog, make_adapter(tiny_model_dir, tmp_path / str(n), n), base, f"v{n}") for n in (1, 2))
        labels = register(catalog, folder, None, "topics")
        for label in TOPIC.labels:
            rules = [{"to": two.id, "classifier": labels.id, "label": f"topic/{label}"}]
            promotion.set_route(catalog, label, parse(AliasRoute, {"versions": {one.id: 1}, "rules": rules}))
        directory = directory_of(catalog, *TOPIC.labels)
        loaded = directory.stable("cards", Caller("r"))
        ids = tuple(loaded.tokenizer.prompt_ids([{"role": "user", "content": "one two"}]))

        async def versions(inputs: RoutingInputs) -> list[str]:
            return [(await directory.choose(name, Caller("r"), inputs)).loaded.version for name in TOPIC.labels]

        try:
            served = asyncio.run(versions(RoutingInputs({}, "", ids)))
            engine, _ = directory.current.loaded[labels.id].classifier
            likeliest = int(engine.submit([ids]).result()[0][:3].argmax())
            assert served == [two.id if n == likeliest else one.id for n in range(3)]
            too_long = asyncio.run(versions(RoutingInputs({}, "", ids * 1000)))
            assert too_long == [one.id] * 3
        finally:
            directory.engines.close()


def test_a_prompt_that_leaves_a_labelling_model_no_tokens_is_answered_without_its_label(
    store: Store, tiny_model_dir: Path, tmp_path: Path
) -> None:
    with Catalog.open(store) as catalog:
        base = register(catalog, tiny_model_dir, None, "tiny", "imported")
        one, two = (register(catalog, make_adapter(tiny_model_dir, tmp_path / str(n), n), base, f"v{n}") for n in (1, 2))
        rules = [{"to": two.id, "classifier": two.id, "label": "x"}]
        promotion.set_route(catalog, "bot", parse(AliasRoute, {"versions": {one.id: 1}, "rules": rules}))
        directory = directory_of(catalog, "bot")
    try:
        longest = directory.stable("bot", Caller("r")).engine.max_request_tokens
        chosen = asyncio.run(directory.choose("bot", Caller("r"), RoutingInputs({}, "", (1,) * (longest - 1))))
        assert chosen.loaded.version == one.id
    finally:
        directory.engines.close()


def test_routes_of_classifiers_and_of_models_that_write_do_not_mix(store: Store, tiny_model_dir: Path, folder: Path) -> None:
    with Catalog.open(store) as catalog:
        chat, labels = register(catalog, tiny_model_dir, None, "tiny"), register(catalog, folder, None, "topics")
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"versions": {labels.id: 9, chat.id: 1}}, "is a classifier, and .* generates text"),
            ({"versions": {chat.id: 1}, "shadow": [labels.id]}, "generates text, and .* is a classifier"),
            ({"versions": {chat.id: 1}, "rules": [{"to": labels.id, "user": ["a"]}]}, "cannot stand for both"),
            ({"versions": {labels.id: 1}, "fallback": "base"}, "names `base`, which generates text"),
            ({"versions": {labels.id: 1}, "rules": [{"to": "base", "user": ["a"]}]}, "names `base`"),
            (
                {"versions": {chat.id: 1}, "rules": [{"to": chat.id, "classifier": labels.id, "label": "cards"}]},
                "the label 'cards', which the classifier .* does not have",
            ),
        ]
        for route, says in wrong:
            with pytest.raises(ConfigError, match=says):
                promotion.set_route(catalog, "mixed", parse(AliasRoute, route))
        promotion.set_route(catalog, "plain", parse(AliasRoute, {"versions": {labels.id: 1}, "shadow": [labels.id]}))


def test_reward_model_is_not_loaded_and_no_route_looks_at_it(store: Store, tiny_model_dir: Path, tmp_path: Path) -> None:
    with Catalog.open(store) as catalog:
        chat = register(catalog, tiny_model_dir, None, "tiny")
        version = register(catalog, make_classifier(tiny_model_dir, tmp_path / "reward", REWARD), None, "rewards")
        rules = [{"to": chat.id, "classifier": version.id, "label": "reward"}]
        with pytest.raises(ConfigError, match="is a reward model"):
            promotion.set_route(catalog, "mixed", parse(AliasRoute, {"versions": {chat.id: 1}, "rules": rules}))
        config = parse(DeployConfig, {"name": "bot", "models": [version.id], "engine": ENGINE})
        table = table_of(config, RoutingFacts({}, frozenset(), lambda one: catalog.get_as(ModelVersion, one)), {})
    pool = EnginePool(config, store)
    with pytest.raises(ConfigError, match=r"\(rewards\) is a reward model, which no endpoint serves") as caught:
        pool.load_version(table.versions[version.id])
    assert "forge eval" in caught.value.hint


def test_canary_of_a_classifier_is_timed_by_the_tokens_that_it_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica_module.time, "monotonic", lambda: 12.0)
    outcomes: list[AnswerOutcome] = []
    for head, expected in ((ClassHead((TOPIC,)), 0.02), (None, 0.0)):
        loaded: Any = SimpleNamespace(head=head, version="mv_1")
        replica_module._OutcomeRecorder(Chosen("topics", loaded, "stable"), outcomes, 10.0).close(100, 0, 200)
        assert outcomes[-1].token_s == pytest.approx(expected)
