"""Load YAML, apply `--set a.b=value`, validate, dump resolved JSON, digest (no torch, no ray).

Configuration is data: frozen, closed (`extra="forbid"`), nested by owner. Nothing is mutated after load.
"""

from __future__ import annotations

import copy
import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from forge_ray.config.yaml_text import MAX_BYTES, MAX_DEPTH, brief, cut, read_yaml
from forge_ray.errors import ConfigError, NotFound
from forge_ray.records import Frozen, digest


class SettingError(ValueError):
    """A rule that a setting breaks, and the remedy; pydantic reports it with the setting's place in the file."""

    def __init__(self, rule: str, hint: str) -> None:
        super().__init__(rule)
        self.hint = hint


class Config(Frozen):
    """Base of every section of a run file."""

    model_config = ConfigDict(allow_inf_nan=False)  # NaN and infinity have no canonical JSON, and so no digest


C = TypeVar("C", bound=Config)

KIND = re.compile(r"int|(literal|tuple|dict|tagged-union|function-[a-z]+)\[.*\]", re.DOTALL)
# pydantic's error types → rules in the terms of YAML
KINDS = {
    "model_type": "must be a section of keys",
    "model_attributes_type": "must be a section of keys",
    "dict_type": "must be a section of keys",
    "tuple_type": "must be a list",
    "finite_number": "must be a finite number",
}


MAX_PROBLEMS = 20  # of one file, in an error


def load(model: type[C], path: str | Path, overrides: tuple[str, ...] = ()) -> C:
    """Read `path`, apply `overrides` (each `key.path=yaml value`) and validate it as `model`."""
    file = Path(path)
    if not file.is_file():
        raise NotFound(f"configuration file {str(path)!r} does not exist", hint="give the path of a YAML file")
    try:
        with file.open("rb") as stream:
            values = read_yaml(stream.read(MAX_BYTES + 1).decode("utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}", hint="check the indentation near that line") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not a mapping", hint="start with `name: …`")
    return parse(model, apply_overrides(values, overrides), where=str(path))


def apply_overrides(values: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """A copy of `values` with every override `a.b.c=yaml` applied; items of lists are addressed by number."""
    result = copy.deepcopy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"--set {cut(override)!r} has no `key=value` form", hint="for example --set train.optimizer.lr=1e-5"
            )
        try:
            value = read_yaml(text)
        except ValueError as error:
            reason = f"the value is not valid YAML: {error}"
            raise ConfigError(f"--set {cut(override)!r}: {reason}", hint="quote it") from error
        node: Any = result
        *parents, last = key.split(".")
        if len(parents) > MAX_DEPTH:
            raise ConfigError(
                f"--set {cut(key)!r} names {len(parents) + 1} levels, and no setting is more than {MAX_DEPTH} deep",
                hint="for example --set train.optimizer.lr=1e-5",
            )
        try:
            for part in parents:
                if isinstance(node, dict) and node.get(part) is None:  # absent, or an empty section in the file
                    node[part] = {}
                node = node[int(part)] if isinstance(node, list) else node[part]
            if isinstance(node, list):
                node[int(last)] = value
            else:
                node[last] = value
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(
                f"--set {cut(override)!r}: {cut(key)!r} does not lead to a setting",
                hint="a list item is named by its number, from 0",
            ) from error
    return result


def parse(model: type[C], values: Any, where: str = "") -> C:
    """Validate `values` as `model`. Raises one `ConfigError` that lists every invalid key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems: dict[str, str] = {}  # "key=value: " → the rules that it breaks; several for a value of several types
        hints: list[str] = []
        items = [(_place(item["loc"]), item) for item in error.errors()]
        for place, item in items:
            if any(len(other) > len(place) and other[: len(place)] == place for other, _ in items):
                continue  # the list itself is reported only because one of its items is invalid
            if _is_other_type(place, item, items):
                continue
            subject, rule, hint = _explain(model, list(place), item)
            problems[subject] = f"{problems[subject]}, or {rule}" if subject in problems else rule
            if hint and hint not in hints:
                hints.append(hint)
        prefix = f"{where}: " if where else ""
        written = [subject + rule for subject, rule in problems.items()]
        if len(written) > MAX_PROBLEMS:
            written[MAX_PROBLEMS:] = [f"and {len(written) - MAX_PROBLEMS} more"]
        raise ConfigError(prefix + "; ".join(written), hint="; ".join(hints[:MAX_PROBLEMS])) from None


def _is_other_type(place: tuple[str, ...], item: Any, items: list[tuple[tuple[str, ...], Any]]) -> bool:
    """Whether the value is a section that breaks one of the section's own rules, and `item` says that it is not of the other
    types that its key can have."""
    broken = any(other == place and one["type"] == "value_error" for other, one in items)
    return broken and item["type"] != "value_error" and isinstance(item["input"], dict)


def _place(parts: tuple[str | int, ...]) -> tuple[str, ...]:
    """A path without what pydantic adds where a key has several types: the name of the type it tried, and of sections that
    name their kind, that kind."""
    place, is_tag = [], False
    for part in map(str, parts):
        if not is_tag and not KIND.fullmatch(part):
            place.append(part)
        is_tag = part.startswith("tagged-union[")
    return tuple(place)


def _explain(model: type[BaseModel], path: list[str], item: Any) -> tuple[str, str, str]:
    """The subject (`key=value: `), the rule that it breaks, and the hint."""
    key = cut(".".join(path)) or "(top level)"
    subject = f"{key}={brief(item['input'])}: "
    if item["type"] == "extra_forbidden":
        fields = sorted(_fields_at(model, path[:-1]))
        near = difflib.get_close_matches(path[-1], fields, n=1)
        hint = f"did you mean {'.'.join([*path[:-1], *near])!r}?" if near else f"known keys: {', '.join(fields)}"
        return subject, "unknown key", hint
    if item["type"] == "missing":
        return f"{key}: ", "required and missing", f"add {key} to the file"
    if item["type"] == "value_error":  # raised by a rule over several keys, which names the values itself
        error: ValueError = item["ctx"]["error"]
        return (f"{key}: " if path else ""), str(error), error.hint if isinstance(error, SettingError) else ""
    rule = KINDS.get(item["type"], item["msg"][:1].lower() + item["msg"][1:])
    return subject, rule, f"see {key} in docs/reference/settings.md"


def _fields_at(model: type[BaseModel], path: list[str]) -> set[str]:
    """Field names of the section at `path`, of each kind that it may be; list positions are skipped."""
    models = [model]
    for part in path:
        annotations = [one.model_fields[part].annotation for one in models if part in one.model_fields]
        models = [inner for annotation in annotations for inner in _models(annotation)] or models
    return {name for one in models for name in one.model_fields}


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def without_defaults(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Serialised settings without those of `defaults` that have their default: for settings that are newer than ids which
    follow from the others."""
    return {name: value for name, value in values.items() if name not in defaults or value != defaults[name]}


def resolved(config: Config) -> dict[str, Any]:
    """Every setting, defaults included, as JSON-ready data."""
    return config.model_dump(mode="json")


def config_digest(config: Config) -> str:
    return digest(resolved(config))
