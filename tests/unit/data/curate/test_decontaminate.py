"""Records that share a run of words with an evaluation set are found; those that do not are kept."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from forge_ray.data.curate.decontaminate import build_index, contaminated, evaluation_texts
from forge_ray.errors import DataError
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit

QUESTION = "Which of these four rivers is the longest one that flows through more than two capitals of Europe today?"


def test_shared_run_of_thirteen_words_is_detected_in_any_context() -> None:
    index = build_index([QUESTION], 13)
    quoted = "he asked: which of THESE four rivers, is the longest one; that flows through more than two!"
    assert contaminated(quoted, index, 13)
    assert contaminated("which of these four rivers is the longest one that flows through", index, 13) is False  # 12 words
    assert not contaminated(QUESTION.replace("rivers", "roads").replace("two", "six"), index, 13)


def test_short_evaluation_text_matches_as_a_whole_unless_too_common() -> None:
    index = build_index(["What is the capital of France?", "yes", "Not at all."], 13)
    assert contaminated("what is the capital of france", index, 13)
    assert not contaminated("I wonder: what is the capital of France?", index, 13)
    assert not contaminated("yes", index, 13)
    assert not contaminated("Not at all.", index, 13)


def test_random_text_is_not_contaminated() -> None:
    seeded = random.Random(0)
    vocabulary = [str(number) for number in range(2000)]

    def text() -> str:
        return " ".join(seeded.choices(vocabulary, k=60))

    index = build_index([text() for _ in range(500)], 13)
    assert len(index) == 500 * 48
    assert not any(contaminated(text(), index, 13) for _ in range(500))


def test_an_empty_index_contaminates_nothing() -> None:
    assert not contaminated(QUESTION, build_index([], 13), 13)


def test_evaluation_sets_are_rows_of_any_shape_or_strings(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]}
    other = {"question": "three", "choices": ["four", {"text": "five"}], "answer": 3}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [chat, other])), encoding="utf-8")
    pq.write_table(pa.table({"stem": ["six"]}), tmp_path / "b.parquet")
    against = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.parquet"))
    assert list(evaluation_texts(against, Store(str(tmp_path / "store")))) == ["one", "two", "three", "four", "five", "six"]


def test_an_evaluation_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("prompt,completion\n".encode("utf-16-le") * 9)
    with pytest.raises(
        DataError, match=r"of decontaminate cannot be read: the file is UTF-16 without a byte order mark"
    ) as error:
        list(evaluation_texts((str(path),), Store(str(tmp_path / "store"))))
    assert error.value.hint == "convert it to JSONL in UTF-8, and name that"
