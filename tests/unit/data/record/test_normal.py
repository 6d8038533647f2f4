"""Normal forms: rows and ids that differ only in their bytes have the same one, others have others."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge_ray.data.record.normal import folded, plain, row_digest, row_digests, row_form, subject_form
from forge_ray.data.record.schema import DataRecord, parse_record

pytestmark = pytest.mark.unit
INVISIBLE = ("\u200b", "\u200d", "\ufeff", "\u00ad", "\u2060", "\ufe0f", "\u034f")
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=40)


def chat(*turns: tuple[str, str]) -> DataRecord:
    return parse_record({"messages": [{"role": role, "content": content} for role, content in turns]})


@pytest.mark.parametrize(
    ("value", "form"),
    [
        ("4711", "4711"),
        ("4711.0", "4711"),
        ("4711.000", "4711"),
        ("-3.0", "-3"),
        ("-0.0", "0"),
        ("1e+16", "10000000000000000"),
        ("1.5e+16", "15000000000000000"),
        (" 4711\n", "4711"),
        ("４７１１", "4711"),
        ("wq\u200b", "wq"),
        ("\ufeffwq", "wq"),
        ("a  b", "a b"),
        ("Jose\u0301", "José"),
        # these tell persons apart
        ("0042", "0042"),
        ("0042.0", "0042.0"),
        ("+4711", "+4711"),
        ("10.10", "10.10"),
        ("1e5", "1e5"),
        ("1E5", "1E5"),
        ("1.5e+00", "1.5e+00"),
        ("WQ", "WQ"),
        ("9e+999", "9e+999"),
    ],
)
def test_form_of_a_subject(value: str, form: str) -> None:
    assert subject_form(value) == form


def test_case_counts_unless_the_column_ignores_it() -> None:
    assert subject_form("WQ") != subject_form("wq")
    assert subject_form("Straße", caseless=True) == subject_form("STRASSE", caseless=True)


@settings(deadline=None)
@given(TEXTS, st.sampled_from(INVISIBLE), st.integers(0, 40), st.sampled_from(["NFC", "NFD", "NFKC", "NFKD"]))
def test_form_does_not_depend_on_bytes(text: str, mark: str, place: int, form: str) -> None:
    other = unicodedata.normalize(form, text[:place] + mark + text[place:])
    assert folded(other) == folded(text)
    assert folded(f" {text.upper().lower()} ") == folded(text.upper())
    assert plain(other) == plain(text)


@settings(deadline=None)
@given(TEXTS)
def test_forms_are_their_own_forms(text: str) -> None:
    assert folded(folded(text)) == folded(text)
    assert plain(plain(text)) == plain(text)


SAME = [
    chat(("user", "Where is my café parcel?"), ("assistant", "At the door.")),
    chat(("user", "Where is my café parcel? "), ("assistant", "At  the door.\n")),
    chat(("user", "WHERE IS MY CAFÉ PARCEL?"), ("assistant", "at the door.")),
    chat(("user", "Where is my cafe\u0301 parcel?"), ("assistant", "At the door.")),
    chat(("user", "Where is my ca\u200bfé parcel?"), ("assistant", "At the door.")),
    chat(("system", "Be brief."), ("user", "Where is my café parcel?"), ("assistant", "At the door.")),
    chat(("developer", "Be brief."), ("user", "Where is my café parcel?"), ("assistant", "At the door.")),
    parse_record({"prompt": "Where is my café parcel? ", "completion": "At the door."}),
    DataRecord({"text": "Where is my café parcel? At the door."}, "text"),
    DataRecord({"text": "Where is my café parcel?\nAt the door."}, "text"),
    DataRecord({"text": "User: Where is my café parcel?\nAssistant: At the door."}, "text"),
    DataRecord({"text": "### Human: Where is my café parcel?\n**Assistant:** At the door."}, "text"),
]


@pytest.mark.parametrize("record", SAME[1:], ids=range(1, len(SAME)))
def test_variants_of_a_row_have_its_form(record: DataRecord) -> None:
    assert row_digest(record) == row_digest(SAME[0])
    assert record.id != SAME[0].id


@pytest.mark.parametrize(
    "record",
    [
        chat(("user", "Where is my café parcel!"), ("assistant", "At the door.")),
        chat(("user", "Where is my cafe parcel?"), ("assistant", "At the door.")),
        chat(("user", "Where is my café parcel?"), ("assistant", "At the back door.")),
        chat(("user", "Where is my café parcel?"), ("assistant", "At the door."), ("user", "Thanks")),
    ],
)
def test_other_rows_have_other_forms(record: DataRecord) -> None:
    assert row_digest(record) != row_digest(SAME[0])


def test_signs_and_vowels_tell_rows_apart() -> None:
    texts = ["5+3", "5-3", "5 3", "की", "का", "👍", "👎"]
    assert len({row_digest(DataRecord({"text": text}, "text")) for text in texts}) == len(texts)


def test_rows_with_other_images_and_rows_without_a_word_differ() -> None:
    def shown(image: str) -> DataRecord:
        parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]
        return DataRecord({"messages": [{"role": "user", "content": parts}]})

    assert row_digest(shown("sha256:a")) != row_digest(shown("sha256:b"))
    assert row_form(DataRecord({"text": " \u200b\n"}, "text")) == ""
    assert row_digest(DataRecord({})) == ""


def test_order_of_keys_and_json_of_arguments_do_not_count() -> None:
    def called(arguments: str) -> DataRecord:
        call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
        return DataRecord({"messages": [{"role": "assistant", "tool_calls": [call], "content": "x"}]})

    assert row_form(called('{"b": "2", "a": "1"}')) == row_form(called('{"a":"1","b":"2"}')) == "x 1 2"
    pair = {"chosen": [{"role": "assistant", "content": "yes"}], "rejected": [{"role": "assistant", "content": "no"}]}
    assert row_form(DataRecord(pair)) == row_form(DataRecord(dict(reversed(pair.items()))))


@pytest.mark.parametrize("content", ["<think>two and two</think>4", "<think>\ntwo and two\n</think>\n\n4"])
def test_row_with_reasoning_has_the_form_of_the_tags_too(content: str) -> None:
    """Tombstones of versions that knew no reasoning hold that form."""
    turns = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": content}]
    record = parse_record({"messages": turns})
    assert "reasoning_content" in record.messages[1]
    assert row_digest(DataRecord({"messages": turns})) in list(row_digests(record))
    assert list(row_digests(chat(("user", "a"), ("assistant", "b")))) == [
        row_digest(chat(("user", "a"), ("assistant", "b")))
    ]
