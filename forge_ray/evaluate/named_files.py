"""Files that settings of `eval` name: read once, where the evaluation is asked for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow.fs as pafs

from forge_ray.errors import ConfigError, NotFound


def read_named(path: str, setting: str, kind: str) -> bytes:
    """The bytes of a local file or a URI; raises `NotFound` or `ConfigError`. `kind`: what the file should be."""
    try:
        if "://" not in path:
            return Path(path).read_bytes()
        filesystem, place = pafs.FileSystem.from_uri(path)
        with filesystem.open_input_stream(place) as stream:
            return bytes(stream.read())
    except FileNotFoundError:
        raise NotFound(
            f"{setting}: {path!r} does not exist", hint="name a file that exists; a path is relative to the current folder"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{setting}: {path!r} cannot be read: {error}", hint=f"give a {kind} file") from None


def sha256_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
