"""Scores by functions of the user's own (`eval.metrics`): each evaluated chat and its answer → scores by name.

The functions are not trusted to end, to be frugal or to be right: each runs in a process with limits (`foreign`), and the
first row on which it fails ends the evaluation, for a mean over the other rows would be of a choice that nobody made.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from forge_ray.config.own_metric import OwnMetric, name_problem
from forge_ray.errors import ConfigError
from forge_ray.evaluate import foreign
from forge_ray.evaluate.calls import expected_calls
from forge_ray.evaluate.examples import Example
from forge_ray.evaluate.named_files import read_named, sha256_of
from forge_ray.evaluate.summary import slice_of
from forge_ray.machine.limited import LIMIT, REASON, ROOT, WALL_S, LimitedProcess

TRIED = 10  # rows that a function is tried on before a model answers any
ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH")  # nothing else is handed on: no keys, no tokens
FIXED = {"PYTHONPATH": ROOT, "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
ISOLATED = ("-s", "-P", "-B")  # no packages of the user's home, no module of the current folder, no files of bytecode

Scores = dict[str, float]
Call = Callable[[dict[str, Any], dict[str, Any]], Scores]


@dataclass(frozen=True)
class ScoringFunction:
    """A function of `eval.metrics` and the bytes of its file."""

    metric: OwnMetric
    source: bytes

    @property
    def settings(self) -> dict[str, Any]:
        """What the scores follow from, for the report."""
        lower = sorted(self.metric.lower_is_better)
        return {"function": self.metric.name, "sha256": sha256_of(self.source), "lower_is_better": lower}

    @property
    def kept_as(self) -> str:
        """The name of the file in the report's folder."""
        return kept_name(self.settings["sha256"])

    def problem(self, clause: str, hint: str, row: str = "") -> ConfigError:
        return ConfigError(f"eval.metrics: {self.metric.function} {clause}" + (f"; row {row}" if row else ""), hint=hint)


def kept_name(sha256: str) -> str:
    return f"metric-{sha256.removeprefix('sha256:')[:16]}.py"


def read_functions(metrics: Sequence[OwnMetric]) -> tuple[ScoringFunction, ...]:
    """Raises `NotFound` or `ConfigError` where a file is not there or is not Python."""
    functions = tuple(ScoringFunction(metric, read_named(metric.file, "eval.metrics", "Python")) for metric in metrics)
    for function in functions:
        try:
            compile(function.source, function.metric.file, "exec")
        except (SyntaxError, ValueError) as error:
            where = f" in line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
            reason = error.msg if isinstance(error, SyntaxError) else str(error)
            raise function.problem(f"is not Python{where}: {reason}", "correct the file") from None
    return functions


def check_loads(functions: Sequence[ScoringFunction]) -> None:
    """Raises `ConfigError` where a file cannot be loaded, or has no such function."""
    for function in functions:
        with running(function):
            pass


@contextlib.contextmanager
def running(function: ScoringFunction) -> Iterator[Call]:
    """The function in a process of its own: (row, answer) → scores. Raises `ConfigError`."""
    environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ} | FIXED
    try:
        process = LimitedProcess(foreign.__name__, environment, WALL_S, *ISOLATED)
    except EOFError as error:
        raise function.problem(f"has no process: it {error}", f"see why: python -m {foreign.__name__} < /dev/null") from None
    limits = {"cpu_s": function.metric.seconds_per_row, "memory": int(function.metric.memory_gb * 1e9)}
    try:
        loading = {"file": function.metric.file, "function": function.metric.name, **limits}
        _answer(process, function, loading, function.source, foreign.IMPORT_CPU_S)

        def call(row: dict[str, Any], answer: dict[str, Any]) -> Scores:
            request = {"row": row, "answer": answer}
            scores = _answer(process, function, request, b"", function.metric.seconds_per_row, row["id"])
            if problem := next(filter(None, map(name_problem, scores)), ""):
                hint = "give the score another name: letters a to z, digits and _"
                raise function.problem(f"returned a score that cannot be called so: {problem}", hint, row["id"])
            return scores

        yield call
    finally:
        process.end()


