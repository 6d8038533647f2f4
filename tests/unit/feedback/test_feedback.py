"""Ratings and corrections → rows: what is joined, left out and why, and that the rows are read as they are meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fabricated import dataset

from forge_ray.cli.main import cli
from forge_ray.data.build import tombstones
from forge_ray.data.record.normal import row_digest
from forge_ray.data.record.schema import DataRecord, Reject, parse_record
from forge_ray.data.record.subject import erased_digests, subject_key
from forge_ray.feedback.entries import entry_of
from forge_ray.feedback.importing import ERASED, HELD_OUT, REPEATED, Import, import_feedback
from forge_ray.store.catalog import Catalog
from forge_ray.store.files import Store
from forge_ray.store.kept_answers import KeptAnswer, write_batch

pytestmark = pytest.mark.unit
ASKED = [{"role": "user", "content": "How do I reset my password, please?"}]
TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"id": "abc123def", "type": "function", "function": {"name": "lookup", "arguments": "{}"}}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def kept(identifier: str, *texts: str, **more: Any) -> KeptAnswer:
    values = {"id": identifier, "request_id": f"req-{identifier}", "at": "2027-03-01T12:00:00", "deployment": "d", "key": ""}
    choices = [{"message": said(text), "finish_reason": "stop"} for text in texts]
    values |= {"model": "support", "model_version": "mv_1", "user": "", "metadata": {}, "messages": ASKED, "tools": []}
    return KeptAnswer.model_validate(values | {"choices": choices} | more)


def keep(store: Store, *answers: KeptAnswer) -> None:
    write_batch(store, "answers/2999-01-01/r0-0.jsonl", [answer.model_dump_json() for answer in answers])


def written(folder: Path, *rows: Any, name: str = "ratings.jsonl") -> str:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def imported(catalog: Catalog, folder: Path, *rows: Any, **more: Any) -> Import:
    return import_feedback(catalog, [written(folder, *rows)], **more)


# ---------------------------------------------------------------- entries


@pytest.mark.parametrize(
    ("row", "is_good"),
    [
        ({"verdict": "good"}, True),
        ({"rating": "Thumbs_Down"}, False),
        ({"verdict": 1}, True),
        ({"verdict": -1}, False),
        ({"verdict": "+1"}, True),
        ({"verdict": 1.0}, True),
        ({"label": True}, True),
        ({"label": False}, False),
        ({"thumbs": "down"}, False),
        ({"score": 0}, False),
        ({"stars": 4}, True),
        ({"stars": "3.5"}, False),
        ({"stars": 5, "verdict": "good"}, True),
        ({"better_answer": "So."}, None),
    ],
)
def test_verdicts(row: dict[str, Any], is_good: bool | None) -> None:
    assert entry_of({"id": "chatcmpl-1", **row}, "f:1", 4.0).is_good is is_good


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("text", "the row is not an object"),
        ({"id": "chatcmpl-1"}, "neither a verdict nor a better answer"),
        ({"verdict": "good"}, "neither an answer's id nor a conversation"),
        ({"id": "chatcmpl-1", "verdict": "perhaps"}, "not good or bad, true or false, 1, 0 or -1: 'perhaps'"),
        ({"id": "chatcmpl-1", "stars": "many"}, "`stars` is not a number"),
        ({"id": "chatcmpl-1", "stars": float("nan")}, "`stars` is not a number"),
        ({"id": "chatcmpl-1", "stars": 1, "verdict": "good"}, "contradicts 1 stars"),
        ({"id": "chatcmpl-1", "verdict": 1, "choice": -1}, "`choice` is not the number of a choice"),
        ({"id": ["x"], "verdict": 1}, "`id` is not a text: a list"),
        ({"answer": "x", "verdict": 1}, "an answer without the conversation"),
        ({"messages": ASKED, "verdict": 1}, "ends without an answer"),
    ],
)
def test_rows_that_say_nothing_clear_are_refused_by_reason(row: Any, reason: str) -> None:
    with pytest.raises(Reject, match=reason.replace("(", r"\(")):
        entry_of(row, "f:1", 4.0)


def test_stars_need_a_threshold() -> None:
    with pytest.raises(Reject, match="--good-from"):
        entry_of({"id": "chatcmpl-1", "stars": 4}, "f:1", None)


# ---------------------------------------------------------------- joining


def test_a_rating_is_joined_with_the_kept_answer(catalog: Catalog, tmp_path: Path) -> None:
    keep(catalog.store, kept("chatcmpl-1", "Open Settings.", user="u1", metadata={"conversation_id": "c7"}))
    result = imported(catalog, tmp_path, {"id": "chatcmpl-1", "verdict": "good", "comment": "clear", "user": "rater"})
    (row,) = result.rows
    assert row == {
        "messages": [*ASKED, said("Open Settings.")],
        "answer_id": "chatcmpl-1",
        "model": "support",
        "model_version": "mv_1",
        "answered_at": "2027-03-01T12:00:00",
        "conversation": "c7",
        "user": "u1",
        "comment": "clear",
        "rated_by": "rater",
    }
    assert result.unused == []
    assert parse_record(row).content == {"messages": [*ASKED, said("Open Settings.")]}


def test_choices_tools_and_earlier_turns_are_joined_whole(catalog: Catalog, tmp_path: Path) -> None:
    earlier = [*ASKED, said("Which one?"), {"role": "user", "content": "The mail account."}]
    call = {"message": {"role": "assistant", "content": None, "tool_calls": [CALL]}, "finish_reason": "tool_calls"}
    store = catalog.store
    keep(store, kept("chatcmpl-n", "A", "B", messages=earlier), kept("chatcmpl-t", tools=TOOLS, choices=[call]))
    rows = [{"id": "chatcmpl-n", "choice": 1, "verdict": 1}, {"id": "chatcmpl-t", "verdict": 1}]
    second, called = imported(catalog, tmp_path, *rows).rows
    assert second["messages"] == [earlier[0], earlier[1] | {"weight": 0}, earlier[2], said("B")]
    assert second["choice"] == 1
    record = parse_record(called)
    assert record.messages[-1]["tool_calls"][0]["function"]["name"] == "lookup"
    assert "tools" in record.content


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"id": "chatcmpl-9", "verdict": 1}, "no kept answer has this id"),
        ({"id": "cmpl-9", "verdict": 1}, "of a text completion"),
        ({"id": "chatcmpl-n", "verdict": 1}, "has 2 choices, and `choice` does not say"),
        ({"id": "chatcmpl-n", "choice": 2, "verdict": 1}, "`choice` is 2, and the answer has 2"),
        ({"id": "chatcmpl-e", "verdict": 1}, "an assistant turn is empty"),
        ('{"id": ', "JSON"),
    ],
)
def test_what_cannot_be_joined_is_listed_with_its_reason(catalog: Catalog, tmp_path: Path, row: Any, reason: str) -> None:
    keep(catalog.store, kept("chatcmpl-n", "A", "B"), kept("chatcmpl-e", ""))
    result = imported(catalog, tmp_path, row)
    (unused,) = result.unused
    assert reason in unused.reason
    assert unused.is_invalid
    assert unused.place.endswith("ratings.jsonl:1")
    assert result.rows == []


def test_a_row_with_its_own_conversation_needs_no_kept_answer(catalog: Catalog, tmp_path: Path) -> None:
    rows = [
        {"messages": [*ASKED, said("A.")], "verdict": "good", "id": "chatcmpl-gone"},
        {"prompt": "And why is that so?", "completion": "B.", "label": True, "model_version": "mv_7"},
    ]
    first, second = imported(catalog, tmp_path, *rows).rows
    assert (first["messages"][-1], first["answer_id"]) == (said("A."), "chatcmpl-gone")
    assert second["messages"] == [{"role": "user", "content": "And why is that so?"}, said("B.")]
    assert second["model_version"] == "mv_7"


def test_files_may_be_of_any_format_that_sources_may_have(catalog: Catalog, tmp_path: Path) -> None:
    keep(catalog.store, kept("chatcmpl-1", "A."), kept("chatcmpl-2", "B."))
    path = tmp_path / "ratings.csv"
    path.write_text("id,stars,mood,better_answer\nchatcmpl-1,5,sunny,\nchatcmpl-2,2,,Better so.\n", encoding="utf-8")
    result = import_feedback(catalog, [str(path)], good_from=4)
    assert [row["messages"][-1]["content"] for row in result.rows] == ["A.", "Better so."]
    assert result.unread == {"mood": 1}


# ---------------------------------------------------------------- forms


def test_forms(catalog: Catalog, tmp_path: Path) -> None:
    keep(catalog.store, kept("chatcmpl-1", "A."), kept("chatcmpl-2", "B."), kept("chatcmpl-3", "C."))
    rows = [
        {"id": "chatcmpl-1", "verdict": "good"},
        {"id": "chatcmpl-2", "verdict": "bad"},
        {"id": "chatcmpl-3", "verdict": "bad", "better_answer": "D."},
    ]
    by_form = {form: imported(catalog, tmp_path, *rows, form=form) for form in ("chat", "preference", "feedback")}
    assert [row["messages"][-1]["content"] for row in by_form["chat"].rows] == ["A.", "D."]
    assert list(by_form["chat"].reasons) == ["the answer was rated bad, and there is no better one to train on"]
    (pair,) = by_form["preference"].rows
    assert (pair["chosen"], pair["rejected"]) == ([said("D.")], [said("C.")])
    assert by_form["preference"].reasons == {"there is no better answer, which --form preference needs": 2}
    labels = [(row["answer"][0]["content"], row["label"]) for row in by_form["feedback"].rows]
    assert labels == [("A.", True), ("B.", False), ("C.", False), ("D.", True)]
    for form, result in by_form.items():
        assert {parse_record(row).kind for row in result.rows} == {form}, "as `shape: auto` reads them"
        assert result.num_invalid == 0


def test_a_better_answer_that_is_the_answer_is_refused_as_a_pair(catalog: Catalog, tmp_path: Path) -> None:
    keep(catalog.store, kept("chatcmpl-1", "A."))
    result = imported(catalog, tmp_path, {"id": "chatcmpl-1", "better_answer": "A."}, form="preference")
    assert result.reasons == {"`chosen` and `rejected` are the same": 1}


# ---------------------------------------------------------------- what is left out


def test_equal_rows_are_used_once(catalog: Catalog, tmp_path: Path) -> None:
    keep(catalog.store, kept("chatcmpl-1", "A."), kept("chatcmpl-2", "A."))
    rows = [{"id": "chatcmpl-1", "verdict": 1}, {"id": "chatcmpl-1", "verdict": 1}, {"id": "chatcmpl-2", "verdict": 1}]
    result = imported(catalog, tmp_path, *rows)
    assert len(result.rows) == 1
    assert result.reasons == {REPEATED: 2}


def test_contradicting_verdicts_on_one_answer(catalog: Catalog, tmp_path: Path) -> None:
    keep(catalog.store, kept("chatcmpl-1", "A."), kept("chatcmpl-2", "A."), kept("chatcmpl-3", "B."))
    rows = [{"id": f"chatcmpl-{number}", "verdict": verdict} for number, verdict in ((1, 1), (2, -1), (3, 1), (1, 1))]
    left_out = imported(catalog, tmp_path, *rows)
    assert [row["answer_id"] for row in left_out.rows] == ["chatcmpl-3"]
    assert left_out.reasons == {"the verdicts on this answer contradict each other: 2 good, 1 bad": 3}
    majority = imported(catalog, tmp_path, *rows, contradictions="majority", form="feedback")
    assert [(row["answer_id"], row["label"]) for row in majority.rows] == [("chatcmpl-1", True), ("chatcmpl-3", True)]
    tie = imported(catalog, tmp_path, *rows[:2], contradictions="majority")
    assert tie.rows == []


def test_conversations_of_test_rows_stay_out(catalog: Catalog, tmp_path: Path) -> None:
    tested = DataRecord({"messages": [*ASKED, said("The reference.")]})
    other = DataRecord({"messages": [{"role": "user", "content": "Where is my parcel now?"}, said("There.")]})
    for name, record, share in (("held", tested, 1.0), ("trained", other, 0.0)):
        manifest = dataset(catalog, [record], data={"splits": {"test": share, "validation": 0.0}}, name=name)
        catalog.store.write(f"datasets/{manifest.id}/MANIFEST.json", b"{}")
    later = [*ASKED, said("Which one?"), {"role": "user", "content": "Mine."}]
    keep(
        catalog.store,
        kept("chatcmpl-1", "A."),
        kept("chatcmpl-2", "B.", messages=later),
        kept("chatcmpl-3", "C.", messages=other.messages[:1]),
    )
    result = imported(catalog, tmp_path, *({"id": f"chatcmpl-{number}", "verdict": 1} for number in (1, 2, 3)))
    assert [row["answer_id"] for row in result.rows] == ["chatcmpl-3"]
    assert result.reasons == {HELD_OUT: 2}
    assert result.num_invalid == 0


def test_erased_people_answers_and_rows_stay_out(catalog: Catalog, tmp_path: Path) -> None:
    store = catalog.store
    keep(
        store,
        kept("chatcmpl-1", "A.", user="wq"),
        kept("chatcmpl-2", "B."),
        kept("chatcmpl-3", "C."),
        kept("chatcmpl-4", "D."),
        kept("chatcmpl-5", "E."),
    )
    erased_row = DataRecord({"messages": [*ASKED, said("C.")]})
    names = set(erased_digests(subject_key(store, ""), "wq")) | {erased_row.id, f"{tombstones.ANSWER}chatcmpl-4"}
    tombstones.write_tombstones(store, "er_1", names | {tombstones.TEXT + row_digest(erased_row)})
    rows = [{"id": f"chatcmpl-{number}", "verdict": 1} for number in range(1, 6)]
    rows[1]["user"] = "wq"
    result = imported(catalog, tmp_path, *rows)
    assert [row["answer_id"] for row in result.rows] == ["chatcmpl-5"]
    assert result.reasons == {ERASED: 4}


# ---------------------------------------------------------------- conversations


def test_turns_of_one_conversation_share_its_name(catalog: Catalog, tmp_path: Path) -> None:
    """By the application's name, else as another row that begins alike, else by how it begins, without system prompts."""
    later = [*ASKED, said("Which one?"), {"role": "user", "content": "Mine."}]
    other = [{"role": "user", "content": "Where is my parcel now?"}]
    rows = [
        {"messages": ASKED, "answer": "A.", "verdict": 1},
        {"messages": [{"role": "system", "content": "Be brief."}, *later], "answer": "B.", "verdict": 1, "session_id": "s1"},
        {"messages": other, "answer": "C.", "verdict": 1},
        {"messages": other, "answer": "D.", "verdict": 1},
        {"messages": later[2:], "answer": "E.", "verdict": 1, "session_id": "s1"},
    ]
    result = imported(catalog, tmp_path, *rows)
    names = [row["conversation"] for row in result.rows]
    assert names[0] == names[1] == names[4] == "s1"
    assert names[2] == names[3]
    assert names[2].startswith("conv_")
    assert result.num_divided == 1, "a conversation that was cut off begins differently"


