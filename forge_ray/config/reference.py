"""The page of settings, from the fields: `python -m forge_ray.config.reference > docs/reference/settings.md`."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from forge_ray.config.base import Config
from forge_ray.config.curate import Rule
from forge_ray.config.release import DeployConfig
from forge_ray.config.run import RunConfig

INTRO = """# Every setting

Written from the code by `python -m forge_ray.config.reference`; a test fails when it is out of date. Override any of them
with `--set key.path=value`. Unknown keys are errors, never ignored.
"""


def rows(model: type[Config], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type, default, meaning) of every leaf, sections depth first."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        if name == "curate":
            for rule in get_args(get_args(Rule)[0]):
                yield f"{key}.0.rule: {get_args(rule.model_fields['rule'].annotation)[0]}", "", "", _first_line(rule)
                yield from (row for row in rows(rule, f"{key}.0.") if not row[0].endswith(".rule"))
            continue
        section = _section(field.annotation)
        if section:
            inner, between = section
            if int in get_args(field.annotation):  # a plain number, or a section
                yield key, "int, or:", f"`{field.default!r}`", field.description or ""
            yield from rows(inner, f"{key}.{between}")
            continue
        default = "required" if field.default is PydanticUndefined else f"`{field.default!r}`"
        yield key, _type(field.annotation), default, (field.description or "").replace("|", "\\|")


def _first_line(model: type[Config]) -> str:
    return (model.__doc__ or "").splitlines()[0].replace("|", "\\|")


def _section(annotation: Any) -> tuple[type[Config], str] | None:
    """The section behind a field, and what stands between its key and theirs: an item's number, a name of one's own."""
    between = {tuple: "0.", dict: "NAME."}.get(get_origin(annotation), "")
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Config):
            return candidate, between
    return None


def _type(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Literal:
        return " \\| ".join(str(value) for value in get_args(annotation))
    if origin in (Union, types.UnionType):
        return " \\| ".join(_type(part) for part in get_args(annotation))
    if origin is tuple:
        return "list of " + ", ".join(_type(part) for part in get_args(annotation) if part is not Ellipsis)
    if origin is dict:
        return "mapping"
    return {type(None): "null"}.get(annotation, getattr(annotation, "__name__", str(typing.cast(object, annotation))))


def reference() -> str:
    """The whole page."""
    parts = [INTRO]
    for title, model in (("Run file (RUN.yaml)", RunConfig), ("Deployment file (DEPLOY.yaml)", DeployConfig)):
        parts.append(f"\n## {title}\n\n| key | type | default | meaning |\n| --- | --- | --- | --- |\n")
        parts += [f"| `{key}` | {kind} | {default} | {meaning} |\n" for key, kind, default, meaning in rows(model)]
    return "".join(parts)


if __name__ == "__main__":
    print(reference(), end="")