def _answer(
    process: LimitedProcess, function: ScoringFunction, request: dict[str, Any], data: bytes, cpu_s: float, row: str = ""
) -> Scores:
    seconds = WALL_S + 4 * cpu_s
    try:
        process.ask(request, data)
        frame = process.answer(seconds)
    except TimeoutError:
        hint = "let it compute and not wait"
        raise function.problem(f"gave no answer within {seconds:.0f} s", hint, row) from None
    except BrokenPipeError:
        frame = None
    if frame is None:
        raise _ended(process, function, cpu_s, row)
    kind, body = frame
    if kind == LIMIT:
        raise function.problem(f"needs more than {function.metric.memory_gb:g} GB", "raise memory_gb of the metric", row)
    if kind == REASON:
        raise function.problem(body.decode(), "correct the function; {} is the answer for a row that it does not score", row)
    scores: Scores = json.loads(body)
    return scores


def _ended(process: LimitedProcess, function: ScoringFunction, cpu_s: float, row: str) -> ConfigError:
    code = process.process.wait()
    if code == -signal.SIGPROF:
        return function.problem(f"took more than {cpu_s:g} s of processor time", "raise seconds_per_row of the metric", row)
    if code < 0:
        name = signal.Signals(-code).name
        return function.problem(f"was ended by {name}", "SIGKILL: the machine had no memory left", row)
    return function.problem(f"ended its process with code {code}", "return the scores instead", row)


def row_of(example: Example, item: dict[str, Any], slices: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """A row as a function receives it, plain data: {id, messages, tools, source, slices, reference: {text, calls}}."""
    values = {kind: slice_of(item, kind, labels) for kind in slices}
    return {
        "id": example.record,
        "messages": [{key: value for key, value in message.items() if key != "weight"} for message in example.messages],
        "tools": example.tools,
        "source": example.source,
        "slices": {kind: value for kind, value in values.items() if value is not None},
        "reference": {"text": example.answer, "calls": expected_calls(example)},
    }


def answer_of(item: dict[str, Any]) -> dict[str, Any]:
    """What the model answered: {text, calls, finish_reason}."""
    return {"text": item["prediction"], "calls": item.get("called", []), "finish_reason": item["finish_reason"]}


def try_functions(
    functions: Sequence[ScoringFunction], chats: Sequence[Example], slices: Sequence[str], labels: Sequence[str]
) -> None:
    """Call each with the first rows and their own references as answers, so that what is wrong with it costs no answers of a
    model. Raises `ConfigError`."""
    if functions and not chats:
        raise functions[0].problem("has no rows to score: no held-out row is a chat", "leave eval.metrics out for texts")
    items = [(chat, _as_answered(chat)) for chat in chats[:TRIED]]
    for _ in scored(iter([item for _, item in items]), functions, chats[:TRIED], slices, labels):
        pass


def _as_answered(example: Example) -> dict[str, Any]:
    """An item whose answer is the reference."""
    calls = expected_calls(example)
    item = {"record": example.record, "source": example.source, "reference": example.answer, "prediction": example.answer}
    return item | {"called": calls, "finish_reason": "stop"} | ({"kind": "call", "calls": calls} if calls else {})


def scored(
    items: Iterator[dict[str, Any]],
    functions: Sequence[ScoringFunction],
    chats: Sequence[Example],
    slices: Sequence[str],
    labels: Sequence[str],
) -> Iterator[dict[str, Any]]:
    """The items of `chats`, as they come, with `scores`. Raises `ConfigError` at the first row that a function fails on."""
    by_record = {chat.record: chat for chat in chats}
    with contextlib.ExitStack() as stack:
        calls = [(function, stack.enter_context(running(function))) for function in functions]
        for item in items:
            if not calls or "left_out" in item:
                yield item
                continue
            scores: Scores = {}
            row = row_of(by_record[item["record"]], item, slices, labels)
            for function, call in calls:
                own = call(row, answer_of(item))
                if twice := sorted(own.keys() & scores.keys()):
                    hint = "give the score another name in one of them"
                    raise function.problem(f"returned {twice[0]}, as another function did", hint, row["id"])
                scores |= own
            yield {**item, "scores": scores}


def num_scored(items: Sequence[dict[str, Any]], functions: Sequence[ScoringFunction]) -> dict[str, int]:
    """Name of a score → rows that have it. Raises `ConfigError` where a direction is set for a score that no row has, and
    where no row has any: nothing was measured."""
    counts: dict[str, int] = {}
    for item in items:
        for name in item.get("scores", ()):
            counts[name] = counts.get(name, 0) + 1
    for function in functions:
        if missing := [name for name in function.metric.lower_is_better if name not in counts]:
            names = ", ".join(sorted(counts)) or "none"
            raise function.problem(f"returned no {missing[0]}, which lower_is_better names", f"its scores are: {names}")
    if functions and not counts:
        raise functions[0].problem("returned {} for every row", "return at least one score for some of them")
    return counts
