"""Answers that an endpoint keeps: whole, privately, within bounds, and never in the way of an answer."""

from __future__ import annotations

import json
import logging
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from http_server import running
from prometheus_client.parser import text_string_to_metric_families
from scripted import saying
from scripted_api import CALL, TOOLS, USER, Api, reset, running_with

from forge_ray.config.endpoint import KeepAnswers
from forge_ray.errors import EngineError
from forge_ray.serve import keeper as keeper_module
from forge_ray.serve.http import build_http
from forge_ray.serve.keeper import Keeper
from forge_ray.serve.metrics import Metrics
from forge_ray.store.files import Store
from forge_ray.store.kept_answers import KeptAnswer, batches, kept_answers, remove_lines, remove_old, write_batch

pytestmark = pytest.mark.unit
DAY = "2027-03-01"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture(scope="module")
def running_api(tiny_model_dir: Path) -> Iterator[Api]:
    with running_with(tiny_model_dir) as api:
        yield api


class Kept:
    """The API with a keeper whose thread never comes to write: the test flushes."""

    def __init__(self, api: Api, store: Store, days: int = 7, max_mib: int = 1) -> None:
        self.api, self.store, self.day = reset(api), store, DAY
        self.metrics = Metrics("bot", "r0")
        settings = KeepAnswers(days=days, max_mib=max_mib)
        self.keeper = Keeper(store, settings, "dep_0", "r0", self.metrics, lambda: f"{self.day}T12:00:00", flush_s=1e6)
        context = replace(api.served, keeper=self.keeper)
        self._running = running(build_http(context))
        self.client = httpx.Client(base_url=self._running.__enter__(), timeout=60)

    def close(self) -> None:
        self.client.close()
        self._running.__exit__(None, None, None)
        self.keeper.close()

    def post(self, path: str = "/v1/chat/completions", **body: Any) -> httpx.Response:
        body = {"model": "tiny", **({"messages": USER} if "chat" in path else {}), **body}
        return self.client.post(path, json=body, headers={"x-request-id": "req-1"})

    def answers(self) -> list[KeptAnswer]:
        self.keeper.flush()
        return list(kept_answers(self.store))

    def counted(self, outcome: str) -> float:
        families = text_string_to_metric_families(self.metrics.text())
        samples = [sample for family in families for sample in family.samples if sample.name == "forge_kept_answers_total"]
        return sum(sample.value for sample in samples if sample.labels["outcome"] == outcome)


@pytest.fixture
def kept(running_api: Api, store: Store) -> Iterator[Kept]:
    one = Kept(running_api, store)
    yield one
    one.close()


def test_nothing_is_kept_by_default() -> None:
    assert KeepAnswers().days == 0


def test_a_chat_is_kept_as_it_was_asked_and_answered(kept: Kept) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body = kept.post(messages=messages, user="u1", metadata={"conversation_id": "c1"}).json()
    (answer,) = kept.answers()
    assert (answer.id, answer.request_id, answer.user, answer.metadata) == (
        body["id"],
        "req-1",
        "u1",
        {"conversation_id": "c1"},
    )
    assert (answer.model, answer.model_version, answer.deployment) == ("tiny", "mv_0", "dep_0")
    assert answer.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    assert [choice.message for choice in answer.choices] == [{"role": "assistant", "content": "hello"}]
    assert kept.counted("kept") == 1


def test_a_stream_is_kept_whole_under_the_id_of_its_chunks(kept: Kept) -> None:
    lines = kept.post(stream=True).text.splitlines()
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    (answer,) = kept.answers()
    assert {chunk["id"] for chunk in chunks} == {answer.id}
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert answer.choices[0].message["content"] == text == "hello"
    assert answer.choices[0].finish_reason == "stop"


def test_every_choice_and_every_call_is_kept(kept: Kept) -> None:
    body = kept.post(n=3).json()
    kept.api.says(CALL)
    called = kept.post(tools=TOOLS).json()
    three, calling = kept.answers()
    assert [choice.message["content"] for choice in three.choices] == [c["message"]["content"] for c in body["choices"]]
    message = calling.choices[0].message
    assert message["tool_calls"] == called["choices"][0]["message"]["tool_calls"]
    assert message["tool_calls"][0]["function"]["name"] == "add"
    assert calling.choices[0].finish_reason == "tool_calls"
    assert [tool["function"]["name"] for tool in calling.tools] == ["add", "addition", "multiply"]


def test_a_prefix_belongs_to_the_answer(kept: Kept) -> None:
    body = kept.post(messages=[*USER, {"role": "assistant", "content": "Well, ", "prefix": True}]).json()
    (answer,) = kept.answers()
    assert answer.messages == USER
    assert answer.choices[0].message["content"] == body["choices"][0]["message"]["content"]


def test_a_response_is_kept_as_a_chat_and_a_text_completion_is_not(kept: Kept) -> None:
    body = kept.post("/v1/responses", input="hi", instructions="Be brief.").json()
    streamed = kept.post("/v1/responses", input="hi", stream=True).text
    assert kept.post("/v1/completions", prompt="hi", max_tokens=10).status_code == 200
    first, second = kept.answers()
    assert (first.id, second.id[:5]) == (body["id"], "resp_")
    assert second.id in streamed
    assert first.messages == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]


