"""A model of another system on held-out rows: who may send them, what is on record of it, and every missing answer."""

from __future__ import annotations

import json
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from certificates import write_certificate
from click.testing import CliRunner
from fabricated import dataset
from http_server import endpoint as tiny_endpoint
from signed_store import add_people, allow

from forge_ray.cli.main import cli
from forge_ray.config.base import SettingError
from forge_ray.config.origins import origin_of, parts_of
from forge_ray.data.record.schema import DataRecord
from forge_ray.errors import ConfigError
from forge_ray.evaluate import chat_api
from forge_ray.evaluate.chat_format import ChatAnswer, Unanswered, error_of, reply_of, wire_messages
from forge_ray.evaluate.items import items_of
from forge_ray.records import DatasetManifest, EvalReport, Event
from forge_ray.store import signing
from forge_ray.store.authority import Policy
from forge_ray.store.catalog import Catalog, write_event
from forge_ray.store.disclosures import sent

pytestmark = pytest.mark.unit
KEY = "sk-secret-0123456789"
Answer = Callable[[int, dict[str, Any]], tuple[int, dict[str, str], Any]]


@dataclass
class Vendor:
    """An API in a thread: what it was asked, with which key, and what it answers to the n-th request."""

    url: str = ""
    answer: Answer = lambda number, body: says("open Billing")
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)


def says(text: str | None, **message: Any) -> tuple[int, dict[str, str], Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text, **message}}
    usage = {"prompt_tokens": 7, "completion_tokens": 3}
    return 200, {}, {"model": "gpt-x-2026-01-01", "choices": [choice], "usage": usage}


