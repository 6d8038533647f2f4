"""What other people's clients send, as tests/e2e/test_installed_clients.py recorded it: read as what it means."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conversations import AGAIN, FIRST, QUESTION, SCHEMA, TEMPLATE, recorded_in
from scripted import ids_of
from scripted_api import Api, reset, running_with

pytestmark = pytest.mark.unit

FOLDER = Path(__file__).parents[2] / "fixtures/clients"
FILES = sorted(path.name for path in FOLDER.glob("*.jsonl"))


@pytest.fixture(scope="module")
def running_api(tiny_model_dir: Path) -> Iterator[Api]:
    with running_with(tiny_model_dir, TEMPLATE) as api:
        yield api


@pytest.fixture
def api(running_api: Api) -> Api:
    return reset(running_api)


def schema_of(body: dict[str, Any]) -> Any:
    """The schema that the answer must follow."""
    form = (body.get("text") or {}).get("format") or (body.get("response_format") or {}).get("json_schema") or {}
    return form.get("schema")


def test_every_client_is_recorded() -> None:
    assert len(FILES) == 7


@pytest.mark.parametrize("name", FILES)
def test_requests_are_answered(api: Api, name: str) -> None:
    whole = streamed = follows = forced = 0
    prompts = []
    for path, body in recorded_in(FOLDER / name):
        if body.get("tool_choice") in ("any", "required"):
            forced += 1
            text = '{"name": "paint", "arguments": {"colour": "red", "sure": true}}\n</tool_call>'
            ids = ids_of(api.tokenizer, text)
            api.engine.script = lambda request, ids=ids: ids
        else:
            api.says("hello")
        response = api.post(path, **body | {"model": "tiny"})
        assert response.status_code == 200, response.text
        if body.get("stream"):
            streamed += 1
            assert '"error":{' not in response.text
        else:
            whole += 1
            assert response.json()["usage"]
        asked = api.asked()
        if schema_of(body) is not None:
            follows += 1
            assert json.loads(asked.json_schema) == schema_of(body)
            assert schema_of(body)["properties"].keys() == SCHEMA["properties"].keys()
        assert bool(asked.json_schema) == (schema_of(body) is not None or body.get("tool_choice") in ("any", "required"))
        prompts.append(api.tokenizer.decode(asked.prompt_ids))
    assert (whole, streamed, follows, forced) == (5, 3, 2, 1)
    (last,) = (prompt for prompt in prompts if AGAIN in prompt)
    places = [last.index(text) for text in (QUESTION, '"colour": "red"', "painted red", FIRST, AGAIN)]
    assert places == sorted(places)
    assert "Be brief." in last
