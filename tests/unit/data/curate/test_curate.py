"""Each rule of `data.curate`, alone: what it keeps, drops, changes, marks and counts."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from forge_ray.config.curate import Rule
from forge_ray.config.data import DataConfig
from forge_ray.data.build.build import index_sources
from forge_ray.data.curate.decontaminate import build_index
from forge_ray.data.curate.rules import Verdict, compile_rule, meta_fields, require_packages
from forge_ray.data.record.schema import DataRecord, parse_record
from forge_ray.errors import ConfigError, DataError

pytestmark = pytest.mark.unit

RULES: TypeAdapter[Rule] = TypeAdapter(Rule)
GERMAN = "Die Buchung wurde gestern von der Bank zurückgewiesen, weil das Konto nicht gedeckt war."
ENGLISH = "The booking was rejected by the bank yesterday because there was not enough money in the account."


def judge(rule: dict[str, Any], record: DataRecord, index: Any = None) -> Verdict:
    return compile_rule(RULES.validate_python(rule), index)(record)


def text(value: str, **meta: str) -> DataRecord:
    return parse_record({"text": value, **meta}, keep=tuple(meta))


def chat(prompt: str, answer: str) -> DataRecord:
    return parse_record({"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]})


@pytest.mark.parametrize(
    ("rule", "value", "reason"),
    [
        ({"min_chars": 5}, "abcd", "fewer than min_chars characters"),
        ({"min_chars": 4}, "abcd", ""),
        ({"max_chars": 3}, "abcd", "more than max_chars characters"),
        ({"max_chars": 4}, "abcd", ""),
        ({"min_words": 3}, "two words", "fewer than min_words words"),
        ({"min_words": 2}, "two words", ""),
    ],
)
def test_length(rule: dict[str, int], value: str, reason: str) -> None:
    verdict = judge({"rule": "length", **rule}, text(value))
    assert verdict.reason == reason
    assert (verdict.record is None) == bool(reason)


def test_length_counts_all_texts_of_a_record() -> None:
    assert judge({"rule": "length", "min_words": 4}, chat("one two", "three four")).record


def test_repetition() -> None:
    rule = {"rule": "repetition", "min_words": 20}
    different = " ".join(f"word{number}" for number in range(100))
    assert judge(rule, text(different)).record
    assert judge(rule, text("spam and eggs\n" * 20)).reason == "repeats its lines"
    assert judge(rule, text("buy now " * 30)).reason == "repeats one pair of words"
    run = "alpha beta gamma delta epsilon zeta eta theta "
    assert judge(rule, text(different + " " + " ".join(f"{run} x{number}" for number in range(6)))).reason == (
        "repeats runs of five words"
    )
    assert judge(rule, text("buy now " * 9)).record, "shorter than min_words"


def test_language() -> None:
    rule = {"rule": "language", "keep": ["en"]}
    assert judge(rule, text(ENGLISH)).detections == {"en": 1}
    verdict = judge(rule, text(GERMAN))
    assert (verdict.record, verdict.reason, verdict.detections) == (None, "language de", {"de": 1})
    assert judge({"rule": "language", "keep": ["en", "de"]}, chat(GERMAN, ENGLISH)).record
    assert judge(rule, text("ja, gerne")).detections == {"too short to judge": 1}


def test_unknown_language_error_lists_the_supported_ones() -> None:
    with pytest.raises(DataError, match="does not know english, xx") as caught:
        judge({"rule": "language", "keep": ["en", "xx", "english"]}, text(ENGLISH))
    assert " de " in (caught.value.hint or "")


def test_language_rule_requires_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "py3langid", None)
    rule = {"rule": "language", "keep": ["en"]}
    data = DataConfig.model_validate({"sources": [{"path": "/nowhere/rows.jsonl"}], "curate": [rule]})
    with pytest.raises(ConfigError, match="rule language needs the package 'py3langid'") as worker:
        judge(rule, text(ENGLISH))
    with pytest.raises(ConfigError, match="rule language needs the package 'py3langid'") as driver:
        index_sources(data)  # before it looks for the files
    for error in (worker, driver):
        assert error.value.hint.startswith("pip install 'forge-ray[language]' on every node")
    require_packages([RULES.validate_python({"rule": "length", "min_chars": 1})])
    assert judge({"rule": "length", "min_chars": 1}, text(ENGLISH)).record


@pytest.mark.parametrize("action", ["flag", "mask", "drop"])
def test_personal_data(action: str) -> None:
    record = chat("Write to jane.doe@acme-bank.com or pay to DE89 3704 0044 0532 0130 00.", "I will.")
    verdict = judge({"rule": "personal_data", "action": action}, record)
    assert verdict.detections == {"email": 1, "iban": 1}
    if action == "drop":
        assert (verdict.record, verdict.reason) == (None, "email,iban")
    elif action == "flag":
        assert verdict.record is record
        assert verdict.flag == "personal_data:email,iban"
    else:
        assert verdict.record is not None
        assert verdict.record.messages[0]["content"] == "Write to <EMAIL> or pay to <IBAN>."
        assert verdict.record.id != record.id
    assert judge({"rule": "personal_data", "action": action, "kinds": ["card"]}, record).record is record


def test_masked_tool_call_arguments_stay_valid_json() -> None:
    key = "AKIA" + "Q3EGRZJ2LKWNFV7T"
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"key": "' + key + '", "n": 1}'}}
    record = parse_record(
        {
            "messages": [
                {"role": "user", "content": "go"},
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "ok", "tool_call_id": "abcdefghi"},
                {"role": "assistant", "content": "done"},
            ],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
        }
    )
    verdict = judge({"rule": "secrets", "action": "mask"}, record)
    assert verdict.record is not None
    assert verdict.record.messages[1]["tool_calls"][0]["function"]["arguments"] == '{"key": "<CLOUD_KEY>", "n": 1}'


def test_licence_and_consent() -> None:
    licence = {"rule": "licence", "allow": ["cc-by-4.0"]}
    assert judge(licence, text("a", licence="cc-by-4.0")).record
    assert judge(licence, text("a", licence="gpl")).reason == "licence is 'gpl'"
    assert judge(licence, text("a")).reason == "no licence"
    consent = {"rule": "consent", "field": "opt_in"}
    assert judge(consent, text("a", opt_in="Yes")).record
    assert judge(consent, text("a", opt_in="no")).reason == "opt_in is 'no'"
    assert judge(consent, text("a")).reason == "no opt_in"
    assert meta_fields((RULES.validate_python(consent),)) == ("opt_in",)


def test_decontaminate() -> None:
    rule = {"rule": "decontaminate", "against": ["x"], "ngram": 5}
    index = build_index(["one two three four five six"], 5)
    assert judge(rule, chat("say two three four five six", "no"), index).reason == "shares 5 words with an evaluation set"
    assert judge(rule, chat("two three four", "five six"), index).record, "a run ends with its text"


@pytest.mark.parametrize(
    "rule",
    [
        {"rule": "length"},
        {"rule": "length", "min_chars": 5, "max_chars": 4},
        {"rule": "language", "keep": []},
        {"rule": "personal_data", "kinds": ["name"]},
        {"rule": "unknown"},
    ],
)
def test_invalid_rule_settings_are_rejected(rule: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        RULES.validate_python(rule)