def test_an_unfinished_answer_is_counted_and_not_kept(kept: Kept) -> None:
    kept.api.engine.script = lambda request: [EngineError("down")]
    assert kept.post().status_code == 503
    kept.api.engine.script = lambda request: [*saying(kept.api.tokenizer, "hel")(request), 30.0, *[1] * 9]
    with kept.client.stream(
        "POST", "/v1/chat/completions", json={"model": "tiny", "messages": USER, "stream": True}
    ) as sent:
        next(sent.iter_lines())
    deadline = time.monotonic() + 20
    while kept.counted("unfinished") < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert kept.counted("unfinished") == 2
    assert kept.answers() == []


def test_files_are_for_their_owner_alone_also_in_a_shared_store(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_GROUP", "1")
    before = os.umask(0o007)
    try:
        kept.post()
        kept.answers()
    finally:
        os.umask(before)
    (path,) = batches(kept.store)
    assert path == "answers/2027-03-08/r0-0.jsonl", "the folder is the last day"
    for place, mode in ((path, 0o600), (path.rpartition("/")[0], 0o700), ("answers", 0o700)):
        assert stat.S_IMODE(kept.store.local(place).stat().st_mode) == mode


def test_a_full_queue_drops_and_counts(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "MAX_QUEUED", 2)
    for _ in range(5):
        assert kept.post().status_code == 200
    assert kept.counted("dropped") == 3
    assert len(kept.answers()) == 2
    monkeypatch.setattr(keeper_module, "MAX_QUEUED_CHARACTERS", 10)
    kept.post(messages=[{"role": "user", "content": "x" * 11}])
    assert kept.counted("dropped") == 4
    kept.post()
    assert len(kept.answers()) == 3, "what was written has left the queue"


def test_a_store_that_cannot_be_written_delays_nothing_and_loses_nothing(
    kept: Kept, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("hi is in this text")

    with monkeypatch.context() as broken:
        broken.setattr(keeper_module.kept_answers, "write_batch", refuse)
        assert kept.post().status_code == 200
        with pytest.raises(OSError):
            kept.keeper.flush()
        quick = Keeper(kept.store, KeepAnswers(days=1), "dep_0", "r1", kept.metrics, flush_s=0.01)
        quick._queue.extend(kept.keeper._queue)
        with caplog.at_level(logging.ERROR):
            deadline = time.monotonic() + 20
            while not caplog.records and time.monotonic() < deadline:
                time.sleep(0.02)
    assert "OSError" in caplog.text
    assert "in this text" not in caplog.text, "an error's text could quote a prompt"
    quick.close()
    assert len(kept.answers()) == 2


def test_batches_are_divided_by_day_and_written_once(kept: Kept) -> None:
    kept.post()
    kept.day = "2027-03-02"
    kept.post()
    kept.answers()
    first = {path: kept.store.read(path) for path in batches(kept.store)}
    kept.post()
    kept.answers()
    assert list(first) == ["answers/2027-03-08/r0-0.jsonl", "answers/2027-03-09/r0-1.jsonl"]
    assert {path: kept.store.read(path) for path in first} == first
    assert batches(kept.store)[-1] == "answers/2027-03-09/r0-2.jsonl"


def line(number: int, **more: Any) -> str:
    values = {"id": f"chatcmpl-{number}", "request_id": f"r{number}", "at": DAY, "deployment": "d", "key": "", "model": "m"}
    values |= {"model_version": "mv_1", "user": "", "metadata": {}, "messages": USER, "tools": [], "choices": []}
    return KeptAnswer.model_validate(values | more).model_dump_json()


def test_what_is_too_old_goes_and_then_what_is_too_much(store: Store) -> None:
    for number, day in enumerate(("2027-02-27", "2027-03-01", "2027-03-02", "2027-03-03")):
        write_batch(store, f"answers/{day}/r-0.jsonl", [line(10 * number), line(10 * number + 1)])
    assert remove_old(store, "2027-03-01") == {"days": 2, "size": 0}
    size = store.size("answers/2027-03-03/r-0.jsonl")
    assert remove_old(store, "2027-03-01", 2 * size) == {"days": 0, "size": 2}
    assert batches(store) == ["answers/2027-03-02/r-0.jsonl", "answers/2027-03-03/r-0.jsonl"]


def test_a_keeper_removes_what_is_not_kept_any_longer(kept: Kept) -> None:
    write_batch(kept.store, "answers/2027-02-27/r-0.jsonl", [line(1), line(2)])
    kept.post()
    assert len(kept.answers()) == 1
    assert kept.counted("removed_days") == 2


def test_lines_are_taken_out_of_their_batches(store: Store) -> None:
    write_batch(store, "answers/2027-03-01/r-0.jsonl", [line(1, user="a"), line(2, user="b")])
    write_batch(store, "answers/2027-03-01/r-1.jsonl", [line(3, user="a")])
    assert remove_lines(store, lambda answer: answer.user == "a") == 2
    assert [answer.id for answer in kept_answers(store)] == ["chatcmpl-2"]
    assert batches(store) == ["answers/2027-03-01/r-0.jsonl"]
    assert remove_lines(store, lambda answer: answer.user == "a") == 0
