"""Test records of earlier cycles stay out of later training, whatever the shares of the splits."""

from __future__ import annotations

from typing import Any

import fabricated
import numpy as np
import pytest
from fabricated import dataset, record_of

from forge_ray.config.base import parse, resolved
from forge_ray.config.curate import HeldOut
from forge_ray.config.data import DataConfig, Splits
from forge_ray.data.curate.heldout import index_of, is_held_out
from forge_ray.data.curate.rules import compile_rule
from forge_ray.data.dataset.index import places
from forge_ray.data.dataset.version import SPLITS, find_record, place, records, split_of
from forge_ray.data.record.schema import DataRecord
from forge_ray.errors import ConfigError, NotFound
from forge_ray.records import ModelVersion
from forge_ray.store.catalog import Catalog
from forge_ray.train.start import with_held_out

pytestmark = pytest.mark.unit
RECORDS = [record_of(number) for number in range(200)]


def config_of(test: float, *rules: dict[str, object]) -> DataConfig:
    splits = {"test": test, "validation": 0.1}
    return parse(DataConfig, {"sources": [{"path": "rows.jsonl"}], "splits": splits, "curate": list(rules)})


def ids(catalog: Catalog, name: str, test: float) -> tuple[str, set[str]]:
    """A dataset version, and its test records."""
    manifest = dataset(catalog, RECORDS, data={"splits": {"test": test, "validation": 0.1}}, name=name)
    catalog.store.write(f"datasets/{manifest.id}/MANIFEST.json", b"{}")
    tables = list(records(catalog.store, manifest, "test", ["record"]))
    return manifest.id, {one for table in tables for one in table.column("record").to_pylist()}


@pytest.mark.parametrize("now", [0.0, 0.1, 0.4, 0.6])
def test_records_of_an_earlier_test_split_are_dropped_unless_they_are_tested_again(catalog: Catalog, now: float) -> None:
    """Against the definition: a record of that split that these shares train or validate on."""
    name, tested = ids(catalog, "before", 0.4)
    assert 50 < len(tested) < 110
    splits = config_of(now).splits
    check = compile_rule(HeldOut(rule="held_out", against=(name,)), index_of((name,), catalog.store), splits)
    dropped = {record.id for record in RECORDS if check(record).record is None}
    moved = {one for one in tested if SPLITS[split_of(bytes.fromhex(one.removeprefix("rec_")), splits)] != "test"}
    assert dropped == moved
    assert bool(moved) == (now < 0.4)
    assert {check(record).reason for record in RECORDS if record.id in dropped} <= {"a test row of an earlier cycle"}


def test_rows_that_are_gone_are_said(catalog: Catalog, capsys: pytest.CaptureFixture[str]) -> None:
    name, _ = ids(catalog, "before", 0.4)
    catalog.store.delete(f"datasets/{name}/MANIFEST.json")
    assert len(index_of((name,), catalog.store)) == 0
    assert f"{name}: its rows are gone, and its test rows are not held out" in capsys.readouterr().err
    assert not is_held_out(RECORDS[0], np.zeros(0, np.uint64), config_of(0.1).splits)


def test_only_dataset_versions_are_held_out() -> None:
    with pytest.raises(ConfigError, match="against"):
        config_of(0.1, {"rule": "held_out", "against": ["eval.jsonl"]})


def test_earlier_cycles_are_held_out_where_the_share_of_the_test_split_fell(catalog: Catalog) -> None:
    """Through `continue` and `merge`: base ← one ← two (continue) ← merged ← three."""
    base = fabricated.version(catalog, "base")
    sets = [ids(catalog, name, share)[0] for name, share in (("one", 0.4), ("two", 0.2), ("three", 0.3))]
    one = fabricated.version(catalog, "1", fabricated.run(catalog, "1", sets[0], base.id).id, base.id, weights="adapter")
    two_run = fabricated.run(catalog, "2", sets[1], base.id, initial_adapter=one.id, initial_digest=one.files_digest)
    two = fabricated.version(catalog, "2", two_run.id, base.id, weights="adapter")
    merged = fabricated.version(catalog, "merged", "", two.id, status="merged", source="2 merged into base")
    three_run = fabricated.run(catalog, "3", sets[2], merged.id)
    three = fabricated.version(catalog, "3", three_run.id, merged.id)

    def against(version: ModelVersion, share: float, *rules: dict[str, object]) -> list[tuple[str, ...]]:
        rules_now = with_held_out(catalog, version, config_of(share, *rules)).curate
        return [rule.against for rule in rules_now if isinstance(rule, HeldOut)]

    assert against(base, 0.0) == []
    assert against(three, 0.4) == []
    assert against(three, 0.3) == [(sets[0],)]
    assert against(three, 0.25) == [(sets[2], sets[0])]
    assert against(three, 0.1) == [(sets[2], sets[1], sets[0])]
    assert against(two, 0.1) == [(sets[1], sets[0])]
    stated = {"rule": "held_out", "against": [sets[0]]}
    assert against(three, 0.25, stated) == [(sets[0],), (sets[2],)]
    unchanged = config_of(0.4)
    assert with_held_out(catalog, three, unchanged) is unchanged


# ---------------------------------------------------------------- by conversation


QUESTION = "Why was my card charged twice in March?"


