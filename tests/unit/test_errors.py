"""The error tree: stdlib kinds, pickles, texts and exit codes that scripts rely on."""

from __future__ import annotations

import pickle

import pytest

from forge_ray import errors
from forge_ray.errors import ForgeError

pytestmark = pytest.mark.unit

# code, exit code and the stdlib error that each refines: a public surface, so written out
TREE: dict[str, tuple[str, int, type[Exception]]] = {
    "ForgeError": ("error", 1, Exception),
    "ConfigError": ("config", 2, ValueError),
    "DataError": ("data", 1, ValueError),
    "NothingLeft": ("nothing_left", 1, ValueError),
    "EncodersDiffer": ("encoders", 1, RuntimeError),
    "NotFound": ("not_found", 2, LookupError),
    "StoreError": ("store", 1, OSError),
    "ClusterError": ("cluster", 1, RuntimeError),
    "TrainingError": ("training", 1, RuntimeError),
    "EngineError": ("engine", 1, RuntimeError),
    "RequestError": ("request", 2, RuntimeError),
    "PolicyError": ("policy", 3, PermissionError),
}


def test_every_error_class_is_covered() -> None:
    class_names = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, ForgeError)}
    assert class_names == set(TREE)


@pytest.mark.parametrize("name", TREE)
def test_kind_code_and_exit_code(name: str) -> None:
    error_type = getattr(errors, name)
    code, exit_code, stdlib = TREE[name]
    assert (error_type.code, error_type.exit_code) == (code, exit_code)
    assert issubclass(error_type, stdlib)
    assert issubclass(error_type, ForgeError)


@pytest.mark.parametrize("name", TREE)
def test_text_ends_with_the_hint(name: str) -> None:
    error_type = getattr(errors, name)
    assert str(error_type("lr=-1 is negative", hint="use 1e-4")) == "lr=-1 is negative\nhint: use 1e-4"
    assert str(error_type("lr=-1 is negative")) == "lr=-1 is negative"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", TREE)
def test_errors_survive_pickling(name: str, protocol: int) -> None:
    error = getattr(errors, name)("what", hint="how")
    back = pickle.loads(pickle.dumps(error, protocol))
    assert type(back) is type(error)
    assert (back.message, back.hint, str(back)) == ("what", "how", "what\nhint: how")
