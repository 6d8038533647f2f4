"""`forge eval`: models on held-out rows, with a run or without one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, load_run_file, verb
from forge_ray.errors import ConfigError
from forge_ray.store import paths

if TYPE_CHECKING:
    from forge_ray.config.release import EvalConfig
    from forge_ray.config.run import RunConfig
    from forge_ray.evaluate.chat_api import Endpoint
    from forge_ray.evaluate.standalone import Compared
    from forge_ray.records import EvalReport
    from forge_ray.store.files import Store

verbs = Verbs()


@verb(verbs, "eval", "forge eval --model smollm2 --model support --data held-out.jsonl")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a setting, e.g. eval.max_examples=50."
)
@click.option("--data", default="", metavar="DATA", help="With --model: a run file, a dataset (ds_…) or a file of rows.")
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME",
    help="A base, version, alias, run, or checkpoint (run_…@step, @best, @last). Repeatable.",
)
@click.option(
    "--endpoint",
    default="",
    metavar="URL",
    help="OpenAI-compatible API of another system to compare with, e.g. https://api.vendor.example/v1; the policy must"
    " name its host.",
)
@click.option("--endpoint-model", "their_models", multiple=True, metavar="NAME", help="Model of that API. Repeatable.")
@click.option("--key-env", default="", metavar="VARIABLE", help="Environment variable that holds the API's key.")
@click.option(
    "--endpoint-option",
    "options",
    multiple=True,
    metavar="KEY=VALUE",
    help="Field of each request, e.g. reasoning_effort=low; null leaves one out. Repeatable.",
)
@click.option("--concurrency", type=click.IntRange(1, 256), help="Requests to the API at a time. Default: 8.")
@click.option("--timeout", type=click.FloatRange(0, min_open=True), help="Seconds for an answer of the API. Default: 120.")
@click.option("--reuse", is_flag=True, help="Take the last report of the API on the same rows, if there is one.")
@click.argument("file", metavar="[RUN.yaml]", required=False)
def evaluate(
    store: Store,
    as_json: bool,
    file: str | None,
    models: tuple[str, ...],
    data: str,
    overrides: tuple[str, ...],
    endpoint: str,
    their_models: tuple[str, ...],
    reuse: bool,
    **request: Any,
) -> Any:
    """Score models on held-out rows.

    With RUN.yaml: its base model, and the trained one once there is a run. With --model: any models of the store side by
    side, without a run; a checkpoint (run_…@120) also while its run is training. With --endpoint: a model of another system
    too. Intervals are of 95 %."""
    if file and data:
        raise ConfigError(f"both {file} and --data {data} name rows", hint="leave out one of them")
    endpoints = _endpoints(endpoint, their_models, reuse, **request)
    if models or endpoints:
        from forge_ray.evaluate.standalone import Compared

        return _side_by_side(store, as_json, file or data, Compared(models, endpoints, reuse), overrides)
    if data or not file:
        raise ConfigError("nothing says what is evaluated", hint="give RUN.yaml, or --model NAME with --data DATA")
    return _of_run_file(store, as_json, load_run_file(file, overrides))


def _of_run_file(store: Store, as_json: bool, config: RunConfig) -> Any:
    from forge_ray import pipeline

    base, tuned = pipeline.evaluate_file(config, store)
    if not as_json:
        reports = [base, tuned] if tuned else [base]
        _print(store, ("base", "tuned")[: len(reports)], reports)
        if not tuned:
            rules = "; ".join(_rules(config)) or "nothing, no gate is set"
            echo(f"no run of this file is finished; it will be judged on: {rules}")
    return {"base": base, "tuned": tuned}


def _endpoints(
    url: str,
    models: tuple[str, ...],
    reuse: bool,
    key_env: str,
    options: tuple[str, ...],
    concurrency: int | None,
    timeout: float | None,
) -> tuple[Endpoint, ...]:
    """The models of an API that --endpoint and its options name."""
    from forge_ray.evaluate.chat_api import endpoint_of

    if not url or not models:
        if url or models or key_env or options or reuse or concurrency or timeout:
            raise ConfigError(
                "an endpoint is named by --endpoint URL with --endpoint-model NAME; one of these two is missing",
                hint="give both; --key-env, --endpoint-option, --concurrency, --timeout and --reuse belong to them",
            )
        return ()
    key = os.environ.get(key_env, "") if key_env else ""
    if key_env and not key:
        raise ConfigError(f"--key-env {key_env}: this variable is not set", hint=f"export {key_env}=… in this shell")
    fields = {}
    for text in options:
        name, mark, value = text.partition("=")
        if not name or not mark:
            raise ConfigError(f"--endpoint-option {text!r} is not KEY=VALUE", hint="--endpoint-option reasoning_effort=low")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return tuple(endpoint_of(url, model, key, fields, concurrency, timeout) for model in dict.fromkeys(models))


def _side_by_side(store: Store, as_json: bool, data: str, compared: Compared, overrides: tuple[str, ...]) -> Any:
    from forge_ray import pipeline
    from forge_ray.evaluate.trained_rows import trained_rows
    from forge_ray.store.catalog import Catalog

    if not data:
        what = "--model" if compared.names else "--endpoint"
        raise ConfigError(f"{what} needs rows", hint="add --data with a run file, a dataset (ds_…) or a file of rows")
    if Path(data).suffix in (".yaml", ".yml"):
        run = load_run_file(data, overrides)
        reports = pipeline.evaluate_models(compared, run, run.scoring, store, {})
    else:
        config, rows = _settings(overrides)
        reports = pipeline.evaluate_models(compared, data, config, store, rows)
    names = (*compared.names, *(one.name for one in compared.endpoints))
    with Catalog.read_only(store) as catalog:
        trained = {
            name: counts
            for name, report in zip(compared.names, reports, strict=False)
            if (counts := trained_rows(catalog, name, report))
        }
    if not as_json:
        _print(store, names, reports)
        for name, counts in trained.items():
            for dataset, count in counts.items():
                echo(f"{name} was trained on {count} of the rows of {reports[0].dataset} ({dataset}): not held out from it")
    return {"reports": dict(zip(names, reports, strict=True)), "trained_rows": trained}


def _settings(overrides: tuple[str, ...]) -> tuple[EvalConfig, dict[str, Any]]:
    """The settings of `eval.…` that --set gives without a run file, and those of `data.…` for a file of rows."""
    from forge_ray.config.base import apply_overrides, parse
    from forge_ray.config.release import EvalConfig

    if others := [text for text in overrides if not text.startswith(("eval.", "data."))]:
        raise ConfigError(
            f"--set {others[0]}: without a run file only eval.… and data.… are settings", hint="--set eval.max_examples=50"
        )
    values = apply_overrides({"eval": {}, "data": {}}, overrides)
    return parse(EvalConfig, values["eval"], where="eval"), values["data"]


def _print(store: Store, names: tuple[str, ...], reports: list[EvalReport]) -> None:
    from forge_ray.cli.show import print_table, scores

    title = f"Held-out {reports[0].split} rows: {reports[0].num_examples}"
    title += f"; general rows: {reports[0].num_general}" if reports[0].general else ""
    print_table(title, *scores(store, names, reports))
    for reason, count in sorted(reports[0].left_out.items()):
        echo(f"not evaluated: {count} rows, {reason}")
    for name, report in zip(names, reports, strict=True):
        numbers = (report.num_examples, report.num_general)
        if numbers != (reports[0].num_examples, reports[0].num_general):
            reasons = "; ".join(f"{count} × {reason}" for reason, count in report.left_out.items())
            counts = f"{report.num_examples} rows" + (f", {report.num_general} general rows" if report.general else "")
            echo(f"{name}: {counts} ({reasons}); changes are of the rows that both have")
        for metric, count in report.num_scored.items():
            if count < report.num_examples:
                echo(f"{name}: {metric} is of {count} of {report.num_examples} rows")
    echo(f"items and confusion matrix: {store.place}/{paths.report(reports[-1].id)}")


def _rules(config: RunConfig) -> list[str]:
    """What the gate of a run file asks, a line each."""
    from forge_ray.release.rows_needed import rule_text

    gate = config.release.gate
    bounds = [(name, bound.min, bound.max) for name, bound in gate.thresholds.items()]
    bounds += [(name, None, most) for name, most in gate.budgets.model_dump().items()]
    bounds += [(f"leak.{name}", None, most) for name, most in gate.leak.model_dump().items()]
    rules = [f"{name} at least {least:g}" for name, least, _ in bounds if least is not None]
    rules += [f"{name} at most {most:g}" for name, _, most in bounds if most is not None]
    return [*rules, *map(rule_text, gate.comparisons)]


EVALUATE = verbs.commands["eval"]
