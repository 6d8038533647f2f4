"""Run files: each mistake is reported with key path, value, rule and hint; equal settings have equal digests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from forge_ray.config.base import apply_overrides, config_digest, load, parse, resolved
from forge_ray.config.data import DataConfig
from forge_ray.config.release import DeployConfig
from forge_ray.config.run import RunConfig
from forge_ray.data.build.settings import input_digest
from forge_ray.errors import ConfigError, NotFound

pytestmark = pytest.mark.unit

MINIMAL: dict[str, Any] = {
    "name": "tickets",
    "base_model": "smollm2",
    "data": {"sources": [{"path": "rows.jsonl"}]},
    "release": {"alias": "tickets"},
}


def mistake(*overrides: str, base: dict[str, Any] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        parse(RunConfig, apply_overrides(base or MINIMAL, overrides))
    return caught.value


# ---------------------------------------------------------------- one key


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("train.optimizer.learning_rate=1", "train.optimizer.learning_rate=1: unknown key", "known keys: betas, eps, lr"),
        ("train.zero_stag=2", "train.zero_stag=2: unknown key", "did you mean 'train.zero_stage'?"),
        ("trian.epochs=2", "trian={'epochs': 2}: unknown key", "did you mean 'train'?"),
        ("data.sources.0.pth=x", "data.sources.0.pth='x': unknown key", "did you mean 'data.sources.0.path'?"),
        (
            "train.adapter={rank: 8}",
            "train.adapter.rank=8: unknown key",
            "known keys: alpha, dropout, lr_ratio, method, modules_to_save, quantize, r, target_modules, target_parameters",
        ),
        ("eval.engine.pagesize=8", "eval.engine.pagesize=8: unknown key", "did you mean 'eval.engine.page_size'?"),
        (
            "release.gate.better_than=[{incumbant: base}]",
            "release.gate.better_than.0.incumbant='base': unknown key",
            "did you mean 'release.gate.better_than.0.incumbent'?",
        ),
        (
            "release.gate.thresholds={exact_match: {minimum: 0.5}}",
            "release.gate.thresholds.exact_match.minimum=0.5: unknown key",
            "did you mean 'release.gate.thresholds.exact_match.min'?",
        ),
        ("train.epochs=many", "train.epochs='many': input should be a valid number", "see train.epochs"),
        ("train.epochs=0", "train.epochs=0: input should be greater than 0", "see train.epochs"),
        ("train.optimizer.lr=-1", "train.optimizer.lr=-1: input should be greater than 0", "see train.optimizer.lr"),
        ("train.optimizer.betas=[0.9]", "train.optimizer.betas.1: required and missing", "add train.optimizer.betas.1"),
        ("train.zero_stage=4", "train.zero_stage=4: input should be 0, 1, 2 or 3", "see train.zero_stage"),
        ("train.precision=fp16", "train.precision='fp16': input should be 'auto', 'bf16' or 'fp32'", "see train.precision"),
        ("train.method=dpo", "train.method='dpo': input should be 'sft'", "see train.method"),
        ("train.method={kind: dpo, gamma: 1}", "train.method: gamma=1.0 has no effect with kind=dpo", "or use kind: simpo"),
        ("data.sources=[]", "data.sources=[]: tuple should have at least 1 item", "see data.sources"),
        ("data.sequence_length=4", "data.sequence_length=4: input should be greater than or equal to 8", "see data"),
        ("data.sources=[{}]", "data.sources.0.path: required and missing", "add data.sources.0.path to the file"),
        ("name=My Model", "name='My Model': string should match pattern", "see name"),
        ("release.alias=../x", "release.alias='../x': string should match pattern", "see release.alias"),
        ("train.optimizer.lr=.inf", "train.optimizer.lr=inf: must be a finite number", "see train.optimizer.lr"),
        ("train.epochs=.nan", "train.epochs=nan: must be a finite number", "see train.epochs"),
        ("data.sources=rows.jsonl", "data.sources='rows.jsonl': must be a list", "see data.sources"),
        (
            "eval.labels=from_dat",
            "eval.labels='from_dat': input should be 'from_data', or must be a list",
            "see eval.labels",
        ),
        (
            "train.adapter={target_modules: [q, 3]}",
            "train.adapter.target_modules.1=3: input should be a valid string",
            "see",
        ),
        ("release=null", "release=None: must be a section of keys", "see release"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_path(override: str, message: str, hint: str) -> None:
    error = mistake(override)
    assert message in error.message
    assert hint in error.hint


def test_each_mistake_is_reported_once() -> None:
    assert mistake("data.sources.0.pth=x").message == "data.sources.0.pth='x': unknown key"
    assert ";" not in mistake("train.adapter={target_modules: [q, 3]}").message


def test_all_mistakes_are_reported_together() -> None:
    error = mistake("train.epochs=0", "data.block_rows=0", "nmae=x")
    assert "train.epochs=0" in error.message
    assert "data.block_rows=0" in error.message
    assert "did you mean 'name'?" in error.hint


def test_a_missing_section_is_named() -> None:
    error = mistake(base={"name": "tickets", "base_model": "smollm2", "release": {"alias": "tickets"}})
    assert error.message == "data: required and missing"
    assert error.hint == "add data to the file"


# ---------------------------------------------------------------- combinations


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        (
            ("train.global_batch=2", "train.scaling.num_workers=4"),
            "train: global_batch=2 leaves some of 4 workers without a row",
            "use train.global_batch=4 or more",
        ),
        (
            ("train.global_batch=2", "train.scaling={num_workers: {min: 1, max: 4}}"),
            "train: global_batch=2 leaves some of 4 workers without a row",
            "use train.global_batch=4 or more",
        ),
        (("train.scaling={num_workers: {min: 3, max: 2}}",), "min=3 exceeds max=2", "swap them"),
        (("train.scaling.num_workers=true",), "num_workers=True is not a number of workers", "use 0 or more"),
        (("train.scaling.num_workers=-1",), "num_workers=-1 is not a number of workers", "use 0 or more"),
        (("train.engine=torch",), "train: engine=torch does not support zero_stage=2", "set train.zero_stage=0"),
        (
            ("train.engine=torch", "train.zero_stage=0", "train.offload.optimizer=cpu"),
            "train: offload.optimizer=cpu needs engine=deepspeed (engine is torch)",
            "set train.engine=deepspeed",
        ),
        (
            ("train.zero_stage=0", "train.offload.optimizer=cpu"),
            "train: offload.optimizer=cpu needs ZeRO (zero_stage is 0)",
            "set train.zero_stage=2",
        ),
        (
            ("train.offload={optimizer: cpu, parameters: cpu}",),
            "train: offload.parameters=cpu needs zero_stage=3 (zero_stage is 2, which keeps whole weights on every GPU)",
            "set train.zero_stage=3",
        ),
        (
            ("train.sequence_parallel=2",),
            "train: sequence_parallel=2: num_workers=1 workers do not make groups of 2",
            "use train.scaling.num_workers=2",
        ),
        (
            ("train.sequence_parallel=2", "train.scaling={num_workers: {min: 2, max: 5}}"),
            "train: sequence_parallel=2: max=5 workers do not make groups of 2",
            "use train.scaling.num_workers.max=6",
        ),
        (
            ("train.sequence_parallel=3", "train.scaling.num_workers=3", "data.sequence_length=512"),
            "train.sequence_parallel=3 does not divide data.sequence_length=512",
            "use data.sequence_length=513",
        ),
        (
            ("train.compile=true", "train.zero_stage=3"),
            "train: compile=true cannot be combined with zero_stage=3, which gathers weights inside a block",
            "set train.compile=false",
        ),
        (
            ("train.sequence_parallel=2", "train.scaling.num_workers=2", "train.router_aux_loss=0.01"),
            "train: router_aux_loss=0.01 with sequence_parallel=2: each worker sees only a slice of the tokens to balance",
            "set train.sequence_parallel=1, or train.router_aux_loss=0",
        ),
        (("train.export=merged",), "train: export=merged without an adapter", "remove train.export, or add train.adapter"),
        (
            ("data.splits={validation: 0.6, test: 0.5}",),
            "data.splits: splits.validation=0.6 + splits.test=0.5 are more than all records",
            "keep their sum below 1, or at 1 for a dataset that is only evaluated",
        ),
        (
            ("release.gate.thresholds.exact_match={}",),
            "release.gate.thresholds.exact_match: a threshold needs `min` or `max`",
            "for example {min: 0.5}",
        ),
        (
            ("deploy={name: a, models: [b], replicas: {min: 3, max: 2}}",),
            "deploy.replicas: replicas.min=3 exceeds replicas.max=2",
            "raise max or lower min",
        ),
        (
            ("deploy={name: a, models: [b]}", "train.adapter={r: 128}"),
            "train.adapter.r=128 exceeds deploy.engine.max_lora_rank=64: it could not be served",
            "lower r, raise max_lora_rank, or list",
        ),
        (
            ("deploy={name: a, models: [b], engine: {max_adapters: 0}}", "train.adapter={r: 8}"),
            "deploy.engine.max_adapters=0 serves no adapters",
            "raise it, or list",
        ),
        (
            ("deploy={name: a, models: [b]}", "train.adapter={method: dora}"),
            "an adapter with method=dora cannot share an engine with other adapters",
            "use lora, or list",
        ),
        (
            ("deploy={name: a, models: [b]}", "train.adapter={modules_to_save: [lm_head]}"),
            "an adapter with modules_to_save=['lm_head'] cannot share an engine with other adapters",
            "remove it, or list",
        ),
        (
            ("deploy={name: a, models: [b], aliases: {'-x': {versions: {c: 1}}}}",),
            "deploy: aliases: '-x' is not a valid alias",
            "for example support@prod",
        ),
    ],
)
def test_settings_that_contradict_each_other(overrides: tuple[str, ...], message: str, hint: str) -> None:
    error = mistake(*overrides)
    assert message in error.message
    assert hint in error.hint
    assert "hint:" not in error.message


# ---------------------------------------------------------------- --set


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("train.epochs=2", ("train", "epochs"), 2),
        ("train.adapter=null", ("train", "adapter"), None),
        ("train.activation_checkpointing=true", ("train", "activation_checkpointing"), True),
        ("data.sources.0.path=other.jsonl", ("data", "sources", 0, "path"), "other.jsonl"),
        ("eval.labels=[yes please, no]", ("eval", "labels"), ["yes please", False]),
        ("base_model=a=b", ("base_model",), "a=b"),
        ("licence=", ("licence",), None),
    ],
)
def test_set_forms(override: str, path: tuple[str | int, ...], value: Any) -> None:
    node: Any = apply_overrides(MINIMAL, (override,))
    for part in path:
        node = node[part]
    assert node == value


def test_the_last_set_wins_and_the_file_stays_as_it_was() -> None:
    before = yaml.safe_dump(MINIMAL)
    changed = apply_overrides(MINIMAL, ("train.epochs=2", "train.epochs=3", "data.sources.0.path=b"))
    assert changed["train"]["epochs"] == 3
    assert yaml.safe_dump(MINIMAL) == before


@pytest.mark.parametrize("text", ["1e-5", "1e5", "2.5E-4", "1.0e-5", "0.00001"])
def test_a_number_in_scientific_notation_is_a_number(text: str, tmp_path: Path) -> None:
    """YAML 1.1 reads `1e-5` as text; whoever writes it means a number."""
    assert parse(RunConfig, apply_overrides(MINIMAL, (f"train.optimizer.lr={text}",))).train.optimizer.lr == float(text)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(MINIMAL) + f"train: {{optimizer: {{lr: {text}}}}}\n")
    assert load(RunConfig, file).train.optimizer.lr == float(text)


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("train.epochs", "has no `key=value` form", "--set train.optimizer.lr=1e-5"),
        ("=3", "has no `key=value` form", "--set train.optimizer.lr=1e-5"),
        ("train.adapter={r: 8", "the value is not valid YAML", "quote it"),
        ("name.first=x", "'name.first' does not lead to a setting", "from 0"),
        ("data.sources.first.path=x", "'data.sources.first.path' does not lead to a setting", "from 0"),
        ("data.sources.7.path=x", "'data.sources.7.path' does not lead to a setting", "from 0"),
    ],
)
def test_set_with_a_path_that_leads_nowhere(override: str, message: str, hint: str) -> None:
    error = mistake(override)
    assert repr(override) in error.message
    assert message in error.message
    assert hint in error.hint


def test_set_can_open_a_section_that_the_file_leaves_empty() -> None:
    empty = {**MINIMAL, "train": None}
    assert parse(RunConfig, apply_overrides(empty, ("train.epochs=2",))).train.epochs == 2


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: [", "is not valid YAML"),
        ("- a\n- b\n", "holds list, not a mapping"),
        ("", "holds NoneType, not a mapping"),
        ("just words", "holds str, not a mapping"),
    ],
)
def test_files_that_are_not_run_files(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load(RunConfig, file)
    assert str(file) in caught.value.message
    assert caught.value.hint


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load(RunConfig, file)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="does not exist"):
        load(RunConfig, tmp_path / "run.yaml")


def test_the_file_is_named_before_the_mistake(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**MINIMAL, "nmae": 1}))
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, file)
    assert caught.value.message == f"{file}: nmae=1: unknown key"


def test_a_key_written_twice_is_a_mistake(tmp_path: Path) -> None:
    """PyYAML would silently use the last one."""
    file = tmp_path / "run.yaml"
    file.write_text("name: a\nbase_model: b\nname: c\n")
    with pytest.raises(ConfigError, match="'name' is written twice"):
        load(RunConfig, file)


# ---------------------------------------------------------------- identity


def shuffled(value: Any, chance: random.Random) -> Any:
    if isinstance(value, dict):
        items = list(value.items())
        chance.shuffle(items)
        return {key: shuffled(item, chance) for key, item in items}
    return [shuffled(item, chance) for item in value] if isinstance(value, list) else value


def test_digest_ignores_formatting() -> None:
    full = resolved(parse(RunConfig, MINIMAL))
    expected = config_digest(parse(RunConfig, MINIMAL))
    chance = random.Random(0)
    for _ in range(5):
        assert config_digest(parse(RunConfig, shuffled(full, chance))) == expected
    assert config_digest(parse(RunConfig, apply_overrides(MINIMAL, ("train.epochs=1",)))) == expected  # 1 and 1.0
    assert config_digest(parse(RunConfig, apply_overrides(MINIMAL, ("train.seed=1",)))) != expected


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.adapter={}", "eval.labels=[a, b]", "train.optimizer.lr=1e-5"),
        ("release.gate={thresholds: {accuracy: {min: 0.5}}, better_than: [{margin: 0.2}]}", "deploy={name: a, models: [b]}"),
    ],
)
def test_resolved_is_complete_and_reads_back(overrides: tuple[str, ...]) -> None:
    config = parse(RunConfig, apply_overrides(MINIMAL, overrides))
    assert parse(RunConfig, resolved(config)) == config
    assert parse(RunConfig, yaml.safe_load(yaml.safe_dump(resolved(config)))) == config


def test_tools_are_a_setting_of_a_dataset_only_where_they_are_text() -> None:
    data = {"sources": [{"path": "a.jsonl"}]}
    plain, text = parse(DataConfig, data), parse(DataConfig, data | {"tools": "text"})
    assert "tools" not in resolved(plain)  # the ids of versions from before the setting stay
    assert parse(DataConfig, data | {"tools": "template"}) == plain
    assert resolved(text)["tools"] == "text"
    assert input_digest(plain, [], "", "") != input_digest(text, [], "", "")
    with pytest.raises(ConfigError, match=r"tools"):
        parse(DataConfig, data | {"tools": "json"})


def test_a_config_is_frozen() -> None:
    config = parse(DeployConfig, {"name": "a", "models": ["b"]})
    with pytest.raises(ValueError, match="frozen"):
        config.port = 1  # type: ignore[misc]
