"""Load YAML, apply `--set a.b=value`, validate, dump resolved JSON, digest (level 0: no torch, no ray).

Configuration is data: frozen, closed (`extra="forbid"`), nested by owner. Nothing is mutated after load.
"""

from __future__ import annotations

import copy
import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from forge_ray.errors import ConfigError, NotFound
from forge_ray.records import Frozen, digest


class Config(Frozen):
    """Base of every section of a run file."""


C = TypeVar("C", bound=Config)


def load(model: type[C], path: str | Path, overrides: tuple[str, ...] = ()) -> C:
    """Read `path`, apply `overrides` (each `key.path=yaml value`) and validate it as `model`."""
    file = Path(path)
    if not file.is_file():
        raise NotFound(f"configuration file {str(path)!r} does not exist", hint="give the path of a YAML file")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}", hint="check the indentation near that line") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds {type(values).__name__}, not a mapping", hint="start with `name: …`")
    return parse(model, apply_overrides(values, overrides), where=str(path))


def apply_overrides(values: dict[str, Any], overrides: tuple[str, ...]) -> dict[str, Any]:
    """A copy of `values` with each `a.b.c=yaml` put in its place; list items by number."""
    result = copy.deepcopy(values)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(
                f"--set {override!r} has no `key=value` form", hint="for example --set train.optimizer.lr=1e-5"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {override!r}: the value is not valid YAML", hint="quote it") from error
        node: Any = result
        *parents, last = key.split(".")
        try:
            for part in parents:
                node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
            if isinstance(node, list):
                node[int(last)] = value
            else:
                node[last] = value
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise ConfigError(
                f"--set {override!r}: {key!r} does not lead to a setting", hint="a list item is named by its number, from 0"
            ) from error
    return result


def parse(model: type[C], values: Any, where: str = "") -> C:
    """Validate `values`; a mistake becomes one `ConfigError` that lists every wrong key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        problems, hints = [], []
        for item in error.errors():
            path = [str(part) for part in item["loc"]]
            problem, hint = _explain(model, path, item)
            problems.append(problem)
            if hint and hint not in hints:
                hints.append(hint)
        prefix = f"{where}: " if where else ""
        raise ConfigError(prefix + "; ".join(problems), hint="; ".join(hints)) from None


def _explain(model: type[BaseModel], path: list[str], item: Any) -> tuple[str, str]:
    key = ".".join(path) or "(top level)"
    if item["type"] == "extra_forbidden":
        known = sorted(_fields_at(model, path[:-1]))
        near = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{key}={item['input']!r}: unknown key", hint
    if item["type"] == "missing":
        return f"{key}: required and missing", f"add {key} to the file"
    rule, _, hint = item["msg"].removeprefix("Value error, ").partition(" hint: ")
    if item["type"] == "value_error":  # raised by a rule over several keys: it names its own values
        return (f"{key}: {rule}" if path else rule), hint
    return f"{key}={item['input']!r}: {rule[:1].lower()}{rule[1:]}", hint or f"see {key} in docs/reference.md"


def _fields_at(model: type[BaseModel], path: list[str]) -> set[str]:
    """Names of the fields of the section that `path` leads to (list positions are skipped)."""
    for part in path:
        field = model.model_fields.get(part)
        if field is None:
            continue
        candidates = [field.annotation, *get_args(field.annotation)]
        candidates += [inner for outer in candidates for inner in get_args(outer)]
        model = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), model)
    return set(model.model_fields)


def resolved(config: Config) -> dict[str, Any]:
    """Every value, defaults included, as JSON-ready data."""
    return config.model_dump(mode="json")


def config_digest(config: Config) -> str:
    return digest(resolved(config))
