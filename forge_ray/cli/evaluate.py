"""`forge eval`: models on held-out rows, with a run or without one."""

from __future__ import annotations

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
@click.argument("file", metavar="[RUN.yaml]", required=False)
def evaluate(
    store: Store, as_json: bool, file: str | None, models: tuple[str, ...], data: str, overrides: tuple[str, ...]
) -> Any:
    """Score models on held-out rows.

    With RUN.yaml: its base model, and the trained one once there is a run. With --model: any models of the store side by
    side, without a run; a checkpoint (run_…@120) also while its run is training. Intervals are of 95 %."""
    if file and data:
        raise ConfigError(f"both {file} and --data {data} name rows", hint="leave out one of them")
    if models:
        return _side_by_side(store, as_json, file or data, models, overrides)
    if data or not file:
        raise ConfigError("nothing says what is evaluated", hint="give RUN.yaml, or --model NAME with --data DATA")
    return _of_run_file(store, as_json, load_run_file(file, overrides))


def _of_run_file(store: Store, as_json: bool, config: RunConfig) -> Any:
    from forge_ray import pipeline

    if pipeline.has_trained(config, store):
        base, tuned = pipeline.evaluate(config, store)
        if not as_json:
            _print(store, ("base", "tuned"), [base, tuned])
        return {"base": base, "tuned": tuned}
    base = pipeline.evaluate_base(config, store)
    if not as_json:
        _print(store, ("base",), [base])
        echo(
            "no run of this file is finished; it will be judged on:"
            f" {'; '.join(_rules(config)) or 'nothing, no gate is set'}"
        )
    return {"base": base, "tuned": None}


def _side_by_side(store: Store, as_json: bool, data: str, models: tuple[str, ...], overrides: tuple[str, ...]) -> Any:
    from forge_ray import pipeline

    if not data:
        raise ConfigError("--model needs rows", hint="add --data with a run file, a dataset (ds_…) or a file of rows")
    if Path(data).suffix in (".yaml", ".yml"):
        run = load_run_file(data, overrides)
        reports = pipeline.evaluate_models(models, run, run.eval, store, {})
    else:
        config, rows = _settings(overrides)
        reports = pipeline.evaluate_models(models, data, config, store, rows)
    if not as_json:
        _print(store, models, reports)
    return {"reports": dict(zip(models, reports, strict=True))}


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

    print_table(f"Held-out {reports[0].split} rows: {reports[0].num_examples}", *scores(store, names, reports))
    for reason, count in sorted(reports[0].left_out.items()):
        echo(f"not evaluated: {count} rows, {reason}")
    for name, report in zip(names, reports, strict=True):
        if report.num_examples != reports[0].num_examples:
            reasons = "; ".join(f"{count} × {reason}" for reason, count in report.left_out.items())
            echo(f"{name}: {report.num_examples} rows ({reasons}); changes are of the rows that both have")
    echo(f"items and confusion matrix: {store.place}/{paths.report(reports[-1].id)}")


def _rules(config: RunConfig) -> list[str]:
    """What the gate of a run file asks, a line each."""
    gate = config.release.gate
    bounds = [(name, bound.min, bound.max) for name, bound in gate.thresholds.items()]
    bounds += [(name, None, most) for name, most in gate.budgets.model_dump().items()]
    bounds += [(f"leak.{name}", None, most) for name, most in gate.leak.model_dump().items()]
    rules = [f"{name} at least {least:g}" for name, least, _ in bounds if least is not None]
    rules += [f"{name} at most {most:g}" for name, _, most in bounds if most is not None]
    for better in gate.better_than:
        at = f" at {better.confidence:.0%}" if better.confidence else ""
        rules.append(f"{better.metric} better than {better.incumbent} by {better.margin:g}{at}")
    for rule in gate.no_worse_than:
        at = f" at {rule.confidence:.0%}" if rule.confidence else ""
        rules.append(f"{rule.metric} at most {rule.tolerance:g} worse than {rule.incumbent}{at}")
    return rules


EVALUATE = verbs.commands["eval"]
