"""The main function of the scripts in `jobs/`: arguments → config and store → one step of the pipeline → JSON.

A step is a function of `forge_ray.pipeline`. stdout gets exactly one JSON object, its result; messages go to stderr; the
exit code is 0 only on success (see `forge_ray.errors`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, TypeVar

from pydantic import BaseModel

from forge_ray import pipeline
from forge_ray.cli.ends import report
from forge_ray.cli.terminal import echo
from forge_ray.config.base import Config, load
from forge_ray.store.files import Store
from forge_ray.store.home import settle

C = TypeVar("C", bound=Config)


def main(model: type[C], step: Callable[[C, Store], Any], arguments: list[str] | None = None) -> int:
    """Run `step` on the config file and store that the arguments name; returns the exit code."""
    parser = argparse.ArgumentParser(description=(step.__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML file of a run or a deployment")
    parser.add_argument(
        "--store", metavar="URI", help="folder or pyarrow.fs URI of the store (default: FORGE_STORE, else .forge)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides", help="override a setting"
    )
    parsed = parser.parse_args(arguments)
    try:
        settle()
        config = load(model, parsed.config, tuple(parsed.overrides))
        result = step(config, pipeline.open_store(parsed.store))
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
    echo(json.dumps(as_json(result), ensure_ascii=False))
    return 0


def as_json(result: Any) -> dict[str, Any]:
    """The result of a step as one JSON object; several results become `{"results": [...]}`."""
    value = _plain(result)
    return value if isinstance(value, dict) else {"results": value}


def _plain(value: Any) -> Any:
    match value:
        case BaseModel():
            return value.model_dump(mode="json")
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case None | bool() | int() | float() | str():
            return value
        case _ if is_dataclass(value) and not isinstance(value, type):
            return _plain({name: getattr(value, name) for name in value.__dataclass_fields__})
        case _:
            return str(value)