def chat(*turns: str, system: str = "", kind: str = "chat", **more: Any) -> DataRecord:
    """Turns of user and assistant in turn; `kind` feedback: the last one is the answer."""
    roles = ("user", "assistant")
    messages = [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
    messages = ([{"role": "system", "content": system}] if system else []) + messages
    if kind == "chat":
        return DataRecord({"messages": messages})
    return DataRecord({"messages": messages[:-1], "answer": messages[-1:], **more}, kind)


def by_conversation(test: float) -> DataConfig:
    splits = {"test": test, "validation": 0.1, "by": "conversation"}
    return parse(DataConfig, {"sources": [{"path": "rows.jsonl"}], "splits": splits})


def test_all_records_of_a_conversation_are_in_one_split() -> None:
    config, by_record = by_conversation(0.3), config_of(0.3)
    seen, divided = set(), 0
    for number in range(60):
        question = f"Question {number} of a customer"
        records_of = [
            chat(question, "A."),
            chat(question, "A.", "And then?", "B."),
            chat(f" {question.upper()} ", "C.", system="Be brief."),
            chat(question, "A.", kind="feedback", label=True),
            chat(question, "A.", "And then?", "B.", kind="feedback", label=False),
        ]
        (split,) = {place(record, config)[0] for record in records_of}
        divided += len({place(record, by_record)[0] for record in records_of}) > 1
        seen.add(split)
    assert seen == {0, 1, 2}
    assert divided > 30, "by record they are not"


def test_plain_text_is_divided_by_record_in_any_case() -> None:
    for record in RECORDS[:50]:
        assert place(record, by_conversation(0.4)) == place(record, config_of(0.4))


def test_a_dataset_that_is_divided_by_conversation_finds_its_records(catalog: Catalog) -> None:
    turns = [(number, turn) for number in range(20) for turn in range(3)]
    conversations = [chat(f"Question {number} of a customer", f"Answer {turn}.") for number, turn in turns]
    splits = {"test": 0.3, "validation": 0.2, "by": "conversation"}
    manifest = dataset(catalog, conversations, data={"splits": splits}, name="conversations")
    config = by_conversation(0.3).model_copy(update={"splits": Splits.model_validate(splits)})
    for record in conversations:
        row = find_record(catalog.store, manifest, record.id)
        assert (row["record"], row["split"]) == (record.id, SPLITS[place(record, config)[0]])
    listed = places(catalog.store, manifest, [record.id for record in conversations])
    assert {one.record for one in listed} == {record.id for record in conversations}
    with pytest.raises(NotFound):
        find_record(catalog.store, manifest, RECORDS[0].id)


def test_the_conversations_of_test_rows_are_dropped_by_conversation_alone(catalog: Catalog) -> None:
    tested = [chat(QUESTION, "We will refund it."), chat("hello", "Hi.", "I lost the key of my locker", "Come by.")]
    manifest = dataset(catalog, tested, data={"splits": {"test": 1.0, "validation": 0.0}}, name="tested")
    catalog.store.write(f"datasets/{manifest.id}/MANIFEST.json", b"{}")
    splits = config_of(0.0).splits
    rows = {
        "another answer": chat(QUESTION, "It was an error of ours."),
        "a rating of it": chat(QUESTION, "It was an error of ours.", kind="feedback", label=False),
        "a later turn": chat(QUESTION, "We will refund it.", "When?", "On Monday."),
        "another system prompt": chat(QUESTION, "So.", system="Be brief."),
        "another conversation": chat("Where is my parcel?", "On its way."),
        "only the greeting in common": chat("hello", "Hi.", "What are your prices?", "See the list."),
        "the beginning of a longer one": chat("hello", "Hello!"),
    }
    dropped: dict[str, set[str]] = {}
    for by in ("record", "conversation"):
        rule = HeldOut(rule="held_out", by=by, against=(manifest.id,))
        check = compile_rule(rule, index_of(rule.against, catalog.store, rule.by), splits)
        dropped[by] = {name for name, record in rows.items() if check(record).record is None}
        assert check(tested[0]).record is None
    assert dropped["record"] == set()
    assert dropped["conversation"] == {"another answer", "a rating of it", "a later turn", "another system prompt"}


def test_earlier_cycles_are_held_out_where_conversations_are_divided_from_now_on(catalog: Catalog) -> None:
    base = fabricated.version(catalog, "base")
    name, _ = ids(catalog, "one", 0.2)
    one = fabricated.version(catalog, "1", fabricated.run(catalog, "1", name, base.id).id, base.id, weights="adapter")
    rules = with_held_out(catalog, one, by_conversation(0.4)).curate
    assert [(rule.by, rule.against) for rule in rules if isinstance(rule, HeldOut)] == [("conversation", (name,))]
    assert with_held_out(catalog, one, config_of(0.4)).curate == ()


def test_settings_of_before_keep_the_ids_of_their_datasets() -> None:
    assert resolved(config_of(0.1))["splits"] == {"validation": 0.1, "test": 0.1}
    assert resolved(by_conversation(0.1))["splits"]["by"] == "conversation"
    rules = resolved(config_of(0.1, {"rule": "held_out", "against": ["ds_1"]}))["curate"]
    assert rules == [{"rule": "held_out", "against": ["ds_1"]}]
