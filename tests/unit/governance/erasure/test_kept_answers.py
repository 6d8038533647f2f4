"""An erasure reaches the answers that endpoints keep: by user, by id, and by the rows in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fabricated import dataset, deployment, version

from forge_ray.cli.main import cli
from forge_ray.data.record.schema import DataRecord
from forge_ray.errors import ConfigError, NotFound
from forge_ray.governance.erasure import answers
from forge_ray.governance.erasure.apply import erase
from forge_ray.governance.erasure.options import Options
from forge_ray.governance.erasure.search import ErasureRequest, search
from forge_ray.governance.space.decide import Retention
from forge_ray.governance.space.prune import examine, prune
from forge_ray.store.catalog import Catalog
from forge_ray.store.kept_answers import KeptAnswer, kept_answers, remove_lines, write_batch

pytestmark = pytest.mark.unit
QUESTION = {"role": "user", "content": "When is my surgery?"}
ANSWER = {"role": "assistant", "content": "On Monday at nine."}
LATER = [QUESTION, ANSWER, {"role": "user", "content": "Thank you"}]


def kept(number: int, **more: Any) -> KeptAnswer:
    values: dict[str, Any] = {"id": f"chatcmpl-{number}", "request_id": f"req-{number}", "at": "2027-03-01T12:00:00"}
    values |= {"deployment": "d", "key": "", "model": "m", "model_version": "mv_1", "user": "", "metadata": {}, "tools": []}
    values |= {"messages": [{"role": "user", "content": f"Question {number}"}]}
    values |= {"choices": [{"message": {"role": "assistant", "content": "Yes."}, "finish_reason": "stop"}]}
    return KeptAnswer.model_validate(values | more)


@pytest.fixture
def filled(catalog: Catalog) -> Catalog:
    asked = {"messages": [QUESTION], "choices": [{"message": ANSWER, "finish_reason": "stop"}]}
    lines = [kept(1, user="wq"), kept(2, user="  WQ "), kept(3), kept(4, **asked), kept(5, messages=LATER)]
    for number, answer in enumerate(lines):
        write_batch(catalog.store, f"answers/2999-01-0{1 + number % 2}/r-{number}.jsonl", [answer.model_dump_json()])
    return catalog


def left(catalog: Catalog) -> list[int]:
    return sorted(int(answer.id.rpartition("-")[2]) for answer in kept_answers(catalog.store))


def applied(catalog: Catalog, request: ErasureRequest) -> int:
    statement = erase(catalog.store, request, Options(retrain="none", wait_s=0))
    return int(statement["predicate"]["purged"]["kept answers"])


def test_the_answers_of_a_person_go_without_any_dataset_that_has_subjects(filled: Catalog) -> None:
    request = ErasureRequest("subject", (" wq\u200b",))
    assert search(filled, request).num_answers == 1
    assert applied(filled, request) == 1
    assert left(filled) == [2, 3, 4, 5]
    assert applied(filled, ErasureRequest("subject", ("wq",), any_case=True)) == 1
    assert left(filled) == [3, 4, 5]


def test_what_a_person_asks_later_goes_when_the_request_is_repeated(filled: Catalog) -> None:
    request = ErasureRequest("subject", ("wq",))
    applied(filled, request)
    write_batch(filled.store, "answers/2999-01-01/r-9.jsonl", [kept(9, user="wq").model_dump_json()])
    applied(filled, request)
    assert left(filled) == [2, 3, 4, 5]


def test_answers_go_by_their_id_or_that_of_the_request(filled: Catalog) -> None:
    assert applied(filled, ErasureRequest("answer", ("chatcmpl-1", "req-3"))) == 2
    assert left(filled) == [2, 4, 5]


def test_an_answer_that_is_not_kept_is_refused_with_the_remedy(filled: Catalog) -> None:
    with pytest.raises(NotFound, match="no kept answer has the id chatcmpl-77") as refused:
        search(filled, ErasureRequest("answer", ("chatcmpl-1", "chatcmpl-77")))
    assert "--subject" in refused.value.hint
    with pytest.raises(ConfigError, match="no kept answer is of this user"):
        search(filled, ErasureRequest("subject", ("nobody",)))


def test_answers_go_with_the_rows_that_are_in_them(filled: Catalog, tmp_path: Path) -> None:
    """Also where the row is an earlier turn of the conversation."""
    record = DataRecord({"messages": [QUESTION, ANSWER]})
    manifest = dataset(filled, [record, DataRecord({"messages": [QUESTION, {"role": "assistant", "content": "No."}]})])
    filled.store.write(f"datasets/{manifest.id}/MANIFEST.json", b"{}")
    assert search(filled, ErasureRequest("record", (record.id,))).num_answers == 2
    by_answer = search(filled, ErasureRequest("answer", ("chatcmpl-4",)))
    assert record.id in by_answer.asked
    assert [place.record for place in by_answer.places[manifest.id]] == [record.id]


def test_what_an_endpoint_still_holds_in_its_queue_is_waited_for(filled: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    def written_meanwhile(seconds: float) -> None:
        assert seconds > 10, "longer than an endpoint takes to write"
        write_batch(filled.store, "answers/2999-01-01/r-9.jsonl", [kept(9, user="wq").model_dump_json()])

    monkeypatch.setattr(answers.time, "sleep", written_meanwhile)
    base = version(filled, "base")
    record = deployment(filled, "bot", base.id)
    keeping = record.model_copy(update={"config": record.config | {"keep_answers": {"days": 3}}, "id": ""}).sealed()
    filled.put(keeping)
    names = search(filled, ErasureRequest("subject", ("wq",))).tombstones
    assert answers.remove_covered(filled, answers.of_values(filled.store, names)) == 2
    assert left(filled) == [2, 3, 4, 5]


def test_the_command_takes_one_selection(filled: Catalog) -> None:
    def forge(*arguments: str) -> Any:
        return CliRunner().invoke(cli, ["erase", *arguments, "--plan", "--store", filled.store.uri])

    assert "1 answers that endpoints keep" in forge("--answer", "chatcmpl-3").output
    assert forge("--answer", "chatcmpl-3", "--subject", "x").exit_code == 2


def test_disk_use_lists_kept_answers_and_removes_them_after_their_last_day(filled: Catalog) -> None:
    write_batch(filled.store, "answers/2020-01-01/r-0.jsonl", [kept(8).model_dump_json()])
    space = examine(filled, Retention())
    decisions = {one.item.name: one for one in space.decisions if one.item.kind == "answers"}
    assert sorted(decisions) == ["answers/2020-01-01", "answers/2999-01-01", "answers/2999-01-02"]
    assert decisions["answers/2999-01-01"].why == ("prompts and answers, kept until 2999-01-01",)
    assert [name for name, one in decisions.items() if one.removes] == ["answers/2020-01-01"]
    prune(filled, Retention())
    assert left(filled) == [1, 2, 3, 4, 5]


def test_separators_in_a_text_end_no_line_of_a_batch(catalog: Catalog) -> None:
    odd = "one\u2028two\u2029three\x85four\x0bfive\x0csix\x1cseven"
    lines = [kept(number, messages=[{"role": "user", "content": odd}]).model_dump_json() for number in (1, 2)]
    write_batch(catalog.store, "answers/2999-01-01/r-0.jsonl", lines)
    assert [answer.messages[0]["content"] for answer in kept_answers(catalog.store)] == [odd, odd]
    assert remove_lines(catalog.store, lambda answer: answer.id == "chatcmpl-1") == 1
    assert left(catalog) == [2]
