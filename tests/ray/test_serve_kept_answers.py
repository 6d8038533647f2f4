"""Feedback on answers of a real endpoint: kept, joined, erased."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from click.testing import CliRunner
from serving import MESSAGES, WAIT_S, Endpoint

from forge_ray.cli.main import cli
from forge_ray.store.files import Store
from forge_ray.store.kept_answers import kept_answers

pytestmark = pytest.mark.ray


def forge(store: Store, *arguments: str) -> Any:
    done = CliRunner().invoke(cli, [*arguments, "--store", store.uri, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])


def test_a_rating_of_an_answer_becomes_a_row_and_an_erasure_takes_the_answer(
    endpoint: Endpoint, client: openai.OpenAI, store: Store, tmp_path: Path
) -> None:
    ask: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 1.0, "user": "kept-user"}
    whole = client.chat.completions.create(n=2, seed=1, **ask)
    chunks = list(client.chat.completions.create(stream=True, seed=7, **ask))
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    ids = {whole.id, chunks[0].id}
    deadline = time.monotonic() + WAIT_S
    while not ids <= {answer.id for answer in kept_answers(store)} and time.monotonic() < deadline:
        time.sleep(0.5)
    ratings = [
        {"id": whole.id, "choice": 1, "verdict": "good"},
        {"id": chunks[0].id, "verdict": "bad", "better_answer": "Open Settings."},
        {"id": "chatcmpl-unknown", "verdict": "good"},
    ]
    file = tmp_path / "ratings.jsonl"
    file.write_text("".join(json.dumps(rating) + "\n" for rating in ratings), encoding="utf-8")
    arguments = ("feedback", "import", str(file), "--form", "feedback", "--max-invalid", "0.5")
    summary = forge(store, *arguments, "--out", str(tmp_path / "rows.jsonl"))
    assert (summary["rows"], summary["invalid"]) == (3, 1)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    texts = [row["answer"][0]["content"] for row in rows]
    assert texts == [whole.choices[1].message.content, streamed, "Open Settings."]
    assert [row["label"] for row in rows] == [True, False, True]
    assert {(row["model"], row["model_version"], row["user"]) for row in rows} == {
        ("tiny", endpoint.version.id, "kept-user")
    }
    assert rows[0]["messages"] == MESSAGES
    assert "forge_kept_answers_total" in httpx.get(f"{endpoint.url}/metrics", timeout=WAIT_S).text
    (item,) = [item for item in forge(store, "store", "du")["items"] if item["kind"] == "answers"]
    assert item["bytes"] > 0
    assert not item["could_go"]

    plan = forge(store, "erase", "--answer", whole.id, "--plan")
    assert plan["num_answers"] == 1
    statement = forge(store, "erase", "--answer", whole.id, "--apply", "--yes")
    assert statement["predicate"]["purged"]["kept answers"] == 1
    assert {answer.id for answer in kept_answers(store)} & ids == {chunks[0].id}
