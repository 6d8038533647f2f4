"""What somebody with write access to a store can do: its audit log with other lines, and every hash right again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from forge_ray.records import canonical_json
from forge_ray.store import audit_log
from forge_ray.store.files import Store


def rechained(store: Store, lines: Sequence[dict[str, Any]]) -> None:
    """The log of a store as these lines, numbered and chained anew, the head too."""
    previous, raw = audit_log.START, []
    for number, line in enumerate(lines, start=1):
        raw.append(canonical_json(line | {"n": number, "previous": previous}))
        previous = audit_log.hash_of(raw[-1])
    store.write(audit_log.LOG, b"".join(line + b"\n" for line in raw))
    store.write(audit_log.HEAD, raw[-1])


def replace_content(store: Store, path: str, content: Any) -> None:
    """A file with other content, in its place and in the log."""
    changed = {"body": content, "sha256": hashlib.sha256(canonical_json(content)).hexdigest()}
    rechained(store, [line | changed if line["path"] == path else line for line in audit_log.read(store)])
    store.write(path, canonical_json(content))
