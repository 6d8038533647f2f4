"""Test records of earlier cycles stay out of later training, whatever the shares of the splits."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import fabricated
import pytest
from fabricated import dataset, record_of

from forge_ray.config.base import parse, resolved
from forge_ray.config.curate import HeldOut
from forge_ray.config.data import DataConfig, Splits
from forge_ray.data.curate.heldout import held_out_reason, index_of
from forge_ray.data.curate.rules import Check, compile_rule
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
    check = check_of(catalog, splits, name, ngram=0)
    dropped = {record.id for record in RECORDS if check(record).record is None}
    moved = {one for one in tested if SPLITS[split_of(bytes.fromhex(one.removeprefix("rec_")), splits)] != "test"}
    assert dropped == moved
    assert bool(moved) == (now < 0.4)
    assert {check(record).reason for record in RECORDS if record.id in dropped} <= {f"a test row of {name}"}


def test_rows_that_are_gone_are_said(catalog: Catalog, capsys: pytest.CaptureFixture[str]) -> None:
    name, _ = ids(catalog, "before", 0.4)
    catalog.store.delete(f"datasets/{name}/MANIFEST.json")
    rule = HeldOut(rule="held_out", against=(name,))
    index = index_of(rule, catalog.store)
    assert index.shape == (2, 0)
    assert f"{name}: its rows are gone, and its test rows are not held out" in capsys.readouterr().err
    assert held_out_reason(RECORDS[0], rule, index, config_of(0.1).splits) == ""


def chat(question: str, answer: str, system: str = "") -> DataRecord:
    first = [{"role": "system", "content": system}] if system else []
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return DataRecord({"messages": [*first, *turns]}, "chat")


def prose(seed: int, num_words: int) -> list[str]:
    return random.Random(seed).choices([f"w{number}" for number in range(5000)], k=num_words)


def edited(words: list[str], *places: int) -> list[str]:
    return [f"new{place}" if place in places else word for place, word in enumerate(words)]


def spoken(words: list[str]) -> str:
    return f"{' '.join(words).capitalize()}!"


TEMPLATE = "please name the section of the package that is described in the following lines in one word"


def test_edited_copies_of_a_test_row_of_any_cycle_are_dropped_by_the_name_of_its_dataset(catalog: Catalog) -> None:
    """Three cycles. Of the copies of test rows those with a run of 13 words left are dropped, and of training rows none."""
    canned, system = spoken(prose(900, 30)), spoken(prose(901, 40))
    rows = {
        cycle: [chat(f"{TEMPLATE}: {spoken(prose(1000 * cycle + n, 40))}", canned, system) for n in range(60)]
        for cycle in (1, 2, 3)
    }
    manifests = {
        cycle: dataset(catalog, own, data={"splits": {"test": 0.3, "validation": 0.1}}, name=f"cycle {cycle}")
        for cycle, own in rows.items()
    }
    for manifest in manifests.values():
        catalog.store.write(f"datasets/{manifest.id}/MANIFEST.json", b"{}")
    splits = config_of(0.0).splits
    check = check_of(catalog, splits, *(manifest.id for manifest in manifests.values()))
    num_tested = 0
    for cycle, manifest in manifests.items():
        for n, row in enumerate(rows[cycle]):
            is_tested = SPLITS[split_of(bytes.fromhex(row.id.removeprefix("rec_")), config_of(0.3).splits)] == "test"
            num_tested += is_tested
            words = prose(1000 * cycle + n, 40)
            copy = chat(f"{TEMPLATE}: {spoken(edited(words, 3, 25))}", "another answer", "another system prompt")
            assert check(row).reason == (f"a test row of {manifest.id}" if is_tested else "")
            assert check(copy).reason == (f"shares 13 words with a test row of {manifest.id}" if is_tested else "")
            far = chat(f"{TEMPLATE}: {spoken(edited(words, 0, 10, 20, 30))}", canned, system)
            assert check(far).record == far  # its longest run in common has nine words
            assert check_of(catalog, splits, manifest.id, ngram=0)(copy).record == copy
    assert num_tested > 30


def test_short_questions_are_compared_with_their_answers(catalog: Catalog) -> None:
    answer = prose(1, 30)
    tested = chat("What is photosynthesis?", spoken(answer))
    label = chat("Is it open on Sundays then?", "Yes, until noon.")
    tiny = chat("Well?", "yes")
    rows = [tested, label, tiny]
    manifest = dataset(catalog, rows, data={"splits": {"test": 1.0, "validation": 0.0}})
    catalog.store.write(f"datasets/{manifest.id}/MANIFEST.json", b"{}")
    check = check_of(catalog, config_of(0.0).splits, manifest.id)
    shares = f"shares 13 words with a test row of {manifest.id}"
    assert check(chat("what is PHOTOSYNTHESIS", spoken(edited(answer, 2, 28)))).reason == shares
    assert check(chat("is it open on sundays, then", "yes: until noon")).reason == shares
    for other in (
        chat("What is respiration?", spoken(answer)),
        chat("What is photosynthesis?", spoken(prose(2, 30))),
        chat("Is it open on Sundays then?", "No, never at all."),
        chat("Well?", "Yes."),
    ):
        assert check(other).record == other


def test_reasons_are_counted_by_dataset_and_a_test_row_here_stays(catalog: Catalog) -> None:
    texts = [DataRecord({"text": spoken(prose(n, 40))}, "text") for n in range(40)]
    manifest = dataset(catalog, texts, data={"splits": {"test": 1.0, "validation": 0.0}})
    catalog.store.write(f"datasets/{manifest.id}/MANIFEST.json", b"{}")
    copies = [DataRecord({"text": spoken(edited(prose(n, 40), 20))}, "text") for n in range(40)]
    splits = config_of(0.3).splits
    reasons = Counter(check_of(catalog, splits, manifest.id)(copy).reason for copy in copies)
    stay = sum(split_of(bytes.fromhex(copy.id.removeprefix("rec_")), splits) == SPLITS.index("test") for copy in copies)
    assert stay > 0
    assert reasons == {"": stay, f"shares 13 words with a test row of {manifest.id}": 40 - stay}


def check_of(catalog: Catalog, splits: Splits, *against: str, ngram: int = 13) -> Check:
    rule = HeldOut(rule="held_out", against=against, ngram=ngram)
    return compile_rule(rule, index_of(rule, catalog.store), splits)


def test_runs_of_too_few_words_are_refused() -> None:
    with pytest.raises(ConfigError, match="ngram=4, and so few words in common prove nothing") as caught:
        config_of(0.1, {"rule": "held_out", "against": ["ds_1"], "ngram": 4})
    assert "0 for equal records alone" in caught.value.hint


def test_only_dataset_versions_are_held_out() -> None:
    with pytest.raises(ConfigError, match="against"):
        config_of(0.1, {"rule": "held_out", "against": ["eval.jsonl"]})


def test_every_earlier_cycle_with_test_rows_is_held_out(catalog: Catalog) -> None:
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
    for share in (0.4, 0.1):
        assert against(three, share) == [(sets[2], sets[1], sets[0])]
    assert against(two, 0.1) == [(sets[1], sets[0])]
    stated: dict[str, object] = {"rule": "held_out", "against": [sets[0]]}
    assert against(three, 0.25, stated) == [(sets[0],), (sets[2], sets[1])]
    unchanged = config_of(0.4)
    assert with_held_out(catalog, base, unchanged) is unchanged  # a first cycle's dataset keeps its id
    untested, _ = ids(catalog, "untested", 0.0)
    only = fabricated.version(catalog, "4", fabricated.run(catalog, "4", untested, base.id).id, base.id)
    assert with_held_out(catalog, only, unchanged) is unchanged


# ---------------------------------------------------------------- by conversation


QUESTION = "Why was my card charged twice in March?"


def turns_of(*turns: str, system: str = "", kind: str = "chat", **more: Any) -> DataRecord:
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
            turns_of(question, "A."),
            turns_of(question, "A.", "And then?", "B."),
            turns_of(f" {question.upper()} ", "C.", system="Be brief."),
            turns_of(question, "A.", kind="feedback", label=True),
            turns_of(question, "A.", "And then?", "B.", kind="feedback", label=False),
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
    conversations = [turns_of(f"Question {number} of a customer", f"Answer {turn}.") for number, turn in turns]
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
    tested = [turns_of(QUESTION, "We will refund it."), turns_of("hello", "Hi.", "I lost the key of my locker", "Come by.")]
    manifest = dataset(catalog, tested, data={"splits": {"test": 1.0, "validation": 0.0}}, name="tested")
    catalog.store.write(f"datasets/{manifest.id}/MANIFEST.json", b"{}")
    splits = config_of(0.0).splits
    rows = {
        "another answer": turns_of(QUESTION, "It was an error of ours."),
        "a rating of it": turns_of(QUESTION, "It was an error of ours.", kind="feedback", label=False),
        "a later turn": turns_of(QUESTION, "We will refund it.", "When?", "On Monday."),
        "another system prompt": turns_of(QUESTION, "So.", system="Be brief."),
        "another conversation": turns_of("Where is my parcel?", "On its way."),
        "only the greeting in common": turns_of("hello", "Hi.", "What are your prices?", "See the list."),
        "the beginning of a longer one": turns_of("hello", "Hello!"),
    }
    dropped: dict[str, set[str]] = {}
    for by in ("record", "conversation"):
        rule = HeldOut(rule="held_out", by=by, against=(manifest.id,), ngram=0)
        check = compile_rule(rule, index_of(rule, catalog.store), splits)
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
    rules = with_held_out(catalog, one, config_of(0.4)).curate
    assert [rule.by for rule in rules if isinstance(rule, HeldOut)] == ["record"]


def test_settings_of_before_keep_the_ids_of_their_datasets() -> None:
    assert resolved(config_of(0.1))["splits"] == {"validation": 0.1, "test": 0.1}
    assert resolved(by_conversation(0.1))["splits"]["by"] == "conversation"
    rules = resolved(config_of(0.1, {"rule": "held_out", "against": ["ds_1"]}))["curate"]
    assert rules == [{"rule": "held_out", "against": ["ds_1"], "ngram": 13}]
