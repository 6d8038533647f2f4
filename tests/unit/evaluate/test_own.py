"""Functions of the user's own: what they are called with, every way to fail, what they may not do, and how scores count."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from forge_ray import pipeline
from forge_ray.cli.evaluate import _print as print_reports
from forge_ray.cli.main import cli
from forge_ray.config.base import parse
from forge_ray.config.own_metric import BUILT_IN, RESERVED
from forge_ray.config.release import EvalConfig
from forge_ray.config.run import RunConfig
from forge_ray.errors import ConfigError, ForgeError, NotFound, StoreError
from forge_ray.evaluate import own
from forge_ray.evaluate.chance import wilson
from forge_ray.evaluate.examples import Example
from forge_ray.evaluate.items import verify_sources
from forge_ray.evaluate.measures import differences, intervals, statistics
from forge_ray.evaluate.own import ScoringFunction, check_loads, num_scored, read_functions, running, scored, try_functions
from forge_ray.evaluate.summary import slice_scores, summarise
from forge_ray.records import EvalReport
from forge_ray.store import paths
from forge_ray.store.files import Store

pytestmark = pytest.mark.unit

LENGTH = "def length(row, answer):\n    return {'num_words': len(answer['text'].split())}\n"
CALL = {"id": "c1", "type": "function", "function": {"name": "order", "arguments": '{"item": "pump"}'}}


def functions_of(folder: Path, source: str, name: str = "f", **settings: Any) -> tuple[ScoringFunction, ...]:
    file = folder / "own.py"
    file.write_text(source)
    config = parse(EvalConfig, {"metrics": [{"function": f"{file}:{name}", **settings}]})
    return read_functions(config.metrics)


def chat(number: int, answer: str = "a b c", **more: Any) -> Example:
    return Example(f"rec_{number}", ({"role": "user", "content": "q?", "weight": 0},), None, answer, "tickets", **more)


def item(number: int, prediction: str = "a b") -> dict[str, Any]:
    answer = {"record": f"rec_{number}", "source": "tickets", "reference": "a b c", "prediction": prediction}
    return answer | {"finish_reason": "stop", "likeliest": "", "logprob": -1.0, "num_tokens": 2}


def failure(folder: Path, source: str, **settings: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        list(scored(iter([item(7)]), functions_of(folder, source, **settings), [chat(7)], (), ()))
    return caught.value


def test_text_alone_is_short_for_the_function() -> None:
    text, section = (parse(EvalConfig, {"metrics": [value]}) for value in ("a/b.py:f", {"function": "a/b.py:f"}))
    assert text == section
    assert (text.metrics[0].file, text.metrics[0].name) == ("a/b.py", "f")


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("own.py", "function='own.py' is not a Python file, a colon and the name of a function"),
        ("own.txt:f", "is not a Python file"),
        ("own.py:f()", "is not a Python file"),
        ("s3://bucket/own.py:f", "function='s3://bucket/own.py:f' is a URI, and code is taken from files alone"),
        ({"function": "own.py:f", "lower_is_better": ["loss"]}, "loss is a metric that every evaluation may have"),
        ({"function": "own.py:f", "seconds_per_row": 0}, "greater than 0"),
    ],
)
def test_setting_that_names_no_function_is_refused(metric: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(").replace(")", r"\)")):
        parse(EvalConfig, {"metrics": [metric]})


def test_function_receives_row_and_answer_as_plain_data(tmp_path: Path) -> None:
    source = "def f(row, answer):\n    return {'n' + str(i): len(str(x)) for i, x in enumerate([row, answer])} if check("
    source += "row, answer) else {}\n\ndef check(row, answer):\n    import json, pathlib\n"
    row = {"id": "rec_1", "messages": [{"role": "user", "content": "q?"}], "tools": ["t"], "source": "tickets"}
    row |= {
        "slices": {"source": "tickets"},
        "reference": {"text": "", "calls": [{"name": "order", "arguments": {"item": "pump"}}]},
    }
    answer = {"text": "<call>", "calls": [{"name": "order", "arguments": {}}], "finish_reason": "length"}
    source += (
        f"    assert row == json.loads({json.dumps(row)!r}), row\n    assert answer == json.loads({json.dumps(answer)!r})\n"
    )
    source += "    return True\n"
    example = Example("rec_1", ({"role": "user", "content": "q?", "weight": 0},), ["t"], "", "tickets", (CALL,))
    answered = {**item(1, "<call>"), "kind": "call", "called": answer["calls"], "finish_reason": "length"}
    (result,) = scored(iter([answered]), functions_of(tmp_path, source), [example], ("source", "label"), ())
    assert result["scores"].keys() == {"n0", "n1"}
    assert "scores" not in answered


def test_scores_are_metrics_with_intervals_and_slices(tmp_path: Path) -> None:
    source = "def f(row, answer):\n    n = int(row['id'][4:])\n    return {'num_words': n, 'even': n % 2 == 0 and 1 or 0}\n"
    chats = [chat(number) for number in range(12)]
    items = list(scored((item(n) for n in range(12)), functions_of(tmp_path, source), chats, (), ()))
    metrics, _ = summarise(items, ())
    assert (metrics["num_words"], metrics["even"]) == (5.5, 0.5)
    low, high = intervals(items, ())["num_words"]
    assert 3 < low < 5.5 < high < 8
    assert intervals(items, ())["even"] == wilson(6, 12)  # 0 or 1 on every row: a share
    assert slice_scores(items, (), ("source",))["source"]["tickets"]["num_words"] == 5.5
    assert num_scored(items, ()) == {"num_words": 12, "even": 12}


def test_row_without_a_score_is_counted_and_differences_are_of_rows_with_both(tmp_path: Path) -> None:
    source = "def f(row, answer):\n    return {'num_words': len(answer['text'])} if answer['text'] else {}\n"
    functions, chats = functions_of(tmp_path, source), [chat(number) for number in range(30)]
    ours = list(scored((item(n, "abcd" if n < 20 else "") for n in range(30)), functions, chats, (), ()))
    theirs = list(scored((item(n, "ab" if n >= 8 else "") for n in range(30)), functions, chats, (), ()))
    assert (num_scored(ours, functions), num_scored(theirs, functions)) == ({"num_words": 20}, {"num_words": 22})
    change = differences(ours, theirs, (), 0.95)["num_words"]
    assert change is not None
    assert (change.num_rows, change.value) == (12, 2)
    without = [{key: value for key, value in one.items() if key != "scores"} for one in theirs]
    assert "num_words" not in differences(ours, without, (), 0.95)


@pytest.mark.parametrize(
    ("source", "clause"),
    [
        ("def f(row, answer):\n    return row['secret']", "raised KeyError in line 2: return row['secret']; row rec_7"),
        ("def f(row, answer):\n    raise ValueError(answer['text'])", "raised ValueError in line 2: raise ValueError("),
        ("def f(row, answer):\n    import sys; sys.exit()", "raised SystemExit in line 2"),
        ("def f(row):\n    return {}", "raised TypeError; row rec_7"),
        ("def f(row, answer):\n    return f(row, answer)", "raised RecursionError in line 2"),
        ("def f(row, answer):\n    return 0.5", "returned float, not a dict of scores by name; row rec_7"),
        ("def f(row, answer):\n    return None", "returned NoneType, not a dict of scores by name"),
        ("def f(row, answer):\n    return {'x': True}", "returned bool as x, not a number"),
        ("def f(row, answer):\n    return {'x': '1'}", "returned str as x, not a number"),
        ("def f(row, answer):\n    return {'x': float('nan')}", "returned nan as x, not a finite number"),
        ("def f(row, answer):\n    return {'x': -float('inf')}", "returned -inf as x, not a finite number"),
        ("def f(row, answer):\n    return {1: 1}", "returned a score whose name is int, not text"),
        ("def f(row, answer):\n    return {'Tone': 1}", "cannot be called so: 'Tone' does not match [a-z0-9_]+; row rec_7"),
        ("def f(row, answer):\n    return {'loss': 1}", "cannot be called so: loss is a metric that every evaluation may"),
        ("def f(row, answer):\n    return {'leak_auc': 1}", "leak_auc begins with leak_, as metrics of every evaluation do"),
        ("def f(row, answer):\n    import os; os._exit(3)", "ended its process with code 3; row rec_7"),
        ("def f(row, answer):\n    import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL; row rec_7"),
        ("import nothing_of_this_name", "raised ModuleNotFoundError: No module named 'nothing_of_this_name' in line 1"),
        ("def g(row, answer): ...\nh = 3", "has no function 'f'; it defines g"),
        ("f = 3", "has no function 'f'; it defines no function"),
    ],
)
def test_every_fault_names_function_row_and_line(tmp_path: Path, source: str, clause: str) -> None:
    error = failure(tmp_path, source)
    assert error.message.startswith(f"eval.metrics: {tmp_path}/own.py:f ")
    assert clause in error.message
    assert error.hint
    assert "a b" not in error.message  # no text of the row


@pytest.mark.parametrize(
    ("source", "settings", "clause"),
    [
        ("def f(row, answer):\n    while True: pass", {"seconds_per_row": 0.2}, "took more than 0.2 s of processor time"),
        ("def f(row, answer):\n    return {'x': len(bytearray(1 << 30))}", {"memory_gb": 0.5}, "needs more than 0.5 GB"),
        ("x = bytearray(1 << 30)\ndef f(row, answer): ...", {"memory_gb": 0.5}, "needs more than 0.5 GB"),
    ],
)
def test_limits_end_the_evaluation(tmp_path: Path, source: str, settings: dict[str, Any], clause: str) -> None:
    assert clause in failure(tmp_path, source, **settings).message


def test_function_that_waits_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = functions_of(tmp_path, "import time\ndef f(row, answer):\n    time.sleep(99)", seconds_per_row=0.25)
    with running(functions[0]) as call:
        monkeypatch.setattr(own, "WALL_S", 0.5)
        with pytest.raises(ConfigError, match="gave no answer within 2 s; row rec_1"):
            call({"id": "rec_1"}, {})


def test_process_that_does_not_start_in_time_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = functions_of(tmp_path, "def f(row, answer):\n    return {}")
    processes: list[Any] = []
    popen = subprocess.Popen

    def started(*arguments: Any, **options: Any) -> Any:
        processes.append(popen(*arguments, **options))
        return processes[-1]

    monkeypatch.setattr(subprocess, "Popen", started)
    monkeypatch.setattr(own, "WALL_S", 0.0)
    with pytest.raises(ConfigError, match="has no process: it did not start within 0 s"), running(functions[0]):
        pass
    assert processes[0].returncode is not None


@pytest.mark.parametrize(
    ("body", "clause"),
    [
        ("import socket; socket.create_connection(('127.0.0.1', 9))", "may not use the network in line 2"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')", "may not use the network in line 2"),
        ("import subprocess; subprocess.run(['true'])", "may not start a program in line 2"),
        ("import os; os.system('true')", "may not start a program in line 2"),
        ("import os; os.fork()", "may not start a process in line 2"),
        ("open('/tmp/never-written-by-a-metric', 'w')", "may not write files in line 2"),
        ("import os; os.remove('/tmp/never-removed-by-a-metric')", "may not change files in line 2"),
    ],
)
def test_function_may_not_reach_outside(tmp_path: Path, body: str, clause: str) -> None:
    assert clause in failure(tmp_path, f"def f(row, answer):\n    {body}\n").message


def test_refusal_that_the_function_passes_over_is_no_fault(tmp_path: Path) -> None:
    source = "def f(row, answer):\n    try: open('/tmp/x', 'w')\n    except OSError: return {'x': 1}\n"
    (result,) = scored(iter([item(1)]), functions_of(tmp_path, source), [chat(1)], (), ())
    assert result["scores"] == {"x": 1.0}


NETWORK = """import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def f(row, answer):
    import struct
    address = struct.pack('=HHI8x', 2, PORT, 0x0100007f)
    return {'x': libc.connect(libc.socket(2, 1, 0), address, 16)}
