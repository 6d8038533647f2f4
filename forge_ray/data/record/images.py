"""Images of a chat: taken from a data URI or a file beside the rows, known afterwards by their sha256."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import NamedTuple

from forge_ray.data.read.strict_json import Reject

ReadImage = Callable[[str], bytes]  # a path, relative to the rows' own file, to the file's bytes
DIGEST = "sha256:"


class Images(NamedTuple):
    """How a row's images are read, and the bytes of those that were."""

    read: ReadImage | None
    by_digest: dict[str, bytes]


def image_digest(source: str, images: Images) -> str:
    """Read the image that `source` names (data URI, relative path or, in canonical content, its digest); `sha256:<hex>`."""
    if source.startswith("data:"):
        data = _from_uri(source)
    elif "://" in source:  # nothing leaves the premises, and tomorrow's image may be another
        raise Reject("an image is a remote URL")
    else:
        data = _from_path(source, images.read)
    if not _is_image(data):
        raise Reject("an image is not PNG, JPEG, GIF or WebP")
    digest = DIGEST + hashlib.sha256(data).hexdigest()
    if source.startswith(DIGEST) and source != digest:
        raise Reject("an image differs from its digest")
    images.by_digest[digest] = data
    return digest


def _from_uri(uri: str) -> bytes:
    head, comma, data = uri.partition(",")
    if not comma or not head.endswith(";base64"):
        raise Reject("an image's data URI is not base64")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):  # ValueError: letters that are not ASCII
        raise Reject("an image's data URI is not base64") from None


def _from_path(path: str, read: ReadImage | None) -> bytes:
    pure, windows = PurePosixPath(path), PureWindowsPath(path)
    if pure.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise Reject("an image's path leads out of the folder of its rows")
    if read is None or "\x00" in path:
        raise Reject("an image cannot be read")
    try:
        return read(path)
    except Reject:
        raise
    except Exception as error:  # a disk's or an object store's: the caller's function decides
        raise Reject("an image cannot be read") from error


def _is_image(data: bytes) -> bool:
    return data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a")) or (
        data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    )