@contextmanager
def running(vendor: Vendor, context: ssl.SSLContext | None = None) -> Iterator[Vendor]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            vendor.bodies.append(body)
            vendor.keys.append(self.headers.get("authorization", ""))
            status, headers, content = vendor.answer(len(vendor.bodies), body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response_only(status)
            for name, value in {**headers, "content-length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            with suppress(OSError):  # who asked has gone
                self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if context:
            server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        vendor.url = f"http{'s' if context else ''}://127.0.0.1:{server.server_port}/v1"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield vendor
        server.shutdown()


@pytest.fixture
def vendor(monkeypatch: pytest.MonkeyPatch) -> Iterator[Vendor]:
    monkeypatch.setattr(chat_api, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("VENDOR_KEY", KEY)
    with running(Vendor()) as server:
        yield server


@pytest.fixture
def people(catalog: Catalog, tmp_path: Path) -> dict[str, Any]:
    return add_people(catalog, tmp_path / "keys")


def chat(question: str, answer: str, **more: Any) -> DataRecord:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return DataRecord({"messages": turns} | more, "chat")


def held(catalog: Catalog, *records: DataRecord) -> DatasetManifest:
    """A dataset version that holds all of them out."""
    return dataset(catalog, records, data={"splits": {"validation": 0.0, "test": 1.0}})


def chats(catalog: Catalog, count: int = 12) -> DatasetManifest:
    """Every third answer is `open Billing`."""
    return held(catalog, *(chat(f"question {n}", "open Billing" if n % 3 == 0 else f"answer {n}") for n in range(count)))


def named(catalog: Catalog, people: dict[str, Any], vendor: Vendor) -> None:
    allow(catalog, people, endpoints=[origin_of(vendor.url)])


def forge(catalog: Catalog, *words: str) -> tuple[int, Any]:
    done = CliRunner().invoke(cli, [*words, "--store", catalog.store.uri, "--json"])
    assert isinstance(done.exception, SystemExit | None), done.exception
    return done.exit_code, json.loads(done.stdout.splitlines()[-1])


def evaluate(catalog: Catalog, vendor: Vendor, manifest: DatasetManifest, *more: str, key: bool = True) -> tuple[int, Any]:
    words = ("eval", "--data", manifest.id, "--endpoint", vendor.url, "--endpoint-model", "gpt-x")
    code, result = forge(catalog, *words, *(("--key-env", "VENDOR_KEY") if key else ()), *more)
    catalog.sync()
    return code, result if "error" in result else EvalReport.model_validate(result["reports"][f"gpt-x at {vendor.url}"])


def disclosed(catalog: Catalog, manifest: DatasetManifest) -> list[dict[str, Any]]:
    catalog.sync()
    return [event.data for event in catalog.events("disclosure", manifest.id)]


def test_a_vendors_model_is_scored_on_the_held_out_rows(
    catalog: Catalog, people: dict[str, Any], vendor: Vendor, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest = chats(catalog)
    named(catalog, people, vendor)
    on_record: list[Any] = []

    def answer(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        with Catalog.read_only(catalog.store) as index:
            on_record.append(index.events("disclosure", manifest.id)[0].data["action"])
        return says("open Billing")

    vendor.answer = answer
    code, report = evaluate(catalog, vendor, manifest)
    assert code == 0, report
    assert report.metrics == {"exact_match": pytest.approx(4 / 12)}  # no loss, perplexity or likeliest label
    assert (report.subject, report.subject_digest, report.endpoint) == (f"gpt-x at {vendor.url}", "", vendor.url)
    assert report.costs == {"prompt_tokens": 84.0, "completion_tokens": 36.0}
    assert report.parents() == (manifest.id,)
    assert set(on_record) == {"began"}
    assert set(vendor.keys) == {f"Bearer {KEY}"}
    asked = vendor.bodies[0]
    assert asked["max_tokens"] == 32
    assert asked["temperature"] == 0
    assert [message["role"] for message in asked["messages"]] == ["user"]  # the answer stays here
    assert {item["answered_by"] for item in items_of(catalog.store, report)} == {"gpt-x-2026-01-01"}
    began, ended = disclosed(catalog, manifest)
    assert (began["to"], began["model"], began["num_rows"], began["split"]) == (vendor.url, "gpt-x", 12, "test")
    assert "@" in began["by"]
    assert (ended["num_sent"], ended["num_answered"]) == (12, 12)
    (line, _) = forge(catalog, "audit", "log", "--action", "disclosure")[1]["results"]
    assert line["why"] == f"evaluation: 12 rows of test to gpt-x at {vendor.url}"
    for path in Path(catalog.store.root).rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path

    words = ("eval", "--data", manifest.id, "--endpoint", vendor.url, "--endpoint-model", "gpt-x", "--key-env", "VENDOR_KEY")
    text = CliRunner().invoke(cli, [*words, "--store", catalog.store.uri]).output
    assert "33.3%" in text
    assert KEY not in text + capfd.readouterr().err


def test_the_rows_of_a_reference_system_stand_next_to_it(catalog: Catalog, people: dict[str, Any], vendor: Vendor) -> None:
    """Two models of an API: the table has the change, and says what endpoints do not give."""
    from forge_ray.cli.show import scores

    manifest = chats(catalog)
    named(catalog, people, vendor)
    vendor.answer = lambda number, body: says("open Billing" if body["model"] == "gpt-x" else "answer 1")
    words = (
        "eval",
        "--data",
        manifest.id,
        "--endpoint",
        vendor.url,
        "--endpoint-model",
        "gpt-x",
        "--endpoint-model",
        "mini",
    )
    code, result = forge(catalog, *words)
    assert code == 0, result
    reports = [EvalReport.model_validate(value) for value in result["reports"].values()]
    assert [report.metrics["exact_match"] for report in reports] == pytest.approx([4 / 12, 1 / 12])
    own = reports[0].model_copy(update={"endpoint": "", "metrics": reports[0].metrics | {"loss": 1.5}})
    header, rows = scores(catalog.store, ("own", "theirs"), [own, reports[1]])
    assert header == ("", "own", "theirs", "change")
    cells = {row[0]: row[1:] for row in rows}
    assert "-25.0 points" in cells["exact_match"][2]
    assert cells["loss"] == ["1.5", "not from an endpoint", ""]


def test_nothing_is_sent_unless_the_signed_policy_names_the_host(
    catalog: Catalog, people: dict[str, Any], vendor: Vendor
) -> None:
    manifest = chats(catalog)
    for policy, names in (({}, "no host"), ({"endpoints": ["https://api.vendor.example"]}, "https://api.vendor.example")):
        if policy:
            allow(catalog, people, **policy)
        code, result = evaluate(catalog, vendor, manifest)
        assert code == 3
        origin = vendor.url.removesuffix("/v1")
        assert (
            result["error"]["message"] == f"policy.endpoints: no rows of this store are sent to {origin}; it names {names}"
        )
        assert f"an owner (olga) can allow it: `forge policy set --endpoint {origin}`" in result["error"]["hint"]
    for forger in (signing.generate(), people["tina"]):  # nobody whose policy counts
        with signing.acting(forger):
            write_event(catalog.store, Event(kind="policy", subject="policy", data={"endpoints": [origin_of(vendor.url)]}))
        assert evaluate(catalog, vendor, manifest)[0] == 3
    allow(catalog, people, endpoints=[origin_of(vendor.url)], roles=True)
    code, result = evaluate(catalog, vendor, manifest)
    assert "disclosure events are written by trainer or validator" in result["error"]["message"]
    with signing.acting(people["vera"]):
        assert evaluate(catalog, vendor, manifest)[0] == 0
    num_asked = len(vendor.bodies)
    allow(catalog, people, endpoints=[], roles=False)
    assert evaluate(catalog, vendor, manifest)[0] == 3
    assert len(vendor.bodies) == num_asked
    assert len(disclosed(catalog, manifest)) == 2


def test_a_store_without_an_owner_says_what_to_do_first(catalog: Catalog, vendor: Vendor) -> None:
    code, result = evaluate(catalog, vendor, chats(catalog))
    assert code == 3
    assert "`forge signers create NAME --role owner`, then `forge policy set --endpoint" in result["error"]["hint"]
    assert vendor.bodies == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--endpoint", "http://api.vendor.example/v1"), "is not encrypted: http is for this machine's loopback alone"),
        (("--endpoint", "ftp://api.vendor.example/v1"), "is not an https URL"),
        (("--endpoint", "https://user:pass@api.vendor.example/v1"), "has a user name, a query or a fragment"),
        (("--endpoint", "https://api.vendor.example/v1?key=a"), "has a user name, a query or a fragment"),
        (("--endpoint", "https://api.vendor.example:99999/v1"), "is not an https URL"),
        (("--endpoint", "https://[::1/v1"), "is not an https URL"),
        (("--endpoint", "https://a/v1", "--key-env", "NO_SUCH_KEY"), "--key-env NO_SUCH_KEY: this variable is not set"),
        (("--endpoint", "https://a/v1", "--key-env", "BROKEN_KEY"), "blanks, line ends or letters that no header can hold"),
        (("--endpoint", "https://a/v1", "--endpoint-option", "low"), "'low' is not KEY=VALUE"),
        (("--endpoint", "https://a/v1", "--endpoint-option", "model=b"), "model is not an option of the requests"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(
    catalog: Catalog, words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setenv("BROKEN_KEY", "a\nb")
    code, result = forge(catalog, "eval", "--data", "ds_0123456789abcdef", "--endpoint-model", "gpt-x", *words)
    assert code == 2
    assert message in result["error"]["message"]
    assert result["error"]["hint"]


@pytest.mark.parametrize(
    "words",
    [
        *(("--endpoint", "https://a/v1"), ("--endpoint-model", "m"), ("--key-env", "K"), ("--reuse",)),
        *(("--endpoint-option", "a=1"), ("--concurrency", "2"), ("--timeout", "9")),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(catalog: Catalog, words: tuple[str, ...]) -> None:
    code, result = forge(catalog, "eval", "--data", "ds_0123456789abcdef", "--model", "tiny", *words)
    assert code == 2
    assert "--endpoint URL with --endpoint-model NAME" in result["error"]["message"]


def test_rows_of_a_file_need_a_model_that_they_are_read_for(
    catalog: Catalog, people: dict[str, Any], vendor: Vendor
) -> None:
    named(catalog, people, vendor)
    code, result = forge(catalog, "eval", "--data", "x.jsonl", "--endpoint", vendor.url, "--endpoint-model", "m")
    assert code == 2
    assert "rows of a file are read for a model of it" in result["error"]["message"]
    code, result = forge(catalog, "eval", "--endpoint", vendor.url, "--endpoint-model", "m")
    assert (code, result["error"]["message"]) == (2, "--endpoint needs rows")


@pytest.mark.parametrize(
    ("reply", "code", "message"),
    [
        (
            (401, {}, {"error": {"message": f"Incorrect API key provided: {KEY}"}}),
            3,
            "answered 401: Incorrect API key provided: …",
        ),
        ((403, {}, b"no"), 3, "answered 403: no"),
        (
            (404, {}, {"error": {"message": "The model `gpt-x` does not exist"}}),
            2,
            "answered 404: The model `gpt-x` does not",
        ),
        ((301, {"location": "https://elsewhere.example/v1"}, b""), 1, "redirects to https://elsewhere.example/v1, and no"),
        (
            (400, {}, {"error": {"message": "no max_tokens", "code": "unsupported_parameter"}}),
            1,
            "answered 400 unsupported_parameter (no",
        ),
        ((200, {}, b"<html>"), 1, "the answer is not a chat completion"),
        ((503, {}, b"busy"), 1, "left 10 requests unanswered: answered 503"),
    ],
    ids=["401", "403", "404", "301", "400", "malformed", "503"],
)
def test_what_holds_for_all_requests_ends_it_and_is_on_record(
    catalog: Catalog, people: dict[str, Any], vendor: Vendor, reply: Any, code: int, message: str
) -> None:
    manifest = chats(catalog, 40)
    named(catalog, people, vendor)
    vendor.answer = lambda number, body: reply
    got, result = evaluate(catalog, vendor, manifest)
    assert got == code
    assert message in result["error"]["message"]
    assert KEY not in json.dumps(result)
    _, ended = disclosed(catalog, manifest)
    assert ended["num_answered"] == 0
    assert 1 <= ended["num_sent"] < 40
    assert catalog.all(EvalReport) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"choices":[{"message":{"content":"a \\ud800"}}]}', "half of a surrogate pair"),
        (
            b'{"choices":[{"message":{"tool_calls":[{"function":{"name":"f","arguments":"{\\"a\\":\\"\\\\ud800\\"}"}}]}}]}',
            "half of a surrogate pair",
        ),
        (b'{"choices":[{"message":{"content":"a"},"finish_reason":"\\udfff"}]}', "half of a surrogate pair"),
        (b'{"choices":[{"message":{"content":"a"}}],"usage":{"prompt_tokens":1e999}}', "not a chat completion"),
    ],
)
def test_a_reply_that_cannot_be_written_costs_no_other_one(content: bytes, reason: str) -> None:
    reply = reply_of(content)
    assert isinstance(reply, Unanswered)
    assert reason in reply.reason
    reply = reply_of(b'{"choices":[{"message":{"content":"\\ud83d\\ude00\\u0000"}}]}')
    assert isinstance(reply, ChatAnswer)
    assert reply.text == "\U0001f600\0"
    assert error_of(b'{"error":{"message":"\\ud800 x"}}', "") == ("", "? x")


def test_a_busy_endpoint_is_asked_again_when_it_says(catalog: Catalog, people: dict[str, Any], vendor: Vendor) -> None:
    manifest = chats(catalog, 3)
    named(catalog, people, vendor)
    moments: list[float] = []
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=1), usegmt=True)
    refusals = [(429, {"retry-after": "0.5"}, b""), (500, {}, b"a page"), (503, {"retry-after": soon}, b"")]

    def answer(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        moments.append(time.monotonic())
        return refusals[number - 1] if number <= len(refusals) else says("open Billing")

    vendor.answer = answer
    code, report = evaluate(catalog, vendor, manifest, "--concurrency", "1")
    assert code == 0, report
    assert (report.num_examples, report.left_out) == (3, {})
    assert moments[1] - moments[0] >= 0.5
    assert len(vendor.bodies) == 6
    assert disclosed(catalog, manifest)[1]["num_sent"] == 3


def test_a_row_without_an_answer_is_left_out_by_name(catalog: Catalog, people: dict[str, Any], vendor: Vendor) -> None:
    many = [chat(f"question {n}", "open Billing") for n in range(6)]
    image = DataRecord(
        {
            "messages": [
                {"role": "user", "content": [{"type": "image", "image": "sha256:0"}]},
                {"role": "assistant", "content": "a"},
            ]
        }
    )
    manifest = held(catalog, *many, image, DataRecord({"text": "a text"}, "text"))
    named(catalog, people, vendor)
    replies: dict[str, Any] = {
        "question 1": (400, {}, {"error": {"message": "question 1 is too long", "code": "context_length_exceeded"}}),
        "question 2": (200, {}, b"{"),
        "question 3": (200, {}, {"choices": []}),
        "question 4": (200, {}, {"choices": [{"message": {"content": [1]}}]}),
    }

    def answer(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        question = body["messages"][0]["content"]
        if question == "question 5":
            time.sleep(1.2)
        return replies.get(question) or says("open Billing")

    vendor.answer = answer
    code, report = evaluate(catalog, vendor, manifest, "--timeout", "0.4")
    assert code == 0, report
    assert report.num_examples == 1
    assert report.left_out == {
        "answered 400 context_length_exceeded": 1,
        "the answer is not a chat completion": 3,
        "no answer within 0.4 s": 1,
        "an image, which is not sent to an endpoint": 1,
        "a text: an endpoint gives no loss of it": 1,
    }
    began, ended = disclosed(catalog, manifest)
    assert (began["num_rows"], ended["num_sent"], ended["num_answered"]) == (6, 6, 1)


def test_rows_that_no_endpoint_can_answer_are_not_sent(catalog: Catalog, people: dict[str, Any], vendor: Vendor) -> None:
    manifest = held(catalog, DataRecord({"text": "a text"}, "text"))
    named(catalog, people, vendor)
    code, result = evaluate(catalog, vendor, manifest)
    assert code == 1
    assert "none of the 1 held-out rows can be put to gpt-x" in result["error"]["message"]
    assert (vendor.bodies, disclosed(catalog, manifest)) == ([], [])


def test_a_certificate_that_does_not_hold_is_refused(
    catalog: Catalog, people: dict[str, Any], vendor: Vendor, tmp_path: Path
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*write_certificate(tmp_path))
    manifest = chats(catalog)
    with running(Vendor(), context) as server:
        named(catalog, people, server)
        code, result = evaluate(catalog, server, manifest)
    assert code == 1
    assert f"the certificate of {origin_of(server.url)} does not hold" in result["error"]["message"]
    assert server.bodies == []


def test_a_proxy_of_the_environment_is_not_asked(
    catalog: Catalog, people: dict[str, Any], vendor: Vendor, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = chats(catalog)
    named(catalog, people, vendor)
    with running(Vendor()) as proxy:
        for name in ("http_proxy", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url.removesuffix("/v1"))
        assert evaluate(catalog, vendor, manifest)[0] == 0
        assert proxy.bodies == []


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}]


def test_tools_are_sent_and_calls_are_scored(catalog: Catalog, people: dict[str, Any], vendor: Vendor) -> None:
    def calling(number: int) -> DataRecord:
        function = {"name": "add", "arguments": json.dumps({"a": number})}
        turns = [{"role": "user", "content": str(number)}, {"role": "assistant", "tool_calls": [{"function": function}]}]
        return DataRecord({"messages": turns, "tools": TOOLS})

    manifest = held(catalog, *map(calling, range(4)), chat("no tool", "done", tools=TOOLS))
    named(catalog, people, vendor)

    def answer(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        assert body["tools"] == TOOLS
        question = body["messages"][0]["content"]
        arguments = {"0": '{"a": 0}', "1": '{"a": 7}', "2": '{"a": 2'}.get(question)
        if arguments is None:
            return says("done")
        return says(None, tool_calls=[{"id": "c", "type": "function", "function": {"name": "add", "arguments": arguments}}])

    vendor.answer = answer
    code, report = evaluate(catalog, vendor, manifest)
    assert code == 0, report
    assert report.metrics == {
        "exact_match": 1.0,
        "calls_match": 0.25,
        "calls_match_any_order": 0.25,
        "call_names_match": 0.75,
        "needless_calls": 0.0,
    }


def test_turns_are_sent_as_the_api_takes_them() -> None:
    call: dict[str, Any] = {"function": {"name": "add", "arguments": "{}"}}
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "a", "weight": 0, "name": "ann"},
        {"role": "assistant", "tool_calls": [call, call], "reasoning_content": "hm", "weight": 0},
        {"role": "tool", "content": "1", "name": "add"},
        {"role": "tool", "content": "2"},
    ]
    user, calling, first, second = wire_messages(turns)
    assert user == {"role": "user", "content": "a", "name": "ann"}
    assert [one["id"] for one in calling["tool_calls"]] == [first["tool_call_id"], second["tool_call_id"]]
    assert set(calling) == {"role", "tool_calls"}
    assert first == {"role": "tool", "content": "1", "tool_call_id": "call_1_0"}
    assert "tool_calls" in turns[1]
    assert "id" not in call


def test_what_needs_weights_is_said_not_to_be_measured(catalog: Catalog, people: dict[str, Any], vendor: Vendor) -> None:
    manifest = chats(catalog, 3)
    named(catalog, people, vendor)
    words = ("--data", manifest.id, "--endpoint", vendor.url, "--endpoint-model", "gpt-x", "--key-env", "VENDOR_KEY")
    done = CliRunner().invoke(cli, ["eval", *words, "--set", "eval.kl={}", "--store", catalog.store.uri])
    assert done.exit_code == 0, done.output
    assert "kl is not measured of gpt-x" in done.stderr


def test_labels_are_compared_with_the_generated_text(catalog: Catalog, people: dict[str, Any], vendor: Vendor) -> None:
    manifest = held(catalog, *(chat(f"question {n}", "red" if n % 2 else "blue") for n in range(10)))
    named(catalog, people, vendor)
    vendor.answer = lambda number, body: says("Red.")
    code, report = evaluate(catalog, vendor, manifest, "--set", 'eval.labels=["red","blue"]')
    assert code == 0, report
    assert set(report.metrics) == {"exact_match", "macro_f1"}
    assert report.metrics["exact_match"] == 0.5
    assert report.per_class["red"]["recall"] == 1.0


def test_safety_prompts_are_put_to_it_too(catalog: Catalog, people: dict[str, Any], vendor: Vendor, tmp_path: Path) -> None:
    (tmp_path / "safety.jsonl").write_text(
        '{"prompt": "bad?", "must_not": ["Billing"]}\n{"prompt": "ok?", "must": ["open"]}\n'
    )
    manifest = chats(catalog, 3)
    named(catalog, people, vendor)
    code, report = evaluate(catalog, vendor, manifest, "--set", f'eval.safety=["{tmp_path}/safety.jsonl"]')
    assert code == 0, report
    assert report.metrics["safety_pass_rate"] == 0.5
    assert [data.get("num_sent") for data in disclosed(catalog, manifest)] == [None, 3]  # rows alone


@pytest.mark.parametrize(
    ("source", "clause"),
    [
        ("def f(row, answer):\n    return {'size': 1 / (answer['text'] != 'odd')}\n", "ZeroDivisionError"),
        ("def f(row, answer):\n    return {} if answer['text'] == 'odd' else {'size': 1}\n", "lower_is_better"),
    ],
    ids=["fails on a late row", "has no such score"],
)
def test_answers_are_kept_where_a_function_fails_on_them(
    catalog: Catalog, people: dict[str, Any], vendor: Vendor, tmp_path: Path, source: str, clause: str
) -> None:
    manifest = chats(catalog)
    named(catalog, people, vendor)
    (tmp_path / "own.py").write_text(source)
    vendor.answer = lambda number, body: says("odd")
    lower = "" if "Zero" in clause else ', "lower_is_better": ["size"]'
    metrics = f'eval.metrics=[{{"function": "{tmp_path}/own.py:f"{lower}}}]'
    code, failure = evaluate(catalog, vendor, manifest, "--set", metrics)
    assert code == 2
    assert clause in failure["error"]["message"]
    (report,) = catalog.all(EvalReport)
    assert f"the answers of gpt-x at {vendor.url} are kept as {report.id}" in failure["error"]["message"]
    assert len(items_of(catalog.store, report)) == len(vendor.bodies) == 12
    assert report.metrics == {"exact_match": 0.0}
    assert evaluate(catalog, vendor, manifest, "--reuse")[1] == report
    assert len(vendor.bodies) == 12  # nothing is paid for twice


def test_general_rows_are_read_before_a_row_is_sent_and_decide_which_report_it_is(
    catalog: Catalog, people: dict[str, Any], vendor: Vendor
) -> None:
    manifest, general = chats(catalog, 3), held(catalog, *(chat(f"general {n}", "yes") for n in range(5)))
    named(catalog, people, vendor)
    code, failure = evaluate(catalog, vendor, manifest, "--set", "eval.general.rows=ds_0000000000000000")
    assert code == 2, failure
    assert not vendor.bodies
    settings = ("--set", f"eval.general.rows={general.id}", "--set", "eval.general.max_examples=2")
    _, report = evaluate(catalog, vendor, manifest, *settings)
    assert report.left_out == {"general row, an endpoint gives no loss of it": 2}
    assert report.config["general"] == {"dataset": general.id, "max_examples": 2}


def test_options_change_the_requests_and_are_part_of_the_report(
    catalog: Catalog, people: dict[str, Any], vendor: Vendor
) -> None:
    manifest = chats(catalog, 3)
    named(catalog, people, vendor)
    options = ("temperature=null", "max_tokens=null", "max_completion_tokens=64", "reasoning_effort=low")
    code, report = evaluate(catalog, vendor, manifest, *(word for text in options for word in ("--endpoint-option", text)))
    assert code == 0, report
    assert set(vendor.bodies[0]) == {"model", "messages", "max_completion_tokens", "reasoning_effort"}
    assert vendor.bodies[0]["max_completion_tokens"] == 64
    assert report.config["endpoint"]["options"]["reasoning_effort"] == "low"


def test_an_endpoint_is_asked_anew_unless_the_last_report_is_enough(
    catalog: Catalog, people: dict[str, Any], vendor: Vendor
) -> None:
    manifest = chats(catalog, 3)
    named(catalog, people, vendor)
    _, first = evaluate(catalog, vendor, manifest)
    _, again = evaluate(catalog, vendor, manifest, "--reuse")
    assert again == first
    assert len(vendor.bodies) == 3
    vendor.answer = lambda number, body: says("another answer")
    _, later = evaluate(catalog, vendor, manifest)
    assert later.metrics["exact_match"] == 0
    assert len(vendor.bodies) == 6
    assert evaluate(catalog, vendor, manifest, "--reuse")[1] == later
    assert evaluate(catalog, vendor, manifest, "--reuse", "--set", "eval.max_examples=1")[1].id not in (first.id, later.id)


def test_trace_and_erasure_say_that_rows_left(catalog: Catalog, people: dict[str, Any], vendor: Vendor) -> None:
    manifest = chats(catalog, 3)
    named(catalog, people, vendor)
    _, report = evaluate(catalog, vendor, manifest)
    record = items_of(catalog.store, report)[0]["record"]
    (rows,) = sent(catalog, {(manifest.id, "test")})
    assert (rows.num_rows, rows.num_sent, rows.to, rows.model) == (3, 3, vendor.url, "gpt-x")
    assert sent(catalog, {(manifest.id, "train")}) == ()
    traced = forge(catalog, "trace", record)[1]
    assert traced["reached"]["sent"][0]["to"] == vendor.url
    assert traced["reached"]["evals"][0]["subject"] == f"gpt-x at {vendor.url}"
    plan = forge(catalog, "erase", "--record", record, "--plan")[1]
    assert plan["sent"][0]["model"] == "gpt-x"
    assert [one["id"] for one in plan["evals"]] == [report.id]
    for words in (("trace", record), ("erase", "--record", record, "--plan")):
        text = CliRunner().invoke(cli, [*words, "--store", catalog.store.uri]).output
        assert f"3 rows of test of {manifest.id} to gpt-x at {vendor.url}" in text
    assert f"gpt-x at {vendor.url} on test of" in forge(catalog, "lineage", report.id)[1]["label"]


def test_the_certificate_of_an_erasure_says_that_rows_left(catalog: Catalog, people: dict[str, Any], vendor: Vendor) -> None:
    manifest = chats(catalog, 3)
    named(catalog, people, vendor)
    _, report = evaluate(catalog, vendor, manifest)
    record = items_of(catalog.store, report)[0]["record"]
    code, statement = forge(catalog, "erase", "--record", record, "--apply", "--yes", "--retrain", "none")
    assert code == 0, statement
    (rows,) = statement["predicate"]["remains"]["rows that were sent to other systems"]
    assert (rows["to"], rows["num_sent"]) == (vendor.url, 3)
    catalog.sync()
    assert not catalog.store.exists(f"evals/{report.id}/items.jsonl")
    num_asked = len(vendor.bodies)
    code, result = evaluate(catalog, vendor, manifest)
    assert code == 3
    assert "erased" in result["error"]["message"]
    assert len(vendor.bodies) == num_asked


def test_no_more_requests_are_under_way_than_allowed(catalog: Catalog, people: dict[str, Any], vendor: Vendor) -> None:
    manifest = chats(catalog, 20)
    named(catalog, people, vendor)
    lock, now, most = threading.Lock(), [0], [0]

    def answer(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with lock:
            now[0] -= 1
        return says("open Billing")

    vendor.answer = answer
    assert evaluate(catalog, vendor, manifest, "--concurrency", "3")[0] == 0
    assert most[0] == 3


def test_an_interrupted_command_says_how_many_rows_left(catalog: Catalog, people: dict[str, Any], vendor: Vendor) -> None:
    manifest = chats(catalog, 20)
    named(catalog, people, vendor)
    is_asked = threading.Event()

    def answer(number: int, body: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
        if number > 4:
            is_asked.set()
            time.sleep(5)
        return says("open Billing")

    vendor.answer = answer
    words = ("eval", "--data", manifest.id, "--endpoint", vendor.url, "--endpoint-model", "gpt-x", "--concurrency", "1")
    process = subprocess.Popen(
        [sys.executable, "-m", "forge_ray.cli", *words, "--json", "--store", catalog.store.uri], stdout=subprocess.PIPE
    )
    assert is_asked.wait(60)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert json.loads(printed)["error"]["code"] == "interrupted"
    assert [data.get("num_sent") for data in disclosed(catalog, manifest)] == [None, 5]


def test_a_killed_command_counts_as_all_of_its_rows(catalog: Catalog, people: dict[str, Any], vendor: Vendor) -> None:
    from forge_ray.store import disclosures

    manifest = chats(catalog, 3)
    named(catalog, people, vendor)
    disclosures.begin(catalog, manifest.id, "test", 3, origin_of(vendor.url), vendor.url, "gpt-x")
    (rows,) = sent(catalog, {(manifest.id, "test")})
    assert str(rows).startswith(f"up to 3 rows of test of {manifest.id} to gpt-x at {vendor.url}, at ")


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://API.vendor.example:443/v1", "https://api.vendor.example"),
        ("https://api.vendor.example:8443", "https://api.vendor.example:8443"),
        ("http://localhost:8000/v1", "http://localhost:8000"),
        ("http://[::1]:80/v1", "http://[::1]"),
    ],
)
def test_hosts_are_compared_in_one_form(url: str, origin: str) -> None:
    assert origin_of(url) == origin


@pytest.mark.parametrize("url", ["http://10.0.0.1", "http://127.0.0.1.vendor.example", "https://", "//a", "https://a b"])
def test_a_host_that_is_not_encrypted_is_none(url: str) -> None:
    with pytest.raises(SettingError):
        origin_of(url)


def test_the_hint_to_encrypt_keeps_the_port_and_path() -> None:
    with pytest.raises(SettingError) as caught:
        parts_of("http://api.vendor.example:8443/v1")
    assert caught.value.hint == "use https://api.vendor.example:8443/v1"


def test_a_policy_names_hosts_as_a_whole(catalog: Catalog, people: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="has a path: a host is allowed as a whole"):
        allow(catalog, people, endpoints=["https://api.vendor.example/v1"])
    with pytest.raises(ConfigError, match="is not encrypted"):
        allow(catalog, people, endpoints=["http://api.vendor.example"])
    allow(catalog, people, endpoints=["https://api.vendor.example/", "https://api.vendor.example:443"])
    assert catalog.authority().policy == Policy(endpoints=("https://api.vendor.example",))
    allow(catalog, people, endpoints=[])
    assert "endpoints" not in catalog.standing.governing[-1].event.data  # earlier releases would pass over all of it


def test_words_of_a_server_are_short_and_without_the_key() -> None:
    assert error_of(json.dumps({"error": {"code": None, "type": "rate_limit"}}).encode(), KEY) == ("rate_limit", "")
    assert error_of(f"your key {KEY} {'x' * 500}".encode(), KEY)[1].startswith("your key … xxx")
    assert KEY[:8] not in error_of(f"{'x' * 190}{KEY}".encode(), KEY)[1]
    assert error_of(json.dumps({"error": {"code": "What the row says!"}}).encode(), "") == ("", "")
    assert error_of(b'{"error": "text"}', "") == ("", '{"error": "text"}')


def test_an_endpoint_of_our_own_is_asked_like_any_other(
    catalog: Catalog, people: dict[str, Any], tiny_model_dir: Path
) -> None:
    manifest = chats(catalog, 3)
    with tiny_endpoint(tiny_model_dir) as url:
        server = Vendor(f"{url}/v1")
        named(catalog, people, server)
        words = ("eval", "--data", manifest.id, "--endpoint", server.url, "--endpoint-model", "tiny")
        code, result = forge(catalog, *words, "--set", "eval.max_new_tokens=4")
    assert code == 0, result
    report = EvalReport.model_validate(result["reports"][f"tiny at {server.url}"])
    assert (report.num_examples, report.left_out) == (3, {})
    assert report.costs["completion_tokens"] > 0