"""


def test_network_is_denied_to_libraries_where_the_kernel_lets_this_user(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(socket.htons(server.getsockname()[1]))
        (result,) = scored(iter([item(1)]), functions_of(tmp_path, NETWORK.replace("PORT", port)), [chat(1)], (), ())
        if os.geteuid() and result["scores"]["x"] == 0:
            pytest.skip("this user may not make network namespaces")
        assert result["scores"]["x"] == -1


def test_function_sees_no_secrets_no_neighbours_and_may_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    (tmp_path / "neighbour.py").write_text("")
    monkeypatch.chdir(tmp_path)
    source = "import os\ndef f(row, answer):\n    print('text', flush=True)\n    try:\n        import neighbour\n"
    source += "    except ImportError:\n        return {'num_keys': sum(name.startswith('AWS') for name in os.environ)}\n"
    (result,) = scored(iter([item(1)]), functions_of(tmp_path, source), [chat(1)], (), ())
    assert result["scores"] == {"num_keys": 0.0}
    assert "text" not in capfd.readouterr().out


def test_functions_are_tried_on_references_before_a_model_answers(tmp_path: Path) -> None:
    functions = functions_of(tmp_path, "def f(row, answer):\n    return {'x': 1 / (row['id'] != 'rec_9')}")
    try_functions(functions, [chat(number) for number in range(9)], (), ())
    with pytest.raises(ConfigError, match=r"raised ZeroDivisionError in line 2: .*; row rec_9"):
        try_functions(functions, [chat(number) for number in range(12)], (), ())
    try_functions(functions, [chat(number) for number in range(9)] + [chat(99), chat(9)], (), ())  # beyond the tried ones
    same = "def f(row, answer):\n    return {'x': answer['calls'] == row['reference']['calls'] and 1 or 0}"
    try_functions(functions_of(tmp_path, same), [chat(1, "", calls=(CALL,))], (), ())
    with pytest.raises(ConfigError, match="no held-out row is a chat"):
        try_functions(functions, [], (), ())


def test_files_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"eval.metrics: '.*nowhere.py' does not exist"):
        read_functions(parse(EvalConfig, {"metrics": [f"{tmp_path}/nowhere.py:f"]}).metrics)
    with pytest.raises(ConfigError, match="is not Python in line 2: "):
        functions_of(tmp_path, "def f(row, answer):\n  return {\n")
    with pytest.raises(ConfigError, match="has no function 'f'; it defines length"):
        check_loads(functions_of(tmp_path, LENGTH))
    check_loads(functions_of(tmp_path, LENGTH, "length"))


def test_edited_function_is_another_metric(tmp_path: Path) -> None:
    (before,), (after,) = functions_of(tmp_path, LENGTH, "length"), functions_of(tmp_path, LENGTH + "#", "length")
    assert before.settings["sha256"] != after.settings["sha256"]
    assert before.kept_as != after.kept_as
    (tmp_path / "moved").mkdir()
    (moved,) = functions_of(tmp_path / "moved", LENGTH, "length", seconds_per_row=1)
    assert moved.settings == before.settings  # the same function elsewhere, with other limits


def test_two_functions_cannot_return_one_name_and_a_direction_needs_its_score(tmp_path: Path) -> None:
    functions = functions_of(tmp_path, "def f(row, answer):\n    return {'x': 1}")
    with pytest.raises(ConfigError, match="returned x, as another function did; row rec_1"):
        list(scored(iter([item(1)]), functions * 2, [chat(1)], (), ()))
    directed = functions_of(tmp_path, "def f(row, answer):\n    return {'x': 1}", lower_is_better=["y"])
    with pytest.raises(ConfigError, match="returned no y, which lower_is_better names") as caught:
        num_scored(list(scored(iter([item(1)]), directed, [chat(1)], (), ())), directed)
    assert caught.value.hint == "its scores are: x"
    silent = functions_of(tmp_path, "def f(row, answer):\n    return {}")
    with pytest.raises(ConfigError, match=r"returned \{\} for every row"):
        num_scored(list(scored(iter([item(1)]), silent, [chat(1)], (), ())), silent)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    source = "import numpy as np\ndef f(row, answer):\n    return {'x': np.float32(0.5), 'y': np.int64(3)}"
    (result,) = scored(iter([item(1)]), functions_of(tmp_path, source), [chat(1)], (), ())
    assert result["scores"] == {"x": 0.5, "y": 3.0}


def test_names_of_every_metric_are_reserved() -> None:
    chats = [item(1) | {"called": [], "valid_schema": True, "reference": "{}"}]
    calls = [item(2) | {"kind": "call", "calls": [], "called": []}]
    texts = [{"kind": "text", "record": "rec_3", "source": "s", "logprob": -1.0, "num_tokens": 1, "num_bytes": 1}]
    names = statistics([*chats, *calls, *texts], ()).keys() | statistics([item(1)], ("a b c",)).keys()
    assert len(names) > 15
    assert names <= BUILT_IN
    assert all(name.startswith(RESERVED) for name in ("safety_pass_rate", "leak_auc", "exposure_mean", "extraction_gain"))


def test_kept_file_that_was_changed_is_detected(tmp_path: Path) -> None:
    (function,) = functions_of(tmp_path, LENGTH, "length")
    fixed = {"subject": "run_1", "subject_digest": "sha256:0", "dataset": "ds_1", "split": "test", "num_examples": 1}
    report = EvalReport(
        **fixed, config={"metrics": [function.settings]}, metrics={}, per_class={}, items_sha256="0"
    ).sealed()
    store = Store(str(tmp_path / "store"))
    place = paths.report(report.id, function.kept_as)
    with pytest.raises(StoreError, match="is not there or not what the report was made with"):
        verify_sources(store, report)
    store.write(place, function.source)
    verify_sources(store, report)
    store.write(place, function.source + b"#")
    with pytest.raises(StoreError, match=function.kept_as):
        verify_sources(store, report)


def test_report_without_own_metrics_keeps_its_id() -> None:
    fixed = {"subject": "run_1", "subject_digest": "sha256:0", "dataset": "ds_1", "split": "test", "config": {}}
    report = EvalReport(**fixed, num_examples=1, metrics={}, per_class={}, items_sha256="0")
    assert "num_scored" not in report.identity()
    assert not {"metrics", "json_schema"} & EvalConfig().scoring().keys()


def test_table_shows_numbers_and_over_how_many_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = {"subject": "run_1", "subject_digest": "sha256:0", "dataset": "ds_1", "split": "test", "num_examples": 40}
    metrics, counts = {"exact_match": 0.5, "num_words": 4.12, "tone": 0.25}, {"num_words": 40, "tone": 12}
    report = EvalReport(**fixed, config={}, metrics=metrics, per_class={}, items_sha256="0", num_scored=counts).sealed()
    print_reports(Store(str(tmp_path)), ("tuned",), [report])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert {"exact_match 50.0%", "num_words 4.12", "tone 0.25", "tuned: tone is of 12 of 40 rows"} <= {*lines}
    assert not any("num_words is of" in line for line in lines)


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ({"metrics": ["nowhere.py:f"]}, "eval.metrics: 'nowhere.py' does not exist"),
        ({"json_schema": "nowhere.json"}, "eval.json_schema: 'nowhere.json' does not exist"),
        ({"safety": ["nowhere.jsonl"]}, "eval.safety: 'nowhere.jsonl' does not exist"),
        ({"metrics": ["own.py:missing"]}, "eval.metrics: own.py:missing has no function 'missing'; it defines length"),
    ],
)
def test_run_is_refused_before_its_base_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: dict[str, Any], error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(LENGTH)
    values = {"name": "n", "base_model": "nobody", "data": {"sources": [{"path": "rows.jsonl"}]}, "release": {"alias": "a"}}
    config = parse(RunConfig, values | {"eval": setting})
    with pytest.raises(ForgeError) as caught:
        pipeline.run(config, Store(str(tmp_path / "store")))
    assert caught.value.message == error
    Path("run.yaml").write_text(json.dumps(values | {"eval": setting}))
    done = CliRunner().invoke(cli, ["train", "run.yaml", "--store", str(tmp_path / "store"), "--json"])
    assert json.loads(done.stdout.splitlines()[-1])["error"]["message"] == error