# ---------------------------------------------------------------- the command


def run(store: Store, *arguments: str) -> Any:
    return CliRunner().invoke(cli, ["feedback", "import", *arguments, "--store", store.uri])


def test_the_command_writes_rows_and_lists_what_it_does_not_use(catalog: Catalog, tmp_path: Path) -> None:
    keep(catalog.store, kept("chatcmpl-1", "A."), kept("chatcmpl-2", "B."))
    path = written(tmp_path, {"id": "chatcmpl-1", "verdict": 1, "mood": "x"}, {"id": "chatcmpl-2", "verdict": -1})
    out = str(tmp_path / "rows.jsonl")
    done = run(catalog.store, path, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert (summary["entries"], summary["rows"], summary["invalid"]) == (2, 1, 0)
    assert summary["columns_not_read"] == {"mood": 1}
    assert [one["answer_id"] for one in summary["not_used"]] == ["chatcmpl-2"]
    assert [json.loads(one)["answer_id"] for one in Path(out).read_text().splitlines()] == ["chatcmpl-1"]
    listed = [json.loads(one) for one in Path(f"{out}.unused").read_text().splitlines()]
    assert listed == summary["not_used"]
    again = run(catalog.store, path, "--out", out)
    assert again.exit_code == 2
    assert "already exists" in again.output
    plain = run(catalog.store, path, "--out", out, "--force")
    assert plain.exit_code == 0
    assert "1 × the answer was rated bad" in plain.output
    assert "column not read: mood (1 rows)" in plain.output


def test_too_many_invalid_entries_end_with_exit_code_1_and_no_rows(catalog: Catalog, tmp_path: Path) -> None:
    keep(catalog.store, kept("chatcmpl-1", "A."))
    path = written(tmp_path, {"id": "chatcmpl-1", "verdict": 1}, {"id": "chatcmpl-gone", "verdict": 1})
    out = str(tmp_path / "rows.jsonl")
    done = run(catalog.store, path, "--out", out)
    assert done.exit_code == 1
    assert "1 of 2 entries cannot be read or joined (50.0%, --max-invalid is 1.0%)" in done.output
    assert "--max-invalid 1" in done.output
    assert not Path(out).exists()
    assert Path(f"{out}.unused").exists()
    assert run(catalog.store, path, "--out", out, "--force", "--max-invalid", "0.5").exit_code == 0


def test_no_row_at_all_is_a_failure(catalog: Catalog, tmp_path: Path) -> None:
    keep(catalog.store, kept("chatcmpl-1", "A."))
    path = written(tmp_path, {"id": "chatcmpl-1", "verdict": -1})
    done = run(catalog.store, path, "--out", str(tmp_path / "rows.jsonl"))
    assert done.exit_code == 1
    assert "none of 1 entries gives a row of form chat" in done.output


def test_a_folder_is_not_a_file_to_write(catalog: Catalog, tmp_path: Path) -> None:
    done = run(catalog.store, written(tmp_path, {"id": "x", "verdict": 1}), "--out", str(tmp_path))
    assert done.exit_code == 2
    assert "is a folder" in done.output


def test_a_refused_import_leaves_nothing_in_the_way_of_the_next(catalog: Catalog, tmp_path: Path) -> None:
    file = written(tmp_path, {"prompt": "?", "answer": "!", "verdict": "good"}, {"id": "chatcmpl-0", "verdict": "good"})
    arguments = ["feedback", "import", file, "--out", str(tmp_path / "rows.jsonl"), "--store", catalog.store.uri]
    refused = CliRunner().invoke(cli, arguments)
    assert refused.exit_code == 1
    assert "--max-invalid 1 writes the others" in refused.output
    assert CliRunner().invoke(cli, [*arguments, "--max-invalid", "1"]).exit_code == 0
    assert CliRunner().invoke(cli, [*arguments, "--max-invalid", "1"]).exit_code == 2
