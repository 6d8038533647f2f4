"""A file that a command writes for its user: whole or not at all, and never in place of another one unasked."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from forge_ray.errors import ConfigError


def require_new(target: Path, force: bool) -> None:
    """Raise `ConfigError` where the file cannot be written, for it exists or is a folder."""
    if target.is_dir():
        raise ConfigError(f"{target} is a folder", hint="give a file in that folder")
    if os.path.lexists(target) and not force:
        raise ConfigError(f"{target} already exists", hint="give another file, or --force to replace it")


def write_new(target: Path, text: str, force: bool) -> None:
    """Write the text atomically; an existing file is replaced only with `force`."""
    require_new(target, force)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        with partial.open("x", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, target)
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written: {error.strerror}", hint="give a file in a folder that exists and is writable"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
