"""`forge init`: write a short run file for a task, to edit."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from forge_ray.cli.new_file import write_new
from forge_ray.cli.terminal import echo
from forge_ray.cli.verbs import Verbs, verb
from forge_ray.errors import ConfigError

if TYPE_CHECKING:
    from forge_ray.records import ModelVersion
    from forge_ray.store.catalog import Catalog
    from forge_ray.store.files import Store

BETTER_ANSWERS = "better_than: [{incumbent: base, metric: loss}]  # released only if it predicts held-out answers better"
BETTER_TEXTS = (
    "better_than: [{incumbent: base, metric: bits_per_byte}]  # released only if it predicts held-out texts better"
)
RIGHT_ANSWERS = "better_than: [{incumbent: base}]  # released only if more answers are right"
LEAST_RIGHT = "thresholds: {exact_match: {min: 0.8}}  # the least share of right answers that you accept"
ADAPTER = "adapter: {r: 16, alpha: 32}  # LoRA; without this line every weight is trained: set optimizer: {lr: 2e-5}"
MORE_PAIRS = (
    "better_than: [{incumbent: base, metric: pair_accuracy}]  # released only if it prefers more of the right answers"
)
DPO = "method: {kind: dpo, beta: 0.1}  # other losses, and single answers judged good or bad: docs/guides/preferences.md"
LONG_ANSWERS = "max_new_tokens: 256  # tokens; longer answers are cut off and count as wrong"
GENERAL = "general: {rows: chats}  # short conversations about anything: what did training make it forget?"
GENERAL_TEXTS = "general: {rows: texts}  # short texts about anything: what did training make it forget?"
KEEPS_ANSWERS = (
    "no_worse_than: [{incumbent: base, metric: general_loss, tolerance: 0.5}]  # nats per token that it may forget"
)
KEEPS_TEXTS = "no_worse_than: [{incumbent: base, metric: general_bits_per_byte, tolerance: 0.1}]  # that it may forget"


@dataclass(frozen=True)
class Task:
    """What is specific to the run file of a task. `gate` and `evaluation`: the lines of these sections."""

    purpose: str
    rows: str  # of a line of a file
    sequence_length: int
    gate: tuple[str, ...] = (BETTER_ANSWERS, KEEPS_ANSWERS)
    evaluation: tuple[str, ...] = (GENERAL,)
    train: tuple[str, ...] = (ADAPTER,)
    other_rows: str = ""


TASKS = {
    "chat": Task("Fine-tune on conversations.", '{"messages": [{"role": "user", "content": "…"}, …]}', 2048),
    "classify": Task(
        "Fine-tune a classifier, which answers with one label.",
        '{"text": "…", "label": "…"}',
        512,
        (LEAST_RIGHT, RIGHT_ANSWERS, KEEPS_ANSWERS),
        ("labels: from_data  # the labels of the training rows", GENERAL),
    ),
    "extract": Task(
        "Fine-tune extraction to JSON. An answer is right if its text is the row's, order of keys included.",
        '{"prompt": "…", "completion": "{\\"total\\": 12}"}',
        2048,
        (LEAST_RIGHT, RIGHT_ANSWERS, KEEPS_ANSWERS),
        (LONG_ANSWERS, GENERAL),
    ),
    "tools": Task(
        "Fine-tune tool calls.",
        '{"messages": [… "tool_calls" …], "tools": […]}',
        4096,
        evaluation=(LONG_ANSWERS, GENERAL),
    ),
    "pretrain": Task(
        "Continue pre-training on plain text.",
        '{"text": "…"}',
        2048,
        (BETTER_TEXTS, KEEPS_TEXTS),
        (GENERAL_TEXTS,),
        train=("optimizer: {lr: 2e-5}  # every weight is trained",),
        other_rows=", or a folder of documents",
    ),
    "preferences": Task(
        "Train on pairs of answers, of which people preferred one.",
        '{"prompt": "…", "chosen": "…", "rejected": "…"}',
        2048,
        (MORE_PAIRS, KEEPS_ANSWERS),
        (GENERAL,),
        train=(DPO, ADAPTER),
    ),
}


def run_file_text(task: str, data: str, base_model: str, name: str) -> str:
    """The run file of a task, with comments on what to change."""
    chosen = TASKS[task]
    data, base_model, name = _scalar(data), _scalar(base_model), _scalar(name)
    lines = [
        f"# {chosen.purpose}",
        "# Every other setting has a default: docs/reference/settings.md. Other forms of rows: docs/guides/data.md",
        f"name: {name}",
        f"base_model: {base_model}  # an alias or version of the store, or a folder or GGUF file to import",
        "data:",
        f"  sources: [{{path: {data}}}]  # one {chosen.rows} per line{chosen.other_rows}",
        f"  sequence_length: {chosen.sequence_length}  # tokens",
        "train:",
        *(f"  {line}" for line in chosen.train),
        "  micro_batch_size: auto  # packed rows per forward pass: as many as fit",
        "eval:",
        *(f"  {line}" for line in chosen.evaluation),
        "release:",
        f"  alias: {name}",
        "  gate:",
        *(f"    {line}" for line in chosen.gate),
        f"deploy: {{name: {name}, models: [{name}]}}  # without this line `forge run` ends after the release",
        "# On a GPU add scaling: {gpus_per_worker: 1} to train, gpus: 1 to eval, gpus_per_replica: 1 to deploy.",
    ]
    return "\n".join(lines) + "\n"


def next_cycle_text(catalog: Catalog, reference: str, data: str = "", name: str = "") -> str:
    """The run file of the run that made a version, to start the next one from that version. `data` takes the place of its
    sources, `name` that of its name. Raises `ConfigError` for a version that no run made."""
    import yaml

    from forge_ray.config.base import parse
    from forge_ray.config.run import RunConfig
    from forge_ray.store.resolve import resolve

    version = catalog.model(resolve(catalog, reference))
    settings = _settings_of(catalog, version)
    values = parse(RunConfig, settings, where=version.run).model_dump(mode="json", exclude_defaults=True)
    for key in ("licence", "base_model"):  # of the model that the first cycle started from
        values.pop(key, None)
    train = {key: value for key, value in values.pop("train", {}).items() if key != "init_from"}
    start = {"init_from": "continue"} if version.weights == "adapter" else {}
    own_name = values.pop("name")
    values = {"name": name or own_name, "base_model": version.id, **values}
    if data:
        values["data"] = {**values["data"], "sources": [{"path": data}]}
    values |= {"train": start | train} if start | train else {}
    lines = [f"# The next cycle of {version.name}: from {version.id}, with the settings of {version.run}."]
    if start:
        lines += [
            "# init_from: `continue` trains this adapter on, on the same base; `merge` adds it to its base, and trains a",
            "# new adapter on the sum.",
        ]
    lines.append(
        "# data.sources: the rows of this cycle."
        if data
        else "# data.sources: those of that run. Name the rows of this cycle."
    )
    return "\n".join(lines) + "\n" + yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=110)


def _settings_of(catalog: Catalog, version: ModelVersion) -> dict[str, Any]:
    """The resolved run file of the run that made a version."""
    from forge_ray.records import RunRecord
    from forge_ray.train import run_folder

    if not version.run:
        raise ConfigError(
            f"{version.id} was made by no run ({version.source}), so there are no settings to go on with",
            hint=f"forge init --base-model {version.id}",
        )
    if catalog.has(version.run):
        return catalog.get_as(RunRecord, version.run).config
    if settings := run_folder.config_of(catalog.store, version.run):
        return settings
    raise ConfigError(
        f"the settings of {version.run}, which made {version.id}, are not in this store",
        hint=f"restore its record from a backup, or forge init --base-model {version.id}",
    )


def _scalar(value: str) -> str:
    """The value as YAML, quoted if necessary, also inside brackets."""
    import yaml

    text: str = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=len(value) * 10 + 80)
    return text.strip()[1:-1]


@click.group(cls=Verbs)
def top() -> None:
    """Top-level verbs; `forge` registers them."""


@verb(top, "init", "forge init run.yaml --task classify --data rows.jsonl --name tickets")
@click.argument("file", metavar="[FILE]", default="run.yaml", type=click.Path(path_type=Path))
@click.option("--task", type=click.Choice(list(TASKS)), default="chat", show_default=True, help="What the model will learn.")
@click.option(
    "--data", default="rows.jsonl", show_default=True, metavar="PATH", help="File, folder, glob or URI of the rows."
)
@click.option(
    "--base-model",
    default="smollm2-135m-instruct",
    show_default=True,
    metavar="NAME",
    help="Alias or version of the store, or path of a model to import.",
)
@click.option("--name", default="my-model", show_default=True, help="Name of the run, and alias of the released model.")
@click.option(
    "--from",
    "origin",
    default="",
    metavar="VERSION|ALIAS",
    help="Write the run file of the next cycle: start from this version, with the settings of the run that made it.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
def init(
    store: Store, as_json: bool, file: Path, task: str, data: str, base_model: str, name: str, origin: str, force: bool
) -> dict[str, str]:
    """Write a short run file to start from, FILE or run.yaml.

    It names what a task needs; every other setting keeps its default. With --from it names what an earlier run set."""
    import yaml

    from forge_ray.config.base import parse
    from forge_ray.config.run import RunConfig

    text = _from_version(store, origin, data, name) if origin else run_file_text(task, data, base_model, name)
    parse(RunConfig, yaml.safe_load(text))  # an invalid name is refused before anything is written
    write_new(file, text, force)
    if not as_json:
        path = shlex.quote(str(file))
        echo(f"wrote {file}\nnext:\n  forge data prepare {path}\n  forge run {path}")
    return {"path": str(file), **({"from": origin} if origin else {"task": task})}


def _from_version(store: Store, origin: str, data: str, name: str) -> str:
    """The text of `--from`; the other options count only where they were given."""
    from click.core import ParameterSource

    from forge_ray.store.catalog import Catalog

    context = click.get_current_context()
    options = ("task", "base_model", "data", "name")
    explicit = {option for option in options if context.get_parameter_source(option) is not ParameterSource.DEFAULT}
    for option, what in (("task", "the task"), ("base_model", "the base model")):
        if option in explicit:
            raise ConfigError(
                f"--{option.replace('_', '-')} with --from: {what} follows from the version {origin}",
                hint=f"leave out one of the two: forge init --from {origin}",
            )
    with Catalog.read_only(store) as catalog:
        return next_cycle_text(catalog, origin, data if "data" in explicit else "", name if "name" in explicit else "")


INIT: tuple[click.Command, ...] = (top.commands["init"],)
